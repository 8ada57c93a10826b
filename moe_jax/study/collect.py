"""From the folder of a study to its result: one dict, written as study.json, that tables and plots are made of."""

import collections
import json
import math
import pathlib
import statistics
from collections.abc import Collection
from typing import Any

from moe_jax.config import ConfigError
from moe_jax.config.study import BRANCH, Arm, Study, study_to_dict
from moe_jax.study.child import VALIDATION
from moe_jax.study.compare import add_tests
from moe_jax.study.curves import Runs, collect_curve, paired, same_tokens
from moe_jax.study.description import load_description
from moe_jax.study.fixed import Fixed, load_fixed
from moe_jax.study.metrics import LOAD, METRICS, worst_layer
from moe_jax.study.plan import has_sources_of_study, run_folder
from moe_jax.study.runs import FAILED
from moe_jax.study.statistics import Interval, first_reached, noise_band, t_interval
from moe_jax.train.metrics import read_metrics


def collect(workdir) -> dict[str, Any]:
    """Everything that a study has measured so far.

    Returns:
      study, scale, command; environment (of the times in the rows); timing {before, after}; target {loss, how}; band: of
      the A/A pairs' mean differences; rows: one per arm; curves: see `collect_curve`; runs: one per arm and seed, with its
      curves; tuning: see `Fixed`, with the arms whose winner is known; counts of runs done, failed and missing. Losses are in
      nats per token; numbers that are not finite are None.

    Raises:
      ConfigError: no study there, a file that cannot be read, or runs that were scored on different text.
    """
    study, about = load_description(workdir)
    sources = [source.name for source in study.base.data.sources]
    timing, fixed = {phase: _timing(workdir, phase) for phase in ("before", "after")}, load_fixed(workdir)

    def read(arm, seed):
        own = sources if has_sources_of_study(study, arm) else ()
        return read_run(run_folder(workdir, arm.name, seed), own, _facts(timing, "before", arm.name))

    runs = {(arm.name, seed): read(arm, seed) for arm in study.arms for seed in study.seeds}
    _check_text(workdir, runs)
    _add_differences(study, runs)
    target = find_target(study, runs)
    aa = {arm.name: twin_interval(study, arm, runs) for arm in study.arms if arm.twin_of}
    band = noise_band([one["interval"] for one in aa.values() if one and not one["identical"]])
    rows = [make_row(study, arm, runs, timing, fixed, aa.get(arm.name)) for arm in study.arms]
    add_tests(study, rows, runs, band, workdir)
    curves = [collect_curve(curve, runs, study.seeds) for curve in study.curves]
    _add_times(rows, runs, target["loss"])
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
        "tuning": fixed.tuning,
    }


def read_run(folder: pathlib.Path, sources: Collection[str], facts: dict[str, Any]) -> dict[str, Any]:
    """One run: state (done, failed, missing), scores of its whole validation text, metrics, curves.

    Args:
      folder: of the run.
      sources: those whose evaluations in training make its `curve`; empty: it has none.
      facts: of its arm, see `measure.facts`; {}: not known.
    """
    scores, failure = _json(folder / VALIDATION), _json(folder / FAILED)
    # Without a code it did not begin, because a run that it needs failed.
    run = {"state": "done" if scores else "failed" if failure and failure["code"] is not None else "missing"}
    if failure and not scores:
        run["failure"] = failure
    rows = read_metrics(folder)
    run["curve"] = validation_curve(rows, sources, scores["sources"] if scores else {})
    training = [row for row in rows if "loss" in row]
    if training:  # what stands in a row of its own after the last step
        late = (row for row in rows if row["step"] == training[-1]["step"])
        training[-1] = training[-1] | {k: v for row in late for k, v in row.items() if k.startswith("router/fluctuation_")}
    run["load_curve"] = [[row["step"], row[f"router/{LOAD}"]] for row in training if f"router/{LOAD}" in row]
    if scores:
        run["sources"] = scores["sources"]
        run |= {name: metric.read(scores["sources"], training) for name, metric in METRICS.items() if metric.read}
        run["worst_layer"] = worst_layer(training)[0]
        run["seconds"] = training_seconds(training, facts) if facts else None
        # To tell two runs that are the same from two that are close.
        run["losses"] = [row["loss"] for row in training]
    return run


