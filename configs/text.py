"""A mixture-of-experts language model of your own text.

    python train.py --config=configs/text.py --config.data.sources[0].files='books/*.txt' --workdir=runs/books

What is held out is cut from the files themselves, unless sources[0].validation_files and test_files name others.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.sources = (c.SourceConfig(name="text"),)
    config.data.batch_size = 8
    config.model.init_std = 0.09
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 400
    config.sample.prompt = "The "
    return config
