"""The StableMoE language model of size large (arXiv:2204.08396, appendix A): 355 M shared parameters and 3.22 B of experts.

    python -m moe_jax.plan --config=configs/stablemoe_lm_large.py --topology=v5p:4x4x4
    python train.py --config=configs/stablemoe_lm_large.py --workdir=gs://bucket/stablemoe \\
        --config.data.sources[0].tfds= --config.data.sources[0].files='text/*.txt'

24 dense blocks, and between them one layer of 64 experts, each a stack of 6 residual sublayers: no attention and no norm of its
own. 0.5 million tokens a step; routing is learned for 6,000 of the 60,000 steps. For 64 TPU chips, an expert on each.
"""

from moe_jax import config as c
from moe_jax.config.load import load_config


def get_config() -> c.Config:
    config = load_config(__file__.removesuffix("large.py") + "base.py")
    model = config.model
    model.layers, model.inserts = 24, "stable=experts@12"
    model.width, model.ffn_width, model.heads = 1024, 4096, 16
    model.ffns[0].moe.experts, model.ffns[0].moe.expert_sublayers = 64, 6
    config.mesh.expert = 64
    config.optimizer.learning_rate = 3e-4
    return config
