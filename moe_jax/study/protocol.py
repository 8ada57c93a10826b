"""The parts of a study's tables that its protocol adds: the primary comparison, tuning, equal time, tests."""

from collections.abc import Callable
from typing import Any

from moe_jax.study.statistics import CONFIDENCE

PERCENT = f"{100 * CONFIDENCE:.0f} %"


def primary(rows: list[dict], differs: Callable[[dict], str]) -> str:
    """The line of the primary comparison; empty without one."""
    row = next((row for row in rows if row.get("primary")), None)
    if row is None:
        return ""
    p = "" if row["p"] is None else f", p = {p_text(row['p'])}"
    return f"**Primary comparison, {row['arm']} - {row['baseline']}: {differs(row)}{p}: {row['verdict']}.**"


def tested(rows: list[dict]) -> bool:
    """Whether rows have tests; those of older results have none."""
    return any(row.get("p_adjusted") is not None for row in rows)


def by_document(rows: list[dict]) -> bool:
    """Whether rows have intervals over documents."""
    return any(row.get("over_documents") for row in rows)


def timed_equally(rows: list[dict]) -> bool:
    """Whether some arm has the seconds of another."""
    return any(row.get("equal_time") for row in rows)


def p_text(p: float | None) -> str:
    """'0.013', or '<0.001'."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def seconds(row: dict[str, Any]) -> str:
    """'430 in 97.1 s (96.0 predicted)': the steps of a row and what they took; as the time of which arm, if it is equal."""
    if not row["steps"]:
        return "-"
    took = f" in {row['seconds']['mean']:.1f} s" if row.get("seconds") else ""
    equal = row.get("equal_time")  # whose prediction is the one that gave the steps, whenever times were taken again
    expected = equal["seconds"] if equal else row.get("predicted_seconds")
    text = f"{row['steps']}{took}" + ("" if expected is None else f" ({expected:.1f} predicted)")
    return f"{text}, the time of {equal['to']}" if equal else text


def tuning(result: dict[str, Any], table: Callable[[list[str], list[list[str]]], str]) -> str:
    """The table of the grid: each arm's mean loss with each candidate, the winner bold; empty without one."""
    grid, arms = result["study"].get("grid"), result.get("tuning") or {}
    if not grid:
        return ""
    searched = [arm for arm in result["study"]["arms"] if not (arm["twin_of"] or arm["scores"] or arm["tuned_as"])]
    missing = [arm["name"] for arm in searched if arm["name"] not in arms]

    def cell(arm, name):
        loss = arm["candidates"][name]["loss"]
        text = "failed" if loss is None else f"{loss:.4f}"
        return f"**{text}**" if name == arm["winner"] else text

    body = [[name, *(cell(arm, one) for one in grid)] for name, arm in arms.items()]
    seeds = ", ".join(map(str, result["study"]["tuning_seeds"]))
    failures = [
        f"{name} {one} seed {seed}: {line}."
        for name, arm in arms.items()
        for one, candidate in arm["candidates"].items()
        for seed, line in candidate.get("failures", {}).items()
    ]
    title = f"**Tuning**: mean validation loss over seeds {seeds}, which are not reported; bold: the settings of all other runs"
    without = f"**Without a winner yet: {', '.join(missing)}.**" if missing else ""
    return "\n\n".join(filter(None, [title, table(["arm", *grid], body), without, " ".join([describe(grid), *failures])]))


def describe(grid: dict[str, dict[str, Any]]) -> str:
    """'Candidates, over the settings of each arm. half: optimizer.learning_rate x 0.5.'"""

    def one(path, value):
        return f"{path} x {value['factor']:g}" if isinstance(value, dict) else f"{path}={value}"

    texts = [f"{name}: {', '.join(one(*item) for item in settings.items()) or 'as it is'}." for name, settings in grid.items()]
    return " ".join(["Candidates, over the settings of each arm.", *texts])


def notes(rows: list[dict]) -> list[str]:
    """What the columns of the protocol mean."""
    texts = []
    if tested(rows):
        family = [row for row in rows if row["arm"] != row["baseline"] and not row["twin_of"] and not row["primary"]]
        alone = "; the primary comparison is tested alone" if any(row["primary"] for row in rows) else ""
        texts.append(
            f"p: of the paired t-test over seeds, by Holm's correction for {len(family)} comparisons{alone}; resolved: p below "
            f"{1 - CONFIDENCE:.2f}."
        )
    if any(row.get("margin") for row in rows):
        texts.append(
            f"At least as good: the upper end of the {PERCENT} interval is below the margin, which was named beforehand; "
            "corrected in the same way for all such claims."
        )
    if by_document(rows):
        texts.append(
            f"Over documents: the same difference, seeds averaged, with the {PERCENT} percentile interval of a bootstrap over "
            "the documents of the validation text."
        )
    if timed_equally(rows):
        texts.append(
            "Steps: of an arm with the time of another, as many as take that one's seconds by the times before training, "
            "with a schedule of their own; in how many seconds: of the runs, evaluations and checkpoints excluded."
        )
    return texts
