"""What the arms of a study cost: sizes and FLOPs, and step times alone and in turns in one process.

Every arm's whole training state lies in memory at once.
"""

import copy
import sys
import time
from typing import Any

import jax
from absl import logging

from moe_jax.config import Config, ConfigError, to_dict
from moe_jax.data import TextData, Tokenizer, open_data
from moe_jax.models import MODELS
from moe_jax.models.flops import active_parameters, router_flops_per_token, training_flops_per_token
from moe_jax.parallel.mesh import mesh_from_config, start_devices
from moe_jax.parallel.rules import local_rows, put_batch
from moe_jax.study.fixed import equal_steps
from moe_jax.study.plan import fingerprint
from moe_jax.study.timing import environment, interleaved, median
from moe_jax.train.checkpoint import Checkpoints, load_meta, outside
from moe_jax.train.evaluation import batch_count
from moe_jax.train.start import inherited_tokenizer
from moe_jax.train.state import abstract_state, place_state, total_bytes
from moe_jax.train.step import compile_train_step

BATCHES = 4  # different ones that the timed steps take in turn
ALONE = 5  # steps of an arm in a row


class Stepper:
    """Optimizer steps of one arm on real batches, which lie on the devices; each call is one and returns its loss.

    Args:
      config: of the run.
      data: its text.
      workdir: of a finished run, to go on from its checkpoint; empty: from initialisation.
    """

    def __init__(self, config: Config, data: TextData, workdir: str = ""):
        mesh, size = mesh_from_config(config.mesh), config.data.batch_size
        model = MODELS[config.model.name](config.model, data.tokenizer.vocab_size)
        with jax.set_mesh(mesh):
            if workdir:
                with Checkpoints(workdir, read_only=True) as checkpoints:
                    target = abstract_state(model, config, mesh)
                    self.state = checkpoints.restore(target, ignore=outside(target)).state  # such as of a curriculum
            else:
                self.state = place_state(model, config, mesh)
            first, rows = int(self.state["step"]), local_rows(mesh, size)
            self.batches = [put_batch(data.train_batch(config.seed, size, first + i, rows), mesh, size) for i in range(BATCHES)]
            began = time.perf_counter()
            self.step = compile_train_step(model, config, mesh, self.state, self.batches[0])
            self.compile_seconds, self.mesh, self.count = time.perf_counter() - began, mesh, 0

    def __call__(self) -> jax.Array:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, self.batches[self.count % BATCHES])
        self.count += 1
        return metrics["loss"]


def open_texts(configs: dict[str, Config], workdirs: dict[str, str], starts: dict[str, str]) -> dict[str, TextData]:
    """The text of every config by name, opened once where it is the same; the rest of the arguments are those of `measure`."""
    opened, texts = {}, {}

    def text(name: str) -> TextData:
        if name in texts:
            return texts[name]
        config = configs[name]
        # Which tokenizer `init.include` leaves is known once the run has begun; until then its own stands for it.
        if name in starts and not config.init.include:
            tokenizer = text(starts[name]).tokenizer
        else:
            saved = load_meta(workdirs[name])["tokenizer"] if name in workdirs else None
            tokenizer = Tokenizer.from_json(saved) if saved else inherited_tokenizer(config)
        key = fingerprint(to_dict(config.data), tokenizer and tokenizer.to_json())
        if key not in opened:
            opened[key] = open_data(config.data, tokenizer=tokenizer)
        return texts.setdefault(name, opened[key])

    return {name: text(name) for name in configs}


def epochs(config: Config, data: TextData) -> float:
    """Passes over the text of the source that is repeated most."""
    rows = config.train.steps * config.data.batch_size
    weights = {source.name: source.weight for source in config.data.sources if source.weight}
    total = sum(weights.values())
    return max(rows * weight / total / data.report[name]["train"]["rows"] for name, weight in weights.items())


def first_step(config: Config) -> int:
    """The steps of another run that a branch goes on from; 0 of other runs."""
    return config.init.branch_step