def training_seconds(rows: list[dict], facts: dict[str, Any]) -> float | None:
    """The seconds that the steps of a run took, input included, evaluations and checkpoints not; None without any.

    Where a run was interrupted, the steps up to the next row count as long as those that the row was measured on.
    """
    before, total = facts.get("first_step", 0), 0.0
    for row in rows:
        total += (row["step"] - before) * facts["tokens_per_step"] / row["tokens_per_second"]
        before = row["step"]
    return total if rows else None


def _add_differences(study: Study, runs: Runs) -> None:
    """Puts into every run the metrics that are a difference to its baseline's, and takes curves that do not compare out."""
    first = next((run for (name, _), run in runs.items() if name == study.baseline and run["state"] == "done"), None)
    for (name, seed), run in runs.items():
        base = runs[study.baseline_of(study.arm(name)), seed]
        for key, metric in METRICS.items():
            if metric.minus_baseline and run["state"] == base["state"] == "done":
                ours, theirs = (one[metric.minus_baseline] for one in (run, base))
                known = None not in (ours, theirs) and (same_tokens(run, base) or not metric.per_token)
                run[key] = ours - theirs if known else None
        if first and run["state"] == "done" and not same_tokens(run, first):
            run["curve"] = []  # of other tokens than the baseline's


def validation_curve(rows: list[dict], sources: Collection[str], scores: dict[str, dict]) -> list[list[float]]:
    """[step, loss] of the evaluations of `sources` in training.

    Sources count by the tokens of their whole validation text; equally before a run is done, when that is not known.
    """
    curve = []
    for row in rows:
        keys = {name: f"eval/{name}/loss" for name in sources}
        losses = {name: row[key] for name, key in keys.items() if key in row}
        if losses and None not in losses.values():
            weights = {name: scores.get(name, {}).get("tokens", 1) for name in losses}
            total = math.fsum(weights[name] * loss for name, loss in losses.items())
            curve.append([row["step"], total / sum(weights.values())])
    return curve


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


def make_row(study: Study, arm: Arm, runs: Runs, timing: dict, fixed: Fixed, aa: dict | None) -> dict[str, Any]:
    """The row of one arm, without its tests and its time to the target."""
    done = [run for (name, _), run in runs.items() if name == arm.name and run["state"] == "done"]
    states = collections.Counter(run["state"] for (name, _), run in runs.items() if name == arm.name)
    baseline = study.baseline_of(arm)
    row = {"arm": arm.name, "twin_of": arm.twin_of, "scores": arm.scores, "baseline": baseline}
    row["own_sources"] = not has_sources_of_study(study, arm)
    row["runs"] = len(done)
    row |= {state: states[state] for state in ("failed", "missing")}
    for key, metric in METRICS.items():
        values = [run[key] for run in done if run.get(key) is not None]
        row[key] = t_interval(values) if metric.interval else statistics.fmean(values) if values else None
        if metric.minus_baseline and arm.name == baseline:
            row[key] = None
    worst = collections.Counter(run["worst_layer"] for run in done if run["worst_layer"])
    row["worst_layer"] = worst.most_common(1)[0][0] if worst else None
    row["sources"] = {
        name: {
            "loss": _mean([run["sources"][name]["loss"] for run in done]),
            "bits_per_byte": _mean([run["sources"][name]["bits_per_byte"] for run in done]),
            "difference": source_difference(study, arm, runs, name),
        }
        for name in dict.fromkeys(name for run in done for name in run["sources"])
    }
    if arm.twin_of:
        row["aa"] = aa
    row["seconds"] = t_interval([run["seconds"] for run in done if run.get("seconds") is not None])
    row["equal_time"] = fixed.equal_time.get(arm.name)
    row["winner"] = fixed.winner(study, arm)
    return row | _costs(study, arm, timing) | _start(study, arm, timing)


def source_difference(study: Study, arm: Arm, runs: Runs, source: str) -> Interval | None:
    """The paired difference of one source's loss to the arm's baseline; None of a baseline."""
    baseline = study.baseline_of(arm)
    if arm.name == baseline:
        return None
    return paired(runs, study.seeds, arm.name, baseline, lambda run: run["sources"][source]["loss"], per_token=True)


