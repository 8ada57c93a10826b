import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.moe import MoE
from moe_jax.routing.soft_moe import SoftMoE
from moe_jax.types import RouterInputs
from tests.compiled import apply, assert_like_reference

B, S, D, E, F, C = 2, 7, 6, 3, 5, 2


def test_against_a_loop():
    """Sequence by sequence, slot by slot, with padding in one of them; outputs and gradients."""
    with jax.enable_x64(True):
        check_against_a_loop()


def check_against_a_loop():
    x = jax.random.normal(jax.random.key(1), (B, S, D), jnp.float64)
    valid = np.ones((B, S), bool)
    valid[1, 4:] = False
    layer = MoE(E, F, 1, SoftMoE(E, C, parent=None), activation="relu")
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    params["router"]["scale"] = jnp.float64(3.0)
    inputs = RouterInputs(valid=jnp.asarray(valid).reshape(-1), sequences=jnp.repeat(jnp.arange(B), S), train=True)

    def slow(params, x):
        phi = params["router"]["kernel"].reshape(D, E * C)
        phi = phi / jnp.linalg.norm(phi, axis=0) * params["router"]["scale"]
        rows = []
        for b in range(B):
            n = int(valid[b].sum())
            z = x[b, :n]
            logits = z / jnp.linalg.norm(z, axis=1, keepdims=True) @ phi
            slots = jax.nn.softmax(logits, axis=0).T @ z
            w = params["experts"]
            out = jnp.stack([jnp.maximum(slots[i] @ w["w_in"][i // C], 0) @ w["w_out"][i // C] for i in range(E * C)])
            y = jax.nn.softmax(logits, axis=1) @ out
            rows.append(jnp.concatenate([y, jnp.zeros((S - n, D))]))
        return jnp.stack(rows)

    def fast(params, x):
        return layer.apply({"params": params}, x, inputs)[0]

    assert_like_reference(fast, slow, params, x, limit=1e-10)


def test_sums():
    """Each slot's shares over a sequence's tokens sum to 1, and each token's over all slots."""
    x = jax.random.normal(jax.random.key(1), (B * S, D))
    sequences = jnp.repeat(jnp.arange(B), S)
    router = SoftMoE(E, C)
    variables = jax.jit(router.init)(jax.random.key(0), x, RouterInputs())
    mix, _, stats = apply(router, variables, x, RouterInputs(sequences=sequences))
    np.testing.assert_allclose(mix.dispatch.reshape(B, S, E, C).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mix.combine.sum(axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(stats["counts"].sum(), B * S, rtol=1e-5)
