import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.routers import GShardConfig
from moe_jax.routing.gshard import GShard, keep_second
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 40, 6, 4


def route(train=True, key=None, **options):
    x = jax.random.normal(jax.random.key(1), (T, D))
    kernel = jax.random.normal(jax.random.key(2), (D, E))
    inputs = RouterInputs(train=train, key=key)
    result = apply(GShard(E, options=GShardConfig(**options)), {"params": {"kernel": kernel}}, x, inputs)
    return *result, jax.nn.softmax(x @ kernel, axis=-1)


def test_all():
    choice, losses, _, p = route(second_expert="all")
    ids = np.argsort(-np.asarray(p), axis=-1)[:, :2]
    gates = np.take_along_axis(np.asarray(p), ids, axis=-1)
    np.testing.assert_array_equal(choice.expert_ids, ids)
    np.testing.assert_allclose(choice.gates, gates / gates.sum(-1, keepdims=True), rtol=1e-5)
    # f is the share of first choices alone.
    f = np.bincount(ids[:, 0], minlength=E) / T
    np.testing.assert_allclose(losses["balance"], E * np.sum(f * np.mean(p, axis=0)), rtol=1e-5)


def test_threshold():
    everyone = route(second_expert="all")[0]
    choice = route(second_expert="threshold", threshold=0.3)[0]
    kept = np.asarray(everyone.gates[:, 1] > 0.3)
    assert 0 < kept.sum() < T
    np.testing.assert_array_equal(choice.expert_ids[:, 1], np.where(kept, everyone.expert_ids[:, 1], E))
    np.testing.assert_array_equal(choice.gates[:, 1], np.where(kept, everyone.gates[:, 1], 0))
    np.testing.assert_array_equal(choice.gates[:, 0], everyone.gates[:, 0])


def test_random_keeps_in_proportion():
    """With probability min(1, 2 g2); five standard deviations of a binomial."""
    n = 20000
    for gate, threshold in ((0.1, 0.5), (0.25, 0.5), (0.5, 0.5), (0.3, 0.2)):
        kept = keep_second(jnp.full(n, gate), "random", threshold, jax.random.key(3))
        p = min(1.0, gate / threshold)
        assert abs(np.mean(kept) - p) <= 5 * np.sqrt(p * (1 - p) / n)


def test_random_is_for_training():
    options = {"second_expert": "random", "key": jax.random.key(5)}
    choice, other = route(**options)[0], route(**{**options, "key": jax.random.key(6)})[0]
    assert np.any(choice.expert_ids != other.expert_ids)
    np.testing.assert_array_equal(route(train=False, **options)[0].expert_ids, route(second_expert="all")[0].expert_ids)
