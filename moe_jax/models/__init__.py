"""Whole models: a dict from name to builder."""

from moe_jax.models.decoder import Decoder

MODELS = {"decoder": Decoder}
