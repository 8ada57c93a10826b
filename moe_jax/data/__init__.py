"""Text: sources, tokenizers, packing, and batches by step."""

from moe_jax.data.packing import PackedRows, TokenStream
from moe_jax.data.pipeline import EvaluationSet, TextData, evaluation_set, open_data
from moe_jax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "EvaluationSet",
    "PackedRows",
    "TextData",
    "TokenStream",
    "Tokenizer",
    "evaluation_set",
    "open_data",
]
