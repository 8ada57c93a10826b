"""Every exchange with every backend on every mesh against the reference on one device: values and all gradients.

The reference is the backend `loop` in float32. Errors are max|a-b| / max|b| of each array. A combination is compiled once;
what the router may have written is data of one padded shape. By default every two of the three meet once; all three under
the mark `slow`, of stacks of sublayers where F is split too. Stacks have a norm in each sublayer.
"""

import functools
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.dispatch.exchange import EXCHANGES
from moe_jax.layers.experts import Experts
from moe_jax.ops.grouped_matmul import BACKENDS, resolve_backend
from moe_jax.types import TokenChoice

T, K, E, D, F = 48, 2, 8, 8, 16
LIMIT = 1e-5
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = {
    "one": None,
    "expert": (1, 1, 8, 1),
    "data x expert": (2, 1, 4, 1),
    "expert x tensor": (1, 1, 4, 2),
    "fsdp x expert x tensor": (1, 2, 2, 2),
}


def available(backend):
    try:
        return resolve_backend(backend)
    except ValueError:  # its package is missing
        return None


SUBLAYERS = (1, 3)
COMBINATIONS = list(itertools.product(EXCHANGES, filter(available, BACKENDS), MESHES, SUBLAYERS))


def pairwise(combinations):
    """A few of the combinations in which every two values that occur together do so: greedy, each exchange in turn."""
    pairs = lambda c: set(itertools.combinations(enumerate(c), 2))
    missing, chosen = set().union(*map(pairs, combinations)), []
    while missing:
        uses = lambda c: sum(c[0] == other[0] for other in chosen)
        best = max(combinations, key=lambda c: (len(pairs(c) & missing), -uses(c)))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def choices():
    """int32 ids [T, K] by name; E is "no expert"."""
    rng, t = np.random.default_rng(0), np.arange(T)
    ids = {
        "balanced": np.stack([t % E, (t + E // 2) % E], -1),
        "skewed": np.minimum(rng.geometric(0.4, (T, K)) - 1, E - 1),
        "empty experts": np.stack([t % 2, 5 + t % 2], -1),
        "all to one": np.full((T, K), 6),
        "30% padding": np.where(rng.random((T, 1)) < 0.3, E, rng.integers(0, E, (T, K))),
        # What is added to 45 tokens.
        "T not divisible by the shards": np.where(t[:, None] < 45, rng.integers(0, E, (T, K)), E),
    }
    return {name: i.astype(np.int32) for name, i in ids.items()}


def arrays(sublayers):
    """(weights, x [T, D], gates [T, K], cotangent [T, D])"""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    shapes = {"w_in": (E, D, F), "w_gate": (E, D, F), "w_out": (E, F, D)}

    def weights(scale):
        weights = {name: scale * draw(*shape) for name, shape in shapes.items()}
        return weights | {"b" + name[1:]: scale * draw(E, shape[-1]) for name, shape in shapes.items()}

    if sublayers == 1:
        params = weights(1)
    else:
        # With such large steps as that of one sublayer, a later norm would hide what the earlier ones add.
        params = {f"sublayer_{i}": weights(0.3) for i in range(sublayers)}
        for one in params.values():
            one |= {name: draw(E, D) for name in ("norm_scale", "norm_bias")}
    return params, draw(T, D), draw(T, K), draw(T, D)


def compiled(mesh=None, sublayers=1, **options):
    """ids -> (y, the gradients of weights, x and gates), statistics."""
    norm = None if sublayers == 1 else "layernorm"
    layer = Experts(E, F, "swiglu", use_bias=True, sublayers=sublayers, norm=norm, **options)
    whole = mesh and jax.sharding.NamedSharding(mesh, compat.PartitionSpec())

    @functools.partial(jax.jit, in_shardings=whole, out_shardings=whole)
    def run(ids, weights, x, gates, d_y):
        f = lambda weights, x, gates: layer.apply({"params": weights}, x, TokenChoice(ids, gates))
        y, pull, sent = jax.vjp(f, weights, x, gates, has_aux=True)
        return (y, pull(d_y)), sent

    def call(ids):
        if mesh is None:
            return jax.device_get(run(ids, *arrays(sublayers)))
        with jax.set_mesh(mesh):
            return jax.device_get(run(ids, *arrays(sublayers)))

    return call


@functools.cache
def expected(sublayers):
    run = compiled(sublayers=sublayers, backend="loop")
    return {name: run(ids)[0] for name, ids in choices().items()}


def assert_exact(result, reference):
    pairs = zip(jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(reference), strict=True)
    for (path, a), b in pairs:
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= LIMIT, f"{jax.tree_util.keystr(path)}: {error:.2e}"


def check(exchange, backend, mesh, sublayers=1):
    shape = MESHES[mesh]
    devices = None if shape is None else compat.make_mesh(jax.devices()[: np.prod(shape)], AXES, shape)
    run, fell = compiled(devices, sublayers, exchange=exchange, backend=backend), {}
    for name, ids in choices().items():
        result, sent = run(ids)
        assert_exact(result, expected(sublayers)[name])
        fell[name] = sent.get("exchange_fallback")
    if shape is None:
        assert set(fell.values()) == {None}
    else:
        bounded = exchange != "gather" and shape[2] > 2  # with 2 shards, twice an even load is all that there is
        assert fell["balanced"] == 0 and fell["all to one"] == bounded


# tokamax's kernels are for GPUs; here it stands for `ragged_dot`.
SMALL = pairwise([c for c in COMBINATIONS if c[1] != "tokamax"])


@pytest.mark.parametrize("exchange, backend, mesh, sublayers", SMALL)
def test_pairwise(exchange, backend, mesh, sublayers):
    check(exchange, backend, mesh, sublayers)


REST = [c for c in COMBINATIONS if c not in SMALL and (c[3] == 1 or "tensor" in c[2])]


@pytest.mark.slow
@pytest.mark.parametrize("exchange, backend, mesh, sublayers", REST)
def test_the_rest(exchange, backend, mesh, sublayers):
    check(exchange, backend, mesh, sublayers)


PROCESS = """
from moe_jax.config import MeshConfig
from moe_jax.parallel.mesh import start_devices

start_devices(MeshConfig(cpu_devices=4))
from tests.dispatch import test_exactness

for exchange in test_exactness.EXCHANGES:
    test_exactness.check(exchange, "blocks", "expert")
print("exact")
"""


@pytest.mark.slow
def test_two_processes():
    """Of four devices each, joined over the network: experts and tokens on both."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    root = str(pathlib.Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env={**env, "PROCESS_ID": str(i)},
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    for out, err in results:
        assert out.endswith("exact\n"), err
