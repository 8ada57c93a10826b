"""Evaluation: a plain computation's numbers, whatever the batches, the order and the mesh."""

import math

import jax
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.config import DataConfig, ModelConfig, MoEConfig
from moe_jax.data import ByteTokenizer, evaluation_set
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import shardings_of
from moe_jax.train.evaluation import batch_count, evaluate, make_evaluation_step
from tests.models.small import boxed_shapes, random_variables

S = 16
TOKENIZER = ByteTokenizer()
MODEL = Decoder(
    ModelConfig(layers=2, width=16, ffn_width=16, heads=2, loss_chunk=24, moe=MoEConfig(experts=4, top_k=2)),
    TOKENIZER.vocab_size,
)
VARIABLES = random_variables(MODEL)


def test_documents_add_up(text, scores, step):
    """Of text in several batches, and documents that end in the middle of a row: every token in one, in order."""
    found = evaluate(make_evaluation_step(MODEL, TOKENIZER.token_bytes, by_token=True), VARIABLES, text, mesh_of(2, 1, 1, 1), 4)
    by_document = found.pop("by_document")
    assert {name: found[name] for name in ("loss", "tokens", "bytes")} == pytest.approx(
        {name: scores[name] for name in ("loss", "tokens", "bytes")}, rel=1e-6
    )
    documents = list(text.texts())
    assert by_document["bytes"].tolist() == list(map(len, documents))
    assert by_document["tokens"].tolist() == [len(document) + 1 for document in documents]
    # A document alone, from its first token; attention ends at a document's edge, so its loss is the same.
    lone = next(text.batches(text.rows))
    first = by_document["tokens"][0]
    out = jax.jit(MODEL.apply)(VARIABLES, lone["tokens"][:1], lone["positions"][:1], lone["segment_ids"][:1])
    logits = np.einsum("SD,VD->SV", np.asarray(out.x[0], np.float64), np.asarray(out.table, np.float64))[:first]
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, lone["targets"][0][:first, None], -1)[:, 0]
    assert by_document["nats"][0] == pytest.approx(nats.sum(), rel=1e-6)
    assert by_document["nats"].sum() / scores["tokens"] == pytest.approx(scores["loss"], rel=1e-6)
    assert "by_document" not in scores


def mesh_of(*shape):
    return compat.make_mesh(jax.devices()[: math.prod(shape)], AXES, shape)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(7):
        (folder / f"{i}.txt").write_text("".join(chr(97 + (i * j * j) % 23) for j in range(4 + 9 * i)) + "é\n")
    return evaluation_set("text", f"{folder}/*.txt", TOKENIZER, DataConfig(sequence_length=S, cache_dir=str(folder)))


@pytest.fixture(scope="module")
def step():
    return make_evaluation_step(MODEL, TOKENIZER.token_bytes)


@pytest.fixture(scope="module")
def scores(text, step):
    return evaluate(step, VARIABLES, text, mesh_of(1, 1, 1, 1), 4)


def test_equals_a_plain_computation(text, scores):
    batch = next(text.batches(text.rows))
    out = jax.jit(MODEL.apply)(VARIABLES, batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = np.einsum("BSD,VD->BSV", np.asarray(out.x, np.float64), np.asarray(out.table, np.float64))
    logits -= logits.max(-1, keepdims=True)
    scored = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    nats = -np.sum(scored * batch["loss_weights"])

    documents = list(text.texts())
    size, tokens = sum(map(len, documents)), sum(len(document) + 1 for document in documents)
    assert (scores["tokens"], scores["bytes"], scores["documents"]) == (tokens, size, 7)
    assert scores["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert scores["router/dropped"] == 0 and scores["router/load_max_over_mean"] >= 1


class Rows:
    """An evaluation set of given batches."""

    def __init__(self, *batches):
        self._batches = batches

    def batches(self, batch_size, limit=0, rows=slice(None)):
        return iter(self._batches)


@pytest.mark.fused
def test_a_row_does_not_depend_on_its_neighbours(text, step, scores):
    mesh = mesh_of(1, 1, 1, 1)
    rows = -(-text.rows // 4) * 4
    whole = next(text.batches(rows))
    order = np.random.default_rng(0).permutation(rows)
    shuffled = {name: array[order] for name, array in whole.items()}
    parts = [{name: array[i : i + 4] for name, array in shuffled.items()} for i in range(0, rows, 4)]
    for batches, size in (([whole], rows), (parts, 4)):
        other = evaluate(step, VARIABLES, Rows(*batches), mesh, size)
        assert other["loss"] == pytest.approx(scores["loss"], rel=1e-6)
        assert [other[name] for name in ("tokens", "bytes", "documents")] == [
            scores[name] for name in ("tokens", "bytes", "documents")
        ]
    each = [step(VARIABLES, part)["nats"] for part in parts]
    np.testing.assert_allclose(np.concatenate(each), step(VARIABLES, whole)["nats"][order], rtol=1e-5)


def test_limit_and_progress(text, step, scores):
    mesh, calls = mesh_of(1, 1, 1, 1), []
    count = batch_count(text, 4)
    assert count == -(-text.rows // 4) > 3 and batch_count(text, 4, 3) == 3 and batch_count(text, 4, 99) == count
    part = evaluate(step, VARIABLES, text, mesh, 4, limit=3, progress=lambda: calls.append(1))
    assert len(calls) == 3
    expected = sum(batch["loss_weights"].sum() for batch in text.batches(4, 3))
    assert part["tokens"] == expected < scores["tokens"]
    compiled = step._cache_size()
    again = evaluate(step, VARIABLES, text, mesh, 4, limit=count)
    assert {**again, "seconds": 0} == {**scores, "seconds": 0}
    assert step._cache_size() == compiled


@pytest.mark.parametrize("batch_size", [8, 6])
def test_on_a_mesh(text, step, scores, batch_size):
    """Also where the batch does not divide by its shards."""
    mesh = mesh_of(2, 1, 2, 2)
    placed = jax.device_put(VARIABLES, shardings_of(boxed_shapes(MODEL), mesh))
    other = evaluate(step, placed, text, mesh, batch_size)
    assert other.pop("seconds") > 0
    for name, value in other.items():
        if not name.startswith("router/exchange_"):  # one device exchanges nothing
            assert value == pytest.approx(scores[name], rel=1e-5), name


def test_not_finite(text, step):
    broken = jax.tree.map(lambda a: a, VARIABLES)
    broken["params"]["norm_final"] = {"scale": np.full(16, np.nan, np.float32)}
    scores = evaluate(step, broken, Rows(next(text.batches(4))), mesh_of(1, 1, 1, 1), 4)
    assert math.isnan(scores["loss"]) and math.isnan(scores["perplexity"])
    assert scores["tokens"] == 64
