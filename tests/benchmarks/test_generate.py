"""What is timed is what `generate` returns. No times are checked."""

import json

import numpy as np
import pytest

from benchmarks import generate, table
from moe_jax.study import timing


def test_the_command(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    generate.main(["--cases=tiny", "--batches=2", "--rounds=1", f"--json={path}"])
    result = json.loads(path.read_text())
    rows = {(row["batch"], row["backend"]): row for row in result["rows"]}
    assert list(rows) == [(batch, way) for batch in (2,) for way in generate.WAYS]
    for (batch, way), row in rows.items():
        if way in generate.KINDS or row["ms"] is not None:
            assert row["tokens_per_second"] == pytest.approx(batch * 5 * 1e3 / row["ms"]) and row["runs"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert "| **routed** |" in table.render([result])


def test_all_rows_get_all_tokens():
    case = generate.CASES["tiny"]
    for kind in generate.KINDS:
        tokens = generate.own_way(case, kind)(2)
        assert tokens.shape == (2, case.tokens) and np.all(tokens < case.vocab)
    routed, dense = (generate.make_model(case, kind)[1]["params"]["stack"]["groups"]["block_0"] for kind in generate.KINDS)
    assert routed["moe"]["experts"]["w_in"].shape == (case.layers, case.experts, *dense["ffn"]["w_in"].shape[1:])


def test_a_table_of_what_there_is():
    row = lambda batch, way, rate: {"case": "small", "batch": batch, "backend": way, "tokens_per_second": rate}
    rates = {"routed": 300.0, "dense": 1000.0, "transformers routed": 200.0, "transformers dense": None}
    rows = [row(1, way, rate) for way, rate in rates.items()]
    case = vars(generate.CASES["small"])
    text = table.generation({"environment": timing.environment(), "cases": {"small": case}, "rows": rows})
    assert "| **routed** | 300 (1.50) |" in text and "| **dense** | 1,000 |" in text
    assert "| transformers, Mixtral | 200 |" in text and "| transformers, Llama | not measured |" in text


@pytest.mark.parametrize("flag", ["--cases=huge", "--batches=1,x", "--batches=0", "--rounds=0", "--json=/nowhere/at/all.json"])
def test_refusals(flag, capsys):
    with pytest.raises(SystemExit):
        generate.main([flag])
    assert flag in capsys.readouterr().err
