"""A study's work in a process of its own: one run, or the times of all arms. Started by `moe_jax.study`.

    python -m moe_jax.study.child train DIR ARM SEED
    python -m moe_jax.study.child time DIR before|after ROUNDS

Both read the study from DIR/description.json. Exit codes are those of train.py.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

from absl import flags as absl_flags

from moe_jax.config import ConfigError
from moe_jax.config.study import Study

VALIDATION = "validation.json"


def main(argv: list[str]) -> int:
    """Does what the arguments say; returns the exit code."""
    absl_flags.FLAGS.mark_as_parsed()  # grain reads flags of its own
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    from moe_jax.study.plan import load_description

    kind, workdir, *rest = argv
    try:
        study, _ = load_description(workdir)
        if kind == "train":
            return train(study, workdir, rest[0], int(rest[1]))
        return time_arms(study, workdir, rest[0], int(rest[1]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _follow_parent(parent: int) -> None:
    """Asks this process to save and stop once its parent is gone, which could not pass a signal on."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def train(study: Study, workdir: str, arm: str, seed: int) -> int:
    """Trains a run, or goes on; then scores all of its validation text into validation.json.

    An arm that scores the runs of another trains nothing: its folder has the scores, log.txt, and failed.json if it failed.

    Raises:
      ConfigError: the other's run is not finished.
    """
    from moe_jax.data import open_data
    from moe_jax.evaluate import evaluate_sets, finite
    from moe_jax.study.plan import run_config, run_folder
    from moe_jax.train.loop import fit
    from moe_jax.train.metrics import write_whole
    from moe_jax.train.restore import load_run

    config, folder = run_config(study, study.arm(arm), seed), run_folder(workdir, arm, seed)
    if other := study.arm(arm).scores:
        trained = run_folder(workdir, other, seed)
        if not (trained / VALIDATION).exists():
            raise ConfigError(f"arm {arm} scores", other, f"its run of seed {seed} is not finished", f"see {trained}")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        trained = folder
        if code := fit(config, str(folder)):
            return code
    run = load_run(trained, config)
    sets = open_data(config.data, tokenizer=run.tokenizer, splits=("validation",)).evaluation("validation")
    scores = evaluate_sets(run, sets, show_progress=True)
    for name, one in sets.items():
        scores[name]["digest"] = one.digest
    text = json.dumps(finite({"step": run.step, "sources": scores}), indent=1, allow_nan=False)
    write_whole(folder / VALIDATION, text)
    return 0


def time_arms(study: Study, workdir: str, phase: str, rounds: int) -> int:
    """Writes timing_before.json (fresh states) or timing_after.json (last states of the first seed), unless it is there."""
    from moe_jax.study.measure import measure
    from moe_jax.study.plan import run_config
    from moe_jax.train.metrics import write_whole

    seed = study.seeds[0]
    configs = {arm.name: run_config(study, arm, seed) for arm in study.trained()}
    workdirs = None
    if phase == "after":
        workdirs = finished_folders(study, workdir)
        configs = {name: config for name, config in configs.items() if name in workdirs}
    name = timing_fingerprint(study, workdir, phase, rounds)
    result = measure(configs, study.epochs_limit, rounds, workdirs)
    text = json.dumps({"fingerprint": name} | result, indent=1)
    write_whole(pathlib.Path(workdir) / f"timing_{phase}.json", text)
    return 0


def finished_folders(study: Study, workdir: str) -> dict[str, str]:
    """The folder of each arm's run from the first seed, where it is finished."""
    from moe_jax.study.plan import run_folder

    folders = {arm.name: run_folder(workdir, arm.name, study.seeds[0]) for arm in study.trained()}
    return {name: str(folder) for name, folder in folders.items() if (folder / VALIDATION).exists()}


def timing_fingerprint(study: Study, workdir: str, phase: str, rounds: int) -> str:
    """Identifies what a timing measures: the arms, the runs, the versions and the machine."""
    import dataclasses

    from moe_jax.study.plan import fingerprint
    from moe_jax.study.timing import PACKAGES, place

    arms = [dataclasses.asdict(arm) for arm in study.trained()]
    runs = sorted(finished_folders(study, workdir)) if phase == "after" else []
    return fingerprint(study.base, arms, study.seeds[0], runs, rounds, place(PACKAGES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
