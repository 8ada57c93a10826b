"""The command line: every setting that cannot work is one line on stderr and exit code 2."""

import json
import os
import re
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from moe_jax import cli
from moe_jax import config as c
from moe_jax.config.load import load_config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PLAIN = "from moe_jax import config as c\ndef get_config():\n    return c.Config()\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with configs/plain.py and the folder of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/plain.py").write_text(PLAIN)
    (tmp_path / "run").mkdir()
    saved = c.Config(seed=5)
    (tmp_path / "run/config.json").write_text(json.dumps(c.to_dict(saved)))
    (tmp_path / "a_file").write_text("")
    return tmp_path


def call(arguments, **options):
    """The config, the flags and the exit code of one command line."""
    seen = []
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda config, flags: seen.append((config, flags)), ["train.py", *arguments], **options)
    return (*seen[0], exit_.value.code) if seen else (None, None, exit_.value.code)


def good(*overrides, **options):
    config, flags, code = call(["--config=configs/plain.py", "--workdir=w", *overrides], **options)
    assert code == 0
    return config, flags


def refused(capsys, arguments, *fragments, **options):
    config, _, code = call(arguments, **options)
    out, err = capsys.readouterr()
    assert (config, code, out) == (None, 2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) < 400
    for fragment in fragments:
        assert fragment in err, err
    return err


