"""The ways to take a step that are timed agree. No times are checked."""

import dataclasses
import json

import jax
import numpy as np

from benchmarks import peer, table
from moe_jax.study import timing


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


def test_kernels_are_not_measured_without_a_gpu(capsys):
    """But the rows are there; and with a GPU all of them can run, which a tiny case interprets here."""
    peer.main(["--cases=kernels", "--rounds=1"])
    names = ["forward triton", "forward blocks", "gradient triton", "gradient blocks", "copy"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names) and all("not measured" in line for line in lines)
    rows = peer.measure_kernels(peer.TINY, 1, progress=False, on_gpu=True)
    assert [row["backend"] for row in rows] == names and all(row["ms"] > 0 for row in rows)
    assert rows[0]["gb"] * 1e9 == 32 * 8 * 2 * 8 * 2 == rows[2]["gb"] * 1e9 / 2


def test_scaling_and_its_picture(tmp_path):
    rows = peer.measure_scaling([peer.TINY], (16, 32), 1, progress=False)
    assert [row["case"] for row in rows] == ["tiny", "f16", "f32"] and all(row["ms"] > 0 for row in rows)
    peer.plot(rows, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_tables_of_what_there_is():
    environment = timing.environment()
    cases = {"pool": dataclasses.asdict(peer.POOL), "kernels": dataclasses.asdict(peer.KERNELS)}
    row = lambda case, backend, ms: {"case": case, "backend": backend, "ms": ms, "gb_per_s": ms and 1000 / ms}
    grown = lambda backend, ms: {
        "case": "n",
        "backend": backend,
        "ms": ms,
        "state_bytes": 1,
        "parameters": 512 * 64,
        "temporary_bytes": 2e6,
    }
    rows = [
        row("pool", "rows", 200.0),
        row("pool", "naive", 500.0),
        row("pool", "copy", 10.0),
        row("kernels", "forward blocks", None),
    ]
    text = table.peer({"environment": environment, "cases": cases, "rows": rows})
    assert "| **gradients by rows** | 200 | 2.50 | 5 |" in text and "| a plain copy | 10 |  | 100 |" in text
    assert "| `forward blocks` | not measured |  | not measured |" in text
    rows[1] = row("pool", "naive", None)
    assert "| **gradients by rows** | 200 |  | 5 |" in table.peer({"environment": environment, "cases": cases, "rows": rows})
    rows = [grown("peer", 3.0), grown("peer", 4.0)]
    text = table.peer({"environment": environment, "cases": {"n": dataclasses.asdict(peer.POOL)}, "rows": rows})
    assert "PEER from N=64 to 64: 3 to 4 ms, 2 to 2 MB" in text
