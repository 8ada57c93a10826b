"""The compiled training step of a config on a slice, and what it costs a chip."""

import copy
import math
import time
from typing import Any, NamedTuple

import jax

from moe_jax import compat
from moe_jax.config import Config, ConfigError
from moe_jax.config.blocks import block_layers
from moe_jax.config.validate import validate
from moe_jax.models import MODELS
from moe_jax.models.flops import block_flops, training_flops_per_token
from moe_jax.parallel.mesh import AXES, mesh_from_config
from moe_jax.plan import hlo
from moe_jax.plan.collectives import Collective, collectives
from moe_jax.plan.products import Kernel, kernels, product_flops
from moe_jax.plan.roofline import GIB, Roofline, roofline
from moe_jax.plan.topology import Topology
from moe_jax.plan.traffic import hbm_bytes, largest_buffers
from moe_jax.train.state import abstract_state
from moe_jax.train.step import abstract_batch, compile_train_step

FIXES = "raise train.microbatches, set model.remat=true, or split over more chips with mesh.fsdp"


class Plan(NamedTuple):
    """One step of a config on a slice. Bytes and FLOPs are a chip's; a multiply-add counts twice.

    mesh: {axis: size}. parameters: of the whole model. tokens: of a step. memory: bytes of arguments, output, aliased
    (output in the arguments' place), temporaries, program. product_flops: outside of kernels. model_flops: three times the
    forward pass. expected_flops: with the blocks that `model.remat` computes again. hbm_bytes, link_bytes: moved in a step.
    unknown_loops: loops that count once because their trips depend on data. buffers: the largest arrays. seconds: to compile.
    """

    topology: Topology
    mesh: dict[str, int]
    parameters: int
    tokens: int
    memory: dict[str, int]
    product_flops: float
    kernels: list[Kernel]
    model_flops: float
    expected_flops: float
    collectives: list[Collective]
    hbm_bytes: float
    link_bytes: float
    unknown_loops: tuple[str, ...]
    buffers: list[tuple[str, str]]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes that a chip must hold at once."""
        return sum(self.memory.values()) - 2 * self.memory["aliased"]

    @property
    def flops(self) -> float:
        """All that the program computes."""
        return self.product_flops + sum(kernel.flops for kernel in self.kernels)

    @property
    def compared_flops(self) -> float:
        """What can be compared with `expected_flops`: without what flash attention computes again by its nature."""
        return self.product_flops + sum(kernel.useful for kernel in self.kernels)

    @property
    def retrieved_bytes(self) -> float:
        """Those of `hbm_bytes` that kernels of retrieval move: rows of experts, and their own inputs and results.

        Rows are fetched once a pass, or twice where the pool's width is split. With split=experts it is a bound: of
        all pairs of a group, as if a device had all their experts.
        """
        return sum(kernel.bytes for kernel in self.kernels if kernel.kind == "retrieval")

    @property
    def times(self) -> Roofline:
        return roofline(self.topology.chip, self.flops, self.hbm_bytes, self.link_bytes)


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles the training step, optimizer included, as training would on the slice.

    Raises:
      ConfigError: the config does not fit the slice's devices, or a chip's memory.
    """
    return analyse(config, topology, *compile_step(config, topology))


