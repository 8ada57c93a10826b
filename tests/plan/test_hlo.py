"""Reading compiled programs: small ones of the CPU, and lines as a TPU's compiler writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.plan.collectives import collectives, replica_groups
from moe_jax.plan.hlo import parse, parse_arrays, scope_of
from moe_jax.plan.products import kernels, product_flops
from moe_jax.plan.traffic import arrays, hbm_bytes, largest_buffers

MESH = {"fsdp": 2, "expert": 4}


@pytest.fixture(scope="module")
def scanned():
    """5 trips of 3 trips of [8, 32] x [32, 32] and a psum over `expert`; one more product outside."""
    mesh = compat.make_mesh(jax.devices(), tuple(MESH), tuple(MESH.values()))

    def shard(x, w):
        def body(x, _):
            with jax.named_scope("exchange"):
                return 0.1 * compat.vary(jax.lax.psum(x @ w, "expert"), frozenset({"expert"})), None

        def outer(x, _):
            return jax.lax.scan(body, x, None, length=3)[0], None

        x = compat.vary(x, frozenset({"expert"}))
        x = jax.lax.scan(outer, x, None, length=5)[0]
        return jax.lax.psum(x @ w[:, :16], "expert")

    spec = compat.PartitionSpec
    run = compat.shard_map(shard, mesh, (spec("fsdp"), spec()), spec("fsdp"))
    return jax.jit(run).lower(jnp.ones((16, 32)), jnp.ones((32, 32))).compile().as_text()


def test_loops_multiply_products_and_collectives(scanned):
    program = parse(scanned)
    assert program.unknown == ()
    assert product_flops(program) == 15 * 2 * 8 * 32 * 32 + 2 * 8 * 32 * 16
    found = {(c.kind, c.axes, c.scope): c for c in collectives(program, MESH)}
    inner = found["all-reduce", "expert", "exchange"]
    assert (inner.count, inner.payload, inner.largest) == (15, 15 * 8 * 32 * 4, "f32[8,32]")
    assert inner.sent == 2 * 3 / 4 * inner.payload
    assert found["all-reduce", "expert", "other"].count == 1 and len(found) == 2


def test_trips_without_xlas_own_count(scanned):
    known = scanned.count("known_trip_count")
    text = scanned.replace("known_trip_count", "forgotten")
    assert known and product_flops(parse(text)) == product_flops(parse(scanned))


def test_a_loop_that_depends_on_data_is_named():
    def f(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    program = parse(jax.jit(f).lower(jnp.ones((8, 8)), 3).compile().as_text())
    assert len(program.unknown) == 1 and product_flops(program) == 2 * 8**3


def test_traffic_of_a_slice_is_the_slice():
    """A loop over rows of [64, 32, 32] reads one in each trip, not all."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x + w), None), x, w)[0]

    program = parse(jax.jit(f).lower(jnp.ones((32, 32)), jnp.ones((64, 32, 32))).compile().as_text())
    one = 32 * 32 * 4
    assert 64 * 2 * one <= hbm_bytes(program) <= 64 * 8 * one
    assert largest_buffers(program, 1)


