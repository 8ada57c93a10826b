"""Does a second expert for the tokens that need it save time at equal quality? On the Python standard library's sources.

    python -m moe_jax.study --config=configs/studies/adaptive.py --workdir=runs/adaptive --jobs=2
    python -m moe_jax.study --config=configs/studies/adaptive.py:PART --workdir=runs/adaptive_PART --jobs=2

Every block is routed, with 16 experts of width 8 D, so that the experts are most of a step. "Equal quality at less time" means
nothing where top-2 is no better than top-1 at twice its FLOPs: that is the first thing to see in the table. The margin of 0.02
nats, below which an arm counts as good as top-2, was named beforehand. --scale=full has 40 million tokens, for a GPU, and needs
more text in `data.sources[0].files`. PART:

    books        the same arms on prose: text files of your own, in the folder books; three seeds
    thresholds   thresholds, targets of the controller, and other routers that decide how many experts a token takes
    size         top-1 and top-2 at other budgets and sizes: where does the second expert begin to pay?
"""

from moe_jax import config as c
from moe_jax.config import Arm, Curve, Settings, Study

MARGIN = 0.02
TOP_1 = {"model.moe.router": "top_k", "model.moe.top_k": 1, "model.moe.routers.top_k.renormalise": "never"}
TOP_2 = {"model.moe.router": "top_k", "model.moe.top_k": 2, "model.moe.routers.top_k.renormalise": "never"}
CURRICULUM = {"data.curriculum": "mean"}
# Experts of 5/8 of the width, two for every token, have the FLOPs of 1.25 of the others.
STATIC = TOP_2 | {"model.moe.expert_width": 320}
# With 6 of 22 experts that do nothing, of two choices 1.45 run, more or less where the router learns to.
NULL = TOP_2 | {"model.moe.zero_experts": 6}
EVALUATED = (0.02, 0.05, 0.2, 0.4, 0.8)
PARTS = ("", "books", "thresholds", "size")
GRID = {"plain": {}, "rate-x0.5": {"optimizer.learning_rate": c.Scale(0.5)}}
FULL = {
    "model.layers": 12,
    "model.width": 384,
    "model.ffn_width": 1536,
    "model.heads": 6,
    "model.init_std": 0.051,  # 1 / sqrt(width), as in the base
    "model.dtype": "bfloat16",
    "model.moe.expert_width": 1536,
    "data.vocab_size": 16384,
    "data.sequence_length": 512,
    "data.batch_size": 64,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 100,
    "train.steps": 1220,
}


def adaptive(**fields: str | float) -> Settings:
    """Two experts where the router says so; fields: its options."""
    options = {f"model.moe.routers.adaptive.{name}": value for name, value in fields.items()}
    return {"model.moe.router": "adaptive", "model.moe.top_k": 2} | options


def base_config() -> c.Config:
    base = c.Config()
    # A fifth of the text is trained on, 3.5 times: a curriculum begins with the second epoch.
    base.data.batch_size, base.data.vocab_size, base.data.held_out_percent = 8, 1024, 40.0
    base.model.layers, base.model.pattern = 4, "routed"
    base.model.width, base.model.ffn_width, base.model.heads, base.model.init_std = 64, 512, 2, 0.125
    base.model.moe.experts, base.model.moe.top_k = 16, 2
    base.model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.optimizer.learning_rate, base.optimizer.warmup_steps = 6e-3, 40
    base.optimizer.schedule, base.optimizer.decay_fraction, base.optimizer.final_fraction = "wsd", 0.8, 0.0
    base.train.steps = 1500
    base.train.log_every = 20
    base.train.eval_every, base.train.eval_batches = 75, 8
    base.train.checkpoint_every, base.train.max_to_keep = 0, 1
    base.train.tensorboard = False
    return base


def on_books() -> c.Config:
    base = base_config()
    base.data.sources = (c.SourceConfig(name="books", files="books/*.txt", document="paragraph"),)
    return base


