"""Text: sources, tokenizers, packing, and batches by step."""

from moe_jax.data.curriculum import Curriculum
from moe_jax.data.identity import check_same_text
from moe_jax.data.packing import PackedRows
from moe_jax.data.pipeline import EvaluationSet, TextData, evaluation_set, open_data
from moe_jax.data.streams import TokenStream
from moe_jax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Curriculum",
    "EvaluationSet",
    "PackedRows",
    "TextData",
    "TokenStream",
    "Tokenizer",
    "check_same_text",
    "evaluation_set",
    "open_data",
]