def compile_step(config: Config, topology: Topology) -> tuple[Any, float]:
    """(the compiled step, seconds it took).

    Raises:
      ConfigError: as `make_plan`.
    """
    model, mesh = _model_and_mesh(config, topology)
    state = abstract_state(model, config, mesh)
    held = state_bytes(state) * topology.devices_per_chip
    if held > topology.chip.hbm:
        raise _too_large(topology, held, "the parameters and the optimizer alone")
    began = time.perf_counter()
    try:
        compiled = compile_train_step(model, config, mesh, state, abstract_batch(config, mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError("--topology", topology.name, str(error).splitlines()[0], FIXES) from None
    return compiled, time.perf_counter() - began


def _model_and_mesh(config: Config, topology: Topology):
    config = copy.deepcopy(config)
    config.mesh.cpu_devices = 0
    validate(config, len(topology.devices))
    return (
        MODELS[config.model.name](config.model, vocabulary(config)),
        mesh_from_config(config.mesh, topology.devices),
    )


def vocabulary(config: Config) -> int:
    """Tokens V without reading the text: a BPE tokenizer has the size asked for, unless the text is too short for it."""
    if config.data.tokenizer != "bytes":
        return config.data.vocab_size
    from moe_jax.data.tokenizer import ByteTokenizer

    return ByteTokenizer().vocab_size


def state_bytes(state: Any) -> int:
    """Bytes of a device's share of a tree of ShapeDtypeStructs with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def analyse(config: Config, topology: Topology, compiled: Any, seconds: float) -> Plan:
    """What a compiled step costs.

    Raises:
      ConfigError: more than a chip's memory.
    """
    model, mesh = _model_and_mesh(config, topology)
    per_chip = topology.devices_per_chip
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "output": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    program = hlo.parse(compiled.as_text())
    data, tokens = config.data, config.data.batch_size * config.data.sequence_length
    shape = {name: mesh.shape[name] for name in AXES}
    rows = tokens // config.train.microbatches // compat.axis_size(mesh, *compat.BATCH_AXES)
    rows *= experts_per_token(config)
    kernels_of_chip = [
        k._replace(flops=k.flops * per_chip, useful=k.useful * per_chip, bytes=k.bytes * per_chip)
        for k in kernels(program, balanced_rows=rows)
    ]
    links = collectives(program, shape)
    vocab = model.vocab_size
    training = training_flops_per_token(config.model, vocab, data.sequence_length)
    again = recomputed_flops_per_token(config, vocab)
    plan = Plan(
        topology=topology,
        mesh=shape,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(abstract_state(model, config, mesh)["params"])),
        tokens=tokens,
        memory={name: size * per_chip for name, size in memory.items()},
        product_flops=product_flops(program) * per_chip,
        kernels=kernels_of_chip,
        model_flops=training * tokens / topology.chips,
        expected_flops=(training + again) * tokens / topology.chips,
        collectives=links,
        hbm_bytes=hbm_bytes(program) * per_chip,
        link_bytes=sum(c.sent for c in links) * per_chip,
        unknown_loops=program.unknown,
        buffers=largest_buffers(program),
        seconds=seconds,
    )
    if plan.peak > topology.chip.hbm:
        parts = ", ".join(f"{name} {memory[name] * per_chip / GIB:.2f}" for name in ("arguments", "temporaries"))
        raise _too_large(topology, plan.peak, parts)
    return plan


def recomputed_flops_per_token(config: Config, vocab: int) -> float:
    """FLOPs of what `model.remat` computes again: the blocks without their last product, whose result no gradient needs."""
    if not config.model.remat:
        return 0.0
    # A layer that retrieves runs its whole forward pass again.
    costs = [block_flops(config.model, ffn, config.data.sequence_length) for ffn in block_layers(config.model)]
    return sum(cost.attention + cost.ffn + cost.router - cost.last for cost in costs)


def experts_per_token(config: Config) -> float:
    """The most experts that run for a token in one routed layer of the model; 1 without one."""
    layers = [ffn.moe for ffn in block_layers(config.model, "routed")]
    return max((moe.options.experts_per_token(moe, config.data.sequence_length) for moe in layers), default=1)


def _too_large(topology: Topology, needed: int, what: str) -> ConfigError:
    limit = (
        f"needs {needed / GIB:.2f} GiB a chip ({what}), and a {topology.name.partition(':')[0]} has "
        f"{topology.chip.hbm / GIB:.0f} GiB"
    )
    return ConfigError("--topology", topology.name, limit, FIXES)
