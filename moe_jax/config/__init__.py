"""The configuration: one tree of mutable dataclasses, and what may stand in it.

Every leaf is a plain `bool`, `int`, `float` or `str` and carries its documentation, range, choices and role, so that
flags, help, validation, resume and studies all read this one place. An empty string or 0 means "off" or "derived",
as the field says; there are no None-able fields, because flags cannot set them.
"""

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.config.leaf import ConfigError, field, one_line, shorten_list
from moe_jax.config.model import FFNConfig, ModelConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.peer import PeerConfig
from moe_jax.config.reflect import differences, from_dict, item_type, leaf_fields, leaves, nearest, role, to_dict, unknown_field
from moe_jax.config.routers import RouterOptions, Traits
from moe_jax.config.run import Config
from moe_jax.config.study import Arm, Curve, Scale, Settings, Study, product
from moe_jax.config.train import InitConfig, MeshConfig, OptimizerConfig, ParameterGroup, SampleConfig, TrainConfig

__all__ = [
    "Arm",
    "Config",
    "FFNConfig",
    "RouterOptions",
    "Traits",
    "ConfigError",
    "Curve",
    "DataConfig",
    "InitConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterGroup",
    "PeerConfig",
    "SampleConfig",
    "Scale",
    "Settings",
    "SourceConfig",
    "Study",
    "TrainConfig",
    "differences",
    "field",
    "from_dict",
    "item_type",
    "leaf_fields",
    "leaves",
    "nearest",
    "one_line",
    "product",
    "role",
    "shorten_list",
    "to_dict",
    "unknown_field",
]
