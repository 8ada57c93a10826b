"""What a pair of runs with one seed shares."""

import flax.traverse_util
import jax
import numpy as np

from moe_jax.config.study import Arm
from moe_jax.models.decoder import Decoder
from moe_jax.study.plan import run_config
from moe_jax.train.state import init_state
from tests.study.small import make_study


def test_initialisation_is_shared_where_shapes_agree():
    settings = {"routed": {}, "dense": {"model.pattern": "dense,dense"}, "many": {"model.moe.experts": 16}}
    study = make_study(arms=tuple(Arm(name, values) for name, values in settings.items()))

    def start(arm, seed):
        config = run_config(study, study.arm(arm), seed)
        state = init_state(Decoder(config.model, 300), config, jax.random.key(config.seed))
        return flax.traverse_util.flatten_dict(jax.device_get(state["params"]), sep="/")

    routed, dense, many = (start(arm, 5) for arm in ("routed", "dense", "many"))
    for other, without in ((dense, "moe"), (many, "experts")):
        shared = {path for path in routed if path in other and routed[path].shape == other[path].shape}
        assert any("attention" in path for path in shared) and "embed/embedding" in shared
        assert not any(f"/{without}/" in path for path in shared)
        for path in shared:
            np.testing.assert_array_equal(routed[path], other[path], err_msg=path)
    # Every attention matrix is among them, and another seed gives others.
    weights = [path for path in routed if "attention" in path and routed[path].std() > 0]
    assert len(weights) >= 8 and all(path in dense for path in weights)
    again = start("routed", 6)
    assert not any(np.array_equal(routed[path], again[path]) for path in weights)
