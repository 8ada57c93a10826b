"""Eight emulated CPU devices for every test, and memory that does not grow from file to file."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import pytest

from tests import memory

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of a small test's time. Tests of equal bits after a restart run whole processes without these settings;
# MOE_JAX_TEST_OPTIMIZED=1 is for those whose numbers depend on what XLA fuses.
OPTIMIZED = os.environ.get("MOE_JAX_TEST_OPTIMIZED") == "1"
jax.config.update("jax_disable_most_optimizations", not OPTIMIZED)


def start_xla(flags: str) -> None:
    """XLA reads its flags once. The processes that tests start do not inherit them: they are those of a user."""
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{given or ''} {flags}"
    jax.jit(lambda x: x + 1)(0)
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


if not OPTIMIZED and jax.__version_info__ < (0, 11):
    # A training step compiles in a third of the time. Later versions of XLA do not know the flag, and end the process.
    start_xla("--xla_cpu_use_fusion_emitters=false")

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
# Bytes of a worker, between tests; what they share in a file is then compiled again.
HELD_LIMIT = 800e6
PEAK = pytest.StashKey[memory.Peak]()


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    # A plugin that starts the backend first would make the setting above a silent no-op.
    assert len(jax.devices()) == 8


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After each file, and within one that holds much."""
    if nextitem is None or nextitem.path != item.path or memory.held() > HELD_LIMIT:
        memory.free()


def pytest_configure(config):
    if not hasattr(config, "workerinput") and pathlib.Path("/proc/self/stat").exists():
        config.stash[PEAK] = memory.Peak()
        config.stash[PEAK].start()


def pytest_terminal_summary(terminalreporter, config):
    if PEAK in config.stash:
        peak = config.stash[PEAK].stop() / 1e9
        terminalreporter.write_line(f"peak memory of all processes together: {peak:.2f} GB")


def pytest_collection_modifyitems(items):
    if not SHARED_DATA.is_dir():
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(pytest.mark.skip(reason=f"there is no {SHARED_DATA}"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Texts beside the checkout, for tests marked `shared_data`."""
    return SHARED_DATA
