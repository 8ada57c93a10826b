"""From the folder of a study to its result: one dict, written as study.json, that tables and plots are made of."""

import collections
import json
import math
import pathlib
import statistics
from typing import Any

from moe_jax.config import ConfigError
from moe_jax.config.study import METRICS, Arm, Study, study_to_dict
from moe_jax.study.child import VALIDATION
from moe_jax.study.curves import Runs, collect_curve, paired
from moe_jax.study.plan import load_description, run_folder
from moe_jax.study.runs import FAILED
from moe_jax.study.statistics import Interval, first_reached, noise_band, t_interval, verdict
from moe_jax.train.metrics import read_metrics

LAST_PART = 0.75  # of training: routing is averaged over the steps after it
LOAD = "load_max_over_mean"
USE = tuple(name for name in METRICS if name != "loss")  # of one-neuron experts, over the whole validation text of each source


def collect(workdir) -> dict[str, Any]:
    """Everything that a study has measured so far.

    Returns:
      study, scale, command; environment (of the times in the rows); timing {before, after}; target {loss, how}; band: of
      the A/A pairs' mean differences; rows: one per arm; curves: see `collect_curve`; runs: one per arm and seed, with its
      curves; counts of runs done, failed and missing. Losses are in nats per token; numbers that are not finite are None.

    Raises:
      ConfigError: no study there, a file that cannot be read, or runs that were scored on different text.
    """
    study, about = load_description(workdir)
    runs = {(arm.name, seed): read_run(run_folder(workdir, arm.name, seed)) for arm in study.arms for seed in study.seeds}
    _check_text(workdir, runs)
    timing = {phase: _timing(workdir, phase) for phase in ("before", "after")}
    target = find_target(study, runs)
    aa = {arm.name: twin_interval(study, arm, runs) for arm in study.arms if arm.twin_of}
    band = noise_band([one["interval"] for one in aa.values() if one and not one["identical"]])
    rows = [make_row(study, arm, runs, timing, band, aa.get(arm.name)) for arm in study.arms]
    curves = [collect_curve(curve, runs, study.seeds) for curve in study.curves]
    _add_times(rows, study, runs, target["loss"])
    states = collections.Counter(run["state"] for run in runs.values())
    conditions = next((t["environment"] for t in (timing["after"], timing["before"]) if t), None)
    return {
        "benchmark": "study",
        **about,
        "study": study_to_dict(study),
        "environment": conditions,
        "counts": {"runs": len(runs), **{state: states[state] for state in ("done", "failed", "missing")}},
        "target": target,
        "band": band,
        "rows": _plain(rows),
        "curves": _plain(curves),
        "runs": [{"arm": arm, "seed": seed, **run} for (arm, seed), run in runs.items()],
        "timing": timing,
    }


def read_run(folder: pathlib.Path) -> dict[str, Any]:
    """One run: state (done, failed, missing), scores of its whole validation text, curves, and its routing."""
    scores, failure = _json(folder / VALIDATION), _json(folder / FAILED)
    run = {"state": "done" if scores else "failed" if failure else "missing"}
    if failure and not scores:
        run["failure"] = failure
    rows = read_metrics(folder)
    run["curve"] = validation_curve(rows, scores["sources"] if scores else {})
    training = [row for row in rows if "loss" in row]
    run["load_curve"] = [[row["step"], row[f"router/{LOAD}"]] for row in training if f"router/{LOAD}" in row]
    if scores:
        run["sources"] = scores["sources"]
        run["loss"], run["bits_per_byte"] = overall(scores["sources"])
        run |= routing(training)
        run |= {name: over_sources(scores["sources"], f"router/{name}") for name in USE}
        run["skipped"] = training[-1]["skipped"] if training else None
        # To tell two runs that are the same from two that are close.
        run["losses"] = [row["loss"] for row in training]
    return run


def overall(sources: dict[str, dict[str, Any]]) -> tuple[float | None, float | None]:
    """(nats per token, bits per byte) over the text of all sources together."""
    if any(source["loss"] is None for source in sources.values()):
        return None, None
    nats = math.fsum(source["loss"] * source["tokens"] for source in sources.values())
    tokens, size = (sum(source[key] for source in sources.values()) for key in ("tokens", "bytes"))
    return nats / tokens, nats / math.log(2) / max(size, 1)


