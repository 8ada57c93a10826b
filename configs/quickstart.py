"""A mixture-of-experts language model of the Python standard library's sources, in minutes on a laptop.

4 blocks, every other one routed to 2 of 8 experts; 980,000 tokens, a third of an epoch.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.batch_size = 8
    # The embedding is also the output table: at 1 / sqrt(width) its vectors and its logits both start near unit size.
    config.model.init_std = 0.09
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 480
    config.train.eval_every = 120
    config.train.eval_batches = 8
    config.train.checkpoint_every = 120
    config.sample.prompt = "def "
    config.sample.stop = "\n\n\n"
    config.sample.compare_compressors = True
    return config
