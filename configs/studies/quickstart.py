"""Is the quickstart's routed model ahead of a dense one in the same seconds? On the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/quickstart.py --workdir=runs/quickstart_study --jobs=2
    python -m moe_jax.study --config=configs/studies/quickstart.py:levers --workdir=runs/levers

The first command is the comparison: a dense model and the quickstart's, whose every other block has 16 experts, two to a token
by a learned router; both tuned by the same grid, eight seeds each. All arms are trained for the seconds of 2,000 dense steps,
by schedules of their own: 4.1 million tokens, 1.3 epochs. Width 64 was chosen for the dense model: in as many seconds 48, 96
and 128 are no better. A run takes 8 minutes on a core, so that the grid is two rates on one tuning seed, and no more.

The second tries what might help, one change at a time, on a tuning seed: the schedule, the size of the start, which blocks are
routed, by which router or tables, with how many experts, a shared one beside them, the width, the batch.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Settings, Study

DENSE = {"model.pattern": "dense,dense"}
HASH = {"model.moe.router": "hash", "model.moe.top_k": 1}
SWITCH = {"model.moe.router": "switch", "model.moe.top_k": 1, "model.moe.routers.switch.jitter": 0.01}
TOP_2 = {"model.moe.experts": 16, "model.moe.top_k": 2, "model.moe.expert_width": 128}
# Half of a token's neurons see every token.
SHARED = {"experts": 16, "expert_width": 128, "shared_experts": 1}
OF_MOE = {f"model.moe.{name}": value for name, value in SHARED.items()}
COSINE = {"optimizer.schedule": "cosine", "optimizer.final_fraction": 0.1}
LARGE_START = {"model.residual_init": 1.0}
SMALL_BATCH = {"data.batch_size": 4}
# init_std: 1 / sqrt(width), as in the base
WIDE = {"model.width": 96, "model.ffn_width": 384, "model.heads": 3, "model.init_std": 0.102}
GRID = {
    "plain": {},
    "rate-x2": {"optimizer.learning_rate": c.Scale(2)},  # half the rate is 0.1 nats worse, for both
}
PARTS = ("", "levers")


def base_config() -> c.Config:
    base = c.Config()
    base.data.batch_size = 8
    base.model.width, base.model.ffn_width, base.model.heads = 64, 256, 2
    base.model.init_std = 0.125
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.optimizer.learning_rate = 6e-3
    base.optimizer.warmup_steps = 40
    base.optimizer.schedule, base.optimizer.decay_fraction, base.optimizer.final_fraction = "wsd", 0.8, 0.0
    base.train.steps = 2000
    base.train.log_every = 20
    base.train.eval_every = 0
    base.train.eval_batches = 8
    base.train.checkpoint_every = 0
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    return base


def two_tables(**moe: int) -> c.Config:
    """The base with two layers, each with a random table of its own; moe: options of both."""
    base = base_config()
    for name, seed in (("one", 1), ("two", 2)):
        layer = c.FFNConfig(name, kind="routed", moe=c.MoEConfig(router="hash", top_k=1, **moe))
        layer.moe.routers.hash.table, layer.moe.routers.hash.seed = "random", seed
        base.model.ffns += (layer,)
    return base


def in_the_same_time(name: str, settings: Settings, base: c.Config | None = None) -> Arm:
    return Arm(name, settings, base=base, equal_time_to="dense")


def get_config(part: str = "") -> Study:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the study; write quickstart.py or quickstart.py:levers")
    dense, routed = Arm("dense", DENSE), in_the_same_time("top_2_of_16", TOP_2)
    if not part:
        seeds = tuple(range(10, 18))
        title = "The quickstart's routed model beside a dense one, in the same seconds"
        limits = {"tuning_seeds": (0,), "hours_limit": 4}
        return Study(base_config(), (dense, routed), "dense", seeds, grid=GRID, primary="top_2_of_16", title=title, **limits)
    tables = {"model.pattern": "dense,one,dense,two"}
    levers = {
        "dense_cosine": DENSE | COSINE,
        "hash_cosine": HASH | COSINE,
        "dense_high_end": DENSE | {"optimizer.final_fraction": 0.3},
        "dense_large_start": DENSE | LARGE_START,
        "hash_large_start": HASH | LARGE_START,
        "switch": SWITCH,
        "hash": HASH,
        "hash_every_block": HASH | {"model.pattern": "routed"},
        "hash_first": HASH | {"model.pattern": "routed,dense"},
        "hash_32": HASH | {"model.moe.experts": 32},
        "hash_shared": HASH | OF_MOE,
        "switch_shared": SWITCH | OF_MOE,
        "dense_wide": DENSE | WIDE,
        "hash_wide": HASH | WIDE,
        "dense_small_batch": DENSE | SMALL_BATCH,
        "hash_small_batch": HASH | SMALL_BATCH,
    }
    arms = [dense, routed, *(in_the_same_time(name, settings) for name, settings in levers.items())]
    for name, base in (("hash_two_tables", two_tables()), ("hash_two_tables_shared", two_tables(**SHARED))):
        arms.append(in_the_same_time(name, tables, base))
    return Study(base_config(), tuple(arms), "dense", (0,), title="Levers of the quickstart, in the same seconds")
