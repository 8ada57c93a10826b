import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

from moe_jax import compat
from moe_jax.ops import balanced_assignment as ops
from moe_jax.ops.balanced_assignment import MAX_PRICE_STEPS, balanced_assignment

T, E = 96, 6
solve = jax.jit(balanced_assignment)


def cases():
    """Scores by name, float64: what routers make, trained or not, and what breaks auctions."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(T, E))
    centres = rng.normal(size=(7, E))[rng.integers(0, 7, T)]
    return {
        "normal": normal,
        "low_rank": rng.normal(size=(T, 2)) @ rng.normal(size=(2, E)),
        "one_direction": rng.normal(size=(T, 1)) * rng.normal(size=E) + 0.01 * normal,
        "all_prefer_one": 30 * (np.arange(E) == 2) + normal,
        "same_order": 100 * rng.normal(size=E) + normal,
        "clusters": centres + 1e-3 * normal,
        "near_duplicates": centres + 1e-5 * normal,
        "duplicates": centres,
        "cauchy": rng.standard_cauchy(size=(T, E)),
        "small_integers": rng.integers(0, 3, (T, E)).astype(float),
        "far_from_zero": 1000 + normal,
        "per_token_offset": 1000 * rng.normal(size=(T, 1)) + normal,
        "tiny": 1e-30 * normal,
        "huge": 1e30 * normal,
        "near_the_largest_float": np.clip(1e38 * normal, -3e38, 3e38),
        "one_outlier": np.where(np.arange(T * E).reshape(T, E) == 7, 1e4, normal),
        "logits_of_a_peaked_softmax": np.log(rng.dirichlet(np.full(E, 0.1), T) + 1e-9),
    }


CASES = cases()


def optimum(scores):
    """The maximum over all assignments with floor or ceil of T / E tokens on each expert, by scipy, float64."""
    tokens, experts = scores.shape
    scale = max(np.abs(scores).max(), 1e-300)
    floor, some = tokens // experts, tokens % experts > 0
    # A bonus above any difference of objectives fills the floor of every expert before its last place.
    bonus = np.repeat([2.0 * tokens, 0.0], [experts * floor, experts * some])
    columns = np.tile(np.arange(experts), floor + some)
    rows, chosen = linear_sum_assignment(scores[:, columns] / scale + bonus, maximize=True)
    return scores[rows, columns[chosen]].sum()


def check(scores, result, tolerance, valid=None):
    """Exact counts, and within `tolerance` of the gain of the optimum over the mean balanced assignment."""
    valid = np.ones(len(scores), bool) if valid is None else valid
    scores, ids = np.asarray(scores, np.float64), np.asarray(result.expert_ids)
    assert ids.dtype == np.int32 and result.rounds.dtype == np.int32
    experts, tokens = scores.shape[1], int(valid.sum())
    assert (ids[~valid] == experts).all()
    counts = np.bincount(ids[valid], minlength=experts)
    assert len(counts) == experts and counts.sum() == tokens
    assert set(counts) <= {tokens // experts, -(-tokens // experts)}
    if tokens:
        kept = scores[valid]
        best, gain = optimum(kept), optimum(kept) - kept.mean(axis=1).sum()
        loss = best - kept[np.arange(tokens), ids[valid]].sum()
        rounding = 1e-14 * np.abs(kept).sum()
        assert loss <= tolerance * gain + rounding, (loss, gain)
        # What the prices certify holds, and is tight.
        assert loss - tolerance * gain - rounding <= result.gap <= 1e-3 * gain + rounding


@pytest.mark.parametrize("tokens", [T, T - 3, T - 5])
@pytest.mark.parametrize("name", CASES)
def test_the_optimum(name, tokens):
    """Within 1e-5 of the gain in float32, divisible or not, with padding that holds anything."""
    scores = CASES[name].astype(np.float32)
    valid = np.random.default_rng(1).permutation(T) < tokens
    padded = np.where(valid[:, None], scores, np.array([np.nan, np.inf, -1e38, 1e38, 0, 5], np.float32))
    result = solve(padded, valid)
    check(scores, result, 1e-5, valid)
    assert result.rounds <= MAX_PRICE_STEPS + 40
    if tokens == T:
        np.testing.assert_array_equal(solve(scores).expert_ids, result.expert_ids)


@pytest.mark.parametrize("name", ["normal", "same_order", "near_duplicates", "far_from_zero"])
def test_float64(name):
    """Exact: the same as scipy's to 1e-12."""
    with jax.enable_x64(True):
        result = solve(CASES[name])
        assert result.gap.dtype == jnp.float64
        check(CASES[name], result, 1e-12 if name != "near_duplicates" else 1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 7])
