"""A run: every section of the configuration."""

import dataclasses

from moe_jax.config.data import DataConfig
from moe_jax.config.leaf import field
from moe_jax.config.model import ModelConfig
from moe_jax.config.train import InitConfig, MeshConfig, OptimizerConfig, SampleConfig, TrainConfig


@dataclasses.dataclass
class Config:
    """A run."""

    seed: int = field(0, "Fixes initialisation and data order, and noise where noise_seed is -1.", low=0, high=2**31 - 1)
    plugins: str = field(
        "", "Comma-separated Python modules to import first, such as those that register routers.", role="runtime"
    )
    noise_seed: int = field(-1, "Fixes the routers' noise alone; -1: `seed`.", low=-1, high=2**31 - 1)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
