"""A layer of a million one-neuron experts (PEER), or of as many values (product-key memory)."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config import ConfigError, ModelConfig, PeerConfig
from moe_jax.config.arguments import check_arguments, limited_fields
from moe_jax.config.validate.common import check_product_keys
from moe_jax.dispatch.retrieval import AXIS, sharded_passes
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.tokens import flatten_tokens, needs_router_state, unflatten_tokens
from moe_jax.ops.activations import SECOND_MOMENT
from moe_jax.ops.precision import standard_promotion
from moe_jax.ops.retrieval import BACKENDS, resolve_backend, retrieve, rows_of_expert
from moe_jax.routing.product_keys import ProductKeys
from moe_jax.sharding import mesh_spec
from moe_jax.types import Aux, RouterInputs

# Logical axes of the pool [N, M, D] by the dimension that is split.
POOL_AXES = {"width": (None, None, "retrieved_width"), "experts": ("experts", None, None)}


# Arguments with the type and limits of a field of the config; the activation may be None besides.
FIELDS = {
    **limited_fields(
        PeerConfig,
        without=("activation", "share_pool", "row_gradients", "selector", "query_rank", "score", "gate_scale"),
    ),
    "replaces": (ModelConfig, "activation"),
    "output_init": (ModelConfig, "residual_init"),
}


# Arguments that a given router has of its own.
OF_ROUTER = ("heads", "top_k", "key_width", "share_keys", "query_norm")


class PEER(nn.Module):
    """Parameter-efficient expert retrieval (arXiv:2407.04153): H heads pick K of N experts each; the sum of all H*K.

    It has reverse-mode gradients of any order: `jax.grad` of `jax.grad` too. Forward mode (`jax.jvp`, `jax.hessian`) is refused
    by JAX with a TypeError about custom_vjp.

    Parameters: `experts` [N, M, D], every expert's rows side by side: the input row, with a gated activation the gate row,
    and the output row; those of `ProductKeys` under `router`, and of `FeedForward` under `shared`.

    The gradient of the pool can be had by rows: put zeros (`ops.retrieval.row_sink`) named `experts` at this module's place in
    the collection `row_sinks`. The pool then gets no gradient; that of the zeros, with `Aux.row_ids`, is the pool's by rows.

    Attributes:
      experts: N, a square where product keys search it.
      heads, top_k, key_width, share_keys, query_norm: see `ProductKeys`; not for a given `router`.
      activation: of the neurons; None: the experts are output rows alone, multiplied by their gates (product-key memory).
      replaces: activation of the feed-forward layer whose output variance this one starts with.
      shared_width: hidden width of a dense network beside the experts that sees every token; 0: none.
      split: what the mesh axis `expert` splits: "width" or "experts", see `moe_jax.dispatch.retrieval`.
      backend: what runs the retrieval, one of `ops.retrieval.BACKENDS`; None: the platform's best. Inside a caller's own
        shard_map it is always `blocks`: its replication checks refuse kernels.
      dtype: compute dtype; None: that of x. The router computes in float32 at least.
      param_dtype: of the pool.
      router: a module of N = `experts` called with (x [T, D], RouterInputs) that returns (TokenChoice, losses, stats) and has
        `gate_square`, about the sum of the squares of a token's gates at the start; such as a `ProductKeys` with other options,
        or a `TokenHash`. None: `ProductKeys` as the arguments say.
      output_init: factor on the standard deviation with which output rows, and `w_out` of the network beside them, start.
    """

    experts: int = 1024**2
    heads: int = 8
    top_k: int = 16
    key_width: int = 256
    share_keys: bool = True
    query_norm: str = "batchnorm"
    activation: str | None = "gelu"
    replaces: str = "gelu"
    shared_width: int = 0
    split: str = "width"
    backend: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    router: nn.Module | None = None
    output_init: float = 1.0

    @nn.compact
    @standard_promotion()
    def __call__(self, x: jax.Array, inputs: RouterInputs | None = None, *, train: bool = False) -> tuple[jax.Array, Aux]:
        """x [..., S, D] -> (y [..., S, D], Aux). Padding gets nothing from the experts.

        `inputs` has an entry for each of the T leading positions of x, flattened; its `train` wins over the argument. With
        "batchnorm" a call in training uses its own batch's statistics, in evaluation the running ones of the collection
        `router_state`, which `routing.product_keys.update` moves on.

        Raises:
          ValueError: in one line: an argument that the config's field refuses, or that does not fit the others; what
            the kernel of a backend cannot do; a missing `router_state`; a mesh of Explicit axes, or whose shards do
            not divide what they split.
        """
        activation = {} if self.activation is None else {"activation": (PeerConfig, "activation")}
        check_arguments("PEER", vars(self), FIELDS | activation)
        router = self._router()
        compat.refuse_explicit_axes("PEER")
        tokens, inputs, _ = flatten_tokens(x, inputs, train, "PEER")
        width = x.shape[-1]
        with jax.named_scope("route"), needs_router_state("PEER"):
            choice, losses, stats = router(tokens, inputs)
        rows = rows_of_expert(self.activation)
        init = functools.partial(self._init, router.gate_square)
        init = nn.with_logical_partitioning(init, POOL_AXES[self.split])
        pool = self.param("experts", init, (self.experts, rows, width), self.param_dtype)
        sink = self.get_variable("row_sinks", "experts") if self.has_variable("row_sinks", "experts") else None
        tokens = tokens.astype(self.dtype or x.dtype)
        if self.is_initializing():
            y = jnp.zeros_like(tokens)
        else:
            with jax.named_scope("experts"):
                y = retrieve(
                    tokens,
                    *choice,
                    pool,
                    sink,
                    activation=self.activation,
                    passes=self._passes(width, jnp.result_type(tokens, pool)),
                )
        if self.shared_width:
            shared = FeedForward(
                self.shared_width, self.replaces, False, tokens.dtype, output_init=self.output_init, name="shared"
            )
            y = y + shared(tokens)
        row_ids = {} if sink is None else {"experts": choice.expert_ids[: math.prod(x.shape[:-1])]}
        return unflatten_tokens(y, x.shape), Aux(losses, stats, row_ids)

    def _router(self):
        if self.router is None:
            check_product_keys("PEER ", self.experts, self.top_k, self.key_width)
            return ProductKeys(
                self.experts, self.heads, self.top_k, self.key_width, self.share_keys, self.query_norm, name="router"
            )
        for name in OF_ROUTER:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"PEER {name}", value, "without effect on the given router", "leave it out, and set it there")
        if self.router.experts != self.experts:
            limit = f"its router was built for {self.router.experts} experts"
            raise ConfigError("PEER experts", self.experts, limit, "give both the same number")
        return self.router

    def _init(self, gate_square, key, shape, dtype):
        """Pre-activations of variance 1 from inputs of mean square 1, and the output variance of what is replaced.

        var(y) = gate_square E[act^2] var(v); of a feed-forward layer it is E[act^2].
        `output_init` comes on top.
        """
        own = 1.0 if self.activation is None else SECOND_MOMENT[self.activation]
        out = math.sqrt(SECOND_MOMENT[self.replaces] / own / gate_square)
        stds = jnp.array([1 / math.sqrt(shape[-1])] * (shape[1] - 1) + [self.output_init * out], dtype)
        return jax.random.normal(key, shape, dtype) * stds[:, None]

    def _passes(self, width, dtype):
        mesh = compat.current_mesh()
        if compat.inside_shard_map(mesh):
            return BACKENDS["blocks"]
        if mesh is None or mesh.size == 1:
            return BACKENDS[resolve_backend(self.backend, width, dtype, self.experts, self.heads * self.top_k)]
        shards, total = compat.axis_size(mesh, AXIS), width if self.split == "width" else self.experts
        if total % shards:
            raise ValueError(f"PEER with split={self.split!r}: {shards} shards do not divide {total}; use other sizes")
        local_width = width // shards if self.split == "width" else width
        backend = resolve_backend(self.backend, local_width, dtype, self.experts, self.heads * self.top_k)
        return sharded_passes(mesh, mesh_spec(mesh, POOL_AXES[self.split]), backend)
