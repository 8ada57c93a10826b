"""Tables of a study, as Markdown, from what `collect` returns."""

import shlex
from collections.abc import Sequence
from typing import Any

from moe_jax.study import protocol
from moe_jax.study.metrics import METRICS
from moe_jax.study.plan import flag
from moe_jax.study.timing import conditions
from moe_jax.train.routing_history import SHARES_OF_TRAINING

NONE = "-"


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
    parts.append(protocol.primary(rows, lambda row: differs(row, study)))
    parts += [quality(result, rows), routing(rows), *map(curve, result.get("curves", ()))]
    parts += [protocol.tuning(result, table), notes(result, study)]
    return "\n\n".join(filter(None, parts))


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
    """Loss, its difference, speed, time to the target, and what it starts from."""
    study = result["study"]
    sources = list(dict.fromkeys(name for row in rows for name in row["sources"]))
    per_source = [f"loss, {name}" for name in sources] if len(sources) > 1 else []
    target = result["target"]["loss"]
    reach = f"s to loss {target:.4f} (rank)" if target is not None else "s to the target (rank)"
    starts = ["starts from"] if any(row.get("starts_from") for row in rows) else []
    tests, documents = ["p"] if protocol.tested(rows) else [], ["over documents"] if protocol.by_document(rows) else []
    equal = ["steps"] if protocol.timed_equally(rows) else []
    titles = [
        "arm",
        "seeds",
        METRICS["loss"].title,
        *per_source,
        f"difference [{protocol.PERCENT}]",
        "",
        *tests,
        *documents,
        METRICS["bits_per_byte"].title,
        "ms per step (ratio)",
        "tokens per s",
        *equal,
        reach,
        *starts,
    ]
    body = []
    for row in rows:
        extra = [shown("loss", row["sources"].get(name, {}).get("loss")) for name in sources] if per_source else []
        ms = NONE if row["ms"] is None else f"{row['ms']:.1f}" + (f" ({row['ratio']:.2f})" if row["ratio"] else "")
        body.append(
            [
                row["arm"],
                str(row["runs"]),
                shown("loss", row["loss"]),
                *extra,
                differs(row, study),
                judged(row),
                *([protocol.p_text(row["p_adjusted"])] if tests else []),
                *([interval(row["over_documents"], "+.4f")] if documents else []),
                shown("bits_per_byte", row["bits_per_byte"]),
                ms,
                number(row["tokens_per_second"], ",.0f"),
                *([protocol.seconds(row)] if equal else []),
                reached(row["time"]),
                *([started(row)] if starts else []),
            ]
        )
    return table(titles, body)


ROUTING = ("load", "load_worst", "dead_experts", "dropped", "entropy", "skipped")
FLUCTUATION = tuple(f"fluctuation_{share}" for share in SHARES_OF_TRAINING)
USE = ("usage", "unevenness")  # of one-neuron experts


def routing(rows: list[dict]) -> str:
    """Sizes, FLOPs and what the routers did."""
    metrics = ROUTING + (("experts_per_token",) if any(row.get("experts_per_token") for row in rows) else ())
    metrics += FLUCTUATION if any(row.get(FLUCTUATION[0]) is not None for row in rows) else ()
    metrics += USE if any(row.get("usage") for row in rows) else ()
    titles = ["arm", "parameters, M", "active, M", "MFLOP a token", "of them routers", *(METRICS[m].title for m in metrics)]
    body = []
    for row in rows:
        mega = [number(row[k] and row[k] / 1e6, ".3f") for k in ("parameters", "active_parameters")]
        # Of the experts that ran, where the router decides how many.
        training = row.get("flops_per_token") or row["training_flops_per_token"]
        flops = [number(training and training / 1e6, ".2f")]
        routers = row["router_flops_per_token"]
        flops.append(number(routers / 1e6 if routers else None, ".3f"))
        cells = {metric: shown(metric, row.get(metric)) for metric in metrics}
        if row["load_worst"] is not None:
            cells["load_worst"] += f" ({row['worst_layer']})"
        body.append([row["arm"], *mega, *flops, *cells.values()])
    return table(titles, body)


def curve(one: dict[str, Any]) -> str:
    """The points of a curve: each metric, its paired difference to the point before and to the first line's there; slopes."""
    several = len(one["lines"]) > 1
    titles = [*(["line"] if several else []), one["x"], "arm"]
    first = one["lines"][0]["label"] if one["lines"] else ""
    for metric in one["metrics"]:
        titles += [METRICS[metric].title, "to the point before", *([f"to {first}"] if several else [])]
    body = []
    for line in one["lines"]:
        for point in line["points"]:
            cells = [*([line["label"]] if several else []), f"{point['x']:,.6g}", point["arm"]]
            for metric in one["metrics"]:
                cells += [shown(metric, point["value"][metric]), shown(metric, point["step"][metric], "+")]
                cells += [shown(metric, point["across"][metric], "+")] if several else []
            body.append(cells)
    return "\n\n".join(filter(None, [f"**{one['title']}**", table(titles, body), slopes(one)]))


