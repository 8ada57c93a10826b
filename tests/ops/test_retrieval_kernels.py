"""The kernels of a retrieval, interpreted on the CPU, against the plain form; and what they become for an NVIDIA GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from moe_jax import PEER, compat
from moe_jax.ops.activations import ACTIVATIONS
from moe_jax.ops.retrieval import BACKENDS, fused, mosaic, resolve_backend, retrieve, row_sink, rows_of_expert

N, T, R = 29, 7, 37
WIDTHS = {"triton": 24, "mosaic": 128}
# Pallas on Triton is deprecated since jax 0.12; it says so when a kernel is lowered for a GPU.
DEPRECATED = "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
# Each M = 1, 2, 3 in the default tests, the others are slow.
SOME_ACTIVATIONS = [
    activation if activation in (None, "gelu", "swiglu") else pytest.param(activation, marks=pytest.mark.slow)
    for activation in (None, *ACTIVATIONS)
]
ONE_ACTIVATION = [pytest.param(None, marks=pytest.mark.slow), pytest.param("gelu", marks=pytest.mark.slow), "swiglu"]


def make(activation, width, dtype=jnp.float32, tokens=T, retrieved=R):
    """Some ids repeat, some places hold no expert, and no token asks for the last one, which is not a number."""
    keys = jax.random.split(jax.random.key(1), 5)
    ids = jax.random.randint(keys[0], (tokens, retrieved), 0, N + 4).at[0].set(4)
    ids = jnp.where(ids == N - 1, 0, ids).at[2, 1:].set(N)
    gates = jax.random.uniform(keys[1], (tokens, retrieved))
    table = jax.random.normal(keys[2], (N, rows_of_expert(activation), width), dtype).at[N - 1].set(jnp.nan)
    x, d_y = jax.random.normal(keys[3], (2, tokens, width), dtype)
    return x, ids, gates, table, d_y


def run(passes, activation, x, ids, gates, table, d_y, with_sink=False):
    """y and the gradients of x, gates and the table, or of its sink."""
    sink = row_sink(*ids.shape, *table.shape[1:]) if with_sink else None

    def loss(x, gates, table, sink):
        y = retrieve(x, ids, gates, table, sink, activation=activation, passes=passes)
        return jnp.sum(y.astype(jnp.float32) * d_y), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 3 if with_sink else 2), has_aux=True))(x, gates, table, sink)
    return y, *jax.tree.leaves(grads)


def error(a, b):
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return np.max(np.abs(a - b)) / np.max(np.abs(b)) if np.any(b) else np.max(np.abs(a))


@pytest.mark.parametrize("activation", SOME_ACTIVATIONS)
@pytest.mark.parametrize("backend", WIDTHS)
def test_value_and_gradients_are_those_of_the_plain_form(backend, activation):
    """Uneven T, R and, in Triton, D; the plain form gets a table without the expert that nobody asks for."""
    *args, table, d_y = make(activation, WIDTHS[backend])
    ours = run(BACKENDS[backend], activation, *args, table, d_y)
    expected = run(BACKENDS["blocks"], activation, *args, table.at[N - 1].set(0), d_y)
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("activation", ONE_ACTIVATION)
@pytest.mark.parametrize("backend", WIDTHS)
def test_bfloat16_sums_in_float32(backend, activation):
    """As far from the plain form in float32 of the same numbers as the results' last bits and those of h are: 2^-8 each."""
    *args, table, d_y = make(activation, WIDTHS[backend], jnp.bfloat16)
    ours = run(BACKENDS[backend], activation, *args, table, d_y, with_sink=True)
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in (*args, table.at[N - 1].set(0), d_y)]
    expected = run(BACKENDS["blocks"], activation, *wide, with_sink=True)
    assert ours[0].dtype == ours[1].dtype == jnp.bfloat16 and ours[2].dtype == jnp.float32
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b) < 2**-7


def test_many_equal_terms_are_not_lost():
    """128 equal small terms onto a large one: in bfloat16 each would be lost."""
    for backend, width in WIDTHS.items():
        table = jnp.stack([jnp.full((1, width), 256.0), jnp.full((1, width), 0.5)]).astype(jnp.bfloat16)
        ids = jnp.ones((1, 129), jnp.int32).at[0, 0].set(0)
        x = jnp.ones((1, width), jnp.bfloat16)
        y = retrieve(x, ids, jnp.ones(ids.shape), table, activation=None, passes=BACKENDS[backend])
        np.testing.assert_array_equal(y.astype(jnp.float32), 256 + 64)


