"""Scores a trained model on held-out text, in one JSON object on stdout.

    python -m moe_jax.evaluate --workdir=runs/quickstart
    python -m moe_jax.evaluate --workdir=runs/quickstart --compare --output=scores.json
    python -m moe_jax.evaluate --workdir=runs/quickstart --source=notes='notes/**/*.txt' --document=line

For each source: loss (nats per token), perplexity, bits_per_byte, and the tokens, bytes and documents they
were measured on; how many documents are repeated, empty, or left out by reason, such as "not UTF-8"; of routed
layers the load and the share of dropped assignments. Without --source the sources are those of the run's config.
With --compare also bits per byte of gzip -9 (document by document) and xz -9 (all documents as one stream, and
document by document). Both, and the documents left out, are of all text even where --batches takes a part. A
number that is not finite is null. Everything but the JSON goes to stderr.
"""

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from etils import epath

from moe_jax import cli
from moe_jax.config import Config, ConfigError
from moe_jax.evaluate import evaluate_sets, finite

if TYPE_CHECKING:
    from moe_jax.data.pipeline import EvaluationSet
    from moe_jax.train.restore import LoadedRun


def define_flags(values: absl_flags.FlagValues) -> None:
    """The command's own flags."""
    options = {"flag_values": values}
    define_text_flags(values)
    text = "Score this many batches of each source, evenly spaced; 0: all."
    absl_flags.DEFINE_integer("batches", 0, text, lower_bound=0, **options)
    absl_flags.DEFINE_boolean("compare", False, "Add bits per byte of gzip and xz.", **options)
    absl_flags.DEFINE_string("output", "", "Write the JSON to this file too.", **options)


def define_text_flags(values: absl_flags.FlagValues) -> None:
    """The flags of every command that reads a checkpoint and held-out text."""
    options = {"flag_values": values}
    absl_flags.DEFINE_enum("split", "test", ["validation", "test"], "Held-out text of the config's sources.", **options)
    text = "NAME=GLOB[,GLOB...] of .txt, .jsonl or .gz files to read instead of the config's sources."
    absl_flags.DEFINE_multi_string("source", None, text, **options)
    kinds = ["file", "paragraph", "line"]
    absl_flags.DEFINE_enum("document", "file", kinds, "What one document of a .txt of --source is.", **options)
    absl_flags.DEFINE_string("text_feature", "text", "Name of the text in a .jsonl row of --source.", **options)
    absl_flags.DEFINE_integer("step", None, "Step of the checkpoint; without: the newest.", **options)


def main(config: Config, flags: absl_flags.FlagValues) -> None:
    """Runs the command."""
    sources = parse_sources(flags.source or [])
    with contextlib.redirect_stdout(sys.stderr):  # whatever a library has to say
        report = _report(config, flags, sources)
    text = json.dumps(finite(report), indent=1, allow_nan=False)
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)
        if flags.output:
            try:
                epath.Path(flags.output).expanduser().write_text(text + "\n")
            except OSError as error:
                raise ConfigError("--output", flags.output, str(error), "name a file that can be written") from None


def parse_sources(texts: list[str]) -> dict[str, str]:
    """--source flags as {name: globs}.

    Raises:
      ConfigError: no '=', an empty side, or a name given twice.
    """
    sources = {}
    for text in texts:
        name, equals, globs = text.partition("=")
        if not (name and equals and globs):
            raise ConfigError("--source", text, "not NAME=GLOB", "write --source=notes='notes/*.txt'")
        if name in sources:
            raise ConfigError("--source", text, f"the name {name} is there twice", "choose another")
        sources[name] = globs
    return sources


def _report(config: Config, flags: absl_flags.FlagValues, sources: dict[str, str]) -> dict[str, Any]:
    from moe_jax.train.restore import load_run

    run = load_run(flags.workdir, config, flags.step)
    sets = evaluation_sets(run, flags, sources)
    scores = evaluate_sets(run, sets, flags.batches, show_progress=True)
    for name, evaluation_set in sets.items():
        scores[name] |= {key: getattr(evaluation_set, key) for key in ("empty", "repeated", "left_out", "left_out_first")}
    if flags.compare:
        from moe_jax.evaluate.compression import compress_bits_per_byte

        for name, evaluation_set in sets.items():
            scores[name] |= compress_bits_per_byte(evaluation_set.texts())
    split = {} if sources else {"split": flags.split}
    return {"step": run.step, **split, "sources": scores}


def evaluation_sets(run: "LoadedRun", flags, sources: dict[str, str]) -> dict[str, "EvaluationSet"]:
    """The held-out text that the flags of `define_text_flags` name, by source.

    Raises:
      ConfigError: there is none.
    """
    from moe_jax.data import evaluation_set, open_data
    from moe_jax.data.identity import changed_splits
    from moe_jax.data.say import say

    data = run.config.data
    if sources:
        return {
            name: evaluation_set(name, globs, run.tokenizer, data, flags.document, flags.text_feature)
            for name, globs in sources.items()
        }
    opened = open_data(data, tokenizer=run.tokenizer, splits=(flags.split,))
    if opened.fingerprint != run.meta.get("data_fingerprint"):
        say("warning: the training text or its packing is not the run's any more: it may hold the held-out text")
    for name, changes in changed_splits(run.meta["text"], opened.identity).items() if "text" in run.meta else ():
        say(f"warning: the {flags.split} text of {name} is not the run's: {changes[flags.split]}")
    sets = opened.evaluation(flags.split)
    if not sets:
        limit = f"no source of the config has text for {flags.split}"
        raise ConfigError("--split", flags.split, limit, "take the other split, or name files with --source")
    return sets


if __name__ == "__main__":
    cli.run(main, flags=define_flags, config_from="workdir")
