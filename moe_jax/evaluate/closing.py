"""What ends a training run: the held-out figures beside compressors', and a sample. Kept in workdir/results.json."""

import json
from typing import Any

import jax
from etils import epath

from moe_jax.config import Config, to_dict
from moe_jax.config.load import run_folder
from moe_jax.data import open_data
from moe_jax.evaluate import evaluate_sets, finite
from moe_jax.evaluate.compression import compress_bits_per_byte
from moe_jax.generate import sample_text
from moe_jax.train.checkpoint import load_identity
from moe_jax.train.metrics import write_whole
from moe_jax.train.restore import load_run


def closing_results(config: Config, workdir: str) -> int:
    """Scores the test text and samples as `config.sample` asks; prints the kept results where they are of the newest
    checkpoint and of the same `config.sample`.

    Returns 0, the exit code.
    """
    if not (config.sample.compare_compressors or config.sample.prompt):
        return 0
    path = run_folder(workdir) / "results.json"
    asked = {"checkpoint": load_identity(workdir), "options": to_dict(config)["sample"]}
    results = _kept(path)
    if {name: results.get(name) for name in asked} != asked:
        results = finite(asked | _results(config, workdir))
        if jax.process_index() == 0:
            write_whole(path, json.dumps(results, indent=1, allow_nan=False))
    if jax.process_index() == 0:
        for line in result_lines(results):
            print(line, flush=True)
    return 0


def _kept(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError:
        return {}


def _results(config: Config, workdir: str) -> dict[str, Any]:
    run = load_run(workdir, config)
    results = {"step": run.step}
    if config.sample.compare_compressors:
        sets = open_data(config.data, tokenizer=run.tokenizer, splits=("test",)).evaluation("test")
        results["sources"] = evaluate_sets(run, sets, show_progress=True)
        for name, evaluation_set in sets.items():
            results["sources"][name] |= compress_bits_per_byte(evaluation_set.texts())
    if config.sample.prompt:
        results["sample"] = sample_text(run, [config.sample.prompt], seed=config.seed)[0]
    return results


def result_lines(results: dict[str, Any]) -> list[str]:
    """The sample, then one line per source with bits per byte beside gzip's and xz's."""
    lines = [results["sample"], ""] if "sample" in results else []
    for name, scores in results.get("sources", {}).items():
        bits = scores["bits_per_byte"]
        lines.append(
            f"{name}: {'not finite' if bits is None else f'{bits:.3f}'} bits per byte on "
            f"{scores['documents']:,} held-out documents "
            f"({scores['bytes'] / 1e6:.2f} MB); gzip -9 {scores['gzip']:.3f} (file by file), "
            f"xz -9 {scores['xz']:.3f} (all in one), {scores['xz_each']:.3f} (file by file)"
        )
    return lines