@pytest.mark.parametrize("activation", ONE_ACTIVATION)
@pytest.mark.parametrize("backend", WIDTHS)
def test_with_a_reduction_between_the_parts(backend, activation):
    """`reduce` sees all pre-activations, and all d_h [T, R, 1]: half of each makes what the plain form makes of it."""
    x, ids, gates, table, d_y = make(activation, WIDTHS[backend])
    table, half = table.at[N - 1].set(0), lambda a: a / 2
    gates = jnp.where(ids < N, gates, 0)

    def both(passes):
        y, hidden = passes.forward(x, ids, gates, table, activation, reduce=half)
        back = passes.backward(d_y, x, ids, gates, hidden, table, activation, reduce=half)
        return y, jnp.where((ids < N)[..., None], hidden, 0), *back

    ours, expected = jax.jit(lambda: both(BACKENDS[backend]))(), jax.jit(lambda: both(BACKENDS["blocks"]))()
    here = (ids < N).astype(jnp.float32)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        a, b = (a * here, b * here) if i == 3 else (a, b)  # d_gates of no expert are masked by `retrieve`
        assert a.shape == b.shape and (not b.size or error(a, b) < 1e-5)


def test_experts_of_a_token_that_do_not_fit_at_once(monkeypatch):
    monkeypatch.setattr(mosaic, "BUFFER_BYTES", 10 * 2 * 128 * 4)  # ten experts of 37
    *args, table, d_y = make("gelu", 128)
    ours = run(BACKENDS["mosaic"], "gelu", *args, table, d_y)
    expected = run(BACKENDS["blocks"], "gelu", *args, table.at[N - 1].set(0), d_y)
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.slow
def test_copies_and_waits_in_the_interpreter_of_tpus():
    """With copies that really run beside the program, scratch memory that is not a number, and a look-out for races."""
    tpu = compat.pallas("tpu")
    x, ids, gates, table, d_y = make("gelu", 128)
    table = table.at[N - 1].set(0)
    gates = jnp.where(ids < N, gates, 0)
    with tpu.force_tpu_interpret_mode(tpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)):
        y, hidden = jax.jit(lambda: mosaic.forward(x, ids, gates, table, "gelu"))()
        d_x, d_gates, weights = jax.jit(lambda: mosaic.backward(d_y, x, ids, gates, hidden, table, "gelu"))()
        jax.block_until_ready((y, d_x, d_gates, weights))
    blocks = BACKENDS["blocks"]
    expected_y, expected_hidden = blocks.forward(x, ids, gates, table, "gelu")
    expected = blocks.backward(d_y, x, ids, gates, expected_hidden, table, "gelu")
    assert error(y, expected_y) < 1e-5 and error(d_x, expected[0]) < 1e-5 and error(weights, expected[2]) < 1e-5
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def for_gpu(backend, activation, dtype, experts, width, tokens=5, retrieved=7):
    """StableHLO of y's gradients by x, gates and the sink, for an H100 that is not there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    rows = rows_of_expert(activation)
    pairs = (tokens, retrieved)
    shapes = [((tokens, width), dtype), (pairs, jnp.int32), (pairs, jnp.float32), ((experts, rows, width), dtype)]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    passes = None if backend == "auto" else BACKENDS[backend]

    def loss(x, ids, gates, table, sink):
        y = retrieve(x, ids, gates, table, sink, activation=activation, passes=passes)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 2, 4))).trace(*args, row_sink(tokens, retrieved, rows, width))
        return traced.lower(lowering_platforms=("cuda",))


def kernels(lowered):
    """The Triton IR of every kernel, as text."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    def walk(operation):
        for inner in (o.operation for region in operation.regions for block in region for o in block):
            if inner.name == "stablehlo.custom_call" and "triton" in str(inner.attributes["call_target_name"]):
                yield ir.StringAttr(inner.attributes["mhlo.backend_config"]["ir"]).value_bytes
            yield from walk(inner)

    module = lowered.compiler_ir()
    with module.context as context:
        dialect.register_dialect(context)
        return [ir.Module.parse(code).operation.get_asm() for code in walk(module.operation)]


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("activation", SOME_ACTIVATIONS)
def test_for_a_gpu_there_is_one_kernel_a_pass(activation):
    """No scatter, no atomic, and no array with T, R and D; the plain form has one."""
    lowered = for_gpu("auto", activation, jnp.bfloat16, 64, 96)
    text, found, rows = lowered.as_text(), kernels(lowered), r"tensor<5x7x(\d+x)?96x"
    assert len(found) == 2 and all("tt.load" in kernel and "atomic" not in kernel for kernel in found)
    assert "scatter" not in text and not re.search(rows, text)
    assert re.search(rows, for_gpu("blocks", activation, jnp.bfloat16, 64, 96).as_text())