def over_sources(sources: dict[str, dict[str, Any]], key: str) -> float | None:
    """A score's mean over the sources by their tokens; None where one has none. Of `USE` it is not that of all text together."""
    values = [(source.get(key), source["tokens"]) for source in sources.values()]
    if any(value is None for value, _ in values):
        return None
    return math.fsum(value * tokens for value, tokens in values) / sum(tokens for _, tokens in values)


def validation_curve(rows: list[dict], scores: dict[str, dict]) -> list[list[float]]:
    """[step, loss] of the evaluations in training.

    Sources count by the tokens of their whole validation text; equally before a run is done, when that is not known.
    """
    curve = []
    for row in rows:
        losses = {k.split("/")[1]: v for k, v in row.items() if k.startswith("eval/") and k.endswith("/loss")}
        if losses and None not in losses.values():
            weights = {name: scores.get(name, {}).get("tokens", 1) for name in losses}
            total = math.fsum(weights[name] * loss for name, loss in losses.items())
            curve.append([row["step"], total / sum(weights.values())])
    return curve


def routing(training: list[dict[str, Any]]) -> dict[str, Any]:
    """Load, dead experts, dropped and entropy as means over the last quarter of the logged steps; {} without routers.

    `load` is the mean over layers, `load_worst` that of the layer where it is highest, `worst_layer`.
    """
    last = training[-1]["step"] if training else 0
    rows = [row for row in training if row["step"] > LAST_PART * last and f"router/{LOAD}" in row]
    if not rows:
        return {}

    def mean(name):
        values = [row[name] for row in rows if row.get(name) is not None]
        return statistics.fmean(values) if values else None

    layers = {n.split("/")[1]: mean(n) for n in rows[-1] if n.count("/") == 2 and n.endswith(f"/{LOAD}")}
    worst = max(layers, key=layers.get)
    return {
        "load": mean(f"router/{LOAD}"),
        "load_worst": layers[worst],
        "worst_layer": worst,
        **{name: mean(f"router/{name}") for name in ("dead_experts", "dropped", "entropy")},
    }


def find_target(study: Study, runs: Runs) -> dict[str, Any]:
    """The loss whose time is compared, and where it comes from."""
    if study.target_loss:
        return {"loss": study.target_loss, "how": "set by the study"}
    last = [
        run["curve"][-1][1]
        for (arm, _), run in runs.items()
        if arm == study.baseline and run["state"] == "done" and run["curve"]
    ]
    how = f"the highest last validation loss in training among the runs of {study.baseline}"
    return {"loss": max(last, default=None), "how": how}


def twin_interval(study: Study, twin: Arm, runs: Runs) -> dict[str, Any] | None:
    """An A/A pair: the interval of twin - original, and whether all their numbers are the same; None without a pair."""
    pairs = [(runs[twin.name, seed], runs[twin.twin_of, seed]) for seed in study.seeds]
    pairs = [(a, b) for a, b in pairs if a.get("loss") is not None and b.get("loss") is not None]
    if not pairs:
        return None
    same = all(a["losses"] == b["losses"] and a["loss"] == b["loss"] for a, b in pairs)
    return {"interval": t_interval([a["loss"] - b["loss"] for a, b in pairs]), "identical": same}


def make_row(study: Study, arm: Arm, runs: Runs, timing: dict, band: float | None, aa: dict | None) -> dict[str, Any]:
    """The row of one arm, without its time to the target."""
    done = [run for (name, _), run in runs.items() if name == arm.name and run["state"] == "done"]
    states = collections.Counter(run["state"] for (name, _), run in runs.items() if name == arm.name)
    row = {"arm": arm.name, "twin_of": arm.twin_of, "scores": arm.scores, "baseline": study.baseline_of(arm)}
    row["runs"] = len(done)
    row |= {state: states[state] for state in ("failed", "missing")}
    for key in (
        "loss",
        "bits_per_byte",
        "load",
        "load_worst",
        "dead_experts",
        "dropped",
        "entropy",
        "skipped",
    ):
        row[key] = _mean([run.get(key) for run in done])
    for key in USE:
        row[key] = t_interval([run[key] for run in done if run.get(key) is not None])
    worst = collections.Counter(run["worst_layer"] for run in done if "worst_layer" in run)
    row["worst_layer"] = worst.most_common(1)[0][0] if worst else None
    names = list(dict.fromkeys(name for run in done for name in run["sources"]))
    row["sources"] = {
        name: {
            "loss": _mean([run["sources"][name]["loss"] for run in done]),
            "bits_per_byte": _mean([run["sources"][name]["bits_per_byte"] for run in done]),
            "difference": difference(study, arm, runs, lambda run: run["sources"][name]["loss"]),
        }
        for name in names
    }
    row["difference"] = difference(study, arm, runs, lambda run: run["loss"])
    row["verdict"] = "baseline" if arm.name == study.baseline_of(arm) else verdict(row["difference"], band)
    if arm.twin_of:
        row["aa"] = aa
        row["verdict"] = "no noise: identical" if aa and aa["identical"] else "A/A"
    return row | _costs(study, arm, timing)


