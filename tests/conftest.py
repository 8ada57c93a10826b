"""Eight emulated CPU devices for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of a small test's time. Tests of equal bits after a restart run whole processes without this.
jax.config.update("jax_disable_most_optimizations", True)

SHARED_DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    # A plugin that starts the backend first would make the setting above a silent no-op.
    assert len(jax.devices()) == 8


def pytest_collection_modifyitems(items):
    if not SHARED_DATA.is_dir():
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(pytest.mark.skip(reason=f"there is no {SHARED_DATA}"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Texts beside the checkout, for tests marked `shared_data`."""
    return SHARED_DATA
