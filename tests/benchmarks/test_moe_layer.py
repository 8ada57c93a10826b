"""The layers that are timed compute the same thing, and rows become the README's table. No times are checked."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import moe_layer, table
from moe_jax.study import timing

TINY = moe_layer.GROUPS["tiny"][1][0]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The command's JSON of the tiny case."""
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    moe_layer.main(["--cases=tiny", "--rounds=2", f"--json={path}"])
    return json.loads(path.read_text())


def test_rows(result):
    rows = result["rows"]
    keys = [(row["case"], row["backend"]) for row in rows]
    assert keys == [(f"tiny/{kind}", b) for kind in moe_layer.PASSES for b in TINY.backends]
    for row in rows:
        assert {"case", "backend", "ms", "ratio_to_dense", "tflops"} <= set(row) and "error" not in row
        forward = 4 * 80 * 8 * 16 / 1e9  # 64 tokens and a second expert for 16 of them
        assert row["gflop"] == pytest.approx(forward * (3 if "backward" in row["case"] else 1))
        if row["backend"] == "torch_grouped_mm":
            continue  # only on an NVIDIA GPU
        assert row["runs"] >= 1 and row["ms"] > 0
        assert row["tflops"] == pytest.approx(row["gflop"] / row["ms"])
    assert all(row["ratio_to_dense"] == 1 for row in rows if row["backend"] == "dense")
    environment = result["environment"]
    assert environment["platform"] == "cpu" and environment["versions"]["jax"] == jax.__version__
    assert environment["load_after"] is not None and environment["date"].count("-") == 2


def test_layers_agree(monkeypatch):
    """The same values and gradients by both dropless layers, and by the two with a capacity, which drop here."""
    monkeypatch.setattr(moe_layer, "CAPACITY_FACTOR", 0.5)
    params, dense, x = moe_layer.make_inputs(TINY)
    assert dense["w_in"].shape == (8, 20)  # 16 * 80 / 64
    run = {b: moe_layer.make_pass(moe_layer.make_apply(TINY, b), "forward+backward") for b in TINY.backends[2:6]}
    out = jax.device_get({b: f(params, x) for b, f in run.items()})
    for a, b in (("dropless", "ragged_dot"), ("capacity", "one_hot")):
        assert len(jax.tree.leaves(out[a])) == 5  # y and the gradients of router, w_in, w_out, x
        for left, right in zip(jax.tree.leaves(out[a]), jax.tree.leaves(out[b])):
            np.testing.assert_allclose(left, right, atol=1e-4 * np.abs(right).max())
    assert np.any(out["dropless"][0] != 0, axis=-1).all() and not np.any(out["capacity"][0] != 0, axis=-1).all()


def test_cases_of_one_dense_shape_share_its_times():
    """Of a hash, whose layer has no loss and no parameters of the router, and of top-2 with half the width."""
    hashed = dataclasses.replace(TINY, name="hash", expert_width=32, top_k=1, second=1.0, router="hash", activation="swiglu")
    top2 = dataclasses.replace(
        TINY, name="top2", second=1.0, router="top_k", activation="swiglu", backends=("dense", "dropless")
    )
    rows = moe_layer.measure([dataclasses.replace(hashed, backends=("dense", "dropless")), top2], 1, progress=False)
    dense = [row for row in rows if row["backend"] == "dense" and row["case"].endswith("/forward")]
    assert dense[0]["ms"] == dense[1]["ms"] and [row["runs"] for row in dense] == [2, 2]
    assert all("error" not in row and row["gflop"] == pytest.approx(dense[0]["gflop"]) for row in rows[:4])
    assert dense[0]["gflop"] == pytest.approx(6 * 64 * 8 * 32 / 1e9)


def test_second_expert_for_some():
    router, (params, _, x) = moe_layer.make_layer(TINY).router, moe_layer.make_inputs(TINY)
    apply = jax.jit(lambda p, x: router.apply({"params": p}, x, moe_layer.RouterInputs())[0])
    choice = apply(params["router"], x)
    assert int(jnp.sum(choice.expert_ids < TINY.experts)) == TINY.assignments == 80


def test_interleaved():
    """Errors are kept, slow functions run less often, order turns around."""
    calls = []

    def failing():
        raise NotImplementedError("no such kernel\non this machine")

    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": failing}
    times, errors = timing.interleaved(functions, 4, progress=False)
    assert errors == {"c": "no such kernel"} and set(times) == {"a", "b"}
    assert all(1 <= len(t) <= 4 for t in times.values())
    assert calls[:4] == ["a", "a", "b", "b"]


