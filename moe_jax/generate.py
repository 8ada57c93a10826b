"""Continues prompts with a trained model.

    python -m moe_jax.generate --workdir=runs/quickstart --prompt="def "
    python -m moe_jax.generate --workdir=runs/quickstart --prompt="import " --prompt="class " --temperature=0

Prints each prompt with its continuation on stdout, everything else on stderr. A sample ends where the model
ends the document. What is not given is taken from the run's config.sample; without a prompt there, write
--prompt= to start from nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from absl import flags as absl_flags

from moe_jax import cli
from moe_jax.config import Config, ConfigError, SampleConfig
from moe_jax.config.blocks import distinct_layers, options_path
from moe_jax.config.validate import validate

if TYPE_CHECKING:
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.train.restore import LoadedRun


def sample_text(run: "LoadedRun", prompts: Sequence[str], sample: SampleConfig | None = None, seed: int = 0) -> list[str]:
    """Each prompt with its continuation.

    A prompt may stop inside a word or after the space before one, where its last token is rare in training.
    So that token is drawn again, among those that begin with its text.

    Args:
      run: the model.
      prompts: texts; "" starts a document from nothing.
      sample: how many tokens, and how they are drawn; None: the run's `config.sample`. Its prompt is unused.
      seed: fixes the samples.

    Raises:
      ConfigError: a prompt that is no text, or too many tokens for learned positions.
    """
    import jax

    from moe_jax.models.decode import generate

    sample = sample or run.config.sample
    starts, first = _starts(run.tokenizer, prompts)
    with jax.set_mesh(run.mesh):
        new = generate(
            run.model,
            run.variables,
            starts,
            tokens=sample.tokens + 1,
            end_id=run.tokenizer.bos,
            temperature=sample.temperature,
            top_p=sample.top_p,
            key=jax.random.key(seed),
            first=first,
        )
    texts = []
    for prompt, start, ids in zip(prompts, starts, new):
        ids = ids if prompt else ids[:-1]  # the first one stands for the prompt's last
        text = run.tokenizer.decode(np.concatenate([start, ids])).removeprefix(prompt)
        end = text.find(sample.stop) if sample.stop else -1
        texts.append(prompt + (text if end < 0 else text[:end]))
    return texts


def _starts(tokenizer: "Tokenizer", prompts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """Ids of the prompts without their last token, and bool [B, V], the tokens that may take its place."""
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    starts, first = [], np.ones((len(prompts), len(pieces)), bool)
    for row, prompt in enumerate(prompts):
        try:
            ids = tokenizer.encode(prompt)
        except UnicodeEncodeError:
            raise ConfigError("--prompt", prompt, "is no UTF-8", "write it in UTF-8") from None
        if len(ids):
            first[row] = [piece.startswith(pieces[ids[-1]]) for piece in pieces]
        starts.append(np.concatenate([[tokenizer.bos], ids[:-1]]).astype(np.int32))
    return starts, first


def define_flags(values: absl_flags.FlagValues) -> None:
    """The command's own flags."""
    text, options = "Text to continue.", {"flag_values": values}
    absl_flags.DEFINE_multi_string("prompt", None, text, **options)
    absl_flags.DEFINE_integer("tokens", None, "Tokens of a sample.", **options)
    absl_flags.DEFINE_float("temperature", None, "Sampling temperature; 0: the most probable tokens.", **options)
    text = "Sample from the smallest set of tokens with this probability."
    absl_flags.DEFINE_float("top_p", None, text, **options)
    absl_flags.DEFINE_string("stop", None, "End a sample before this text.", **options)
    absl_flags.DEFINE_integer("seed", 0, "Fixes the samples.", lower_bound=0, upper_bound=2**31 - 1, **options)
    absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; without: the newest.", **options)


def main(config: Config, flags: absl_flags.FlagValues) -> None:
    """Runs the command."""
    for name in ("tokens", "temperature", "top_p", "stop"):
        if flags[name].value is not None:
            setattr(config.sample, name, flags[name].value)
    for ffn in distinct_layers(config.model, "routed"):
        if not ffn.moe.options.traits.causal:
            limit, path = (
                "looks at later tokens, which there are none of while text is generated",
                options_path(config.model, ffn),
            )
            raise ConfigError(f"{path}moe.router", ffn.moe.router, limit, "use moe_jax.evaluate")
    validate(config)
    prompts = flags.prompt or [config.sample.prompt] * bool(config.sample.prompt)
    if not prompts:
        raise ConfigError("--prompt", None, "not given, and config.sample.prompt is empty", 'write --prompt="def "')

    import jax

    from moe_jax.train.restore import load_run

    run = load_run(flags.workdir, config, flags.step)
    samples = sample_text(run, prompts, seed=flags.seed)
    if jax.process_index() == 0:
        for number, text in enumerate(samples, 1):
            if len(samples) > 1:
                print(f"{chr(10) * (number > 1)}=== {number} of {len(samples)} ===")
            print(text, flush=True)


if __name__ == "__main__":
    cli.run(main, flags=define_flags, config_from="workdir")