@pytest.mark.filterwarnings(DEPRECATED)
def test_addresses_in_a_large_table_have_64_bits():
    """2^33 values. Every place where the table is read has an offset of 64 bits; in a small table of 32."""
    for experts, bits in ((2**21, 64), (64, 32)):
        for kernel in kernels(for_gpu("triton", "gelu", jnp.bfloat16, experts, 2048)):
            offsets = re.findall(r"tensor<2x2048x!tt.ptr<bf16>>, tensor<2x2048xi(\d+)>", kernel)
            assert len(offsets) >= 2 and set(offsets) == {str(bits)}


def test_what_the_kernels_refuse_they_refuse_in_one_line():
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)

    def call(backend, experts=N, width=128, ids=jnp.int32, dtype=jnp.float32):
        args = shape(T, width, dtype=dtype), shape(T, R, dtype=ids), shape(T, R), shape(experts, 2, width, dtype=dtype)
        with pytest.raises(ValueError) as caught:
            jax.eval_shape(lambda *args: retrieve(*args, passes=BACKENDS[backend]), *args)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with jax.enable_x64():
        for backend in WIDTHS:
            assert "beyond int32 in a kernel; use fewer experts" in call(backend, experts=2**31)
            assert "ids int64" in call(backend, ids=jnp.int64)
            assert "x of float64; use 16 or 32 bits, or the backend blocks" in call(backend, dtype=jnp.float64)
    assert "width 96 is no multiple of 128; use the backend blocks" in call("mosaic", width=96)


def test_the_platform_chooses(monkeypatch):
    for platform, expected in (("cpu", "blocks"), ("gpu", "triton"), ("cuda", "triton"), ("tpu", "mosaic")):
        monkeypatch.setattr(compat, "target_platform", lambda platform=platform: platform)
        assert resolve_backend(None, 256) == resolve_backend("auto", 256) == expected
        small = resolve_backend(None, 256, jnp.float32, 16 * 32, 32), resolve_backend(None, 256, jnp.float32, 16 * 32 + 1, 32)
        assert small == ("dense" if platform == "cpu" else expected, expected)
        assert resolve_backend(None, 256, jnp.float64, 9, 32) == "blocks"
    assert resolve_backend(None, 96) == "blocks" and resolve_backend("triton", 96) == "triton"
    monkeypatch.setattr(compat, "target_platform", lambda: "gpu")
    assert resolve_backend(None, 256, jnp.bfloat16) == "triton" and resolve_backend(None, 256, jnp.float64) == "blocks"
    with pytest.raises(ValueError, match="retrieval backend='cuda': one of blocks, dense, triton, mosaic, auto"):
        resolve_backend("cuda", 96)


def test_the_layer_runs_what_it_is_told():
    x = jax.random.normal(jax.random.key(0), (2, 3, 128))
    layer = PEER(49, 2, 4, 8)
    variables = layer.init(jax.random.key(1), x)
    expected = layer.apply(variables, x)[0]
    for backend in WIDTHS:
        apply = lambda x, backend=backend: layer.clone(backend=backend).apply(variables, x)[0]
        assert "name=retrieval" in str(jax.make_jaxpr(apply)(x))
        assert error(jax.jit(apply)(x), expected) < 1e-5


def test_the_error_function_of_the_kernels():
    x = jnp.linspace(-6, 6, 10001)
    assert np.max(np.abs(fused._erf(x) - jax.scipy.special.erf(x))) < 5e-7
