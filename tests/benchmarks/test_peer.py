"""The ways to take a step that are timed agree. No times are checked."""

import json

import jax
import numpy as np

from benchmarks import peer


def test_the_ways_agree():
    x, d_y = peer.make_inputs(peer.TINY)
    results = {}
    for backend in ("rows", "dense", "naive"):
        state, y = peer.make_step(peer.TINY, backend)(peer.make_state(peer.TINY, x), x, d_y)
        results[backend] = jax.device_get((y, state["dense"], state["table"]))
    for other in ("dense", "naive"):
        for a, b in zip(jax.tree.leaves(results["rows"]), jax.tree.leaves(results[other])):
            # Adam's first update is the sign of the gradient where that is not tiny.
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_command(tmp_path):
    path = tmp_path / "tiny.json"
    peer.main(["--cases=tiny", "--rounds=1", f"--json={path}"])
    rows = json.loads(path.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["rows", "dense", "naive", "pytorch", "copy"]
    assert all(row["ms"] > 0 for row in rows if row["backend"] != "pytorch") and all("error" not in row for row in rows)


def test_scaling_and_its_picture(tmp_path):
    rows = peer.measure_scaling([peer.TINY], (16, 32), 1, progress=False)
    assert [row["case"] for row in rows] == ["tiny", "f16", "f32"] and all(row["ms"] > 0 for row in rows)
    peer.plot(rows, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
