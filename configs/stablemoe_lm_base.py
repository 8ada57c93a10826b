"""The StableMoE language model of size base (arXiv:2204.08396, appendix A): 124 M shared parameters and 454 M of experts.

    python -m moe_jax.plan --config=configs/stablemoe_lm_base.py --topology=v5p:2x4x4
    python train.py --config=configs/stablemoe_lm_base.py --workdir=gs://bucket/stablemoe \\
        --config.data.sources[0].tfds= --config.data.sources[0].files='text/*.txt'

12 dense blocks, and between them one layer of 32 experts, each a stack of 3 residual sublayers: no attention and no norm of its
own. 0.5 million tokens a step; routing is learned for 6,000 of the 60,000 steps. For 32 TPU chips, an expert on each.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.sources = (c.SourceConfig(name="text", tfds="python_stdlib"),)
    config.data.vocab_size = 50257
    config.data.sequence_length, config.data.batch_size = 1024, 512
    model = config.model
    model.layers, model.pattern, model.inserts = 12, "dense", "stable=experts@6"
    model.width, model.ffn_width, model.heads = 768, 3072, 12
    model.norm, model.norm_epsilon, model.activation = "layernorm", 1e-5, "relu"
    model.positions, model.max_positions = "learned", 1024
    model.qkv_bias = model.output_bias = model.ffn_bias = True
    model.dtype, model.remat = "bfloat16", True
    moe = c.MoEConfig(router="stable", experts=32, top_k=1, expert_sublayers=3)
    model.ffns = (c.FFNConfig("experts", kind="routed", attention=False, norm=False, moe=moe),)
    config.mesh.expert = 32
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 6e-4, 2000
    config.optimizer.schedule, config.optimizer.final_fraction = "linear", 0.0
    config.optimizer.b2, config.optimizer.clip_norm, config.optimizer.weight_decay = 0.98, 0.1, 0.0
    config.train.steps = 60000
    config.train.eval_every = config.train.checkpoint_every = 1000
    config.train.routing_snapshots = 120
    return config
