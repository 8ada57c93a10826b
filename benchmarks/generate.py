"""Tokens a second of greedy generation by a routed and by a dense decoder, beside transformers where it is installed.

    python benchmarks/generate.py [--json FILE] [--cases small] [--batches 1,8,64] [--rounds 5]

All ways of a batch run in turns in one process; a row has the median of whole calls, prompts included. The routed decoder has
E experts in every block, each as wide as the dense feed-forward layer, so that its tokens take K times the products of the
dense one's there. Weights are random: no token ends a document, and every row gets all of its tokens. transformers' models
(Mixtral and Llama of the same sizes) have the same shapes and as many threads as there are cores.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from moe_jax.config import ModelConfig, MoEConfig  # noqa: E402
from moe_jax.models.decode import generate  # noqa: E402
from moe_jax.models.decoder import Decoder  # noqa: E402
from moe_jax.study import timing  # noqa: E402

KINDS = ("routed", "dense")
WAYS = (*KINDS, *(f"transformers {kind}" for kind in KINDS))
PACKAGES = (*timing.PACKAGES, "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of the models, and how many tokens each row has and gets."""

    name: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    experts: int
    top_k: int
    vocab: int
    prompt: int
    tokens: int


CASES = {
    "small": Case("small", 4, 256, 1024, 4, 8, 2, 4096, 16, 128),
    "tiny": Case("tiny", 2, 16, 16, 2, 4, 2, 32, 3, 5),
}


def make_prompts(case: Case, batch: int) -> np.ndarray:
    """int32 [B, P], drawn evenly from the vocabulary."""
    return np.random.default_rng(0).integers(0, case.vocab, (batch, case.prompt), dtype=np.int32)


def make_model(case: Case, kind: str) -> tuple[Decoder, dict]:
    """The decoder of a kind and its variables."""
    moe = MoEConfig(experts=case.experts, top_k=case.top_k)
    fields = {"layers": case.layers, "width": case.width, "ffn_width": case.ffn_width, "heads": case.heads}
    model = Decoder(ModelConfig(**fields, pattern=kind, moe=moe), case.vocab)
    token = jnp.zeros((1, 1), jnp.int32)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), token, token, token + 1))


def own_way(case: Case, kind: str) -> Callable[[int], np.ndarray]:
    """batch -> the new tokens, int32 [B, tokens]."""
    model, variables = make_model(case, kind)

    def run(batch):
        return generate(model, variables, list(make_prompts(case, batch)), tokens=case.tokens, end_id=case.vocab)

    return run


def transformers_way(case: Case, kind: str) -> Callable[[int], np.ndarray] | None:
    """The same by transformers on the CPU; None where it or torch is missing."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    torch.set_num_threads(timing.place()["cores"])
    options = {
        "vocab_size": case.vocab,
        "hidden_size": case.width,
        "intermediate_size": case.ffn_width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "routed":
        sizes = {"num_local_experts": case.experts, "num_experts_per_tok": case.top_k}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**options, **sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    model = model.eval()

    def run(batch):
        ids = torch.from_numpy(make_prompts(case, batch)).long()
        new = {"max_new_tokens": case.tokens, "min_new_tokens": case.tokens}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, **new)
        return out[:, case.prompt :].numpy()

    return run


def measure(case: Case, batches: list[int], rounds: int, progress: bool = True) -> list[dict]:
    """Rows case, batch, backend, ms of a call, tokens_per_second, runs; ms None: not measured."""
    runs = {kind: own_way(case, kind) for kind in KINDS}
    runs |= {f"transformers {kind}": transformers_way(case, kind) for kind in KINDS}
    rows = []
    for batch in batches:
        functions = {name: functools.partial(run, batch) for name, run in runs.items() if run is not None}
        times, errors = timing.interleaved(functions, rounds, f"{case.name}, batch {batch}", progress, rounds)
        for name in WAYS:
            ms = timing.median(times[name]) if times.get(name) else None
            rate = ms and 1e3 * batch * case.tokens / ms
            row = {"case": case.name, "batch": batch, "backend": name, "ms": ms, "tokens_per_second": rate}
            rows.append(row | {"runs": len(times.get(name, ()))} | ({"error": errors[name]} if name in errors else {}))
    return rows


def print_rows(rows: list[dict]) -> None:
    """A table on stdout."""
    print(f"{'case':10}{'batch':>6}  {'way':24}{'ms':>12}{'tokens/s':>12}{'runs':>6}")
    for row in rows:
        head = f"{row['case']:10}{row['batch']:6}  {row['backend']:24}"
        if row["ms"] is None:
            print(f"{head}  not measured{': ' + row['error'] if 'error' in row else ''}")
            continue
        print(f"{head}{row['ms']:12.4g}{row['tokens_per_second']:12.4g}{row['runs']:6}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write machine, versions, date and rows here")
    parser.add_argument("--cases", default="small", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--batches", default="1,8,64", help="comma-separated numbers of rows")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each way")
    options = parser.parse_args(argv)
    names = options.cases.split(",")
    for name in names:
        if name not in CASES:
            parser.error(f"--cases={options.cases}: no case {name!r}; use some of {', '.join(CASES)}")
    batches = options.batches.split(",")
    if not all(batch.isdecimal() and int(batch) > 0 for batch in batches):
        parser.error(f"--batches={options.batches}: whole numbers from 1 on, comma-separated; such as 1,8,64")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: at least 1; raise it")
    if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json={options.json}: no such folder; make it first")
    result = {"benchmark": "generate", "environment": timing.environment(PACKAGES), "cases": {}, "rows": []}
    for name in names:
        result["cases"][name] = dataclasses.asdict(CASES[name])
        result["rows"] += measure(CASES[name], list(map(int, batches)), options.rounds)
    result["environment"]["load_after"] = timing.load()
    print_rows(result["rows"])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