def slopes(one: dict[str, Any]) -> str:
    """A sentence for each line of three points or more: how each metric changes with x, seed by seed."""
    per = f"a doubling of {one['x']}" if one["log"] else f"a unit of {one['x']}"
    texts = []
    for line in one["lines"]:
        known = [(m, value) for m, value in line.get("slope", {}).items() if value and len(line["points"]) > 2]
        if known:
            label = f" ({line['label']})" if line["label"] else ""
            found = "; ".join(f"{METRICS[m].title} {shown(m, value, '+')}" for m, value in known)
            texts.append(f"Slope for {per}{label}, least squares by seed: {found}.")
    return " ".join(texts)


def shown(metric: str, value: float | dict[str, Any] | None, sign: str = "") -> str:
    """A metric's mean, or its interval, as tables print it; a difference has its sign."""
    m = METRICS[metric]
    form = ("+" if m.minus_baseline else sign) + m.form
    if isinstance(value, dict):
        return interval(scaled(value, m.scale), form, m.unit)
    return NONE if value is None else f"{m.scale * value:{form}}{m.unit}"


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
    texts += protocol.notes(rows)
    texts += notes_of_arms(rows, study)
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
    counted = ", or as many as ran where the router decides" if any(row.get("flops_per_token") for row in rows) else ""
    texts.append(
        f"FLOPs: forward and backward, K experts a token{counted}; routers D x E a routed layer. Load, dead experts "
        "(all layers), dropped and entropy: means over the last quarter of training."
    )
    if any(row.get("usage") for row in rows):
        texts.append(
            "Experts used: the share of one-neuron experts that any token of a source's whole validation text retrieves; "
            "unevenness: the divergence of their shares of the gates from even ones; both means over the sources by their "
            "tokens. Their routers' FLOPs: queries, and scores of half keys."
        )
    return " ".join(texts)


def notes_of_arms(rows: list[dict], study: dict[str, Any]) -> list[str]:
    """What sets single arms apart: whose runs they score or start from, their text and their tokens."""
    texts, settings = [], {arm["name"]: arm["settings"] for arm in study["arms"]}
    for row in rows:
        if row.get("scores"):
            texts.append(
                f"{row['arm']}: the runs of {row['scores']}, scored once more with another evaluation: "
                f"`{evaluate(row['scores'], settings[row['arm']])}`."
            )
    if any(row.get("starts_from") for row in rows):
        texts.append(
            "Starts from: the arm whose finished run of the same seed a run begins with, and what the training of all runs "
            "before its own has cost; tokens, FLOPs and seconds elsewhere are without it, and such an arm has no rank."
        )
    for row in rows:
        if row.get("branch_step"):
            texts.append(
                f"{row['arm']}: a branch of {row['starts_from']} at its step {row['branch_step']}; its steps, tokens and FLOPs "
                "count those before."
            )
    if own := [row["arm"] for row in rows if row.get("own_sources")]:
        texts.append(
            f"{', '.join(own)}: trained on other text, scored on that of the study's sources; what they evaluate in "
            "training is not compared."
        )
    if others := [row["arm"] for row in rows if other_tokens(row)]:
        texts.append(
            f"{', '.join(others)}: another tokenizer than the baseline's. Losses of other tokens do not compare; bits per byte "
            "do, without the A/A band, which is in nats per token. Pictures of losses are without these arms."
        )
    return texts


def differs(row: dict[str, Any], study: dict[str, Any]) -> str:
    """The difference to the baseline; nothing for a twin of it that is the same to the last bit."""
    baseline = row.get("baseline", study["baseline"])
    if row["twin_of"] == baseline and row["aa"] and row["aa"]["identical"]:
        return NONE
    other = f" to {baseline}" if baseline != study["baseline"] else ""
    if other_tokens(row):
        return shown("bits_difference", row["bits_difference"]) + " bits per byte" + other
    return shown("difference", row["difference"]) + (other if row["difference"] else "")


def other_tokens(row: dict[str, Any]) -> bool:
    """Whether an arm has other tokens than its baseline, so that they compare in bits per byte alone."""
    return row["difference"] is None and row.get("bits_difference") is not None


def started(row: dict[str, Any]) -> str:
    """'dense (20,480 tokens, 0.061 TFLOP, 12.3 s)': whose run a row starts from, and what all runs before its own have cost."""
    if not row["starts_from"]:
        return NONE
    cost = row["start_cost"]
    costs = f" ({cost['tokens']:,} tokens, {cost['flops'] / 1e12:.3g} TFLOP, {cost['seconds']:.3g} s)" if cost else ""
    step = f" step {row['branch_step']}" if row.get("branch_step") else ""
    return row["starts_from"] + step + costs


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
