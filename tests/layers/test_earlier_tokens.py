"""The ids before each token: by hand, and the same in one call as in many."""

import jax
import numpy as np
import pytest

from moe_jax.layers.earlier_tokens import earlier_tokens

IDS = np.array([[4, 7, 2, 9, 5, 0, 0], [0, 3, 8, 1, 6, 2, 2]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1, 2]], np.int32)


def test_by_hand():
    """Documents and padding end what can be seen."""
    nearest, second, third = np.moveaxis(earlier_tokens(IDS, SEGMENTS, 3)[0], -1, 0)
    np.testing.assert_array_equal(nearest, [[-1, 4, 7, -1, 9, -1, -1], [-1, -1, 3, 8, 1, 6, -1]])
    np.testing.assert_array_equal(second, [[-1, -1, 4, -1, -1, -1, -1], [-1, -1, -1, 3, 8, 1, -1]])
    np.testing.assert_array_equal(third, [[-1] * 7, [-1, -1, -1, -1, 3, 8, -1]])


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5, 6), (5,), (6,)])
def test_calls_one_after_the_other(cuts):
    """Also where a row is padded between two calls, and where fewer tokens than the window holds have come."""
    run, window, parts = jax.jit(earlier_tokens, static_argnums=2), None, []
    for first, last in zip((0, *cuts), (*cuts, IDS.shape[1])):
        part, window = run(IDS[:, first:last], SEGMENTS[:, first:last], 3, window)
        parts.append(part)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), earlier_tokens(IDS, SEGMENTS, 3)[0])
    np.testing.assert_array_equal(window.token_ids, [[2, 9, 5], [6, 2, 2]])
    np.testing.assert_array_equal(window.segment_ids, [[1, 2, 2], [1, 1, 2]])