def _costs(study: Study, arm: Arm, timing: dict) -> dict[str, Any]:
    """Sizes, FLOPs and times; those of the trained arms where they are measured, which the row says."""
    trained = arm.scores or arm.name
    facts = _facts(timing, "before", trained)
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
    phase = "after" if "ms" in _facts(timing, "after", trained) else "before"
    ms, base = (_facts(timing, phase, name).get("ms") for name in (trained, study.baseline))
    return costs | {
        "timed": phase if ms else None,
        "predicted_seconds": (facts["steps"] - facts.get("first_step", 0)) * facts["ms"] / 1e3 if "ms" in facts else None,
        "ms": ms,
        "ratio": ms / base if ms and base else None,
        "tokens_per_second": 1e3 * facts["tokens_per_step"] / ms if ms and facts else None,
    }


def _facts(timing: dict, phase: str, arm: str) -> dict[str, Any]:
    """What a timing has of an arm; {} where there is none."""
    return (timing[phase] or {"arms": {}})["arms"].get(arm, {})


def _start(study: Study, arm: Arm, timing: dict) -> dict[str, Any]:
    """The arm that a row starts from, and what the training of all runs before its own has cost, which no other number has.

    A branch's own numbers count the steps that it takes over from its trunk.
    """
    chain = study.ancestors(arm)
    trunks = [study.defined_by(one).start == BRANCH for one in [arm, *chain]]
    costs = [_costs(study, one, timing) for one, taken_over in zip(chain, trunks) if not taken_over]
    known = costs if all(one["ms"] and one["tokens"] for one in costs) else []
    cost = {
        "tokens": sum(one["tokens"] for one in known),
        "flops": sum(one["tokens"] * one["training_flops_per_token"] for one in known),
        "seconds": sum(one["steps"] * one["ms"] / 1e3 for one in known),
    }
    return {
        "starts_from": chain[0].name if chain else "",
        "branch_step": _facts(timing, "before", arm.scores or arm.name).get("first_step", 0) if chain and trunks[0] else 0,
        "start_cost": cost if known else None,
    }


def _add_times(rows: list[dict], runs: Runs, target: float | None) -> None:
    """Puts `time` into every row: training seconds to the target with interval, how many seeds reach it, and rank.

    Ranked are the arms that reach it with every seed, failed ones too; an A/A arm is not, and neither is one that starts from
    another's run, whose seconds are not all there were.
    """
    for row in rows:
        done = [run for (name, _), run in runs.items() if name == row["arm"] and run["state"] == "done"]
        steps = [first_reached(*zip(*run["curve"]), target) for run in done if run["curve"] and target is not None]
        reached = [step for step in steps if step is not None]
        # What scores the runs of another has no curve of training, and no curve of other text or tokens compares.
        none = row["scores"] or row["own_sources"] or (done and not any(run["curve"] for run in done))
        of = 0 if none else row["runs"] + row["failed"]
        row["time"] = {"reached": len(reached), "of": of, "rank": None, "steps": t_interval(reached)}
        row["time"]["seconds"] = t_interval([s * row["ms"] / 1e3 for s in reached]) if row["ms"] else None
    whole = [row for row in rows if not row["twin_of"] and not row["starts_from"]]
    ranked = [row for row in whole if row["time"]["seconds"] and row["time"]["reached"] == row["time"]["of"]]
    for rank, row in enumerate(sorted(ranked, key=lambda row: row["time"]["seconds"].mean), 1):
        row["time"]["rank"] = rank


def _check_text(workdir, runs: Runs) -> None:
    """That all runs were scored on the same text, by whichever tokens."""
    seen = {}
    for (arm, seed), run in runs.items():
        for name, source in run.get("sources", {}).items():
            first, *other = seen.setdefault(name, (source, arm, seed))
            same = first["digest"] == source["digest"] or source.get("text", 0) == first.get("text")
            if not same:
                limit = f"{arm} seed {seed} was scored on other text of {name} than {other[0]} seed {other[1]}"
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
