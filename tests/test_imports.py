"""The arrows between the rooms of `moe_jax`, read from the source."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# One way down: a room imports only rooms of its own line and of lines above.
ROOMS = [
    ("config", "cli", "types"),
    ("compat", "sharding"),
    ("ops",),
    ("routing",),
    ("dispatch",),
    ("layers",),
    ("models",),
    ("parallel",),
    ("data",),
    ("train",),
    ("interop",),
    ("evaluate", "generate", "report", "moefy", "study", "plan"),
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# JAX's moving parts outside compat.py, each with its reason.
MOVING = {
    # The TPU kernel, imported where it is called, and a map over the mesh without the replication check.
    "layers/attention_kernels.py": ("jax.experimental.pallas.ops.tpu.splash_attention", "jax.shard_map"),
    # Barriers and broadcasts between processes, imported only where there are several.
    "train/interrupt.py": ("jax.experimental.multihost_utils",),
    "train/checkpoint.py": ("jax.experimental.multihost_utils",),
}
MOVING_NAMES = (
    "jax.experimental",
    "jax.shard_map",
    "jax.make_mesh",
    "jax.sharding.AxisType",
    "jax.sharding.Mesh",
    "jax.sharding.AbstractMesh",
    "jax.sharding.get_abstract_mesh",
    "jax.lax.pcast",
    "jax.lax.pvary",
    "jax.typeof",
)


def imports(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all imports, lazy ones too: the module and, of `from`, each name in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: package.count(".") + 2 - node.level]
                base = ".".join([*parents, base]).strip(".")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def attributes(tree: ast.AST) -> set[str]:
    """Dotted names that the code uses, such as jax.lax.psum; not those of annotations alone."""
    skip = {
        id(child)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
        for child in ast.walk(getattr(node, field))
    }
    return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in skip}


def under(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def violations(path: str, source: str) -> list[str]:
    """What a file of `moe_jax` (path below it) or of `configs` breaks."""
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    tree = ast.parse(source)
    if parts[0] == "configs":
        allowed = ("moe_jax.config",)
        own = [name for name in imports(tree, "configs") if not under(name, *allowed)]
        return [f"{path} imports {name}" for name in own]
    room = parts[0]
    if room == "__init__":
        return [f"{path} imports {name}" for name in imports(tree, "moe_jax") if name != "importlib"]
    if room not in RANK:
        return [f"{path}: a room without a line in ROOMS"]
    names, found = imports(tree, ".".join(["moe_jax", *parts[:-1]])), []
    for name in names:
        if under(name, "moe_jax"):
            rooms = [part for part in name.split(".")[1:2] if part in RANK]
            if not rooms:
                found.append(f"{path} imports {name}, which is no room")
            elif RANK[rooms[0]] > RANK[room]:
                found.append(f"{path} imports {name}, which is below it")
        if under(name, "flax") and RANK[room] < RANK["routing"]:
            found.append(f"{path} imports {name} above routing/")
        if under(name, "optax", "orbax") and RANK[room] < RANK["train"]:
            found.append(f"{path} imports {name} above train/")
        if under(name, "grain", "tensorflow_datasets", "tensorflow") and room not in ("data", "train"):
            found.append(f"{path} imports {name} outside data/ and train/")
    if room != "compat":
        moving = {name for name in names | attributes(tree) if under(name, *MOVING_NAMES)}
        found += [f"{path} uses {n} outside compat.py" for n in moving if not under(n, *MOVING.get(path, ()))]
    return sorted(found)


def files():
    package = ROOT / "moe_jax"
    yield from ((str(p.relative_to(package)), p.read_text()) for p in sorted(package.rglob("*.py")))
    yield from ((str(p.relative_to(ROOT)), p.read_text()) for p in sorted((ROOT / "configs").rglob("*.py")))


@pytest.mark.smoke
def test_the_arrows():
    sources = dict(files())
    assert len(sources) > 40
    assert [line for path, source in sources.items() for line in violations(path, source)] == []
    assert set(MOVING) <= set(sources), "an exception for a file that is gone"


@pytest.mark.parametrize(
    "path, source",
    [
        ("ops/x.py", "import flax.linen as nn"),
        ("ops/x.py", "from moe_jax.layers.moe import MoE"),
        ("ops/x.py", "from moe_jax import layers"),
        ("ops/x.py", "def f():\n    from ..routing import ROUTERS"),
        ("compat.py", "from moe_jax.ops.counting import count_experts"),
        ("config/x.py", "from moe_jax import compat"),
        ("models/x.py", "import optax"),
        ("data/x.py", "from orbax import checkpoint"),
        ("evaluate/x.py", "import grain.python as grain"),
        ("models/x.py", "import tensorflow_datasets as tfds"),
        ("train/x.py", "from moe_jax.generate import main"),
        ("routing/x.py", "from jax.experimental.shard_map import shard_map"),
        ("routing/x.py", "import jax\njax.shard_map(f)"),
        ("layers/x.py", "from jax.experimental import pallas"),
        ("layers/attention_kernels.py", "from jax.experimental import pallas"),
        ("parallel/x.py", "from jax.sharding import AxisType"),
        ("novel/x.py", "import jax"),
        ("layers/x.py", "from moe_jax import MoE"),
        ("configs/x.py", "from moe_jax.train import loop"),
        ("configs/studies/x.py", "from moe_jax.study import plan"),
        ("configs/x.py", "import numpy"),
        ("__init__.py", "import jax"),
    ],
)
def test_a_wrong_arrow_is_seen(path, source):
    assert len(violations(path, source)) == 1


def test_right_arrows_pass():
    source = "import jax\nimport flax\nfrom moe_jax import compat\nfrom moe_jax.ops import x\nfrom . import y"
    assert violations("layers/x.py", source) == []
    assert violations("configs/x.py", "from moe_jax import config as c") == []
    assert violations("configs/x.py", "from moe_jax.config import Config") == []
    assert violations("configs/studies/x.py", "from moe_jax.config.study import Arm, Study") == []
    assert violations("train/x.py", "import optax, grain\ndef f(mesh: jax.sharding.Mesh): pass") == []


def test_public_names():
    """They are there, and `import moe_jax` alone loads no JAX."""
    import moe_jax

    for name in moe_jax.__all__:
        value = getattr(moe_jax, name)
        assert value.__name__ == name and importlib.import_module(value.__module__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moe_jax.nothing
    code = "import moe_jax, moe_jax.config, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