def test_few_tokens(tokens):
    check(CASES["normal"], solve(CASES["normal"].astype(np.float32), np.arange(T) < tokens), 1e-6, np.arange(T) < tokens)


@pytest.mark.parametrize("shape", [(1, 1), (40, 1), (1, 4), (3, 8), (64, 64), (50, 40)])
def test_shapes(shape):
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    check(scores, solve(scores), 1e-6)


def test_who_gets_one_more_is_part_of_the_maximum():
    scores = np.tile(np.array([0.0, 3.0, 1.0, 2.0], np.float32), (6, 1))
    counts = np.bincount(solve(scores).expert_ids, minlength=4)
    np.testing.assert_array_equal(counts, [1, 2, 1, 2])


@pytest.mark.parametrize("value", [0.0, -7.25, np.nan, np.inf, -np.inf])
def test_all_equal(value):
    result = solve(np.full((T, E), value, np.float32), np.arange(T) < T - 1)
    counts = np.bincount(result.expert_ids, minlength=E)
    assert sorted(counts[:E]) == [T // E - 1] + [T // E] * (E - 1) and counts[E] == 1
    assert result.gap == 0 and result.rounds <= 2 * E


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_scores_that_are_not_finite_count_as_the_smallest(value):
    rng = np.random.default_rng(0)
    bad = rng.random((T, E)) < 0.2
    bad[:20, 3], bad[5] = True, True
    scores = CASES["normal"].astype(np.float32)
    result = solve(np.where(bad, value, scores))
    check(np.where(bad, scores[~bad].min(), scores), result, 1e-6)
    # As 9 it is the better half of 9 + 12; as 0 it would not be. The invalid -50 does not count.
    ids = solve(np.array([[10, value], [12, 9], [-50, 0]], np.float32), np.array([True, True, False])).expert_ids
    np.testing.assert_array_equal(ids, [1, 0, 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_other_dtypes(dtype):
    scores = jnp.asarray(10 * CASES["normal"], dtype)
    result = solve(scores)
    check(scores.astype(jnp.float32), result, 1e-5)
    assert result.gap.dtype == jnp.float32


def test_equivariance_and_invariance():
    """Permuted tokens or experts, a constant added to a token's row, another scale: the same assignment, exactly."""
    rng = np.random.default_rng(2)
    scores = (np.round(CASES["normal"] * 2**12) / 2**12).astype(np.float32)  # sums with integers are exact
    ids = np.asarray(solve(scores).expert_ids)
    tokens, experts = rng.permutation(T), rng.permutation(E)
    np.testing.assert_array_equal(solve(scores[tokens]).expert_ids, ids[tokens])
    np.testing.assert_array_equal(experts[solve(scores[:, experts]).expert_ids], ids)
    np.testing.assert_array_equal(solve(scores + rng.integers(-500, 500, (T, 1)).astype(np.float32)).expert_ids, ids)
    np.testing.assert_array_equal(solve(scores * np.float32(2.0**-40)).expert_ids, ids)


@pytest.mark.parametrize("name", ["normal", "same_order", "duplicates", "small_integers"])
@pytest.mark.parametrize("start", ["zero", "random", "far"])
def test_any_prices_end_at_the_optimum(name, start, monkeypatch):
    """The prices save moves and no more: without the first stage the second is exact still, and ends."""
    factor = {"zero": 0.0, "random": 0.1, "far": 100.0}[start]
    prices = jnp.asarray(factor * np.random.default_rng(3).normal(size=E), jnp.float32)
    monkeypatch.setattr(ops, "_price", lambda *_: (prices, jnp.int32(0)))
    scores = CASES[name][:37].astype(np.float32)
    result = jax.jit(lambda s: balanced_assignment(s))(scores)
    check(scores, result, 1e-4)
    assert result.rounds <= 37


def test_moves_are_bounded(monkeypatch):
    """Past the limit whole groups move: from the worst start far fewer moves than tokens, and exact counts."""
    monkeypatch.setattr(ops, "_price", lambda *_: (jnp.zeros(4), jnp.int32(0)))
    rng = np.random.default_rng(4)
    scores = (rng.normal(size=(4000, 4)) + [10, 0, 0, 0]).astype(np.float32)
    result = jax.jit(lambda s: balanced_assignment(s))(scores)
    np.testing.assert_array_equal(np.bincount(result.expert_ids), [1000] * 4)
    assert 100 < result.rounds < 400
    ids = np.asarray(result.expert_ids)
    gain = scores.max(axis=1).sum() - scores.mean(axis=1).sum()
    assert 0 < result.gap < 0.5 * gain and scores[np.arange(4000), ids].sum() > scores.mean(axis=1).sum()


def test_gradient_is_zero():
    grad = jax.jit(jax.grad(lambda s: balanced_assignment(s).gap + jnp.sum(s)))(jnp.asarray(CASES["clusters"], jnp.float32))
    np.testing.assert_array_equal(grad, np.ones((T, E)))


def groups():
    scores = np.stack([CASES[name] for name in ("normal", "duplicates", "same_order", "cauchy")] * 2).astype(np.float32)
    valid = np.arange(T) < np.array([96, 90, 0, 3, 95, 50, 96, 7])[:, None]
    return scores, valid, [solve(s, v) for s, v in zip(scores, valid)]


def test_vmap_is_a_loop():
    scores, valid, want = groups()
    got = jax.jit(jax.vmap(balanced_assignment))(scores, valid)
    for i, one in enumerate(want):
        # Batched products may round otherwise, and which of several equal tokens moves is then open.
        if len(np.unique(scores[i], axis=0)) == T:
            np.testing.assert_array_equal(got.expert_ids[i], one.expert_ids)
        check(scores[i], jax.tree.map(lambda a: a[i], got), 1e-5, valid[i])


@pytest.mark.parametrize("with_valid", [True, False])
def test_shard_map_is_a_loop(with_valid):
    """Each shard takes its own number of rounds; with the checks of what varies."""
    scores, valid, want = groups()
    mesh = compat.make_mesh(jax.devices(), ("data", "expert"), (4, 2))
    spec = P(("data", "expert"))

    def local(scores, valid):
        result = balanced_assignment(scores[0], valid[0] if with_valid else None)
        return jax.tree.map(lambda a: a[None], result)

    got = jax.jit(compat.shard_map(local, mesh, (spec, spec), spec))(scores, valid)
    if not with_valid:
        want = [solve(s) for s in scores]
    for i, one in enumerate(want):
        # As above; programs for one device and for eight may round otherwise too.
        if len(np.unique(scores[i], axis=0)) == T:
            np.testing.assert_array_equal(got.expert_ids[i], one.expert_ids)
            assert got.rounds[i] == one.rounds
        check(scores[i], jax.tree.map(lambda a: a[i], got), 1e-5, valid[i] if with_valid else None)
    assert len(set(np.asarray(got.rounds).tolist())) > 2