def main_arms() -> tuple[Arm, ...]:
    return (
        Arm("dense", {"model.pattern": "dense"}),
        Arm("top_1", TOP_1),
        Arm("top_2", TOP_2),
        Arm("adaptive", adaptive()),
        Arm("adaptive_curriculum", adaptive() | CURRICULUM),
        Arm("target_1.25", adaptive(target_k=1.25)),
        Arm("static_1.25", STATIC, full={"model.moe.expert_width": 960}),
        Arm("null_experts", NULL),
    )


def other_arms() -> tuple[Arm, ...]:
    thresholds = (0.05, 0.2, 0.3, 0.4)
    return (
        Arm("top_2", TOP_2),
        Arm("adaptive", adaptive()),
        *(Arm(f"threshold_{threshold}", adaptive(threshold=threshold)) for threshold in thresholds),
        Arm("single_balance", adaptive(balance_over="single")),
        Arm("target_1.1", adaptive(target_k=1.1)),
        Arm("target_1.5", adaptive(target_k=1.5)),
        Arm("top_p", {"model.moe.router": "top_p", "model.moe.routers.top_p.max_k": 4}),
        Arm("expert_threshold", {"model.moe.router": "expert_threshold", "model.moe.routers.expert_threshold.max_k": 4}),
        Arm("quantile", TOP_2 | _quantile()),
        *(Arm(f"evaluated_{t}", {"model.moe.routers.adaptive.evaluation_threshold": t}, scores="adaptive") for t in EVALUATED),
        *(Arm(f"evaluated_with_{k}", {"model.moe.routers.adaptive.evaluation_k": k}, scores="adaptive") for k in (1, 2)),
    )


def trade_off() -> Curve:
    """Loss against the experts that ran: of one trained model with other thresholds in evaluation, and of models trained so."""
    trained = (
        "threshold_0.05",
        "adaptive",
        "threshold_0.2",
        "threshold_0.3",
        "threshold_0.4",
        "target_1.1",
        "target_1.5",
        "top_2",
    )
    evaluated = ("adaptive", *(f"evaluated_{t}" for t in EVALUATED), "evaluated_with_1", "evaluated_with_2")
    lines = {"trained so": dict.fromkeys(trained, 0.0), "one model, evaluated so": dict.fromkeys(evaluated, 0.0)}
    title = "Loss against experts per token"
    return Curve("trade_off", title, "experts per token in evaluation", lines, log=False, x_metric="evaluated_experts")


def _quantile() -> Settings:
    return {
        "model.moe.routers.top_k.bias_rule": "quantile",
        "model.moe.routers.top_k.bias_rate": 0.1,
        "model.moe.routers.top_k.balance_loss": 0.0,
    }


def sizes() -> tuple[Arm, ...]:
    """Pairs of top-1 and top-2, each of which has its own baseline."""
    changes = {
        "": {},
        "_short": {"train.steps": 750},
        "_long": {"train.steps": 3000},
        "_narrow_experts": {"model.moe.expert_width": 128},
        "_wide": {"model.width": 128, "model.heads": 4, "model.init_std": 0.088, "model.moe.expert_width": 1024},
    }
    pairs = []
    for name, settings in changes.items():
        pairs += [
            Arm(f"top_1{name}", TOP_1 | settings, baseline=f"top_1{name}"),
            Arm(f"top_2{name}", TOP_2 | settings, baseline=f"top_1{name}"),
        ]
    return tuple(pairs)


def get_config(part: str = "") -> Study:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the study; write adaptive.py, or one of its parts after a colon")
    title = "One expert or two"
    if part == "size":
        return Study(base_config(), sizes(), "top_1", (10,), title="Where a second expert pays")
    if part == "thresholds":
        limits = {"margin": MARGIN, "curves": (trade_off(),), "title": f"{title}: thresholds and rivals"}
        return Study(base_config(), other_arms(), "top_2", (10, 11, 12), **limits)
    seeds, base = (tuple(range(10, 18)), base_config()) if not part else ((10, 11, 12), on_books())
    limits = {"full": FULL, "grid": GRID, "tuning_seeds": (0,), "hours_limit": 12, "margin": MARGIN}
    return Study(base, main_arms(), "top_2", seeds, primary="adaptive", title=title + (", prose" if part else ""), **limits)