def difference(study: Study, arm: Arm, runs: Runs, value) -> Interval | None:
    """The paired difference to the arm's baseline over the seeds that both have finished; None of a baseline."""
    baseline = study.baseline_of(arm)
    return None if arm.name == baseline else paired(runs, study.seeds, arm.name, baseline, value)


def _costs(study: Study, arm: Arm, timing: dict) -> dict[str, Any]:
    """Sizes, FLOPs and times; those of the trained arms where they are measured, which the row says."""
    trained = arm.scores or arm.name
    facts = (timing["before"] or {"arms": {}})["arms"].get(trained, {})
    names = (
        "steps",
        "tokens",
        "epochs",
        "training_flops_per_token",
        "router_flops_per_token",
        "parameters",
        "active_parameters",
        "tokens_per_step",
    )
    costs = {name: facts.get(name) for name in names}
    phase = "after" if timing["after"] and "ms" in timing["after"]["arms"].get(trained, {}) else "before"
    arms = (timing[phase] or {"arms": {}})["arms"]
    ms, base = (arms.get(name, {}).get("ms") for name in (trained, study.baseline))
    return costs | {
        "timed": phase if ms else None,
        "ms": ms,
        "ratio": ms / base if ms and base else None,
        "tokens_per_second": 1e3 * facts["tokens_per_step"] / ms if ms and facts else None,
    }


def _add_times(rows: list[dict], study: Study, runs: Runs, target: float | None) -> None:
    """Puts `time` into every row: training seconds to the target with interval, how many seeds reach it, and rank.

    Ranked are the arms that reach it with every seed, failed ones too; an A/A arm is not.
    """
    for row in rows:
        done = [run for (name, _), run in runs.items() if name == row["arm"] and run["state"] == "done"]
        steps = [first_reached(*zip(*run["curve"]), target) for run in done if run["curve"] and target is not None]
        reached = [step for step in steps if step is not None]
        # What scores the runs of another has no curve of training.
        of = 0 if row["scores"] else row["runs"] + row["failed"]
        row["time"] = {"reached": len(reached), "of": of, "rank": None, "steps": t_interval(reached)}
        row["time"]["seconds"] = t_interval([s * row["ms"] / 1e3 for s in reached]) if row["ms"] else None
    ranked = [
        row for row in rows if row["time"]["seconds"] and row["time"]["reached"] == row["time"]["of"] and not row["twin_of"]
    ]
    for rank, row in enumerate(sorted(ranked, key=lambda row: row["time"]["seconds"].mean), 1):
        row["time"]["rank"] = rank


def _check_text(workdir, runs: Runs) -> None:
    """That all runs were scored on the same text with the same tokens."""
    seen = {}
    for (arm, seed), run in runs.items():
        for name, source in run.get("sources", {}).items():
            first = seen.setdefault(name, (source["digest"], arm, seed))
            if first[0] != source["digest"]:
                limit = f"{arm} seed {seed} was scored on other text of {name} than {first[1]} seed {first[2]}"
                fix = "put the text back and delete the folders of those runs, or start another study"
                raise ConfigError("--workdir", str(workdir), limit, fix)


def _timing(workdir, phase: str) -> dict[str, Any] | None:
    return _json(pathlib.Path(workdir) / f"timing_{phase}.json")


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError("--workdir", str(path.parent), f"{path.name}: {error}", "delete the file") from None


def _mean(values: list) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def _plain(tree: Any) -> Any:
    """Intervals as dicts."""
    if isinstance(tree, Interval):
        return tree._asdict()
    if isinstance(tree, list):
        return [_plain(value) for value in tree]
    return {name: _plain(value) for name, value in tree.items()} if isinstance(tree, dict) else tree
