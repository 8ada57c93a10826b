"""PEER beside a dense layer, mixtures of experts and product-key memory, on the Python standard library's own sources.

    python -m moe_jax.study --config=configs/studies/peer.py:PART --workdir=runs/peer_PART

The middle block of 3 (8 at full) changes, as in arXiv:2407.04153; the others are dense. PART:

    levers     what might help PEER, one change at a time, on the tuning seeds: 1.0 million tokens a run, as half and pools
    half       dense, PEER, product-key memory, 64 experts of which 8 run, and 8 experts by a hash of the token id: all tuned by
               one grid, at equal FLOPs and, by schedules of their own, in equal time; eight seeds
    whole      the same with 2.0 million tokens (9.8 with --scale=full), each arm with the settings that won in half
    pools      PEER with 32^2 to 512^2 experts, 16 times as many at full
    controls   8 experts of which one runs, expert choice, PEER without a norm of its queries, and with other rounding

The FLOPs of a step, routers included, are those of `dense`, whose middle block has width 192 (768), exactly (`peer`, `pkm`,
`hash`) or to 1 %, except in the arms below: keys cost as sqrt(N), and the control `token_hash` searches nothing.

    --scale    n32      n64      n256     n512     64x8     token_hash
    small      -4.1 %   -2.7 %   +5.5 %   +16.4 %  +1.4 %   -11.0 %
    full       -1.1 %   -0.7 %   +1.5 %   +4.4 %   +0.1 %   -

`expert_choice` looks at later tokens in its evaluation too, which no model that writes text can; `expert_choice_causal` are the
same runs with each token's best expert.
"""

from moe_jax import config as c
from moe_jax.config import Arm, Curve, Settings, Study

STEPS, STEPS_FULL = 500, 600
DENSE = {"model.inserts": "middle=dense@1", "model.insert_width": 192}
DENSE_FULL = {"model.inserts": "middle=dense@4", "model.insert_width": 768}
CAUSAL = {"model.moe.routers.expert_choice.evaluation": "tokens"}
GRID = {
    "plain": {},
    "rate-x0.5": {"optimizer.learning_rate": c.Scale(0.5)},
    "rate-x2": {"optimizer.learning_rate": c.Scale(2)},
    "final_fraction-0.3": {"optimizer.final_fraction": 0.3},
    "final_fraction-0.5": {"optimizer.final_fraction": 0.5},
}


