"""The search over a study's grid: what each candidate of an arm came to, and which one wins."""

import json
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.config.study import Arm, Study
from moe_jax.study.child import VALIDATION
from moe_jax.study.fixed import Fixed
from moe_jax.study.metrics import overall
from moe_jax.study.plan import candidate_settings, run_config, run_folder
from moe_jax.study.runs import FAILED


def decide(study: Study, arm: Arm, workdir, fixed: Fixed) -> dict[str, Any] | None:
    """What `Fixed.tuning` keeps of an arm; None while one of its runs is neither finished nor failed."""
    candidates = {}
    for candidate in study.grid:
        runs = {seed: read_loss(run_folder(workdir, arm.name, seed, candidate)) for seed in study.tuning_seeds}
        if any(run is None for run in runs.values()):
            return None
        losses = {str(seed): run["loss"] for seed, run in runs.items()}
        failures = {str(seed): run["failure"] for seed, run in runs.items() if "failure" in run}
        candidates[candidate] = {"loss": mean_loss(losses), "losses": losses} | ({"failures": failures} if failures else {})
    winner = choose({name: one["loss"] for name, one in candidates.items()})
    settings = {}
    if winner:
        # Of the arm as it is, over which the factors are.
        plain = run_config(study, arm, study.tuning_seeds[0], workdir, fixed, candidate="")
        settings = candidate_settings(study, winner, plain)
    return {"winner": winner, "settings": settings, "candidates": candidates}


def read_loss(folder) -> dict[str, Any] | None:
    """{"loss": nats per token or None} of a finished run, with its "failure" of one that failed; None of another."""
    try:
        return {"loss": overall(json.loads((folder / VALIDATION).read_text())["sources"])[0]}
    except FileNotFoundError:
        pass
    try:
        return {"loss": None, "failure": json.loads((folder / FAILED).read_text())["line"]}
    except FileNotFoundError:
        return None


def mean_loss(losses: Mapping[str, float | None]) -> float | None:
    """The mean over the seeds; None where one has none."""
    values = list(losses.values())
    return None if None in values or not values else math.fsum(values) / len(values)


def choose(losses: Mapping[str, float | None]) -> str:
    """The candidate with the lowest loss, the first of equal ones; "" where none has one."""
    known = {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(known, key=known.get, default="")