# What a TPU's compiler writes and a CPU's does not: products as convolutions, unrolled loops without a count, kernels,
# arrays on the core, groups as a mesh.
TPU = """HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[4,8,1024], param_1: bf16[4,1024,16]) -> bf16[4,8,16] {
  %param_0 = bf16[4,8,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[4,1024,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %conv = bf16[4,8,16]{2,1,0} convolution(%param_0, %param_1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%condition (wide.param: (bf16[4,8,1024], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(6)
  %wide.param = (bf16[4,8,1024]{2,1,0}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%wide.param), index=1
  ROOT %compare = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body (wide.param.1: (bf16[4,8,1024], u32[])) -> (bf16[4,8,1024], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %wide.param.1 = (bf16[4,8,1024]{2,1,0}, u32[]{:T(128)}) parameter(0)
  %x = bf16[4,8,1024]{2,1,0} get-tuple-element(%wide.param.1), index=0
  %counter.1 = u32[]{:T(128)} get-tuple-element(%wide.param.1), index=1
  %copied = u32[]{:T(128)S(6)} copy(%counter.1)
  %weights = bf16[4,1024,16]{2,1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %product = bf16[4,8,16]{2,1,0} fusion(%x, %weights), kind=kOutput, calls=%fused
  %moved = (bf16[4,8,1024]{2,1,0}, bf16[4,8,1024]{2,1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}, metadata={op_name="jit(step)/transpose(jvp(D))/attention/dot_general" stack_frame_id=1}
  %arrived = bf16[4,8,1024]{2,1,0} collective-permute-done(%moved)
  %next = u32[]{:T(128)} add(%copied, %two)
  ROOT %tuple.1 = (bf16[4,8,1024]{2,1,0}, u32[]{:T(128)}) tuple(%arrived, %next)
}

ENTRY %main (p0: bf16[4,8,1024], p1: bf16[512,256], p2: bf16[8,256,128], p3: bf16[2,4,128,64], p4: s32[1]) -> bf16[4,8,1024] {
  %p0 = bf16[4,8,1024]{2,1,0} parameter(0)
  %p1 = bf16[512,256]{1,0} parameter(1)
  %p2 = bf16[8,256,128]{2,1,0} parameter(2)
  %p3 = bf16[2,4,128,64]{3,2,1,0} parameter(3)
  %p4 = s32[1]{0} parameter(4)
  %zero = u32[]{:T(128)} constant(0)
  %tuple = (bf16[4,8,1024]{2,1,0}, u32[]{:T(128)}) tuple(%p0, %zero)
  %while = (bf16[4,8,1024]{2,1,0}, u32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  %ragged-dot-metadata = (s32[9]{0:T(128)}, s32[1]{0}) custom-call(%p4), custom_call_target="tpu_custom_call"
  %ragged-dot-none.3 = f32[512,128]{1,0} custom-call(%p4, %p1, %p2), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/experts/ragged_dot"}
  %tgmm.1 = f32[8,256,128]{2,1,0} custom-call(%p4, %p1, %ragged-dot-none.3), custom_call_target="tpu_custom_call"
  %splash_mha_fwd = bf16[2,4,128,64]{3,2,1,0} custom-call(%p3, %p3, %p3), custom_call_target="tpu_custom_call"
  %splash_mha_dkv.1 = bf16[2,4,128,64]{3,2,1,0} custom-call(%p3, %p3, %p3), custom_call_target="tpu_custom_call"
  %splash_mha_dq.1 = bf16[2,4,128,64]{3,2,1,0} custom-call(%p3, %p3, %p3), custom_call_target="tpu_custom_call"
  %sum = (f32[16]{0}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %b), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add, metadata={op_name="jit(step)/update/reduce_sum"}
  ROOT %out = bf16[4,8,1024]{2,1,0} get-tuple-element(%while), index=0
}
"""  # noqa: E501


def test_a_tpu_program():
    program = parse(TPU)
    assert program.times["body"] == 3  # from 0 to 6 in steps of 2
    # 4 products of [8, 1024] x [1024, 16]: of the 16 pairs of output and window, 4 meet an element.
    assert product_flops(program) == 3 * 4 * 2 * 8 * 1024 * 16
    found = {k.name: k for k in kernels(program)}
    grouped = 2 * 512 * 256 * 128
    assert found["ragged-dot-metadata"].kind == "other" and found["ragged-dot-metadata"].flops == 0
    assert found["ragged-dot-none"].flops == found["tgmm"].flops == grouped
    assert found["ragged-dot-none"].operands == "bf16[512,256] x bf16[8,256,128]"
    half = 2 * 2 * 4 * 128 * 128 * 64 / 2
    flops = {name: (k.flops / half, k.useful / half) for name, k in found.items() if k.kind == "attention"}
    assert flops == {"splash_mha_fwd": (2, 2), "splash_mha_dkv": (4, 2), "splash_mha_dq": (3, 2)}
    few = {k.name: k.flops for k in kernels(program, balanced_rows=128)}
    assert few["ragged-dot-none"] == few["tgmm"] == grouped / 4
    permute, reduce = collectives(program, MESH)
    assert permute[:5] == ("collective-permute", "fsdp", "attention backward", "bf16[4,8,1024]", 3)
    assert permute.sent == permute.payload == 3 * 4 * 8 * 1024 * 2
    assert reduce[:5] == ("all-reduce", "fsdp", "update", "f32[16]", 1) and reduce.sent == 17 * 4
    assert "bf16[4,1024,16]" in {str(a) for a in arrays(program)}


