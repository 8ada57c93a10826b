"""What the differences of a study say: tests over seeds, Holm's correction, margins, and a bootstrap over documents."""

import functools
from collections.abc import Callable
from typing import Any

from moe_jax.config.study import Study
from moe_jax.study.child import DOCUMENTS
from moe_jax.study.curves import Runs
from moe_jax.study.documents import Documents, bootstrap_difference, load_documents
from moe_jax.study.plan import run_folder
from moe_jax.study.statistics import Interval, holm, p_value, verdict


def add_tests(study: Study, rows: list[dict[str, Any]], runs: Runs, band: float | None, workdir) -> None:
    """Puts into every row `p`, `p_adjusted`, `margin`, `over_documents` and `verdict`.

    The study's primary comparison is tested alone; the others are one family, and their claims to be at least as good as a
    baseline are another. Baselines and A/A arms are not tested.
    """
    compared = [row for row in rows if row["arm"] != row["baseline"] and not row["twin_of"]]
    # A baseline's are those of every arm that is compared with it.
    load = functools.cache(lambda arm, seed: load_documents(run_folder(workdir, arm, seed) / DOCUMENTS))
    for row in rows:
        row |= dict.fromkeys(("p", "p_adjusted", "margin", "over_documents"))
        row["primary"] = row["arm"] == study.primary
    for row in compared:
        values = seed_differences(study, row, runs)
        row["p"] = p_value(values)
        if margin := study.margin_of(study.arm(row["arm"])):
            row["margin"] = {"value": margin, "p": p_value(values, margin)}
        row["over_documents"] = over_documents(study, row, runs, load)
    for family in ([row for row in compared if row["primary"]], [row for row in compared if not row["primary"]]):
        for row, adjusted in zip(family, holm([row["p"] for row in family])):
            row["p_adjusted"] = adjusted
        claims = [row["margin"] for row in family if row["margin"]]
        for claim, adjusted in zip(claims, holm([claim["p"] for claim in claims])):
            claim["p_adjusted"] = adjusted
    for row in rows:
        row["verdict"] = judge(row, band)


def judge(row: dict[str, Any], band: float | None) -> str:
    """The verdict of a row."""
    if row["twin_of"]:
        return "no noise: identical" if row["aa"] and row["aa"]["identical"] else "A/A"
    if row["arm"] == row["baseline"]:
        return "baseline"
    # Where the tokens are others, bits per byte compare; the A/A band is in nats per token.
    difference, band = (row["difference"], band) if row["difference"] else (row["bits_difference"], None)
    claim = row["margin"] or {}
    return verdict(difference, band, row["p_adjusted"], claim.get("value"), claim.get("p_adjusted"))


def seed_differences(study: Study, row: dict[str, Any], runs: Runs) -> list[float]:
    """By seed, what the row's difference is the mean of."""
    metric = "difference" if row["difference"] else "bits_difference"
    values = [runs[row["arm"], seed].get(metric) for seed in study.seeds]
    return [value for value in values if value is not None]


def over_documents(
    study: Study, row: dict[str, Any], runs: Runs, load: Callable[[str, int], Documents | None]
) -> Interval | None:
    """The row's difference with its interval over documents, for the seeds that both arms have; None without their scores.

    load: (arm, seed) -> the documents of that run.
    """
    pairs = []
    for seed in study.seeds:
        names = row["arm"], row["baseline"]
        if all(runs[name, seed]["state"] == "done" for name in names):
            ours, theirs = (load(name, seed) for name in names)
            if ours and theirs and len(ours.nats) == len(theirs.nats):
                pairs.append((ours, theirs))
    return bootstrap_difference(pairs, "tokens" if row["difference"] else "bytes")
