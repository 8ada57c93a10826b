"""Compiles a training step for a TPU slice, on a machine without a TPU, and says what it costs.

    python -m moe_jax.plan --config=configs/routed_1b.py --topology=v5p:2x2x2
    python -m moe_jax.plan --config=configs/routed_1b.py --topology=v6e:2x4 --json
    python -m moe_jax.plan --config=configs/routed_1b.py --topology=v5e:2x4 --search --axes=fsdp,expert

Prints memory, FLOPs beside the model's own count, kernels and collectives with loops multiplied out, and a roofline. The
step is the one that training runs, optimizer included. Needs `pip install -e '.[tpu]'`. The text is not read: the tokenizer
is taken to have config.data.vocab_size tokens. --search tries the meshes of the slice and ranks those that fit.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

from absl import flags as absl_flags

from moe_jax import cli
from moe_jax.config import Config, ConfigError


def define_flags(values: absl_flags.FlagValues) -> None:
    """The command's own flags."""
    options = {"flag_values": values}
    text = "TPU slice, CHIP:SHAPE, such as v5e:2x4, v5p:2x2x2, v6e:2x4, v4:2x2x2 or tpu7x:2x2x1."
    absl_flags.DEFINE_string("topology", "", text, **options)
    absl_flags.DEFINE_boolean("json", False, "Print JSON: bytes, FLOPs, seconds.", **options)
    absl_flags.DEFINE_boolean("search", False, "Try the meshes of the slice, rank those that fit.", **options)
    text = "Mesh axes that --search varies; the others stay as in the config."
    absl_flags.DEFINE_string("axes", "data,fsdp,expert,tensor", text, **options)


def main(config: Config, flags: absl_flags.FlagValues) -> None:
    """Runs the command."""
    if not flags.topology:
        raise ConfigError("--topology", None, "not given", "write --topology=v5p:2x2x2")
    import jax

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is not needed, and would be held

    from moe_jax.plan import report
    from moe_jax.plan.step import make_plan
    from moe_jax.plan.topology import open_topology, wrong_libtpu

    topology = open_topology(flags.topology)
    if warning := wrong_libtpu():
        print(f"warning: {warning}", file=sys.stderr)
    if flags.search:
        plans, refused = search(config, topology, [name.strip() for name in flags.axes.split(",")])
        if flags.json:
            out = {
                "fit": [report.to_dict(plan) for plan in plans],
                "refused": [{"mesh": mesh, "reason": reason} for mesh, reason in refused],
            }
            print(json.dumps(out, indent=1))
        else:
            print(report.ranking(plans, refused))
        return
    with working(f"compiling for {topology.name}"):
        plan = make_plan(config, topology)
    print(json.dumps(report.to_dict(plan), indent=1) if flags.json else report.to_text(plan))


def search(config: Config, topology, axes: list[str]):
    """(plans that fit, fastest first; [(mesh, why not)])."""
    from moe_jax.parallel.mesh import AXES
    from moe_jax.plan.report import mesh_text
    from moe_jax.plan.search import meshes
    from moe_jax.plan.step import make_plan

    candidates = meshes(config, len(topology.devices), axes)
    plans, refused = [], []
    for number, candidate in enumerate(candidates, 1):
        mesh = {name: getattr(candidate.mesh, name) for name in AXES}
        with working(f"{number} of {len(candidates)}: {mesh_text(mesh)}"):
            try:
                plans.append(make_plan(candidate, topology))
            except ConfigError as error:
                refused.append((mesh, error.limit))
    return sorted(plans, key=lambda plan: (plan.times.overlapped, plan.times.serial)), refused


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on stderr what goes on and for how long."""
    began, done, live = time.perf_counter(), threading.Event(), sys.stderr.isatty()

    def tick():
        while live and not done.wait(1):
            print(f"\r{what} ... {time.perf_counter() - began:.0f} s", end="", file=sys.stderr, flush=True)

    print(f"{what} ...", end="" if live else "\n", file=sys.stderr, flush=True)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print("\r\033[K" if live else "", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, flags=define_flags, workdir=False)
