"""PEER beside a dense layer, mixtures of experts and product-key memory, on the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/peer.py --workdir=runs/peer

The middle block of 3 (8 at full) changes, as in arXiv:2407.04153; the others are dense. 2.0 million tokens a run, 9.8 million
with --scale=full; the arms named `half` have half of them, and a schedule of their own. `n1`, `n4`, `n64`: pools of 1, 4 and 64
times 32^2 experts (1,024, 4,096 and 65,536; `peer` has 16,384), 16 times as many at full. Heads and granularity vary
at half the tokens: their curves ask for an order at one budget, not for the best loss.

The FLOPs of a step, routers included, are those of `dense`, whose middle block has width 192 (768), exactly (`peer`,
`pkm`) or to 1 %, except in the arms below; keys cost as sqrt(N):

    --scale    n1       n4       n64      h2       h8       atoms    64x8
    small      -4.1 %   -2.7 %   +5.5 %   -6.2 %   +12.3 %  +5.4 %   +1.4 %
    full       -1.1 %   -0.7 %   +1.5 %   -1.6 %   +3.3 %   +1.3 %   +0.1 %

`expert_choice` looks at later tokens in its evaluation too, which no model that writes text can; `expert_choice_causal` are the
same runs with each token's best expert.

`--config=configs/studies/peer.py:rate` asks, at half the tokens, whether the pool wants another learning rate than the rest.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Curve, Settings, Study

STEPS, STEPS_FULL = 500, 600  # 500: 1,000 visits of each of 65,536 experts, 32 to a token
DENSE = {"model.inserts": "middle=dense@1", "model.insert_width": 192}
DENSE_FULL = {"model.inserts": "middle=dense@4", "model.insert_width": 768}
CAUSAL = {"model.moe.routers.expert_choice.evaluation": "tokens"}


def routed(experts: int, top_k: int) -> tuple[Settings, Settings]:
    """(settings, settings with --scale=full) of E experts, K to a token: 1,536 hidden neurons and 192 of them; 4 times that."""
    settings = {"model.inserts": "middle=routed@1", "model.moe.experts": experts, "model.moe.top_k": top_k}
    small, full = {"model.moe.expert_width": 192 // top_k}, {"model.moe.expert_width": 768 // top_k}
    return settings | small, {"model.inserts": "middle=routed@4"} | full


def retrieving(kind: str, side: int, full: Settings | None = None, **fields: int | str) -> tuple[Settings, Settings]:
    """The same of side^2 experts, 16 times as many with --scale=full; fields: of model.peer, `full` those that differ there."""
    of_peer = lambda values: {f"model.peer.{name}": value for name, value in values.items()}
    small = {"model.inserts": f"middle={kind}@1"} | of_peer({"experts": side**2} | fields)
    return small, {"model.inserts": f"middle={kind}@4"} | of_peer({"experts": (4 * side) ** 2} | (full or {}))


def base_config() -> c.Config:
    base = c.Config()
    base.data.vocab_size = 1024
    base.data.sequence_length, base.data.batch_size = 128, 32
    base.model.layers, base.model.pattern = 2, "dense"
    base.model.init_std = 0.09
    base.model.heads, base.model.ffn_width = 2, 192
    base.model.peer.heads, base.model.peer.top_k, base.model.peer.key_width = 4, 8, 64
    base.optimizer.learning_rate = 6e-3
    base.optimizer.warmup_steps = 40
    base.model.scan = False  # three blocks compile fast enough, and a loop costs a fifth more time on a CPU
    base.train.steps = STEPS
    base.train.log_every = 10
    base.train.eval_every = 50
    base.train.eval_batches = 8
    base.train.checkpoint_every = 250
    base.train.max_to_keep = 1
    base.train.tensorboard = False
    return base


# Queries of 128 make the middle block's FLOPs those of width 768 again, with 512^2 experts.
FULL = {
    "data.vocab_size": 4096,
    "data.sequence_length": 512,
    "data.batch_size": 32,
    "model.layers": 7,
    "model.width": 512,
    "model.heads": 8,
    "model.ffn_width": 2048,
    "model.dtype": "bfloat16",
    "model.init_std": 0.044,
    "model.peer.heads": 8,
    "model.peer.top_k": 16,
    "model.peer.key_width": 128,
    "optimizer.learning_rate": 1e-3,
    "train.steps": STEPS_FULL,
    "train.eval_every": 60,
}


def get_config(part: str = "") -> Study:
    if part not in ("", "rate"):
        raise ValueError(f"{part!r} is no part of the study; write peer.py or peer.py:rate")
    return learning_rates() if part else comparison()


def learning_rates() -> Study:
    base, (small, full) = base_config(), retrieving("peer", 128)
    base.train.steps = STEPS // 2
    base.optimizer.groups = (c.ParameterGroup("embedding"),)  # without effect; arms with a pool make it theirs
    arms = [Arm("dense", DENSE, full=DENSE_FULL)]
    rates = {"third": 1 / 3, "same": 1.0, "triple": 3.0, "tenfold": 10.0}
    for name, scale in rates.items():
        group = {"optimizer.groups[0].path": "peer/experts$", "optimizer.groups[0].learning_rate_scale": scale}
        arms.append(Arm(f"peer_{name}", small | group, full=full))
    line = {"": {f"peer_{name}": round(scale, 2) for name, scale in rates.items()}}
    curve = Curve(
        "rate", "The pool's learning rate", "its learning rate / that of the rest", line, ("difference", "unevenness", "usage")
    )
    return Study(
        base,
        tuple(arms),
        baseline="dense",
        full=FULL | {"train.steps": STEPS_FULL // 2},
        title="PEER at equal FLOPs, half the tokens",
        curves=(curve,),
    )


def comparison() -> Study:
    base = base_config()
    small, full = routed(8, 1)
    main = {
        "dense": (DENSE, DENSE_FULL),
        "moe_8x1": (small, full),
        "moe_64x8": routed(64, 8),
        "expert_choice": (small | {"model.moe.router": "expert_choice", "model.moe.allow_noncausal": True}, full),
        "pkm": retrieving("pkm", 128, {"top_k": 32}, top_k=16),
        "peer": retrieving("peer", 128),
    }
    # Neurons like those of the routed arms, 39^2 = 1,521 for 1,536 and 192 a token; longer queries would outweigh them.
    atoms = {"top_k": 16, "key_width": 16, "activation": "swiglu"}
    pools = {
        "peer_n1": retrieving("peer", 32),
        "peer_n4": retrieving("peer", 64),
        "peer_n64": retrieving("peer", 256),
        "peer_no_norm": retrieving("peer", 128, query_norm="none"),
    }
    halves = {
        "moe_32x4": routed(32, 4),
        "peer_atoms": retrieving("peer", 39, {"heads": 48, "experts": 78**2}, heads=12, **atoms),
        "peer_h2": retrieving("peer", 128, {"heads": 4}, heads=2),
        "peer_h8": retrieving("peer", 128, {"heads": 16}, heads=8),
    }
    arms = [Arm(name, small, full=full) for name, (small, full) in (main | pools).items()]
    for name, (small, full) in (main | halves).items():
        small, full = small | {"train.steps": STEPS // 2}, full | {"train.steps": STEPS_FULL // 2}
        arms.append(Arm(f"{name}_half", small, full=full, baseline="dense_half"))
    for budget in ("", "_half"):
        arms.append(Arm(f"expert_choice_causal{budget}", CAUSAL, scores=f"expert_choice{budget}"))

    pool = "model.peer.experts"
    curves = (
        Curve(
            "pool",
            "Larger pools",
            "experts N",
            {
                "BatchNorm of queries": {name: pool for name in ("peer_n1", "peer_n4", "peer", "peer_n64")},
                "no norm": {"peer_no_norm": pool},
            },
            ("difference", "unevenness", "usage"),
        ),
        Curve(
            "granularity",
            "Finer experts, equal parameters, total and active",
            "hidden neurons of an expert",
            {
                "": {f"moe_{kind}_half": "model.moe.expert_width" for kind in ("8x1", "32x4", "64x8")} | {"peer_atoms_half": 1},
            },
            ("difference",),
        ),
        Curve(
            "heads",
            "More heads",
            "heads H",
            {
                "": {name: "model.peer.heads" for name in ("peer_h2_half", "peer_half", "peer_h8_half")},
            },
            ("difference", "unevenness"),
        ),
        Curve(
            "budget",
            "Two budgets",
            "optimizer steps",
            {name: {f"{name}_half": "train.steps", name: "train.steps"} for name in (*main, "expert_choice_causal")},
            ("difference",),
        ),
    )
    return Study(
        base,
        tuple(arms),
        baseline="dense",
        seeds=(0, 1, 2),
        full=FULL,
        title="PEER at equal FLOPs",
        curves=curves,
        shown=(*main, "expert_choice_causal"),
        hours_limit=12.0,  # 29 arms of three seeds, compared with each other
    )
