"""Training states of a few arrays, sharded, and runs that saved them, shared by the tests of checkpoints and of starts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.compat import make_mesh
from moe_jax.config import Config
from moe_jax.data import ByteTokenizer, Tokenizer
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.start import run_meta

META = {"config": {"seed": 3}, "data_position": 7, "none": None, "tokenizer": '{"é": "\\u0120"}'}
AXES = ("data", "fsdp", "expert")
SPECS = {
    "params/layers/moe/experts": P("expert", "fsdp", None),
    "params/layers/dense": P("fsdp", None),
    "params/embed": P(None, "fsdp"),
}
MESHES = {1: (1, 1, 1), 4: (1, 2, 2), 8: (2, 2, 2)}


def initial_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers": {
            "moe": {"experts": rng.normal(size=(8, 16, 64)).astype(np.float32)},
            "dense": rng.normal(size=(16, 3)).astype(np.float32),
        },
        "embed": rng.normal(size=(10, 16)).astype(jnp.bfloat16),
        "norm": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
    }


def put(tree, devices=8):
    """`tree` on a mesh: parameters, and what is shaped like them, sharded; the rest replicated."""
    mesh = make_mesh(jax.devices()[:devices], AXES, MESHES[devices])

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for key, spec in SPECS.items() if name.endswith(key.removeprefix("params/"))), P())
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(leaf, tree)


def make_state(seed=0, devices=8, router_state=None):
    params = initial_params(seed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    opt_state = jax.tree.map(lambda x: x + np.ones((), x.dtype), optimizer.init(params))
    if router_state is None:
        router_state = {"layers": {"moe": {"bias": np.arange(8, dtype=np.float32)}}}
    state = {"params": params, "router_state": router_state, "opt_state": opt_state, "step": np.int32(seed)}
    return put({**state, "flags": {"frozen": np.array([True, False]), "nothing": ()}}, devices)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(workdir, steps=(1,), max_to_keep=5, **options):
    with Checkpoints(workdir, max_to_keep=max_to_keep, **options) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {**META, "data_position": step})


def data_of(tokenizer: Tokenizer) -> types.SimpleNamespace:
    """What the description of a checkpoint takes from a run's data."""
    return types.SimpleNamespace(tokenizer=tokenizer, fingerprint="text", identity={})


def save_run(workdir, config: Config, steps=(1,), tokenizer: Tokenizer | None = None):
    """Checkpoints with the description of a run of `config`, and of its arrays the step alone."""
    with Checkpoints(workdir, max_to_keep=5, asynchronous=False) as checkpoints:
        for step in steps:
            meta = run_meta(config, data_of(tokenizer or ByteTokenizer()), step)
            checkpoints.save(step, {"step": jnp.int32(step)}, meta)
