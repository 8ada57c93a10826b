import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import BaseConfig
from moe_jax.routing.base import Base
from moe_jax.types import RouterInputs
from tests.compiled import apply

T, D, E = 24, 6, 4


def route(train, groups=1, valid=None, x=None):
    x = jax.random.normal(jax.random.key(1), (T, D)) + 1 if x is None else x
    kernel = jax.random.normal(jax.random.key(2), (D, E))
    inputs = RouterInputs(train=train, valid=valid)
    return apply(Base(E, BaseConfig(groups=groups)), {"params": {"kernel": kernel}}, x, inputs), x @ kernel


def test_balanced_in_training_and_greedy_in_evaluation():
    (choice, losses, stats), logits = route(True)
    np.testing.assert_array_equal(stats["counts"], T // E)
    assert losses == {}
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(choice.expert_ids), axis=-1)
    np.testing.assert_allclose(choice.gates, 1 / (1 + np.exp(-chosen)), rtol=1e-5)
    (greedy, _, stats), _ = route(False)
    np.testing.assert_array_equal(greedy.expert_ids[:, 0], np.argmax(logits, axis=-1))
    assert stats["counts"].max() > T // E


def test_groups_are_balanced_by_themselves():
    (choice, _, _), _ = route(True, groups=3)
    for part in np.asarray(choice.expert_ids).reshape(3, -1):
        np.testing.assert_array_equal(np.bincount(part, minlength=E), T // E // 3)
    with pytest.raises(ValueError, match="base.groups=5 does not divide the 24 tokens"):
        route(True, groups=5)


def test_padding_takes_no_place():
    valid = np.arange(T) % 3 > 0  # 16
    (choice, _, stats), _ = route(True, valid=jnp.asarray(valid))
    np.testing.assert_array_equal(stats["counts"], 4)
    assert np.all((np.asarray(choice.expert_ids[:, 0]) < E) == valid)


def test_embeddings_start_orthogonal():
    kernel = Base(E).init(jax.random.key(0), jnp.ones((T, D)), RouterInputs())["params"]["kernel"].value
    np.testing.assert_allclose(kernel.T @ kernel, 0.01 * np.eye(E), atol=1e-6)
