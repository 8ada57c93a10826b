"""Scores of a trained model, and what to compare them with."""

import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_jax.data.pipeline import EvaluationSet
    from moe_jax.train.restore import LoadedRun


def evaluate_sets(
    run: "LoadedRun", sets: dict[str, "EvaluationSet"], limit: int = 0, show_progress: bool = False, by_document: bool = False
) -> dict[str, dict[str, Any]]:
    """`train.evaluation.evaluate` of several sets by name, with one compilation and a bar on stderr."""
    import jax
    from tqdm import tqdm

    from moe_jax.train.evaluation import batch_count, evaluate, make_evaluation_step

    step = make_evaluation_step(run.model, run.tokenizer.token_bytes, by_token=by_document)
    batch_size = run.config.data.batch_size
    total = sum(batch_count(evaluation_set, batch_size, limit) for evaluation_set in sets.values())
    hidden = not show_progress or jax.process_index() != 0
    pause = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets a line now and then
    with tqdm(total=total, unit="batch", disable=hidden, mininterval=pause) as bar:
        return {
            name: evaluate(step, run.variables, evaluation_set, run.mesh, batch_size, limit=limit, progress=bar.update)
            for name, evaluation_set in sets.items()
        }


def finite(tree: Any) -> Any:
    """`tree` with None for numbers that JSON does not have: NaN and infinity."""
    if isinstance(tree, dict):
        return {name: finite(value) for name, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
