"""StableMoE beside a dense control, Switch, BASE, Hash and a frozen random table, on the Python standard library's sources.

    python -m moe_jax.study --config=configs/studies/stablemoe_lm.py --workdir=runs/stablemoe_lm --jobs=2
    python -m moe_jax.study --config=configs/studies/stablemoe_lm.py:PART --workdir=runs/stablemoe_PART --jobs=2

The paper's place (arXiv:2204.08396): 4 dense blocks, and after the second one layer of 8 experts, each a stack of 2 residual
sublayers (32 of 3 in 12 blocks with --scale=full), without attention and norm of its own. The control has as many dense
sublayers there. `table` has StableMoE's gate over a table that is balanced over the text and never learned: what stage 1 adds
to it is what learning to route is worth. Eight seeds, 1.5 million tokens a run (40 million at full). PART:

    equal_time   the same arms, each trained for the seconds of the control
    ablations    stage 1 alone, BASE and BASE frozen, place, length of stage 1, number and depth of experts, light router
"""

from moe_jax import config as c
from moe_jax.config import Arm, Settings, Study

TOKENS = 1.5e6
# Half the rate was tried for StableMoE on the tuning seed: 0.083 nats worse.
GRID = {"plain": {}, "rate-x2": {"optimizer.learning_rate": c.Scale(2)}}
FULL = {
    "model.layers": 12,
    "model.width": 384,
    "model.ffn_width": 1536,
    "model.heads": 6,
    "model.init_std": 0.051,  # 1 / sqrt(width), as in the base
    "model.dtype": "bfloat16",
    "model.inserts": "stable=experts@6",
    "model.ffns[0].moe.experts": 32,
    "model.ffns[0].moe.expert_sublayers": 3,
    "data.vocab_size": 16384,
    "data.sequence_length": 512,
    "data.batch_size": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 100,
    "train.steps": 1220,
}
CONTROL = {"model.inserts": "first=sublayer@2,second=sublayer@2"}
CONTROL_FULL = {"model.inserts": "first=sublayer@6,second=sublayer@6,third=sublayer@6"}
PARTS = ("", "equal_time", "ablations")


def moe(**fields: str | int | float | bool) -> Settings:
    """Settings of the layer `experts`; a double underscore stands for a dot."""
    return {f"model.ffns[0].moe.{name.replace('__', '.')}": value for name, value in fields.items()}


def stable(**fields: str | int | float) -> Settings:
    """Settings of the router `stable`."""
    return moe(**{f"routers__stable__{name}": value for name, value in fields.items()})


ROUTERS = {
    "switch": moe(router="switch", routers__switch__jitter=0.01),
    "base": moe(router="base"),
    "hash": moe(router="hash"),
    "stable": {},
    "table": stable(light_router="balanced"),
}


def base_config() -> c.Config:
    base = c.Config()
    base.data.batch_size = 8
    base.model.layers, base.model.pattern, base.model.inserts = 4, "dense", "stable=experts@2"
    base.model.width, base.model.ffn_width, base.model.heads, base.model.init_std = 64, 256, 2, 0.125
    experts = c.MoEConfig(router="stable", experts=8, top_k=1, expert_sublayers=2)
    # In a tenth of so few steps nothing settles that could be distilled.
    experts.routers.stable.stage_1 = 0.3
    base.model.ffns = (
        c.FFNConfig("experts", kind="routed", attention=False, norm=False, moe=experts),
        c.FFNConfig("sublayer", kind="dense", attention=False),
    )
    base.model.scan = False  # few blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.optimizer.learning_rate, base.optimizer.warmup_steps = 12e-3, 40
    base.optimizer.schedule, base.optimizer.decay_fraction, base.optimizer.final_fraction = "wsd", 0.8, 0.0
    base.train.steps = round(TOKENS / (base.data.batch_size * base.data.sequence_length))
    base.train.log_every = 20
    base.train.eval_every, base.train.eval_batches = base.train.steps // 10, 8
    base.train.checkpoint_every = 0
    base.train.max_to_keep = 1
    base.train.routing_snapshots = 50
    base.train.tensorboard = False
    return base


def fast_light_router() -> c.Config:
    """The base with ten times the learning rate for the word vectors of the light router."""
    base = base_config()
    base.optimizer.groups = (c.ParameterGroup("light_embedding", learning_rate_scale=10.0),)
    return base


def ablations() -> tuple[Arm, ...]:
    alone = {"stage_1": 1.0, "evaluation": "backbone", "distillation_loss": 0.0}
    one = moe(expert_sublayers=1, expert_norm=True)
    return (
        Arm("stable"),
        Arm("stage_1_alone", stable(**alone)),
        Arm("base", moe(router="base")),
        Arm("base_frozen", stable(backbone="base")),
        Arm("bottom", {"model.inserts": "stable=experts@1"}),
        Arm("top", {"model.inserts": "stable=experts@4"}, full={"model.inserts": "stable=experts@12"}),
        Arm(
            "scattered",
            one | {"model.inserts": "one=experts@1,two=experts@3"},
            full=one | {"model.inserts": "one=experts@3,two=experts@6,three=experts@9"},
        ),
        Arm("stage_1_tenth", stable(stage_1=0.1)),
        Arm("stage_1_half", stable(stage_1=0.5)),
        Arm("experts_x2", moe(experts=16), full=moe(experts=64)),
        Arm("sublayers_x2", moe(expert_sublayers=4), full=moe(expert_sublayers=6)),
        Arm("light_x10", base=fast_light_router()),
        Arm("window", stable(light_router="window")),
    )


def get_config(part: str = "") -> Study:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the study; write stablemoe_lm.py, or one of its parts after a colon")
    title = "StableMoE beside other routings"
    if part == "ablations":
        return Study(base_config(), ablations(), "stable", (10, 11, 12), full=FULL, title=f"{title}: ablations")
    limits = {"full": FULL, "grid": GRID, "tuning_seeds": (0,), "hours_limit": 8}
    control, seeds = Arm("dense", CONTROL, full=CONTROL_FULL), tuple(range(10, 18))
    if part == "equal_time":
        arms = [Arm(name, settings, equal_time_to="dense") for name, settings in ROUTERS.items()]
        return Study(base_config(), (control, *arms), "dense", seeds, primary="stable", title=f"{title}, equal time", **limits)
    arms = [Arm(name, settings) for name, settings in ROUTERS.items() if name != "switch"]
    arms = (Arm("switch", ROUTERS["switch"]), Arm("switch_again", twin_of="switch"), control, *arms)
    return Study(base_config(), arms, "switch", seeds, primary="stable", title=title, **limits)
