"""A study's work in a process of its own: one run, or the times of all arms. Started by `moe_jax.study`.

    python -m moe_jax.study.child train DIR ARM SEED [CANDIDATE]
    python -m moe_jax.study.child time DIR before|after ROUNDS

Both read the study from DIR/description.json. Exit codes are those of train.py.
"""

import dataclasses
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
DOCUMENTS = "documents.npz"


def main(argv: list[str]) -> int:
    """Does what the arguments say; returns the exit code."""
    absl_flags.FLAGS.mark_as_parsed()  # grain reads flags of its own
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    from moe_jax.study.description import load_description

    kind, workdir, *rest = argv
    _share_compiled(workdir)
    try:
        study, _ = load_description(workdir)
        if kind == "train":
            return train(study, workdir, rest[0], int(rest[1]), *rest[2:])
        return time_arms(study, workdir, rest[0], int(rest[1]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _share_compiled(workdir: str) -> None:
    """Has the runs of a study share what they compile, in DIR/compiled: seeds of an arm differ in no program."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(workdir).absolute() / "compiled"))


def _follow_parent(parent: int) -> None:
    """Asks this process to save and stop once its parent is gone, which could not pass a signal on."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def train(study: Study, workdir: str, name: str, seed: int, candidate: str = "") -> int:
    """Trains a run, or goes on; then scores the validation text of the study's sources into validation.json and documents.npz.

    An arm that scores the runs of another trains nothing: its folder has the scores, log.txt, and failed.json if it failed.

    Args:
      study, workdir, name, seed: the run of an arm.
      candidate: in the grid, of a run that tunes the arm; empty: one that is reported, with the settings of the winner.

    Raises:
      ConfigError: the run that it starts from, or scores, is not finished; or the arm's grid has no winner.
    """
    from moe_jax.data import open_data
    from moe_jax.data.hashing import digest, hash64
    from moe_jax.evaluate import evaluate_sets, finite
    from moe_jax.study.documents import save_documents
    from moe_jax.study.fixed import load_fixed
    from moe_jax.study.plan import run_config, run_folder
    from moe_jax.train.loop import fit
    from moe_jax.train.metrics import write_whole
    from moe_jax.train.restore import load_run

    arm, fixed = study.arm(name), load_fixed(workdir)
    if study.grid and not (candidate or fixed.winner(study, arm)):
        limit = "no candidate of the grid finished with every tuning seed"
        raise ConfigError(f"arm {study.tuned_by(arm).name}", None, limit, "see the logs of its runs in tuning")
    config = run_config(study, arm, seed, workdir, fixed, candidate or None)
    folder = run_folder(workdir, name, seed, candidate)
    if other := study.needs(arm):
        needed = run_folder(workdir, other, seed, candidate and fixed.winner(study, study.arm(other)))
        if not (needed / VALIDATION).exists():
            field = "scores" if arm.scores else "starts_from"
            raise ConfigError(f"arm {name} {field}", other, f"its run of seed {seed} is not finished", f"see {needed}")
    trained = run_folder(workdir, arm.scores, seed) if arm.scores else folder
    if arm.scores:
        folder.mkdir(parents=True, exist_ok=True)
    elif code := fit(config, str(folder)):
        return code
    run = load_run(trained, config)
    data = dataclasses.replace(config.data, sources=study.base.data.sources)
    sets = open_data(data, tokenizer=run.tokenizer, splits=("validation",)).evaluation("validation")
    scores = evaluate_sets(run, sets, show_progress=True, by_document=True)
    save_documents(folder / DOCUMENTS, {source: one.pop("by_document") for source, one in scores.items()})
    for source, one in sets.items():  # `text` does not depend on the tokenizer
        scores[source] |= {"digest": one.digest, "text": digest(*map(hash64, one.texts()))}
    text = json.dumps(finite({"step": run.step, "sources": scores}), indent=1, allow_nan=False)
    write_whole(folder / VALIDATION, text)
    return 0


def time_arms(study: Study, workdir: str, phase: str, rounds: int) -> int:
    """Writes timing_before.json (fresh states) or timing_after.json (last states of the first seed).

    Before training, the steps of arms of equal time are found too, and fixed, where they are not yet.
    """
    from moe_jax.study.fixed import load_fixed, save_fixed
    from moe_jax.study.measure import measure
    from moe_jax.study.plan import run_config
    from moe_jax.train.metrics import write_whole

    seed, workdirs, starts, fixed, equal = study.seeds[0], None, {}, load_fixed(workdir), {}
    configs = {arm.name: run_config(study, arm, seed, workdir, fixed) for arm in study.trained()}
    if phase == "after":
        workdirs = finished_folders(study, workdir)
        configs = {name: config for name, config in configs.items() if name in workdirs}
    else:  # no run is there yet to start from
        starts = {arm.name: own.starts_from for arm in study.trained() if (own := study.defined_by(arm)).starts_from}
        for name in starts:
            setattr(configs[name].init, study.defined_by(study.arm(name)).start, "")
        equal = {arm.name: arm.equal_time_to for arm in study.arms if arm.equal_time_to and not fixed.steps(study, arm)}
    twins = {arm.name: arm.twin_of for arm in study.arms if arm.twin_of}
    identity = timing_fingerprint(study, workdir, phase, rounds)
    result = measure(configs, study.epochs_limit, rounds, workdirs, starts, equal, twins)
    if found := result.pop("equal_time"):
        fixed.equal_time |= found
        save_fixed(workdir, fixed)
    text = json.dumps({"fingerprint": identity} | result, indent=1)
    write_whole(pathlib.Path(workdir) / f"timing_{phase}.json", text)
    return 0


def finished_folders(study: Study, workdir: str) -> dict[str, str]:
    """The folder of each arm's run from the first seed, where it is finished."""
    from moe_jax.study.plan import run_folder

    folders = {arm.name: run_folder(workdir, arm.name, study.seeds[0]) for arm in study.trained()}
    return {name: str(folder) for name, folder in folders.items() if (folder / VALIDATION).exists()}


def timing_fingerprint(study: Study, workdir: str, phase: str, rounds: int) -> str:
    """Identifies what a timing measures: the arms, the runs, the versions and the machine."""
    from moe_jax.config.study import arm_to_dict
    from moe_jax.study.plan import fingerprint
    from moe_jax.study.timing import PACKAGES, place

    arms = [arm_to_dict(arm) for arm in study.trained()]
    runs = sorted(finished_folders(study, workdir)) if phase == "after" else []
    return fingerprint(study.base, arms, study.seeds[0], runs, rounds, place(PACKAGES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
