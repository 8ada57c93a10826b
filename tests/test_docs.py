"""The commands of docs/tpu_pod.md: they parse, and the rehearsal runs. The example of docs/studies.md is a study."""

import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest

import moe_jax.evaluate.__main__ as evaluate
import moe_jax.plan.__main__ as plan
from moe_jax import cli, generate
from moe_jax.config.validate import validate

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "tpu_pod.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
TRAIN = re.search(r'TRAIN="(.*?)"', TEXT, re.DOTALL)[1]
OWN_FLAGS = {
    "train.py": None,
    "moe_jax.plan": plan.define_flags,
    "moe_jax.evaluate": evaluate.define_flags,
    "moe_jax.generate": generate.define_flags,
}


def commands():
    """[program, flags...] of every command of this project on the page, those inside on_all "..." too."""
    for block in BLOCKS:
        for line in re.findall(
            r"python (?:-m )?((?:train\.py|moe_jax\.\w+)[^;\n]*)",
            block.replace("$TRAIN", TRAIN).replace("\\\n", " "),
        ):
            words = shlex.split(line, comments=True) if line.count('"') % 2 == 0 else shlex.split(line.rstrip('"'))
            yield [word for word in words if word not in ("&", "$@")]


def test_every_command_parses(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NUM_PROCESSES", "2")
    monkeypatch.setattr(cli, "load_saved_config", lambda folder: cli.load_config("configs/routed_1b.py"))
    monkeypatch.setattr(cli, "_check_workdir", lambda path, must_exist: tmp_path)
    found = list(commands())
    assert {words[0] for words in found} == set(OWN_FLAGS) and len(found) == 9
    for words in found:
        of_run = words[0] in ("moe_jax.evaluate", "moe_jax.generate")
        config, flags = cli.parse(
            words,
            flags=OWN_FLAGS[words[0]],
            config_from="workdir" if of_run else "file",
            workdir=words[0] != "moe_jax.plan",
        )
        if words[0] == "moe_jax.plan":
            sizes = flags.topology.partition(":")[2].split("x")
            assert sizes == ["2", "2", "4"]
        elif "runs/rehearsal" in str(words):
            validate(config, 8)
        else:
            validate(config, 16)


def test_named_scopes_are_those_of_the_code():
    from moe_jax.plan.hlo import SCOPES

    assert all(f"`{scope}`" in TEXT for scope in SCOPES)


@pytest.mark.parametrize("part, arms, runs", [("", 4, 3 * 9 * 3), ("schedule", 4, 3 * 2 * 3), ("budgets", 3, 0)])
def test_the_example_of_a_study(part, arms, runs):
    from moe_jax.study.plan import prepare
    from moe_jax.study.work import tuning_runs

    page, example = (ROOT / "docs" / "studies.md").read_text(), {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], example)
    study = prepare(example["get_config"](part), "small")
    assert len(study.arms) == arms and len(tuning_runs(study, study.searched())) == runs


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    """Trained to its end by the first call, and known as complete by the second."""
    block = next(block for block in BLOCKS if "rehearse()" in block)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        block = block.replace("8476", str(s.getsockname()[1])).replace("runs/rehearsal", str(tmp_path / "run"))
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    result = subprocess.run(["bash", "-c", block], cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0 and "8 cpu devices" in result.stderr, result.stderr[-3000:]
    assert result.stderr.count("complete: ") == 1 and "Traceback" not in result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists() and list((tmp_path / "run" / "profile").rglob("*.pb"))
