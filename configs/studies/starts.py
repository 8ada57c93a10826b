"""How small should all that writes into the residual stream start? On the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/starts.py --workdir=runs/starts --jobs=2

Output projections of attention, feed-forward layers and experts, and PEER's output rows, start with `model.residual_init` times
the standard deviation that keeps variances. Blocks 1 and 3 of 4 are dense, routed by a hash of the token id, routed by a
learned router (8 experts, one to a token), or PEER, with the FLOPs of the dense block. 512,000 tokens a run. The question is
answered by the table of the tuning: one default for every kind of layer.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Study

CANDIDATES = {f"x{factor:g}": {"model.residual_init": factor} for factor in (1.0, 0.3, 0.1, 0.01)}


def get_config() -> Study:
    base = c.Config()
    base.data.vocab_size = 1024
    base.data.batch_size = 8
    base.model.init_std = 0.09
    base.model.ffn_width = 512
    base.model.moe.experts, base.model.moe.top_k = 8, 1
    base.model.peer.experts, base.model.peer.heads, base.model.peer.top_k, base.model.peer.key_width = 128**2, 8, 8, 88
    base.optimizer.learning_rate = 6e-3
    base.optimizer.warmup_steps = 40
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.train.steps = 250
    base.train.log_every = 10
    base.train.eval_every = 0
    base.train.eval_batches = 8
    base.train.checkpoint_every = 0
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    arms = (
        Arm("dense", {"model.pattern": "dense,dense"}),
        Arm("hash", {"model.moe.router": "hash"}),
        Arm("switch", {"model.moe.router": "switch", "model.moe.routers.switch.jitter": 0.01}),
        Arm("peer", {"model.pattern": "dense,peer"}),
    )
    return Study(base, arms, baseline="dense", seeds=(10,), grid=CANDIDATES, title="Small starts of the residual stream")
