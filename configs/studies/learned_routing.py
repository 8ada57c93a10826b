"""When does learning to route pay? Dense, hash and Switch at 2, 4 and 8 million tokens of the installed packages' sources.

    python -m moe_jax.study --config=configs/studies/learned_routing.py --workdir=runs/learned_routing --jobs=2

Blocks 1 and 3 of 4 are dense, or have 8 experts, one to a token: by a hash of its id, or by a learned router. Each kind is
trained once, at a constant rate; from 80 % of a budget a branch decays over the last 20 %, so that every budget ends a schedule
of its own. Width 64 is better than 48 and 128 for a dense model of some minutes, and at 8 million tokens it has seen 15 for
each of its parameters. The rate was not searched for each kind.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Curve, Study

MILLIONS = (2, 4, 8)
WIDTH = 64
DECAY = 0.2
KINDS = {
    "dense": {"model.pattern": "dense,dense"},
    "hash": {"model.moe.router": "hash"},
    "switch": {"model.moe.router": "switch", "model.moe.routers.switch.jitter": 0.01},
}


def get_config() -> Study:
    base = c.Config()
    base.data.sources = (c.SourceConfig("packages", tfds="python_stdlib", installed_packages=True),)
    base.data.batch_size = 8
    base.data.held_out_percent = 1.0  # 1 MB of text scores 24 runs, not 3 MB
    base.model.width, base.model.ffn_width, base.model.heads = WIDTH, 4 * WIDTH, 2
    base.model.init_std = 0.125  # 1 / sqrt(width)
    base.model.moe.experts, base.model.moe.top_k = 8, 1
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.optimizer.learning_rate = 3e-3  # held at 6e-3, hash layers fall behind after 5 million tokens
    base.optimizer.warmup_steps = 40
    base.optimizer.schedule, base.optimizer.decay_fraction = "wsd", DECAY
    base.train.log_every = 20
    base.train.eval_every = 0
    base.train.eval_batches = 8
    base.train.checkpoint_every = 0
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    steps = {millions: round(1e6 * millions / (base.data.batch_size * base.data.sequence_length)) for millions in MILLIONS}
    branches = {millions: int((1 - DECAY) * count) for millions, count in steps.items()}
    base.train.steps = max(branches.values())
    keep = ",".join(map(str, branches.values()))
    stable = {"optimizer.schedule": "constant", "train.keep_steps": keep}
    arms = [Arm(f"{kind}_stable", settings | stable, baseline="dense_stable") for kind, settings in KINDS.items()]
    for millions, count in steps.items():
        for kind, settings in KINDS.items():
            decay = {"train.steps": count, "init.branch_step": branches[millions]}
            own = {"baseline": f"dense_{millions}m", "starts_from": f"{kind}_stable", "start": "branch_from"}
            arms.append(Arm(f"{kind}_{millions}m", settings | decay, **own))
    lines = {kind: {f"{kind}_{millions}m": float(millions) for millions in MILLIONS} for kind in KINDS}
    curve = Curve("budget", "Loss against tokens", "million tokens", lines, ("loss", "difference"))
    shown = tuple(f"{kind}_{MILLIONS[-1]}m" for kind in KINDS)
    title = "When does learning to route pay?"
    return Study(base, tuple(arms), "dense_stable", (10, 11), title=title, curves=(curve,), shown=shown)
