"""Trains, fine-tunes or resumes a model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py --workdir=runs/wide --config.model.width=256
    python train.py --config.help

Run again, it goes on from the newest checkpoint in --workdir, or says that the run is complete. Interrupted (Ctrl-C,
SIGTERM), it finishes the step, saves and exits with 130 or 143.
"""

from moe_jax import cli


def main(config, flags) -> int:
    from moe_jax.evaluate.closing import closing_results
    from moe_jax.train.loop import fit

    return fit(config, flags.workdir) or closing_results(config, flags.workdir)


if __name__ == "__main__":
    cli.run(main)