def test_a_collective_that_is_spread_over_fusions_counts_once():
    part = """
%part.N (param_0: f32[4]) -> f32[16] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %all-gather.N = f32[16]{0} all-gather(%param_0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}
"""
    calls = "".join(f"  %f{i} = f32[16]{{0}} fusion(%x), kind=kCustom, calls=%part.{i}\n" for i in range(3))
    text = "".join(part.replace(".N", f".{i}") for i in range(3)) + (
        "\nENTRY %main (x: f32[4]) -> f32[4] {\n  %x = f32[4]{0} parameter(0)\n" + calls + "}\n"
    )
    (found,) = collectives(parse(text), MESH)
    assert (found.count, found.payload, found.sent, found.axes) == (1, 64, 48, "expert")
    assert hbm_bytes(parse(text)) == 0  # beside the work of the fusions


def test_a_retrieval_says_what_it_moves():
    text = """
ENTRY %main (t: f32[65536,2,256], i: s32[8,4]) -> f32[8,256] {
  %t = f32[65536,2,256]{2,1,0} parameter(0)
  %i = s32[8,4]{1,0} parameter(1)
  ROOT %jvp_retrieval_.3 = f32[8,256]{1,0} custom-call(%i, %t), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"600","transcendentals":"32","bytes_accessed":"7000","remote_bytes_transferred":"0"}}}
}
"""  # noqa: E501
    (kernel,) = kernels(parse(text))
    assert (kernel.kind, kernel.count, kernel.flops, kernel.useful, kernel.bytes) == ("retrieval", 1, 600, 600, 7000)
    assert hbm_bytes(parse(text)) == 7000
    assert hbm_bytes(parse(text.replace("retrieval", "other"))) > 65536 * 2 * 256 * 4


def test_a_scatter_moves_its_rows():
    """In a fusion and alone: the rows it gets, those it finds and those it writes, and the ids; not the table."""
    scatter = "f32[65536,256]{1,0} scatter(%t, %i, %u), update_window_dims={1}, inserted_window_dims={0}, to_apply=%last"
    head = """
%last (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}
"""
    given = (
        "  %t = f32[65536,256]{1,0} parameter(0)\n  %i = s32[32,1]{1,0} parameter(1)\n  %u = f32[32,256]{1,0} parameter(2)\n"
    )
    shape = "(t: f32[65536,256], i: s32[32,1], u: f32[32,256]) -> f32[65536,256] {\n"
    rows = 32 * 256 * 4
    alone = head + "\nENTRY %main " + shape + given + f"  ROOT %s = {scatter}\n}}\n"
    assert hbm_bytes(parse(alone)) == 3 * rows + 32 * 4
    fused = head + "\n%body " + shape + given + f"  ROOT %s = {scatter}\n}}\n\nENTRY %main " + shape + given
    fused += "  ROOT %f = f32[65536,256]{1,0} fusion(%t, %i, %u), kind=kCustom, calls=%body\n}\n"
    assert hbm_bytes(parse(fused)) == 3 * rows + 32 * 4


def test_arrays_on_the_core_are_no_traffic():
    body = parse(TPU)
    once = hbm_bytes(body)
    everywhere = hbm_bytes(parse(TPU.replace("S(1)", "")))
    assert everywhere - once == 3 * 4 * 1024 * 16 * 2


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}, x", [[3, 2], [1, 0]]),
        ("replica_groups={{0,1,2},{3}}, x", None),
        ("no groups", None),
    ],
)
def test_replica_groups(text, groups):
    found = replica_groups(text, 4)
    assert found is None if groups is None else np.array_equal(found, groups)


def test_shapes_and_scopes():
    a, b, c = parse_arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[], f8e4m3fn[<=5])")
    assert (a.bytes, a.on_core, b.bytes, c.bytes, str(a)) == (12, True, 1, 5, "bf16[2,3]")
    assert scope_of("jit(f)/transpose(jvp(D))/moe/experts/exchange/psum") == "exchange backward"
    assert scope_of("jit(f)/add") == "other"
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")
