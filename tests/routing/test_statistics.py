import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.statistics import experts_by_row, matrix
from moe_jax.types import ExpertChoice, TokenChoice


def test_a_gate_that_underflowed_is_a_choice():
    """Of 3 tokens and 2 experts; a sigmoid far below 0 is exactly 0, "no expert" stays out."""
    gates = jax.nn.sigmoid(jnp.asarray([[0.0, 0.0], [-200.0, 0.0], [0.0, -200.0]]))
    assert gates[1, 0] == 0
    choice = TokenChoice(jnp.asarray([[0, 2], [1, 2], [1, 0]]), gates)
    found = np.asarray(jax.jit(lambda c: matrix(c, 3, 2, 0))(choice))
    np.testing.assert_array_equal(found > 0, [[True, False], [False, True], [True, True]])
    np.testing.assert_allclose(found, [[0.5, 0], [0, 0], [0, 0.5]], atol=1e-30)
    columns = ExpertChoice(jnp.asarray([[0], [3]]), jnp.asarray([[0.0], [0.0]]))
    np.testing.assert_array_equal(matrix(columns, 3, 2, 0) > 0, [[True, False], [False, False], [False, False]])


def test_experts_by_row():
    """2 rows of 3 tokens, E = 2: virtual experts (3 and more) and padding do not count."""
    ids = jnp.asarray([[0, 1], [2, 2], [0, 2], [1, 3], [0, 1], [2, 2]])
    valid = jnp.asarray([True, False, True, True, True, False])
    np.testing.assert_allclose(experts_by_row(ids, valid, 2, 2), [3 / 2, 3 / 2])
    np.testing.assert_allclose(experts_by_row(ids, None, 2, 2), [3 / 3, 3 / 3])
