"""The StableMoE language model of size large (arXiv:2204.08396, appendix A): 355 M shared parameters and 3.22 B of experts.

    python -m moe_jax.plan --config=configs/stablemoe_lm_large.py --topology=v5p:4x4x4
    python train.py --config=configs/stablemoe_lm_large.py --workdir=gs://bucket/stablemoe \\
        --config.data.sources[0].tfds= --config.data.sources[0].files='text/*.txt'

24 dense blocks, and between them one layer of 64 experts, each a stack of 6 residual sublayers: no attention and no norm of its
own. 0.5 million tokens a step; routing is learned for 6,000 of the 60,000 steps. For 64 TPU chips, an expert on each.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.sources = (c.SourceConfig(name="text", tfds="python_stdlib"),)
    config.data.vocab_size = 50257
    config.data.sequence_length, config.data.batch_size = 1024, 512
    model = config.model
    model.layers, model.pattern, model.inserts = 24, "dense", "stable=experts@12"
    model.width, model.ffn_width, model.heads = 1024, 4096, 16
    model.norm, model.norm_epsilon, model.activation = "layernorm", 1e-5, "relu"
    model.positions, model.max_positions = "learned", 1024
    model.qkv_bias = model.output_bias = model.ffn_bias = True
    model.dtype, model.remat = "bfloat16", True
    moe = c.MoEConfig(router="stable", experts=64, top_k=1, expert_sublayers=6)
    model.ffns = (c.FFNConfig("experts", kind="routed", attention=False, norm=False, moe=moe),)
    config.mesh.expert = 64
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 2000
    config.optimizer.schedule, config.optimizer.final_fraction = "linear", 0.0
    config.optimizer.b2, config.optimizer.clip_norm, config.optimizer.weight_decay = 0.98, 0.1, 0.0
    config.train.steps = 60000
    config.train.eval_every = config.train.checkpoint_every = 1000
    config.train.routing_snapshots = 120
    return config
