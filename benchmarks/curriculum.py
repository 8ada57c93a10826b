"""How long the shards of a batch wait for each other where tokens take one expert or two, by the order of the rows.

    python benchmarks/curriculum.py [--json FILE] [--epochs 4] [--steps 0]

Trains the same model on a fifth of the Python standard library's sources in three orders: random, and those of
`data.curriculum`. From the second epoch on it counts, as if the batch lay over 8 devices: the second choices of the shard that
has most of them among its own tokens, and the rows of the 8th of the experts that has most, both summed over steps and layers.
On one device an order cannot change the time, on several it is that of the fullest shard.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from moe_jax import config as c  # noqa: E402
from moe_jax.data import TextData, open_data  # noqa: E402
from moe_jax.models import MODELS  # noqa: E402
from moe_jax.models.places import by_layer  # noqa: E402
from moe_jax.parallel.mesh import mesh_from_config  # noqa: E402
from moe_jax.parallel.rules import put_batch  # noqa: E402
from moe_jax.study import timing  # noqa: E402
from moe_jax.train.curriculum import open_curriculum  # noqa: E402
from moe_jax.train.state import place_state  # noqa: E402
from moe_jax.train.step import compile_train_step  # noqa: E402

SHARDS = 8
ORDERS = ("none", "mean", "cosine")


def make_config(target_k: float = 1.25) -> c.Config:
    """A small model whose every block decides between one expert and two."""
    config = c.Config()
    config.data.batch_size, config.data.vocab_size, config.data.held_out_percent = 16, 1024, 40.0
    model = config.model
    model.layers, model.pattern = 4, "routed"
    model.width, model.ffn_width, model.heads, model.init_std, model.scan = 64, 128, 2, 0.125, False
    model.moe.experts, model.moe.router = 16, "adaptive"
    model.moe.routers.adaptive.target_k = target_k
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 6e-3, 40
    config.optimizer.schedule = "constant"
    return config


def waiting(shares: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """What the fullest shard has over the mean of all, over steps and layers; 1: no waiting.

    Args:
      shares: [steps, L, B], experts per token of each row.
      counts: [steps, L, E], tokens of each expert.

    Returns:
      second_choices: of the shards of the batch. experts: of the shards of the experts. step: of the time of a step whose
      experts take all of it, where each shard of the batch runs its own tokens.
    """
    steps, layers, _ = shares.shape
    own = shares.reshape(steps, layers, SHARDS, -1).mean(axis=3)
    held = counts.reshape(steps, layers, SHARDS, -1).sum(axis=3)
    second = own - 1
    return {
        "second_choices": float(second.max(axis=2).sum() / max(second.mean(axis=2).sum(), 1e-9)),
        "experts": float(held.max(axis=2).sum() / held.mean(axis=2).sum()),
        "step": float(own.max(axis=2).sum() / own.mean(axis=2).sum()),
    }


def train(config: c.Config, data: TextData, rule: str, epochs: int, most: int) -> list[dict]:
    """A row for each epoch but the first: order, epoch, share of the tokens with two experts, loss, `waiting`."""
    config.data.curriculum = rule if rule != "none" else "mean"  # so that the step reports its rows
    order = open_curriculum(config, data) if rule != "none" else data.order(config.seed)
    mesh = mesh_from_config(config.mesh, jax.devices()[:1])
    model = MODELS[config.model.name](config.model, data.tokenizer.vocab_size)
    size, found = config.data.batch_size, []
    epoch_steps = data.train_rows // size
    steps = min(epochs * epoch_steps, most or sys.maxsize)
    config.train.steps = steps
    with jax.set_mesh(mesh):
        state = place_state(model, config, mesh)
        batches = data.train_dataset(config.seed, size, order=order)
        step = compile_train_step(model, config, mesh, state, put_batch(batches[0], mesh, size))
        for number in tqdm(range(steps), desc=f"order {rule}", mininterval=10, disable=not sys.stderr.isatty()):
            state, metrics = step(state, put_batch(batches[number], mesh, size))
            metrics = jax.device_get({name: metrics[name] for name in ("rows", "stats", "loss")})
            shares = np.stack(list(metrics["rows"].values()))
            if rule != "none":
                order.report(number, shares.T)
            counts = np.stack([sums["counts"] for sums in by_layer(metrics["stats"], config.model).values()])
            found.append((shares, counts, float(metrics["loss"])))
    rows = []
    for epoch in range(1, -(-steps // epoch_steps)):
        part = found[epoch * epoch_steps : (epoch + 1) * epoch_steps]
        shares, counts = np.stack([one[0] for one in part]), np.stack([one[1] for one in part])
        row = {"order": rule, "epoch": epoch + 1, "steps": len(part), "two_experts": float(shares.mean() - 1)}
        rows.append(row | {"loss": float(np.mean([one[2] for one in part]))} | waiting(shares, counts))
    return rows


def print_rows(rows: list[dict]) -> None:
    """A table on stdout."""
    print(f"{'order':10}{'epoch':>6}{'steps':>7}{'two experts':>13}{'loss':>8}{'second choices':>16}{'experts':>9}{'step':>7}")
    for row in rows:
        head = f"{row['order']:10}{row['epoch']:6}{row['steps']:7}{row['two_experts']:13.3f}{row['loss']:8.3f}"
        print(f"{head}{row['second_choices']:16.3f}{row['experts']:9.3f}{row['step']:7.3f}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write machine, versions, date and rows here")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the text, the first of which is random")
    parser.add_argument("--steps", type=int, default=0, help="stop each order after so many; 0: after the epochs")
    options = parser.parse_args(argv)
    if options.epochs < 2:
        parser.error(f"--epochs={options.epochs}: the first one is random; use 2 or more")
    data = open_data(make_config().data)
    environment = timing.environment()
    rows = [row for rule in ORDERS for row in train(make_config(), data, rule, options.epochs, options.steps)]
    print_rows(rows)
    if options.json:
        result = {"benchmark": "curriculum", "environment": environment, "rows": rows}
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
