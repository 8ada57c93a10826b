"""Is the quickstart's routed model ahead of a dense one in the same seconds? On the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/quickstart.py --workdir=runs/quickstart_study --jobs=2
    python -m moe_jax.study --config=configs/studies/quickstart.py:levers --workdir=runs/levers

The first command is the comparison: a dense model and one whose every other block has 8 experts, one to a token by a hash of
its id; both tuned by the same grid, eight seeds each. All arms are trained for the seconds of 610 dense steps, by schedules
of their own. The second tries what might help, one change at a time, on a tuning seed: the end of the schedule, small starts,
which blocks are routed, by which router or table, the number of experts, the model's width, and the size of a batch.
"""

import dataclasses

from moe_jax import config as c
from moe_jax.config import Arm, Settings, Study

DENSE = {"model.pattern": "dense,dense"}
HASH = {"model.moe.router": "hash", "model.moe.top_k": 1}
SWITCH = {"model.moe.router": "switch", "model.moe.top_k": 1, "model.moe.routers.switch.jitter": 0.01}
TOP_2 = {"model.moe.experts": 16, "model.moe.top_k": 2, "model.moe.expert_width": 256}
HIGH_END = {"optimizer.final_fraction": 0.5}
SMALL_START = {"model.residual_init": 0.1}
SMALL_BATCH = {"data.batch_size": 4}
WIDE = {"model.width": 192, "model.ffn_width": 768, "model.init_std": 0.072}  # 1 / sqrt(width), as in the base
GRID = {
    "plain": {},
    "rate-x0.5": {"optimizer.learning_rate": c.Scale(0.5)},
    "rate-x2": {"optimizer.learning_rate": c.Scale(2)},
    "final_fraction-0.3": {"optimizer.final_fraction": 0.3},
    "final_fraction-0.5": HIGH_END,
}


def base_config() -> c.Config:
    base = c.Config()
    base.data.batch_size = 8
    base.model.init_std = 0.09
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.optimizer.learning_rate = 6e-3
    base.optimizer.warmup_steps = 40
    base.train.steps = 610
    base.train.log_every = 10
    base.train.eval_every = 0
    base.train.eval_batches = 8
    base.train.checkpoint_every = 0
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    return base


def two_tables() -> c.Config:
    """The base with two layers of 8 experts, each by a random table of its own."""
    base = base_config()
    for name, seed in (("one", 1), ("two", 2)):
        layer = c.FFNConfig(name, kind="routed")
        layer.moe.router, layer.moe.top_k = "hash", 1
        layer.moe.routers.hash.table, layer.moe.routers.hash.seed = "random", seed
        base.model.ffns += (layer,)
    return base


def in_the_same_time(name: str, settings: Settings) -> Arm:
    return Arm(name, settings, equal_time_to="dense")


PARTS = ("", "levers")


def get_config(part: str = "") -> Study:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the study; write quickstart.py or quickstart.py:levers")
    dense, routed = Arm("dense", DENSE), in_the_same_time("hash", HASH)
    if not part:
        seeds = tuple(range(10, 18))
        title = "The quickstart's routed model beside a dense one, in the same seconds"
        return Study(base_config(), (dense, routed), "dense", seeds, grid=GRID, primary="hash", title=title, hours_limit=3)
    arms = (
        dense,
        routed,
        in_the_same_time("dense_high_end", DENSE | HIGH_END),
        in_the_same_time("hash_high_end", HASH | HIGH_END),
        in_the_same_time("dense_small_start", DENSE | SMALL_START),
        in_the_same_time("hash_small_start", HASH | SMALL_START),
        in_the_same_time("switch", SWITCH),
        in_the_same_time("hash_every_block", HASH | {"model.pattern": "routed"}),
        in_the_same_time("top_2_of_16", TOP_2),
        in_the_same_time("hash_32", HASH | {"model.moe.experts": 32}),
        in_the_same_time("dense_wide", DENSE | WIDE),
        in_the_same_time("hash_wide", HASH | WIDE),
        in_the_same_time("hash_first", HASH | {"model.pattern": "routed,dense"}),
        dataclasses.replace(in_the_same_time("hash_two_tables", {"model.pattern": "dense,one,dense,two"}), base=two_tables()),
        in_the_same_time("dense_small_batch", DENSE | SMALL_BATCH),
        in_the_same_time("hash_small_batch", HASH | SMALL_BATCH),
    )
    return Study(base_config(), arms, "dense", (0,), title="Levers of the quickstart, in the same seconds")
