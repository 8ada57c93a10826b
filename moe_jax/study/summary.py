"""Tables of a study, as Markdown, from what `collect` returns."""

import shlex
from collections.abc import Sequence
from typing import Any

from moe_jax.study.plan import flag
from moe_jax.study.statistics import CONFIDENCE
from moe_jax.study.timing import conditions

NONE = "-"
# Of a curve: what it is called, and how it is printed: times, format, unit.
METRICS = {
    "loss": ("loss", 1, ".4f", ""),
    "usage": ("experts used", 100, ".1f", " %"),
    "unevenness": ("unevenness, nats", 1, ".3f", ""),
}


def to_markdown(result: dict[str, Any], pictures: Sequence[str] = ()) -> str:
    """The whole of study.md."""
    title = result["study"]["title"] or "Study"
    parts = [f"# {title}", tables(result), *(f"![{name}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def tables(result: dict[str, Any]) -> str:
    """Conditions, the two tables and their notes; also for a README."""
    counts, study = result["counts"], result["study"]
    parts = [header(result)]
    if counts["missing"] or counts["failed"]:
        missing = f"**{counts['missing']} of {counts['runs']} runs are missing, {counts['failed']} failed.**"
        failed = [f"{r['arm']} seed {r['seed']}: {r['failure']['line']}" for r in result["runs"] if "failure" in r]
        parts.append(" ".join([missing, *failed]))
    rows = result["rows"]
    parts += [quality(result, rows), routing(rows), *map(curve, result.get("curves", ()))]
    parts.append(notes(result, study))
    return "\n\n".join(parts)


def header(result: dict[str, Any]) -> str:
    """On what, when, and the command that gives every number again."""
    study = result["study"]
    tokens = sorted({row["tokens"] for row in result["rows"] if row["tokens"]})
    size = ""
    if tokens:
        epochs = max(row["epochs"] for row in result["rows"] if row["epochs"])
        size = f" {' or '.join(f'{n:,}' for n in tokens)} tokens a run, {epochs:.2f} epochs{' at most' * (len(tokens) > 1)}."
    where = f" {conditions(result['environment'])}." if result["environment"] else ""
    seeds = ", ".join(map(str, study["seeds"]))
    return (
        f"`{result['command']}`, scale {result['scale']}, seeds {seeds}.{size}{where} The same command gives "
        f"every number again; a run's loss: `{evaluate('ARM', {})}`."
    )


def evaluate(arm: str, settings: dict[str, Any]) -> str:
    """The command that scores a run of an arm, with settings over its own."""
    command = ["python", "-m", "moe_jax.evaluate", f"--workdir=DIR/runs/{arm}/seed_N", "--split=validation"]
    return shlex.join(command + [flag(path, value) for path, value in settings.items()])


def quality(result: dict[str, Any], rows: list[dict]) -> str:
    """Loss, its difference, speed and time to the target."""
    study = result["study"]
    sources = list(dict.fromkeys(name for row in rows for name in row["sources"]))
    per_source = [f"loss, {name}" for name in sources] if len(sources) > 1 else []
    target = result["target"]["loss"]
    reach = f"s to loss {target:.4f} (rank)" if target is not None else "s to the target (rank)"
    percent = f"{100 * CONFIDENCE:.0f} %"
    titles = [
        "arm",
        "seeds",
        "loss",
        *per_source,
        f"difference [{percent}]",
        "",
        "bits per byte",
        "ms per step (ratio)",
        "tokens per s",
        reach,
    ]
    body = []
    for row in rows:
        extra = [number(row["sources"].get(name, {}).get("loss"), ".4f") for name in sources] if per_source else []
        ms = NONE if row["ms"] is None else f"{row['ms']:.1f}" + (f" ({row['ratio']:.2f})" if row["ratio"] else "")
        body.append(
            [
                row["arm"],
                str(row["runs"]),
                number(row["loss"], ".4f"),
                *extra,
                differs(row, study),
                judged(row),
                number(row["bits_per_byte"], ".4f"),
                ms,
                number(row["tokens_per_second"], ",.0f"),
                reached(row["time"]),
            ]
        )
    return table(titles, body)


def routing(rows: list[dict]) -> str:
    """Sizes, FLOPs and what the routers did."""
    titles = [
        "arm",
        "parameters, M",
        "active, M",
        "MFLOP a token",
        "of them routers",
        "load max/mean",
        "worst layer",
        "dead experts",
        "dropped",
        "entropy, nats",
        "skipped steps",
    ]
    retrieves = any(row.get("usage") for row in rows)
    titles += ["usage", "unevenness, nats"] if retrieves else []
    body = []
    for row in rows:
        mega = [number(row[k] and row[k] / 1e6, ".3f") for k in ("parameters", "active_parameters")]
        flops = [number(row["training_flops_per_token"] and row["training_flops_per_token"] / 1e6, ".2f")]
        routers = row["router_flops_per_token"]
        flops.append(number(routers / 1e6 if routers else None, ".3f"))
        worst = NONE if row["load_worst"] is None else f"{row['load_worst']:.2f} ({row['worst_layer']})"
        body.append(
            [
                row["arm"],
                *mega,
                *flops,
                number(row["load"], ".2f"),
                worst,
                number(row["dead_experts"], ".1f"),
                NONE if row["dropped"] is None else f"{100 * row['dropped']:.2f} %",
                number(row["entropy"], ".2f"),
                number(row["skipped"], ".1f"),
                *((interval(scaled(row["usage"], 100), ".1f", " %"), interval(row["unevenness"], ".3f")) if retrieves else ()),
            ]
        )
    return table(titles, body)


def curve(one: dict[str, Any]) -> str:
    """The points of a curve: each metric, its paired difference to the point before, and to the first line at the same x."""
    several = len(one["lines"]) > 1
    titles = [*(["line"] if several else []), one["x"], "arm"]
    first = one["lines"][0]["label"] if one["lines"] else ""
    for metric in one["metrics"]:
        titles += [METRICS[metric][0], "to the point before", *([f"to {first}"] if several else [])]
    body = []
    for line in one["lines"]:
        for point in line["points"]:
            cells = [*([line["label"]] if several else []), f"{point['x']:,.6g}", point["arm"]]
            for metric in one["metrics"]:
                _, scale, form, unit = METRICS[metric]
                show = lambda kind, sign: interval(scaled(point[kind][metric], scale), sign + form, unit)
                cells += [show("value", ""), show("step", "+"), *([show("across", "+")] if several else [])]
            body.append(cells)
    return f"**{one['title']}**\n\n{table(titles, body)}"


def scaled(value: dict[str, Any] | None, factor: float) -> dict[str, Any] | None:
    """An interval times a factor."""
    if value is None or factor == 1:
        return value
    return {name: number if name == "n" or number is None else factor * number for name, number in value.items()}


def notes(result: dict[str, Any], study: dict[str, Any]) -> str:
    """What the columns mean."""
    band, rows = result["band"], result["rows"]
    baselines = {row.get("baseline", study["baseline"]) for row in rows}
    other = ", or to the arm that is named" if len(baselines) > 1 else ""
    texts = [
        "Loss: nats per token on the whole validation text, mean over seeds. Difference: to "
        f"{study['baseline']}{other}, paired by seed, with Student's interval; not corrected for the number of arms."
    ]
    settings = {arm["name"]: arm["settings"] for arm in study["arms"]}
    for row in rows:
        if row.get("scores"):
            texts.append(
                f"{row['arm']}: the runs of {row['scores']}, scored once more with another evaluation: "
                f"`{evaluate(row['scores'], settings[row['arm']])}`."
            )
    twins = [row for row in rows if row["twin_of"]]
    if band is not None:
        texts.append(
            f"A/A band: +-{band:.4f}, the end farther from 0 of the interval of "
            + ", ".join(f"{row['arm']} - {row['twin_of']}" for row in twins)
            + ", which differ in their routers' noise only; a mean difference inside it is within A/A noise."
        )
    elif twins:
        texts.append("A/A arms: no band, as their routers have no noise or fewer than two pairs are done.")
    if twins:
        texts.append("The ms of an A/A arm beside its twin's show the noise of the times.")
    timed = {row["timed"] for row in rows if row["timed"]}
    when = "before training" if timed == {"before"} else "of the trained arms (first seed)"
    if timed == {"before", "after"}:
        when += " where there is one, else before training"
    texts.append(f"ms: median of optimizer steps in turns in one process, {when}; compilation, input and evaluation excluded.")
    if result["target"]["loss"] is not None:
        texts.append(
            f"Target: {result['target']['how']}; seconds are the steps to it on the validation curve of training, "
            "interpolated, times ms per step."
        )
    texts.append(
        "FLOPs: forward and backward, K experts a token; routers D x E a routed layer. Load, dead experts (all layers), "
        "dropped and entropy: means over the last quarter of training."
    )
    if any(row.get("usage") for row in rows):
        texts.append(
            "Usage: the share of one-neuron experts that any token of a source's whole validation text retrieves; "
            "unevenness: the divergence of their shares of the gates from even ones; both means over the sources by their "
            "tokens. Their routers' FLOPs: queries, and scores of half keys."
        )
    return " ".join(texts)


def differs(row: dict[str, Any], study: dict[str, Any]) -> str:
    """The difference to the baseline; nothing for a twin of it that is the same to the last bit."""
    baseline = row.get("baseline", study["baseline"])
    same = row["twin_of"] == baseline and row["aa"] and row["aa"]["identical"]
    other = f" to {baseline}" if row["difference"] and baseline != study["baseline"] else ""
    return NONE if same else interval(row["difference"], "+.4f") + other


def judged(row: dict[str, Any]) -> str:
    """The verdict of a row; of an A/A arm its difference to the other of the pair."""
    if row["verdict"] != "A/A":
        return row["verdict"]
    return f"A/A of {row['twin_of']}: {interval(row['aa'] and row['aa']['interval'], '+.4f')}"


def reached(time: dict[str, Any]) -> str:
    """'12.3 [11.0, 13.6] (2)', or that the target was not reached."""
    if not time["of"]:
        return NONE
    if not time["reached"]:
        return "not reached"
    if time["seconds"] is None:
        return NONE
    text = interval(time["seconds"], ".0f" if time["seconds"]["mean"] >= 100 else ".1f")
    if time["reached"] < time["of"]:
        return f"{text} not reached by {time['of'] - time['reached']} of {time['of']}"
    return text + (f" ({time['rank']})" if time["rank"] else "")


def interval(value: dict[str, Any] | None, form: str, unit: str = "") -> str:
    """'+0.0123 [-0.0010, +0.0256]'."""
    if value is None:
        return NONE
    ends = "" if value["low"] is None else f" [{value['low']:{form}}, {value['high']:{form}}]"
    return f"{value['mean']:{form}}{ends}{unit}"


def number(value: float | None, form: str) -> str:
    """`value` in a format, or that there is none."""
    return NONE if value is None else f"{value:{form}}"


def table(titles: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
