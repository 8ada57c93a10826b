"""A study small enough for a test, and its folder with made-up numbers."""

import json
import math

from moe_jax.config import Config, SourceConfig
from moe_jax.config.study import Arm, Study
from moe_jax.study.description import save_description
from moe_jax.study.plan import run_folder
from moe_jax.study.timing import place

LAYER = "layer_01"


def make_study(**changes) -> Study:
    config = Config()
    config.data.sources = (SourceConfig(name="a", files="a.txt"), SourceConfig(name="b", files="b.txt"))
    arms = (Arm("routed"), Arm("twin", twin_of="routed"), Arm("dense", {"model.pattern": "dense,dense"}))
    return Study(**{"base": config, "arms": arms, "baseline": "routed", "seeds": (3, 5)} | changes)


def write_run(workdir, arm, seed, loss, curve, routed=True, digest="d", use=None, text=None, tokens=1) -> None:
    """A finished run: validation losses {source: loss} on 100 tokens of a and 300 of b, 4 bits a token at loss 4 ln 2.

    use: (usage, unevenness) on b; on a they are half of it. text: its digest, which older runs have not. tokens: a
      byte has this many times as many.
    """
    folder = run_folder(workdir, arm, seed)
    folder.mkdir(parents=True)
    sources = {
        name: {
            "loss": loss[name],
            "tokens": count * tokens,
            "bytes": 2 * count,
            "digest": f"{digest} {name}",
            "bits_per_byte": loss[name] / math.log(2) * tokens / 2,
        }
        | ({"text": f"{text} {name}"} if text else {})
        for name, count in (("a", 100), ("b", 300))
    }
    for name, share in (("a", 0.5), ("b", 1.0)) if use else ():
        sources[name] |= {"router/usage": share * use[0], "router/unevenness": share * use[1]}
    (folder / "validation.json").write_text(json.dumps({"step": 40, "sources": sources}))
    rows = []
    for step, value in curve:
        row = {"step": step, "loss": value + 0.1, "skipped": 1, "tokens_per_second": 5120.0}  # 20 steps in 2 seconds
        if routed:
            early = step <= 30  # of 40: not in the last quarter
            load = {
                "router/load_max_over_mean": 9.0 if early else 1.5,
                "router/entropy": 2.0,
                "router/dropped": 0.25,
            }
            layers = {f"router/{LAYER}/load_max_over_mean": 1.75, "router/layer_03/load_max_over_mean": 1.25}
            row |= load | layers | {"router/dead_experts": 3, f"router/{LAYER}/load": [0.5, 0.5]}
        rows += [row, {"step": step, "eval/a/loss": value, "eval/b/loss": value - 0.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_timing(workdir, phase, times) -> None:
    """The timing of a phase with `ms` of each arm."""
    environment = {
        "platform": "cpu",
        "device": "cpu",
        "revision": "",
        "date": "2026-01-02",
        "load_before": 0.5,
    }
    facts = {
        "steps": 40,
        "tokens_per_step": 512,
        "tokens": 20480,
        "epochs": 0.5,
        "evaluation_batches": 9,
        "training_flops_per_token": 3e6,
        "router_flops_per_token": 5e4,
        "parameters": 2_000_000,
        "active_parameters": 1_000_000,
    }
    arms = {name: facts | {"ms": ms, "alone_ms": ms, "runs_ms": [ms]} for name, ms in times.items()}
    result = {"fingerprint": "x", "environment": environment | place(), "rounds": 3, "arms": arms}
    (workdir / f"timing_{phase}.json").write_text(json.dumps(result))


def write_study(workdir, study: Study) -> None:
    save_description(workdir, study, {"scale": "small", "command": "python -m moe_jax.study --config=x.py"})
