"""Routers at equal parameters, total and active, on the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/routers.py --workdir=runs/routers

Blocks 1 and 3 of 4 are routed: 8 experts of width 512, one to a token, or 16 of width 256, two to a token. The dense model
has the width that a token meets in the others. 1.5 million tokens a run, less than once through the text.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Study

FINE = {"model.moe.experts": 16, "model.moe.top_k": 2, "model.moe.expert_width": 256}
FINE_FULL = {"model.moe.expert_width": 1024}
SWITCH = {"model.moe.router": "switch", "model.moe.routers.switch.jitter": 0.01}
# Weights of a loss would need another size with sigmoid scores; the bias needs none.
SIGMOID = {
    "model.moe.routers.top_k.score": "sigmoid",
    "model.moe.routers.top_k.bias_rate": 0.01,
    "model.moe.routers.top_k.balance_loss": 0.0,
    "model.moe.routers.top_k.z_loss": 0.0,
}


def get_config() -> Study:
    base = c.Config()
    base.data.vocab_size = 1024
    base.model.init_std = 0.09
    base.model.residual_init = 1.0  # of the day of the README's tables
    base.model.ffn_width = 512
    base.model.moe.experts, base.model.moe.top_k = 8, 1
    base.optimizer.learning_rate = 6e-3
    base.optimizer.warmup_steps = 40
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.train.steps = 370
    base.train.log_every = 10
    base.train.eval_every = 37
    base.train.eval_batches = 8
    base.train.checkpoint_every = 185
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    arms = (
        Arm("dense", {"model.pattern": "dense,dense"}),
        Arm("switch", SWITCH),
        Arm("switch_again", twin_of="switch"),
        Arm("switch_unbalanced", SWITCH | {"model.moe.routers.switch.balance_loss": 0.0}),
        Arm("top_2", FINE, full=FINE_FULL),
        Arm("sigmoid_bias", FINE | SIGMOID, full=FINE_FULL),
        Arm("base", {"model.moe.router": "base"}),
        Arm("hash", {"model.moe.router": "hash"}),
        Arm("remoe", FINE | {"model.moe.router": "remoe"}, full=FINE_FULL),
    )
    # Four times through the text is the most that a study allows: more of it, and more steps, with data.sources[0].files.
    full = {
        "data.vocab_size": 4096,
        "data.sequence_length": 512,
        "data.batch_size": 32,
        "model.layers": 8,
        "model.width": 512,
        "model.heads": 8,
        "model.ffn_width": 2048,
        "model.dtype": "bfloat16",
        "model.init_std": 0.044,
        "model.scan": True,
        "optimizer.learning_rate": 1e-3,
        "train.steps": 600,
        "train.eval_every": 60,
    }
    return Study(base, arms, baseline="dense", seeds=(0, 1, 2), full=full, title="Routers at equal parameters")