def evaluation_batches(config: Config, data: TextData) -> dict[str, int]:
    """Batches that a run evaluates, and those of the whole text at its end alone."""
    t, size = config.train, config.data.batch_size
    sets = data.evaluation("validation").values()
    inside = -(-t.steps // t.eval_every) - first_step(config) // t.eval_every if t.eval_every else 1
    last = sum(batch_count(one, size) for one in sets)
    during = sum(inside * batch_count(one, size, t.eval_batches) for one in sets)
    return {"evaluation_batches": during + last, "last_evaluation_batches": last}


def facts(config: Config, data: TextData) -> dict[str, Any]:
    """Sizes of one arm: steps, the first of them, tokens, epochs, FLOPs a token (training: three times the forward pass),
    parameters, state bytes. Of a branch, the steps and tokens of the other run too.
    """
    vocabulary = data.tokenizer.vocab_size
    model = MODELS[config.model.name](config.model, vocabulary)
    state = abstract_state(model, config, mesh_from_config(config.mesh))
    tokens = config.data.batch_size * config.data.sequence_length
    return {
        "steps": config.train.steps,
        "first_step": first_step(config),
        "tokens_per_step": tokens,
        "tokens": config.train.steps * tokens,
        "epochs": epochs(config, data),
        **evaluation_batches(config, data),
        "training_flops_per_token": training_flops_per_token(config.model, vocabulary, config.data.sequence_length),
        "router_flops_per_token": 3 * router_flops_per_token(config.model),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "active_parameters": active_parameters(config.model, state["params"]),
        "state_bytes": total_bytes(state),
    }


def measure(
    configs: dict[str, Config],
    epochs_limit: float,
    rounds: int,
    workdirs: dict[str, str] | None = None,
    starts: dict[str, str] | None = None,
    equal_time: dict[str, str] | None = None,
    twins: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Facts and step times of every arm.

    Args:
      configs: of one run of each arm, by the arm's name.
      epochs_limit: passes over the text that no arm may exceed.
      rounds: turns of the interleaved times.
      workdirs: of finished runs by arm, whose last state is timed; None: a fresh one.
      starts: arm -> the other one whose parameters and tokenizer its run will begin with.
      equal_time: arm -> the other one whose seconds say how many steps it has.
      twins: A/A arm -> the one whose runs it repeats, with as many steps.

    Returns:
      `environment`, `rounds`, and `arms`: for each the facts, `ms` (median of the interleaved steps), `runs_ms` (all),
      `alone_ms` (median of steps in a row) and `compile_seconds`; where an arm cannot run, `error` instead. `equal_time`: what
      `study.fixed.Fixed` keeps of each of those arms; their facts, and those of their twins, are of these steps.

    Raises:
      ConfigError: too many epochs, a mesh that the devices do not fill, or text that cannot be read.
    """
    start_devices(next(iter(configs.values())).mesh)
    workdirs = workdirs or {}
    texts = open_texts(configs, workdirs, starts or {})
    arms = {name: facts(config, texts[name]) for name, config in configs.items()}
    for name in configs:
        check_epochs(name, arms[name], epochs_limit)
    conditions = environment()
    steppers = {}
    for name, config in configs.items():
        print(f"timing: compiling {name}", file=sys.stderr, flush=True)
        try:
            steppers[name] = Stepper(config, texts[name], workdirs.get(name, ""))
            arms[name]["compile_seconds"] = steppers[name].compile_seconds
        except jax.errors.JaxRuntimeError as error:  # out of memory
            arms[name]["error"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            logging.warning("%s cannot be timed: %s", name, arms[name]["error"])
    for name, stepper in steppers.items():
        times, errors = interleaved({name: stepper}, ALONE, f"{name} alone", minimum=ALONE)
        if errors:
            arms[name]["error"] = errors[name]
        else:
            arms[name]["alone_ms"] = median(times[name])
    timed = {name: stepper for name, stepper in steppers.items() if "error" not in arms[name]}
    times, errors = interleaved(timed, rounds, "in turns", minimum=rounds)
    for name, runs in times.items():
        arms[name] |= {"ms": median(runs), "runs_ms": runs}
    for name, error in errors.items():
        arms[name]["error"] = error
    found = {name: equal_time_of(name, other, arms) for name, other in (equal_time or {}).items()}
    for name in configs:
        if not (equal := found.get((twins or {}).get(name, name))):
            continue
        config = copy.deepcopy(configs[name])
        config.train.steps = equal["steps"]
        arms[name] |= facts(config, texts[name])
        check_epochs(name, arms[name], epochs_limit)
    return {"environment": conditions, "rounds": rounds, "arms": arms, "equal_time": found}


def check_epochs(name: str, arm: dict[str, Any], limit: float) -> None:
    """That an arm does not repeat its text too often.

    Raises:
      ConfigError: it does.
    """
    if arm["epochs"] > limit:
        text = f"{arm['epochs']:.1f} passes over the training text, more than epochs_limit={limit:g}"
        fix = "train fewer steps, on more text, or raise the study's epochs_limit if repetition is the subject"
        raise ConfigError(f"arm {name} config.train.steps", arm["steps"], text, fix)


def equal_time_of(name: str, other: str, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `study.fixed.Fixed` keeps of an arm of equal time, from the facts and times of all.

    Raises:
      ConfigError: one of the two could not be timed.
    """
    for one in (name, other):
        if "error" in arms[one]:
            limit = f"{one} cannot be timed ({arms[one]['error']})"
            raise ConfigError(f"arm {name} equal_time_to", other, limit, "make the arm smaller, or take it out")
    ms, to_ms = arms[name]["ms"], arms[other]["ms"]
    steps = equal_steps(arms[other]["steps"], to_ms, ms)
    return {"to": other, "steps": steps, "ms": ms, "to_ms": to_ms, "seconds": steps * ms / 1e3}