def routed(experts: int, top_k: int, **moe: bool | str) -> tuple[Settings, Settings]:
    """(settings, settings with --scale=full) of E experts, K to a token: 1,536 hidden neurons and 192 of them; 4 times that."""
    settings = {"model.inserts": "middle=routed@1", "model.moe.experts": experts, "model.moe.top_k": top_k}
    settings |= {f"model.moe.{name}": value for name, value in moe.items()}
    small, full = {"model.moe.expert_width": 192 // top_k}, {"model.moe.expert_width": 768 // top_k}
    return settings | small, {"model.inserts": "middle=routed@4"} | full


def retrieving(kind: str, side: int, full: Settings | None = None, **fields: int | str) -> tuple[Settings, Settings]:
    """The same of side^2 experts, 16 times as many with --scale=full; fields: of model.peer, `full` those that differ there."""
    of_peer = lambda values: {f"model.peer.{name}": value for name, value in values.items()}
    small = {"model.inserts": f"middle={kind}@1"} | of_peer({"experts": side**2} | fields)
    return small, {"model.inserts": f"middle={kind}@4"} | of_peer({"experts": (4 * side) ** 2} | (full or {}))


def base_config(steps: int = STEPS) -> c.Config:
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
    base.train.steps = steps
    base.train.log_every = 10
    base.train.eval_every = 50
    base.train.eval_batches = 8
    base.train.checkpoint_every = 0
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
HALF_FULL = FULL | {"train.steps": STEPS_FULL // 2}
WINNERS = {}  # of `half`; until there are some, `whole` is tuned by the grid itself
PEER, DENSE_LAYER, HASH = retrieving("peer", 128), (DENSE, DENSE_FULL), routed(8, 1, router="hash")


def get_config(part: str = "") -> Study:
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the study; write one of " + ", ".join(f"peer.py:{name}" for name in PARTS))
    return PARTS[part]()


def levers() -> Study:
    """Each change alone, of the arm `peer`."""
    base = base_config(STEPS // 2)
    base.optimizer.groups = (c.ParameterGroup("embedding"),) * 2  # without effect, until an arm with rates makes them its own
    peer, _ = PEER

    def group(number: int, path: str, rate: float, **more: float) -> Settings:
        values = {"path": path, "learning_rate_scale": rate} | more
        return {f"optimizer.groups[{number}].{name}": value for name, value in values.items()}

    keys, queries = "peer/router/keys$", "peer/router/kernel$"
    changes = {
        "pool_x3": group(0, "peer/experts$", 3.0),
        "pool_x10": group(0, "peer/experts$", 10.0),
        "selector_x0.3": group(0, keys, 0.3) | group(1, queries, 0.3),
        "keys_without_decay": group(0, keys, 1.0, weight_decay=0.0),
        "head_keys": {"model.peer.share_keys": False},
        "gates_x8": {"model.peer.gate_scale": 8.0},
        "sigmoid": {"model.peer.score": "sigmoid"},
        "raw": {"model.peer.score": "raw"},
        # One query of 64 for all heads pays for 128 neurons a token instead of 32.
        "low_rank": {"model.peer.query_rank": 64, "model.peer.share_keys": False, "model.peer.top_k": 32},
        "dense_branch": {"model.peer.shared_width": 96, "model.peer.heads": 2},
        "every_block": {"model.pattern": "peer"},
        "token_hash": {"model.peer.selector": "token_hash"},
    }
    arms = [Arm("dense", DENSE), Arm("hash", HASH[0]), Arm("peer", peer)]
    arms += [Arm(f"peer_{name}", peer | change) for name, change in changes.items()]
    return Study(base, tuple(arms), "dense", seeds=(0, 1, 2), title="What might help PEER, one change at a time")


def headline(steps: int, full: Settings, winners: dict[str, Settings], title: str) -> Study:
    """The five layers at equal FLOPs and in equal time. winners: settings of each; empty: tuned by the grid."""
    layers = {
        "dense": DENSE_LAYER,
        "peer": PEER,
        "pkm": retrieving("pkm", 128, {"top_k": 32}, top_k=16),
        "moe_64x8": routed(64, 8),
        "hash": HASH,
    }
    arms = [Arm(name, small | winners.get(name, {}), full=large) for name, (small, large) in layers.items()]
    for arm in tuple(arms[1:]):
        tuned_as = "" if winners else arm.name
        arms.append(Arm(f"{arm.name}_time", arm.settings, full=arm.full, equal_time_to="dense", tuned_as=tuned_as))
    return Study(
        base_config(steps),
        tuple(arms),
        baseline="dense",
        seeds=tuple(range(10, 18)),
        full=full,
        grid={} if winners else GRID,
        primary="peer",
        title=title,
        shown=tuple(layers),
    )


def half() -> Study:
    return headline(STEPS // 2, HALF_FULL, {}, "PEER at equal FLOPs and in equal time, half the tokens")


def whole() -> Study:
    return headline(STEPS, FULL, WINNERS, "PEER at equal FLOPs and in equal time")


def pools() -> Study:
    """Larger pools, as a slope."""
    sides = (32, 64, 128, 256, 512)
    arms = [Arm("dense", DENSE, full=DENSE_FULL)]
    arms += [Arm(f"peer_n{side}", small, full=full) for side in sides for small, full in (retrieving("peer", side),)]
    line = {"": {f"peer_n{side}": "model.peer.experts" for side in sides}}
    curve = Curve("pool", "Larger pools", "experts N", line, ("difference", "unevenness", "usage"))
    seeds = tuple(range(10, 15))
    title = "PEER against the number of experts, half the tokens"
    return Study(
        base_config(STEPS // 2), tuple(arms), "dense", seeds, HALF_FULL, title=title, curves=(curve,), primary="peer_n128"
    )


def controls() -> Study:
    small, full = routed(8, 1)
    expert_choice = small | {"model.moe.router": "expert_choice", "model.moe.allow_noncausal": True}
    no_norm, no_norm_full = retrieving("peer", 128, query_norm="none")
    arms = (
        Arm("dense", DENSE, full=DENSE_FULL),
        Arm("moe_8x1", small, full=full),
        Arm("expert_choice", expert_choice, full=full),
        Arm("expert_choice_causal", CAUSAL, scores="expert_choice"),
        Arm("peer", PEER[0], full=PEER[1]),
        Arm("peer_rounded", PEER[0] | {"model.loss_chunk": 512}, full=PEER[1], baseline="peer"),
        Arm("peer_no_norm", no_norm, full=no_norm_full),
    )
    title = "Controls beside PEER, half the tokens"
    return Study(base_config(STEPS // 2), arms, "dense", (10, 11, 12), HALF_FULL, title=title)


PARTS = {"levers": levers, "half": half, "whole": whole, "pools": pools, "controls": controls}