def make_result():
    case = {"tokens": 64, "width": 8, "expert_width": 16, "experts": 4, "top_k": 1, "dtype": "float32"}
    row = lambda case, backend, ms, ratio: {
        "case": case,
        "backend": backend,
        "ms": ms,
        "ratio_to_dense": ratio,
        "tflops": 0.1,
        "gflop": 1.0,
    }
    rows = [
        row("e4/forward", "dense", 2.0, 1.0),
        row("e4/forward", "dropless", 123.4, 61.7),
        row("e4/forward", "one_hot", None, None),
        row("e8/forward", "dense", 3.0, 1.0),
        row("second_all/forward", "dropless", 8.0, 1.0),
        row("second_25/forward", "dropless", 5.0, 1.0) | {"gflop": 0.625},
        row("ceiling_2048_float32", "matmul", 9.0, None),
    ]
    environment = {
        "platform": "cpu",
        "device": "cpu",
        "machine": "A processor, x86_64",
        "cores": 2,
        "python": "3.11.1",
        "versions": {"jax": "0.10.2"},
        "date": "2026-01-02",
        "load_before": 0.5,
    }
    cases = {"e4": case, "e8": case | {"experts": 8}, "second_all": case, "second_25": case}
    return {"benchmark": "moe_layer", "environment": environment, "cases": cases, "rows": rows}


def test_table(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "cpu.json"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    results.write_text(json.dumps(make_result()))
    for _ in range(2):  # the second time changes nothing
        table.main([str(results), f"--readme={readme}"])
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert "CPU: A processor, x86_64, 2 cores, 2026-01-02, Python 3.11.1, jax 0.10.2, load average" in text
        assert "| forward, K=1, T=64 D=8 F=16, float32 | E=4 | E=8 |" in text
        assert "| **dropless** | 123 (61.70) | not measured |" in text
        assert "| one-hot einsums, factor 1.25 | not measured | not measured |" in text
        assert "for 25 % of the tokens (0.625 of the FLOPs) forward 0.62" in text
        assert "One dense product of 2048 x 2048 in float32: 100 GFLOP/s." in text
        assert "NVIDIA GPU, TPU: not measured." in text and text.count(table.BEGIN) == 1


def test_columns_of_different_sizes():
    result = make_result()
    result["cases"]["e8"]["width"] = 32
    text = table.render([result, result])
    assert "| forward | E=4, K=1, T=64 D=8 F=16, float32 | E=8, K=1, T=64 D=32 F=16, float32 |" in text
    assert text.count("CPU: A processor") == 2
    result["cases"]["e8"] |= {"activation": "swiglu", "router": "hash"}
    assert "\n\n| forward, K=1, T=64 D=32 F=16, float32, swiglu | E=8, hash |" in table.render([result])
    assert table.render([]) == "CPU, NVIDIA GPU, TPU: not measured."


def test_table_of_the_command(result):
    text = table.render([result])
    assert all(f"| {name} |" in text for name in table.BACKENDS.values())
    assert "| torch's grouped product alone, rows sorted | not measured |" in text
    assert set(table.BACKENDS) >= {b for _, cases in moe_layer.GROUPS.values() for c in cases for b in c.backends}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases=e9"], "--cases=e9: no case 'e9'; use some of e8,"),
        (["--rounds=0"], "--rounds=0: at least 1; raise it"),
        (["--json=no/such/x.json"], "--json=no/such/x.json: no such folder; make it first"),
    ],
)
def test_bad_input(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        moe_layer.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_bad_tables(tmp_path, capsys):
    bad, other, good = (tmp_path / name for name in ("bad.json", "other.json", "good.json"))
    bad.write_text("{")
    other.write_text('{"benchmark": "x"}')
    good.write_text(json.dumps(make_result()))
    (tmp_path / "README.md").write_text(f"{table.END}{table.BEGIN}")
    for file, message in (
        (bad, "JSONDecodeError"),
        (other, "no table for benchmark='x'"),
        (good, "not one pair"),
    ):
        with pytest.raises(SystemExit) as stop:
            table.main([str(file), f"--readme={tmp_path / 'README.md'}"])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
