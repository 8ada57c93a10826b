"""A mixture-of-experts language model of the Python standard library's sources, in minutes on a laptop.

4 blocks, every other one routed to 2 of 16 experts with the FLOPs of a dense one; 3.7 million tokens, a little over an epoch.
So narrow a model, for that long, is better than a wider one in as many seconds.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.batch_size = 8
    config.model.width, config.model.ffn_width, config.model.heads = 64, 256, 2
    # The embedding is also the output table: at 1 / sqrt(width) its vectors and its logits both start near unit size.
    config.model.init_std = 0.125
    config.model.moe.experts, config.model.moe.expert_width = 16, 128
    config.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.schedule, config.optimizer.decay_fraction, config.optimizer.final_fraction = "wsd", 0.8, 0.0
    config.train.steps = 1800
    config.train.eval_every = 600
    config.train.eval_batches = 8
    config.train.checkpoint_every = 600
    config.sample.prompt = "def "
    config.sample.stop = "\n\n\n"
    config.sample.compare_compressors = True
    return config
