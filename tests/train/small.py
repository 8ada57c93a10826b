"""A model and batches small enough for a test, shared by the tests of `train`."""

import pathlib

import jax
import numpy as np

from moe_jax.config import Config, DataConfig, SourceConfig
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.mesh import mesh_from_config
from moe_jax.parallel.rules import batch_sharding, put_batch, replicated
from moe_jax.train.state import place_state, state_shardings
from moe_jax.train.step import make_train_step

# Everything that could move a parameter without a gradient.
MOVING = {"optimizer__weight_decay": 0.5, "optimizer__ema_decay": 0.9, "optimizer__b1": 0.9}
EIGHT = {"mesh__expert": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
VOCABULARY = 96
USED = 80
BATCH = 16
LENGTH = 16


def make_config(**overrides) -> Config:
    """A small config; `model__moe__top_k=1` sets config.model.moe.top_k."""
    config = Config()
    config.data.batch_size, config.data.sequence_length = BATCH, LENGTH
    config.model.layers, config.model.pattern = 1, "routed"
    config.model.width, config.model.ffn_width = 32, 64
    config.model.residual_init = 1.0  # layers that begin by adding nothing would hide what is wrong with them
    config.optimizer.warmup_steps, config.train.steps = 2, 20
    for path, value in overrides.items():
        *parents, name = path.split("__")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        assert hasattr(owner, name), path
        setattr(owner, name, value)
    return config


def words(folder: pathlib.Path) -> DataConfig:
    """A source of 24 small documents in `folder`, a fifth of them held out, in rows of 16 bytes."""
    (folder / "text").mkdir()
    for i in range(24):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " + f"word {i} " * 30)
    return DataConfig(
        sources=(SourceConfig(name="words", files=f"{folder}/text/*.txt"),),
        tokenizer="bytes",
        sequence_length=LENGTH,
        batch_size=8,
        held_out_percent=20.0,
        cache_dir=str(folder / "cache"),
    )


def make_batch(step: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Arithmetic sequences, which a small model can learn, of some of the tokens; some rows end in padding."""
    rng = np.random.default_rng(step)
    steps = np.arange(length + 1) * rng.integers(1, 4, (BATCH, 1))
    tokens = ((rng.integers(0, USED, (BATCH, 1)) + steps) % USED).astype(np.int32)
    segments = np.ones((BATCH, length), np.int32)
    segments[:3, -5:] = 0
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (BATCH, 1)),
        "segment_ids": segments,
        "loss_weights": (segments > 0).astype(np.float32),
    }


class Runner:
    """A jitted training step on a mesh over the first `devices` devices."""

    def __init__(self, config: Config, devices: int = 1):
        self.config = config
        self.mesh = mesh_from_config(config.mesh, jax.devices()[:devices])
        self.model = Decoder(config.model, VOCABULARY)
        with jax.set_mesh(self.mesh):
            self.state = place_state(self.model, config, self.mesh)
        shardings = state_shardings(self.model, config, self.mesh)
        self._step = jax.jit(
            make_train_step(self.model, config),
            in_shardings=(shardings, batch_sharding(self.mesh, BATCH)),
            out_shardings=(shardings, replicated(self.mesh)),
            donate_argnums=0,
        )

    def step(self, batch: dict[str, np.ndarray]) -> dict:
        """One step; returns the metrics on the host."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self._step(self.state, put_batch(batch, self.mesh, BATCH))
        return jax.device_get(metrics)

    def losses(self, steps: int) -> list[float]:
        """The losses of the next `steps` steps."""
        return [float(self.step(make_batch(i))["loss"]) for i in range(steps)]
