"""A mixture-of-experts language model of a billion parameters, 0.2 billion of them active for a token, for 8 TPU chips or more.

    python -m moe_jax.plan --config=configs/routed_1b.py --topology=v5p:2x2x2
    python train.py --config=configs/routed_1b.py --workdir=gs://bucket/routed \\
        --config.data.sources[0].tfds= --config.data.sources[0].files='text/*.txt'

16 routed blocks of 32 experts, 4 to a token, bfloat16; 0.5 million tokens a step, 10 billion in all.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.sources = (c.SourceConfig(name="text", tfds="python_stdlib"),)
    config.data.vocab_size = 32768
    config.data.sequence_length = 2048
    config.data.batch_size = 256
    model = config.model
    model.layers, model.pattern = 16, "routed"
    model.width, model.heads, model.kv_heads, model.head_width = 1024, 8, 4, 128
    model.moe.experts, model.moe.top_k, model.moe.expert_width = 32, 4, 512
    model.init_std = 1024**-0.5
    model.dtype, model.remat, model.loss_chunk = "bfloat16", True, 32768
    config.mesh.fsdp = 8
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 1000
    config.train.steps = 20000
    config.train.microbatches = 8
    config.train.eval_every = config.train.checkpoint_every = 1000
    return config
