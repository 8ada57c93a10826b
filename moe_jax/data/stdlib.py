"""TFDS dataset of the running Python's own source code: real text that needs no download."""

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from moe_jax.data.hashing import digest, hash64, hold_out

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(eq=False, kw_only=True)
class PythonStdlibConfig(tfds.core.BuilderConfig):
    """Which files `PythonStdlib` holds; `python_stdlib_config` makes it, with a `name` for their content.

    Attributes:
      folders: (label, path) of each folder of sources; a label begins the paths of its files.
      held_out_percent: share of validation and of test, each.
      undecodable: files left out because they are no UTF-8.
    """

    folders: tuple[tuple[str, str], ...] = ()
    held_out_percent: float = 3.0
    undecodable: int = 0


def source_files(folders: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    """(name, path) of the .py files below `folders`, sorted, without tests and installed packages."""
    for label, folder in folders:
        for parent, folder_names, file_names in os.walk(folder):
            folder_names[:] = sorted(set(folder_names) - SKIPPED_FOLDERS)
            for file_name in sorted(file_names):
                path = os.path.join(parent, file_name)
                if file_name.endswith(".py") and os.path.isfile(path):
                    yield f"{label}/{os.path.relpath(path, folder).replace(os.sep, '/')}", path


def _decode(path: str) -> tuple[bytes, str | None]:
    with open(path, "rb") as f:
        data = f.read()
    try:
        return data, data.decode()
    except UnicodeDecodeError:
        return data, None


def python_stdlib_config(held_out_percent: float = 3.0, installed_packages: bool = False, root: str = "") -> PythonStdlibConfig:
    """Names the files of the standard library as they are now.

    Args:
      held_out_percent: share of the files in each of validation and test; 0: no such splits.
      installed_packages: add the sources in site-packages.
      root: folder to take instead of the standard library's.
    """
    folders = [("stdlib", root or sysconfig.get_path("stdlib"))]
    if installed_packages:
        folders.append(("packages", sysconfig.get_path("purelib")))
    content, undecodable = hashlib.blake2b(digest_size=16), 0
    for name, path in source_files(tuple(folders)):
        data, text = _decode(path)
        undecodable += text is None
        content.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        content.update(data)
    key = digest(float(held_out_percent), content.hexdigest())
    kind = "packages" if installed_packages else "stdlib"
    return PythonStdlibConfig(
        name=f"py{platform.python_version()}-{kind}-{key[:16]}",
        description="Python sources, identified by a digest of their content.",
        folders=tuple(folders),
        held_out_percent=held_out_percent,
        undecodable=undecodable,
    )


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """Source files of the running Python: features `path` and `text`, one example a file, none empty.

    Splits train, validation and test go by a hash of the file's path. Needs no TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS finds this itself with a package that neither it nor we depend on.
    code_path = epath.Path(__file__)

    def __init__(self, *, config: PythonStdlibConfig | None = None, file_format: str = "array_record", **kwargs):
        super().__init__(config=config or python_stdlib_config(), file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source code of the running Python, without its tests.",
            features=tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(undecodable=self.builder_config.undecodable),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        config = self.builder_config
        examples = []
        for name, path in source_files(config.folders):
            text = _decode(path)[1]
            if text is None:
                logging.warning("%s is not UTF-8 and is left out.", path)
            elif text:
                examples.append((hash64(name), name, text))
        held_out = ("validation", "test") if config.held_out_percent else ()
        bounds = hold_out([example[0] for example in examples], held_out, config.held_out_percent)
        return {split: self._generate_examples(examples, *bounds[split]) for split in ("train", *held_out)}

    def _generate_examples(self, examples, low, high):
        for key, name, text in examples:
            if low <= key < high:
                yield name, {"path": name, "text": text}
