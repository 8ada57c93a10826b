"""A small StableMoE language model of the Python standard library's sources, in minutes on a laptop: its routing settles.

    python train.py --config=configs/stablemoe_lm_small.py --workdir=runs/stablemoe
    python -m moe_jax.report --workdir=runs/stablemoe

4 dense blocks, and between them one layer of 8 experts, each a stack of 2 residual sublayers, without attention and norm of
its own. Routing is learned in the first 30 % of the steps, then frozen. After the paper's tenth of so few steps the affinities
still move: the light router agrees with them on 18 % of the tokens, after 200 steps on 38 %.
"""

from moe_jax import config as c


def get_config() -> c.Config:
    config = c.Config()
    config.data.batch_size = 8
    model = config.model
    model.layers, model.pattern, model.inserts = 4, "dense", "stable=experts@2"
    model.width, model.ffn_width, model.heads, model.init_std = 64, 256, 2, 0.125
    model.scan = False  # four blocks compile fast enough, and a loop costs a fifth more time on a CPU
    moe = c.MoEConfig(router="stable", experts=8, top_k=1, expert_sublayers=2)
    moe.routers.stable.stage_1 = 0.3
    model.ffns = (c.FFNConfig("experts", kind="routed", attention=False, norm=False, moe=moe),)
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 6e-3, 40
    config.train.steps = 700
    config.train.eval_every = config.train.checkpoint_every = 350
    config.train.eval_batches = 8
    config.train.routing_snapshots = 50
    config.sample.prompt = "def "
    config.sample.stop = "\n\n\n"
    return config