# One row: overrides, the start of the message (field and value), a piece of the fix.
BAD_OVERRIDES = [
    # No such field.
    (["--config.sed=1"], "config.sed=1", "did you mean config.seed?"),
    (
        [
            "--config.model.pattern=peer",
            "--config.model.peer.backend=mosaic",
            "--config.model.width=192",
            "--config.model.heads=2",
        ],
        "config.model.peer.backend=mosaic: 192 values of an expert's row on a device",
        "use model.peer.backend=auto",
    ),
    (
        ["--config.model.pattern=peer", "--config.model.peer.query_rank=4"],
        "config.model.peer.share_keys=True: with one query for all heads, model.peer.query_rank=4",
        "use false, or model.peer.query_rank=0",
    ),
    (
        ["--config.model.pattern=pkm", "--config.model.peer.query_rank=5", "--config.model.peer.share_keys=false"],
        "config.model.peer.query_rank=5: odd",
        "use 6",
    ),
    (
        ["--config.model.pattern=peer", "--config.model.peer.top_k=1"],
        "config.model.peer.top_k=1: the softmax over one score is 1",
        "use 2 or more, or another model.peer.score",
    ),
    (
        ["--config.model.pattern=peer", "--config.model.peer.selector=token_hash", "--config.model.peer.score=raw"],
        "config.model.peer.score=raw: without effect on model.peer.selector=token_hash",
        "use softmax",
    ),
    (
        ["--config.model.pattern=peer", "--config.model.peer.selector=token_hash", "--config.model.peer.experts=127"],
        "config.model.peer.experts=127: 128 different experts for a token with model.peer.heads=8",
        "use 128 or more, or a smaller heads or top_k",
    ),
    (["--config.model.top_k=1"], "config.model.top_k=1", "did you mean config.model.moe.top_k?"),
    (["--config.data.bach_size=8"], "config.data.bach_size=8", "did you mean config.data.batch_size?"),
    (
        ["--config.data.sources[0].wight=2"],
        "config.data.sources[0].wight=2",
        "config.data.sources[0].weight?",
    ),
    (["--config.qqqqqqqq=1"], "config.qqqqqqqq=1", "--config.help lists all fields"),
    (["--noconfig.model.scann"], "config.model.scann", "did you mean config.model.scan?"),
    (
        ["--config.data.sources[1].weight=2"],
        "config.data.sources[1].weight=2",
        "add items in the config file",
    ),
    (
        ["--config.optimizer.groups[0].path=x"],
        "config.optimizer.groups[0].path=x",
        "add items in the config file",
    ),
    (["--config.data.sources=a"], "config.data.sources=a", "add items in the config file"),
    (["--config.model=large"], "config.model=large", "set one field, such as config.model.name"),
    # Another type.
    (["--config.seed=x"], "config.seed=x", "write an int from 0 to"),
    (["--config.train.steps=1e6"], "config.train.steps=1e6", "write an int of 1 or more"),
    (["--config.seed="], "config.seed=''", "write an int"),
    (["--config.seed"], "config.seed: no value", "write --config.seed=VALUE"),
    (["--config.model.init_std=a: b"], "config.model.init_std=a: b", "write a float of 0 or more"),
    (["--config.model.scan=yes"], "config.model.scan=yes", "write true or false"),
    (["--noconfig.seed"], "--noconfig.seed", "write --config.seed=VALUE"),
    # Out of range.
    (["--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate=nan", "write a finite number"),
    (["--config.optimizer.b2=1"], "config.optimizer.b2=1.0", "lower it to 0.999999 or less"),
    (["--config.seed=-1"], "config.seed=-1", "raise it to 0 or more"),
    (["--config.mesh.data", "-2"], "config.mesh.data=-2", "raise it to -1 or more"),
    (["--config.model.dtype=float16"], "config.model.dtype=float16", "choose float32 or bfloat16"),
    (["--config.model.moe.router=top\nk"], r"config.model.moe.router=top\nk", "choose top_k or switch"),
    # Combinations: the model.
    (
        ["--config.model.moe.top_k=9"],
        "config.model.moe.top_k=9: at most model.moe.experts=8",
        "lower top_k or raise",
    ),
    # Combinations: the router.
    (
        ["--config.model.moe.zero_experts=1", "--config.model.moe.top_k=10"],
        "config.model.moe.top_k=10: at most model.moe.experts=8 and 1 zero, copy and constant experts",
        "lower top_k",
    ),
    (
        ["--config.model.moe.router=switch"],
        "config.model.moe.top_k=2: model.moe.router=switch knows 1 only",
        "use 1",
    ),
    (
        ["--config.model.moe.router=remoe", "--config.model.moe.copy_experts=1"],
        "config.model.moe.copy_experts=1: model.moe.router=remoe",
        "use 0",
    ),
    (
        ["--config.model.moe.router=expert_choice"],
        "config.model.moe.router=expert_choice: looks at later tokens",
        "model.moe.allow_noncausal=true",
    ),
    (
        ["--config.model.moe.router=base", "--config.model.moe.top_k=1", "--config.model.moe.execution=capacity"],
        "config.model.moe.execution=capacity: model.moe.router=base is balanced",
        "use dropless",
    ),
    (
        ["--config.model.moe.router=base", "--config.model.moe.top_k=1", "--config.model.moe.eval_capacity=2"],
        "config.model.moe.eval_capacity=2.0: model.moe.router=base",
        "use 0",
    ),
    (
        ["--config.model.moe.shared_gate=true"],
        "config.model.moe.shared_gate=True: model.moe.shared_experts=0",
        "switch the gate off",
    ),
    (
        ["--config.model.moe.top_k=1", "--config.model.moe.routers.top_k.renormalise=always"],
        "config.model.moe.routers.top_k.renormalise=always: with model.moe.top_k=1",
        "use auto",
    ),
    (
        ["--config.model.moe.top_k=1", "--config.model.moe.routers.top_k.order=top_k_first"],
        "config.model.moe.routers.top_k.order=top_k_first: with model.moe.top_k=1",
        "use score_first",
    ),
    (
        ["--config.model.moe.routers.top_k.order=top_k_first", "--config.model.moe.routers.top_k.score=sigmoid"],
        "config.model.moe.routers.top_k.order=top_k_first: the softmax",
        "use score_first",
    ),
    (
        ["--config.model.moe.routers.top_k.groups=3"],
        "config.model.moe.routers.top_k.groups=3: does not divide the 8 experts",
        "use a divisor",
    ),
    (
        ["--config.model.moe.routers.top_k.kept_groups=2"],
        "config.model.moe.routers.top_k.kept_groups=2: more than",
        "lower it",
    ),
    (
        ["--config.model.moe.routers.top_k.groups=8"],
        "config.model.moe.routers.top_k.kept_groups=1: fewer than model.moe.top_k=2 experts in 1 of 8 groups",
        "raise it",
    ),
    (
        ["--config.model.moe.routers.top_k.zero_sum_bias=true"],
        "config.model.moe.routers.top_k.zero_sum_bias=True",
        "switch this off",
    ),
    (
        ["--config.model.moe.router=base", "--config.model.moe.top_k=1", "--config.model.moe.routers.base.groups=7"],
        "config.model.moe.routers.base.groups=7: does not divide the 4096 tokens of a microbatch",
        "use a divisor",
    ),
    (
        ["--config.model.moe.router=remoe", "--config.model.moe.routers.remoe.max_k=1"],
        "config.model.moe.routers.remoe.max_k=1: not from model.moe.top_k=2 to model.moe.experts=8",
        "use 0 for all",
    ),
    (
        [
            "--config.model.moe.router=expert_choice",
            "--config.model.moe.allow_noncausal=true",
            "--config.sample.prompt=",
            "--config.model.moe.exchange=ragged",
        ],
        "config.model.moe.exchange=ragged: without effect on model.moe.router=expert_choice, whose slots",
        "use auto",
    ),
    (
        [
            "--config.model.moe.router=expert_choice",
            "--config.model.moe.allow_noncausal=true",
            "--config.sample.prompt=",
            "--config.model.moe.routers.expert_choice.evaluation=tokens",
            "--config.model.moe.backend=ragged_dot",
        ],
        "config.model.moe.backend=ragged_dot: without effect on model.moe.router=expert_choice in training; "
        "evaluation by tokens is dropless",
        "use auto",
    ),
    (
        [
            "--config.model.moe.router=expert_choice",
            "--config.model.moe.allow_noncausal=true",
            "--config.sample.prompt=",
            "--config.model.moe.routers.expert_choice.evaluation=tokens",
            "--config.model.moe.eval_capacity=2",
        ],
        "config.model.moe.eval_capacity=2.0: model.moe.router=expert_choice has no use for it in training; "
        "evaluation by tokens",
        "use 0",
    ),
    (
        [
            "--config.model.moe.router=expert_choice",
            "--config.model.moe.allow_noncausal=true",
            "--config.sample.prompt=def",
        ],
        "config.sample.prompt=def: model.moe.router=expert_choice looks at later tokens",
        "empty it",
    ),
    # Combinations: the blocks.
    (["--config.model.layers=3"], "config.model.layers=3", "use 2"),
    (
        ["--config.model.pattern=dense,sparse"],
        "config.model.pattern=dense,sparse",
        "use dense, routed, peer, pkm, separated by commas",
    ),
    (["--config.model.pattern="], "config.model.pattern=''", "use dense, routed, peer, pkm, separated by commas"),
    (["--config.model.inserts=dense@0"], "config.model.inserts=dense@0", "write name=layer@block"),
    (["--config.model.inserts=groups=dense@0"], "config.model.inserts=groups=dense@0", "such as first"),
    (["--config.model.inserts=counts=routed@0"], "config.model.inserts=counts=routed@0", "such as first"),
    (["--config.model.inserts=layer_00=dense@0"], "config.model.inserts=layer_00=dense@0", "such as first"),
    (["--config.model.inserts=a=mlp@0"], "config.model.inserts=a=mlp@0", "layer one of dense, routed, peer, pkm"),
    (
        ["--config.model.inserts=a=dense@1"],
        "config.model.inserts=a=dense@1",
        "use a multiple of 2 from 0 to model.layers=4",
    ),
    (["--config.model.inserts=a=dense@6"], "config.model.inserts=a=dense@6", "from 0 to model.layers=4"),
    (
        ["--config.model.inserts=a=dense@0,a=dense@2"],
        "config.model.inserts=a=dense@0,a=dense@2",
        "rename one",
    ),
    (
        ["--config.model.insert_width=64", "--config.model.inserts=a=routed@0"],
        "config.model.insert_width=64: there is no insert of the layer dense in model.inserts='a=routed@0'",
        "use 0, or add one",
    ),
    (["--config.model.kv_heads=3"], "config.model.kv_heads=3: does not divide model.heads=4", "multiple of"),
    (["--config.model.heads=3"], "config.model.heads=3: does not divide model.width=128", "multiple of"),
    (["--config.model.head_width=9"], "config.model.head_width=9: model.positions=rope", "set an even"),
    (["--config.model.width=12"], "config.model.head_width=0: model.positions=rope", "set an even"),
    (
        ["--config.model.positions=none", "--config.model.rope_scaling=linear"],
        "config.model.rope_scaling=linear",
        "rope",
    ),
    (
        ["--config.model.rope_scaling=llama3", "--config.model.rope_low_frequency=4"],
        "config.model.rope_low_frequency=4.0: not between 0 and model.rope_high_frequency=4.0",
        "lower it",
    ),
    (
        ["--config.model.positions=learned", "--config.model.max_positions=128"],
        "config.model.max_positions=128: rows are fewer than data.sequence_length=256",
        "raise it",
    ),
    (
        ["--config.model.positions=learned", "--config.sample.prompt=a", "--config.sample.tokens=2048"],
        "config.sample.tokens=2048: with the prompt, more than model.max_positions=2048",
        "lower it",
    ),
    (["--config.model.row_gradients"], "config.model.row_gradients=True", "set model.tied_embeddings=false"),
    # Combinations: the mesh.
    (
        ["--config.model.moe.renormalise_kept=true"],
        "config.model.moe.renormalise_kept=True: nothing is dropped with model.moe.execution=dropless and",
        "use false, or model.moe.execution=capacity",
    ),
    (
        ["--config.model.moe.capacity_priority=gate", "--config.model.moe.eval_capacity=2"],
        "config.model.moe.capacity_priority=gate: not causal, in evaluation with model.moe.eval_capacity=2.0",
        "use token, or model.moe.eval_capacity=0",
    ),
    (
        ["--config.model.moe.exchange=ragged", "--config.model.moe.exchange_buffer=0.5"],
        "config.model.moe.exchange_buffer=0.5: less than an even load needs",
        "use 1 or more, or 0",
    ),
    (["--config.mesh.expert=3"], "config.mesh.expert=3: does not divide model.moe.experts=8", "multiple of"),
    (["--config.mesh.tensor=8"], "config.mesh.tensor=8: does not divide model.heads=4", "multiple of"),
    (
        ["--config.mesh.tensor=2", "--config.model.kv_heads=1"],
        "config.mesh.tensor=2: does not divide model.kv_heads=1",
        "multiple of",
    ),
    (
        ["--config.mesh.tensor=4", "--config.model.moe.expert_width=6"],
        "config.mesh.tensor=4: does not divide model.moe.expert_width=6",
        "multiple of",
    ),
    (
        ["--config.mesh.tensor=2", "--config.model.ffn_width=7"],
        "config.mesh.tensor=2: does not divide model.ffn_width=7",
        "multiple of",
    ),
    (["--config.mesh.fsdp=3"], "config.mesh.fsdp=3: does not divide model.width=128", "multiple of"),
    (["--config.mesh.data=0"], "config.mesh.data=0", "use -1"),
    (
        ["--config.mesh.cpu_devices=6", "--config.mesh.expert=4"],
        "config.mesh.data=-1: fsdp=1 * expert=4 * tensor=1 = 4 does not divide the 6 devices",
        "change an axis",
    ),
    (["--config.mesh.data=2", "--config.mesh.cpu_devices=8"], "config.mesh.data=2", "use mesh.data=-1"),
    (["--config.train.microbatches=3"], "config.data.batch_size=16", "use 15"),
    # Combinations: the data.
    (["--config.data.sources[0].name=a b"], "config.data.sources[0].name=a b", "use letters, digits"),
    (["--config.data.sources[0].files=*.txt"], "config.data.sources[0].files=*.txt", "empty one of them"),
    (["--config.data.sources[0].tfds="], "config.data.sources[0].files=''", "set one of them"),
    (
        ["--config.data.sources[0].tfds=", "--config.data.sources[0].files=a,,b"],
        "config.data.sources[0].files=a,,b",
        "remove the extra comma",
    ),
    (
        ["--config.data.sources[0].weight=0"],
        "config.data.sources[0].weight=0.0",
        "give one source a weight above 0",
    ),
    (
        [
            "--config.data.sources[0].tfds=lm1b",
            "--config.data.sources[0].installed_packages",
        ],
        "config.data.sources[0].installed_packages=True",
        "switch it off",
    ),
    (["--config.data.sources[0].weight=1e300"], "config.data.sources[0].weight=1e+300", "lower it to"),
    (["--config.data.sources[0].text_feature="], "config.data.sources[0].text_feature=''", "name the text"),
    (
        [
            "--config.data.held_out_percent=0",
            "--config.data.sources[0].tfds=",
            "--config.data.sources[0].files=a",
        ],
        "config.data.held_out_percent=0.0",
        "raise it or name the files",
    ),
    # Combinations: the run.
    (
        ["--config.optimizer.learning_rate=1e39"],
        "config.optimizer.learning_rate=1e+39: at most 3.4e+38, the largest",
        "lower it",
    ),
    (["--config.train.profile_steps=13:10"], "config.train.profile_steps=13:10", "write one such as 10:13"),
    (["--config.train.profile_steps=0:2"], "config.train.profile_steps=0:2", "write one such as 10:13"),
    (
        ["--config.train.profile_steps=999:1002"],
        "config.train.profile_steps=999:1002",
        "write one such as 10:13",
    ),
    (["--config.train.profile_steps=ten"], "config.train.profile_steps=ten", "write one such as 10:13"),
    (
        ["--config.init.include=embed"],
        "config.init.include=embed: init.checkpoint is empty",
        "name a checkpoint",
    ),
    (
        ["--config.init.checkpoint=run", "--config.init.include=embed,"],
        "config.init.include=embed,",
        "remove the extra comma",
    ),
    # Flags.
    (["--wokdir=x"], "--wokdir=x: no such flag", "did you mean --workdir?"),
    (["--batch_size=8"], "--batch_size=8: no such flag", "did you mean --config.data.batch_size?"),
    (
        ["--model.moe.experts", "8"],
        "--model.moe.experts: no such flag",
        "did you mean --config.model.moe.experts?",
    ),
    (["extra"], "argument 'extra': not a flag", "write --name=VALUE"),
    (["--", "--config.seed=1"], "argument '--config.seed=1': not a flag", "write --name=VALUE"),
    (["--flagfile=missing"], "--flagfile: ", "name a readable file of flags"),
    (["--workdir="], "--workdir: not given", "write --workdir=DIR"),
    (["--workdir=a_file"], "--workdir=a_file: a file, not a folder", "name a folder"),
    (["--config="], "--config: not given", "write --config=FILE"),
    (
        ["--config=configs/plian.py"],
        "--config=configs/plian.py: no such file",
        "did you mean configs/plain.py?",
    ),
    (["--config=nowhere/plain.py"], "--config=nowhere/plain.py: no such file", "name a Python file"),
    (["--config=configs"], "--config=configs: ", "name a readable Python file"),
    (
        ["--config=configs/plain.py:large"],
        "--config=configs/plain.py:large: ",
        "remove the ':TEXT' after the file",
    ),
]


@pytest.mark.parametrize(("overrides", "start", "fix"), BAD_OVERRIDES, ids=lambda value: str(value)[:60])
def test_bad_setting(files, capsys, overrides, start, fix):
    err = refused(capsys, ["--config=configs/plain.py", "--workdir=w", *overrides], fix)
    assert err.startswith(f"error: {start}")
    assert not (files / "w").exists()


# One row: the text of a config file and a piece of the message.
BAD_FILES = {
    "syntax": ("def get_config(:\n", "configs/bad.py:1: SyntaxError"),
    "null byte": ("x = 1\0\n", "null bytes"),
    "import": (
        "\nimport no_such_module\n",
        "configs/bad.py:2: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "no get_config": ("x = 1\n", "has no function get_config"),
    "needs an argument": ("def get_config(size):\n    return size\n", "write FILE:TEXT"),
    "raises": (
        "def get_config():\n    return 1 / 0\n",
        "configs/bad.py:2: ZeroDivisionError: division by zero",
    ),
    "raises lines": (
        "def get_config():\n    raise ValueError('a\\nb')\n",
        r"configs/bad.py:2: ValueError: a\nb",
    ),
    "returns None": ("def get_config():\n    pass\n", "get_config() returns a NoneType"),
    "returns a dict": ("def get_config():\n    return {}\n", "return a moe_jax.config.Config"),
    "returns a section": (PLAIN.replace("Config()", "ModelConfig()"), "get_config() returns a ModelConfig"),
    "misspelt": (
        "config.model.widht = 8",
        "config.model.widht=8: no such field; did you mean config.model.width?",
    ),
    "misspelt section": ("config.modle = c.ModelConfig()", "did you mean config.model?"),
    "bool for int": ("config.seed = True", "config.seed=True: a bool, not an int"),
    "float for int": ("config.model.width = 8.0", "config.model.width=8.0: a float, not an int"),
    "str for float": ("config.optimizer.b1 = '0.9'", "config.optimizer.b1='0.9': a str, not a float"),
    "None for str": (
        "config.sample.prompt = None",
        "config.sample.prompt=None: a NoneType, not a str; write a str",
    ),
    "dict for section": ("config.mesh = {'data': 2}", "config.mesh={'data': 2}: a dict, not a MeshConfig"),
    "class for section": ("config.mesh = c.MeshConfig", "not a MeshConfig; set its fields instead"),
    "one source": ("config.data.sources = c.SourceConfig()", "write a tuple of SourceConfig"),
    "no source": (
        "config.data.sources = ()",
        "config.data.sources=(): there is no source; add a SourceConfig",
    ),
    "dict for source": (
        "config.data.sources = ({},)",
        "config.data.sources[0]={}: a dict, not a SourceConfig",
    ),
    "same name": (
        "config.data.sources *= 2",
        "config.data.sources[1].name=python_stdlib: the name of data.sources[0]",
    ),
    "group without path": (
        "config.optimizer.groups = (c.ParameterGroup(),)",
        "optimizer.groups[0].path='': matches every",
    ),
    "group with bad path": (
        "config.optimizer.groups = (c.ParameterGroup('a('),)",
        "not a regular expression",
    ),
    "negative decay": (
        "config.optimizer.groups = (c.ParameterGroup('a', weight_decay=-0.5),)",
        "config.optimizer.groups[0].weight_decay=-0.5: negative; use 0 or more, or -1",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_config_file(files, capsys, name):
    body, message = BAD_FILES[name]
    if body.startswith("config."):
        body = PLAIN.replace("return c.Config()", f"config = c.Config()\n    {body}\n    return config")
    (files / "configs/bad.py").write_text(body)
    refused(capsys, ["--config=configs/bad.py", "--workdir=w"], message)


def test_overrides_of_each_type(files):
    config, flags = good(
        "--config.seed=3",
        "--config.optimizer.b1=1e-1",
        "--config.model.rope_theta=500000",
        "--config.sample.prompt=a, 'b' = c: d",
        "--config.model.scan=false",
        "--config.data.sources[0].weight=3",
        "--config.model.pattern=routed,dense",
    )
    assert (config.seed, config.optimizer.b1, config.model.rope_theta) == (3, 0.1, 500000.0)
    assert config.sample.prompt == "a, 'b' = c: d"
    assert config.model.scan is False
    assert config.data.sources[0].weight == 3.0 and isinstance(config.data.sources, tuple)
    assert config.model.pattern == "routed,dense"
    assert flags.workdir == "w"


def test_every_leaf_can_be_set(files):
    plain = c.Config()
    arguments = [f"--config.{path}={getattr(owner, leaf.name)}" for path, owner, leaf in c.leaves(plain)]
    config, _ = good(*arguments)
    assert config == plain


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.model.scan", "false"], False),
        (["--config.model.scan", "--config.seed=1"], True),
        (["--noconfig.model.scan"], False),
        (["--config.model.scan=false", "--config.model.scan=true"], True),
        (["-config.model.scan=0"], False),
        (["--config.model.scan", "False"], False),
    ],
    ids=str,
)
def test_booleans(files, arguments, expected):
    assert good(*arguments)[0].model.scan is expected


@pytest.mark.smoke
def test_order_and_separate_values(files):
    argv = [
        "--config.seed",
        "1",
        "--workdir",
        "w",
        "--config.mesh.data",
        "-1",
        "--config",
        "configs/plain.py",
    ]
    config, flags, code = call([*argv, "--config.seed", "2"])
    assert (config.seed, config.mesh.data, flags.workdir, code) == (2, -1, "w", 0)


def test_workdir_below_the_home_folder(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    config, flags, _ = call(["--workdir=~/run"], config_from="workdir")
    assert (config.seed, flags.workdir) == (5, f"{files}/run")


def test_flagfile(files):
    (files / "flags").write_text("--config=configs/plain.py\n--config.seed=4\n")
    config, _, _ = call(["--flagfile=flags", "--workdir=w"])
    assert config.seed == 4


def test_config_file_with_an_argument_and_a_class(files):
    text = "import dataclasses\nfrom moe_jax import config as c\n"
    text += "@dataclasses.dataclass\nclass Local:\n    x: 'int' = 1\n"
    (files / "configs/sized.py").write_text(text + "def get_config(size='2'):\n    return c.Config(seed=int(size))\n")
    assert load_config("configs/sized.py").seed == 2
    assert load_config("configs/sized.py:7").seed == 7
    assert load_config(str(files / "configs/sized.py:8")).seed == 8


def test_config_file_is_read_again(files):
    assert load_config("configs/plain.py").seed == 0
    (files / "configs/plain.py").write_text("x = 1\n")
    with pytest.raises(c.ConfigError, match="get_config"):
        load_config("configs/plain.py")


def test_two_runs_share_nothing(files):
    config, _ = good("--config.data.sources[0].weight=3", "--config.seed=3")
    assert good()[0] == c.Config()
    assert config.seed == 3


def own_flags(values):
    absl_flags.DEFINE_string("prompt", None, "Text to continue.", flag_values=values, required=True)
    absl_flags.DEFINE_integer("count", 1, "How many.", flag_values=values)
    absl_flags.DEFINE_enum("form", "text", ["text", "json"], "Form.", flag_values=values)
    absl_flags.DEFINE_bool("quiet", False, "Say less.", flag_values=values)
    absl_flags.DEFINE_multi_string("source", [], "NAME=GLOB.", flag_values=values)


def test_config_from_workdir_with_own_flags(files):
    options = {"flags": own_flags, "config_from": "workdir"}
    argv = [
        "--workdir=run",
        "--prompt",
        "--config.x",
        "--source=a=*.txt",
        "--source",
        "b=c",
        "--config.mesh.expert=8",
    ]
    config, flags, code = call([*argv, "--quiet"], **options)
    assert (config.seed, config.mesh.expert, code) == (5, 8, 0)
    assert (flags.prompt, flags.source, flags.quiet, flags.count) == (
        "--config.x",
        ["a=*.txt", "b=c"],
        True,
        1,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a"], "--workdir: not given"),
        (["--prompt=a", "--workdir=nowhere"], "--workdir=nowhere: no such folder"),
        (["--prompt=a", "--workdir=configs"], "--workdir=configs: no config.json in it"),
        (["--prompt=a", "--workdir=a_file"], "--workdir=a_file: a file"),
        (["--prompt=a", "--workdir=broken"], "--workdir=broken: config.json: JSONDecodeError"),
        (["--prompt=a", "--workdir=newer"], "config.model.depth=3: no such field"),
        (["--prompt=a", "--workdir=typed"], "config.seed='1': a str, not an int"),
        (
            ["--prompt=a", "--workdir=run", "--config=configs/plain.py"],
            "--config=configs/plain.py: this command reads",
        ),
        (["--prompt=a", "--workdir=run", "--config.seed=x"], "config.seed=x: not an int"),
        (["--workdir=run"], "--prompt: "),
        (["--prompt=a", "--workdir=run", "--count=x"], "--count=x: "),
        (["--prompt=a", "--workdir=run", "--form=xml"], "--form=xml: "),
        (["--prompt=a", "--workdir=run", "--promt=a"], "did you mean --prompt?"),
        (["--workdir=run", "--prompt"], "--prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_workdir_and_own_flags(files, capsys, arguments, message):
    for name, text in (("broken", "{"), ("newer", '{"model": {"depth": 3}}'), ("typed", '{"seed": "1"}')):
        (files / name).mkdir()
        (files / name / "config.json").write_text(text)
    refused(capsys, arguments, message, flags=own_flags, config_from="workdir")


def test_command_without_workdir(files):
    config, flags, code = call(["--config=configs/plain.py"], workdir=False)
    assert (config, code) == (c.Config(), 0)
    assert "workdir" not in flags


@pytest.mark.smoke
def test_main_decides_the_exit_code(files, capsys):
    argv = ["train.py", "--config=configs/plain.py", "--workdir=w"]
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda config, flags: 143, argv)
    assert exit_.value.code == 143

    def refuses(config, flags):
        raise c.ConfigError("mesh.data", 3, "there are 8 devices", "use -1")

    def interrupted(config, flags):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        cli.run(interrupted, argv)
    assert exit_.value.code == 130

    with pytest.raises(SystemExit) as exit_:
        cli.run(refuses, argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: config.mesh.data=3: there are 8 devices; use -1\n"

    def fails(config, flags):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(fails, argv)


def test_config_help_lists_every_leaf(files, capsys):
    assert call(["--config.help"])[2] == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    text = " ".join(out.split())
    for path, _, leaf in c.leaves(c.Config()):
        assert re.search(rf"config\.{re.escape(path)} = \S.*? {leaf.type.__name__} ", out), path
        assert leaf.metadata["doc"].replace("- ", "-") in text.replace("- ", "-"), path
        assert all(str(choice) in text for choice in leaf.metadata["choices"])
    assert "config.optimizer.groups[i].path = ''" in out


def test_config_help_shows_the_values(files, capsys):
    (files / "configs/other.py").write_text(PLAIN.replace("Config()", "Config(seed=77)"))
    argv = [
        "--config=configs/other.py",
        "--config.help",
        "--config.model.width=64",
        "--config.model.moe.top_k=99",
    ]
    assert call(argv)[2] == 0
    out = capsys.readouterr().out
    assert "config.seed = 77 " in out and "config.model.width = 64 " in out and "top_k = 99 " in out
    assert call(["--workdir=run", "--config.help"], config_from="workdir")[2] == 0
    assert "config.seed = 5 " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(files, capsys, flag):
    assert call([flag, "--nonsense"], flags=own_flags)[2] == 0
    out = capsys.readouterr().out
    assert out.startswith("The command line: every setting")
    for name in (
        "--config=FILE",
        "--workdir=VALUE",
        "--prompt=VALUE",
        "--[no]quiet",
        "One of text, json.",
        "Default: 1.",
    ):
        assert name in out
    assert len(out.splitlines()) < 30 and "--only_check_args" not in out


SCRIPT = '''"""Prints a seed.

    python script.py --config=FILE --workdir=DIR
"""
import sys
from moe_jax import cli

def main(config, flags):
    print(config.seed, "jax" in sys.modules)

if __name__ == "__main__":
    cli.run(main)
'''


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--config=configs/plain.py", "--workdir=w", "--config.seed=3"], 0, "3 False\n", ""),
        (["--help"], 0, "Prints a seed.\n", ""),
        (
            ["--config=configs/plain.py", "--workdir=w", "--config.model.moe.top_k=9"],
            2,
            "",
            "config.model.moe.top_k=9: ",
        ),
        (
            ["--config=configs/plain.py", "--workdir=w", "--config.sed=3"],
            2,
            "",
            "config.sed=3: no such field",
        ),
        (["--config=configs/missing.py", "--workdir=w"], 2, "", "--config=configs/missing.py: no such file"),
    ],
    ids=["good", "help", "combination", "unknown", "missing"],
)
def test_as_a_process(files, arguments, code, out, err):
    (files / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "script.py", *arguments], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(out) and (out or not done.stdout)
    assert done.stderr.startswith(f"error: {err}") if err else not done.stderr
    assert done.stderr.count("\n") == (1 if err else 0)
