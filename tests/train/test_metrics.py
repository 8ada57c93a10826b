"""metrics.jsonl survives kills and resumes; the numbers in it are exact; routing sums mean what they say."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_jax.config import ConfigError
from moe_jax.train import metrics
from moe_jax.train.metrics import MetricsWriter, read_metrics
from moe_jax.train.peaks import peak_flops
from moe_jax.train.routing_metrics import routing_metrics


def events(workdir):
    """(step, purge?, {tag: value}) of every TensorBoard event, files in order."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            purge = event.HasField("session_log") and event.session_log.status == 1
            found.append((event.step, purge, {v.tag: v.simple_value for v in event.summary.value}))
    return found


def test_rows_are_exact_and_typed(tmp_path):
    chance = np.random.default_rng(0)
    floats = chance.integers(0, 2**32, 200, dtype=np.uint32).view(np.float32)
    floats = floats[np.isfinite(floats)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for i, x in enumerate(floats):
            writer.write(i, {"loss": x, "on_device": jnp.asarray(x)})
        values = {
            **{
                "bf16": jnp.bfloat16(1.5),
                "int": np.int32(7),
                "big": 2**60,
                "flag": np.bool_(True),
                "text": "a\u2028b",
            },
            **{"load": jnp.arange(3) / 4, "list": [1, 2.5, jnp.int32(3)], "nested": np.eye(2, dtype=np.int8)},
        }
        writer.write(np.int64(300), values)
    rows = read_metrics(tmp_path)
    for x, row in zip(floats, rows, strict=False):
        # Denormals are flushed by some devices, so only the host's copy is compared for them.
        assert np.float32(row["loss"]).tobytes() == x.tobytes()
        if abs(x) > 1e-37:
            assert np.float32(row["on_device"]).tobytes() == x.tobytes()
    assert rows[-1] == {
        **{"step": 300, "bf16": 1.5, "int": 7, "big": 2**60, "flag": True, "text": "a\u2028b"},
        **{"load": [0.0, 0.25, 0.5], "list": [1, 2.5, 3], "nested": [[1, 0], [0, 1]]},
    }
    assert type(rows[-1]["int"]) is int and type(rows[-1]["flag"]) is bool


def test_nonfinite_numbers_are_null_and_counted(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"loss": float("nan"), "norm": np.float32("inf"), "load": [1.0, float("-inf")]})
        assert writer.nonfinite == 3
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "norm": None, "load": [1.0, None]}]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_each_row_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("tail", [b"", b'{"step": 5, "lo', b'{"step": 5, "text": "\xc3', b'{"step": 4, "last": 1}'])
def test_resume_cuts_the_file_back(tmp_path, tail):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": step / 3})
        writer.write(2, {"eval/a/loss": 1.5})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    # What a kill during an earlier cut leaves behind.
    (tmp_path / "metrics.jsonl.tmp").write_text("{")
    kept = [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, {"step": 2, "eval/a/loss": 1.5}]
    with MetricsWriter(tmp_path, tensorboard=True, resume_step=2) as writer:
        assert read_metrics(tmp_path) == kept
        writer.write(3, {"loss": 9.0})
    assert read_metrics(tmp_path) == [*kept, {"step": 3, "loss": 9.0}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert any(step == 3 and purge for step, purge, _ in events(tmp_path))
    with MetricsWriter(tmp_path, tensorboard=False):
        assert read_metrics(tmp_path) == []


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=2) as writer:
        writer.write(3, {})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="metrics.jsonl line 2"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    assert "nonsense" in (tmp_path / "metrics.jsonl").read_text()


def test_scalars_go_to_tensorboard(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(5, {"loss": jnp.float32(0.5), "load": [1.0, 2.0], "note": "x", "n": 3})
    assert (5, False, {"loss": 0.5}) in events(tmp_path) and (5, False, {"n": 3.0}) in events(tmp_path)
    assert not {"load", "note"} & {tag for *_, values in events(tmp_path) for tag in values}


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run", tensorboard=True) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_object_stores_get_the_whole_file(tmp_path, monkeypatch):
    """gs://bucket stands for a folder here; what is tested is that nothing is appended and nothing lost."""
    real = metrics.epath.Path
    monkeypatch.setattr(metrics.epath, "Path", lambda p: real(str(p).replace("gs://bucket", str(tmp_path))))
    with MetricsWriter("gs://bucket/run", tensorboard=True) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
        assert read_metrics("gs://bucket/run") == []
        writer.flush()
        assert len(read_metrics("gs://bucket/run")) == 2
        monkeypatch.setattr(metrics, "_REMOTE_SECONDS", 0.0)
        writer.write(3, {"loss": 3.0})
        assert len(read_metrics("gs://bucket/run")) == 3
    with MetricsWriter("gs://bucket/run", resume_step=2) as writer:
        writer.write(3, {"loss": 4.0})
    assert [row["loss"] for row in read_metrics("gs://bucket/run")] == [1.0, 2.0, 4.0]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_routing_metrics():
    uniform = {"counts": jnp.full(4, 50.0), "dropped": 0, "entropy_sum": 100 * np.log(4), "tokens": 100}
    skewed = {
        "counts": np.array([150, 50, 0, 0]),
        "dropped": 20,
        "entropy_sum": 50.0,
        "tokens": 100,
        "nonfinite": 3,
    }
    got = routing_metrics({"groups/1/moe": jax.device_get(uniform), "groups/0/moe": skewed})
    want = {
        **{"router/groups/0/moe/load_max_over_mean": 3.0, "router/groups/1/moe/load_max_over_mean": 1.0},
        **{"router/groups/0/moe/entropy": 0.5, "router/groups/1/moe/entropy": np.log(4)},
        **{"router/groups/0/moe/dropped": 0.1, "router/groups/1/moe/dropped": 0.0},
        **{"router/groups/0/moe/dead_experts": 2, "router/groups/1/moe/dead_experts": 0},
        **{"router/groups/0/moe/load": [0.75, 0.25, 0, 0], "router/groups/1/moe/load": [0.25] * 4},
        **{"router/groups/0/moe/nonfinite": 3.0, "router/nonfinite": 3.0},
        **{"router/load_max_over_mean": 2.0, "router/entropy": (0.5 + np.log(4)) / 2, "router/dropped": 0.05},
        "router/dead_experts": 2,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)


def test_routing_metrics_of_nothing():
    assert routing_metrics({}) == {}
    empty = routing_metrics({"m": {"counts": np.zeros(3), "dropped": 0, "entropy_sum": 0.0, "tokens": 0}})
    assert empty["router/m/load"] == [0, 0, 0] and empty["router/dead_experts"] == 3
    assert (empty["router/load_max_over_mean"], empty["router/entropy"], empty["router/dropped"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        *[("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459)],
        *[("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 1153.5), ("NVIDIA A100-SXM4-80GB", 312)],
        *[
            ("NVIDIA H100 80GB HBM3", 989),
            ("NVIDIA H100 PCIe", 756),
            ("NVIDIA H200", 989),
            ("NVIDIA B200", 2250),
        ],
        *[("NVIDIA GH200 480GB", 989), ("cpu", None), ("NVIDIA GeForce RTX 4090", None)],
    ],
)
def test_peak_flops(kind, tflops):
    assert peak_flops(kind) == (None if tflops is None else pytest.approx(tflops * 1e12))
