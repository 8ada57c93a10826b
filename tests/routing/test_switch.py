import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import SwitchConfig, TopKConfig
from moe_jax.routing.switch import Switch
from moe_jax.routing.top_k import TopK
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 12, 6, 4


def route(router, inputs=None, x=None):
    x = jax.random.normal(jax.random.key(1), (T, D)) if x is None else x
    variables = {"params": {"kernel": jax.random.normal(jax.random.key(2), (D, E))}}
    return apply(router, variables, x, inputs or RouterInputs()), x @ variables["params"]["kernel"]


def test_the_gate_is_the_raw_probability():
    (choice, losses, _), logits = route(Switch(E))
    p = jax.nn.softmax(logits, axis=-1)
    np.testing.assert_array_equal(choice.expert_ids[:, 0], np.argmax(p, axis=-1))
    np.testing.assert_allclose(choice.gates[:, 0], np.max(p, axis=-1), rtol=1e-5)
    f = np.bincount(np.argmax(p, axis=-1), minlength=E) / T
    np.testing.assert_allclose(losses["balance"], E * np.sum(f * np.mean(p, axis=0)), rtol=1e-5)


@pytest.mark.parametrize("router", [Switch(E, options=SwitchConfig(jitter=0.1)), TopK(E, 1, options=TopKConfig(jitter=0.1))])
def test_jitter(router):
    """In training alone, within its range, and different for each key."""
    gates = lambda **inputs: route(router, RouterInputs(**inputs))[0][0].gates
    quiet = gates()
    np.testing.assert_array_equal(gates(key=jax.random.key(0)), quiet)
    np.testing.assert_array_equal(gates(train=True), quiet)
    noisy = gates(train=True, key=jax.random.key(0))
    assert np.any(noisy != quiet)
    np.testing.assert_array_equal(gates(train=True, key=jax.random.key(0)), noisy)
    assert np.any(gates(train=True, key=jax.random.key(1)) != noisy)


def test_jitter_scales_each_input():
    """With one input and one weight per expert the logits are those of the input times 1 - jitter to 1 + jitter."""
    x = jnp.ones((2000, 1))
    router = Switch(2, options=SwitchConfig(jitter=0.2))
    variables = {"params": {"kernel": jnp.asarray([[1.0, 0.0]])}}
    gates = router.apply(variables, x, RouterInputs(train=True, key=jax.random.key(0)))[0].gates[:, 0]
    factors = np.log(gates / (1 - gates))
    assert 0.8 <= factors.min() < 0.81 and 1.19 < factors.max() <= 1.2001
    np.testing.assert_allclose(factors.mean(), 1, atol=0.01)
