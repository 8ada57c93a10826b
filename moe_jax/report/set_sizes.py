"""How many experts a token takes, where the router decides: by layer, place, kind of token, word, and difficulty."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.report.collect import Observed
from moe_jax.report.overview import Material
from moe_jax.report.page import number, paragraph, percent, table, text
from moe_jax.study.statistics import Interval, t_interval

PLACES = (0, 8, 32, 128, 512, 2048, 8192)  # where ranges of positions begin
KINDS = ("new line", "space", "number", "punctuation", "start of a word", "rest of a word", "other")
WORDS, LEAST = 12, 5  # words of each end of the list; how often a word must occur


class Finding(NamedTuple):
    """What the paper saw (arXiv:2310.07188, section 4.3), and the difference in experts per token here, a mean over rows."""

    claim: str
    what: str
    difference: Interval


def sizes(observed: Observed, experts: dict[str, int]) -> dict[str, np.ndarray]:
    """{layer: int [T], how many of its E experts each token takes}, of layers where tokens differ.

    experts: E by layer; virtual experts are not counted.
    """
    found = {
        name: choices.chosen()[:, : experts[name]].sum(axis=1)
        for name, choices in observed.layers.items()
        if name not in observed.dense
    }
    return {name: one for name, one in found.items() if len(one) and one.min() < one.max()}


def kind_of(piece: bytes) -> str:
    """One of KINDS, of the bytes of a token."""
    content = piece.decode("utf-8", "replace")
    word = content.strip()
    if not word:
        return "new line" if "\n" in content else "space" if content else "other"
    if word.isdigit():
        return "number"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    if word[0].isalpha() or word[0] == "_":
        return "start of a word" if content[0].isspace() else "rest of a word"  # as far as the piece alone can tell
    return "other"


def words(pieces: Sequence[bytes], rows: np.ndarray) -> list[tuple[str, list[int]]]:
    """(word, indices of its tokens) of each word: pieces are merged while they are letters without a space before them.

    Args:
      pieces: of T tokens, in order.
      rows: int [T], the row of text of each; no word crosses one.
    """
    found: list[tuple[str, list[int]]] = []
    ended = False  # whether the last piece ends in a space
    for t, piece in enumerate(pieces):
        content = piece.decode("utf-8", "replace")
        letters = content.strip().replace("_", "").isalpha()
        joins = letters and not content[0].isspace() and t and found and found[-1][1][-1] == t - 1 and rows[t] == rows[t - 1]
        if joins and not ended:
            found[-1] = (found[-1][0] + content.strip(), [*found[-1][1], t])
        elif letters:
            found.append((content.strip(), [t]))
        ended = content[-1:].isspace()
    return found


def by_row(values: np.ndarray, rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> Interval | None:
    """Mean over rows of the mean of `values` [T] over `second` less that over `first`, both bool [T]; None: no row has both."""
    differences = _means(values, rows, second) - _means(values, rows, first)
    return t_interval(differences[~np.isnan(differences)].tolist())


def harder_half(nats: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool [T]: tokens whose nats are above the median of their row."""
    order = np.argsort(rows, kind="stable")
    _, starts, of_row = np.unique(rows[order], return_index=True, return_inverse=True)
    medians = np.asarray([np.median(part) for part in np.split(nats[order], starts[1:])])
    harder = np.empty(len(nats), bool)
    harder[order] = nats[order] > medians[of_row]
    return harder


def clustering(values: np.ndarray, rows: np.ndarray, seed: int = 0, shuffles: int = 50) -> tuple[float, float]:
    """(standard deviation of the rows' means of `values` [T], what it is with the values dealt out anew among the tokens)."""
    rng = np.random.default_rng(seed)
    shuffled = [np.std(_means(rng.permutation(values), rows)) for _ in range(shuffles)]
    return float(np.std(_means(values, rows))), float(np.mean(shuffled))


def findings(taken: dict[str, np.ndarray], observed: Observed) -> list[Finding]:
    """What there is to say of the paper's observations on language models."""
    mean, layers, rows = np.mean(list(taken.values()), axis=0), list(taken), observed.rows
    hard, late = harder_half(observed.nats, rows), observed.positions >= np.median(observed.positions)
    depth = taken[layers[-1]].astype(float) - taken[layers[0]]
    wanted = (
        (
            "it changes with depth",
            f"{layers[-1]} less {layers[0]}",
            t_interval(_means(depth, rows).tolist()) if len(layers) > 1 else None,
        ),
        (
            "it grows with the length of the text before",
            "later half of the positions less earlier half",
            by_row(mean, rows, ~late, late),
        ),
        ("it depends on the token that is predicted", "harder half less easier half, by loss", by_row(mean, rows, ~hard, hard)),
    )
    return [Finding(*one) for one in wanted if one[2] is not None]


def _means(values: np.ndarray, rows: np.ndarray, part: np.ndarray | None = None) -> np.ndarray:
    """[R]: the mean of `values` [T] in each row, over the tokens of `part`, bool [T]; NaN: the row has none of them."""
    of_row = np.unique(rows, return_inverse=True)[1]
    weights = np.ones(len(rows)) if part is None else part.astype(float)
    counts = np.bincount(of_row, weights)
    return np.divide(np.bincount(of_row, weights * values), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def set_sizes(m: Material) -> str:
    """The section; "" where every token takes as many experts."""
    taken = sizes(m.observed, {name: m.experts(name) for name in m.observed.layers})
    if not taken:
        return ""
    mean, pieces = np.mean(list(taken.values()), axis=0), _Pieces(m)
    return (
        _layers(taken)
        + _parts("position in the document", _ranges(m.observed.positions), mean)
        + _parts("kind of token", {k: pieces.kinds == k for k in KINDS}, mean)
        + _parts("loss of the prediction", _quarters(m.observed.nats), mean)
        + _words(pieces.words, mean)
        + _table_of_findings(taken, m.observed, mean)
    )


class _Pieces:
    """The tokens as text. kinds: str [T]; words: as `words`."""

    def __init__(self, m: Material):
        ids = m.observed.ids
        of_id = {int(i): m.run.tokenizer.decode_bytes(np.asarray([i])) for i in np.unique(ids)}
        kinds = {i: kind_of(piece) for i, piece in of_id.items()}
        self.words = words([of_id[int(i)] for i in ids], m.observed.rows)
        self.kinds = np.asarray([kinds[int(i)] for i in ids], object)
        for _, tokens in self.words:
            self.kinds[tokens[0]], self.kinds[tokens[1:]] = "start of a word", "rest of a word"


def _layers(taken: dict[str, np.ndarray]) -> str:
    head = ["layer", "experts per token", "none", "one", "two", "more"]
    body = [
        (text(name), number(one.mean()), *(percent(np.mean(one == k)) for k in (0, 1, 2)), percent(np.mean(one > 2)))
        for name, one in taken.items()
    ]
    return table(head, body, kinds=".nnnnn")


def _parts(title: str, parts: dict[str, np.ndarray], mean: np.ndarray) -> str:
    body = [(text(name), f"{int(part.sum()):,}", number(mean[part].mean())) for name, part in parts.items() if part.any()]
    return f"<h3>By {text(title)}</h3>\n" + table([title, "tokens", "experts per token"], body, kinds=".nn")


def _ranges(positions: np.ndarray) -> dict[str, np.ndarray]:
    ends = (*PLACES[1:], np.inf)
    return {
        f"{first} to {end - 1:.0f}" if np.isfinite(end) else f"from {first}": (positions >= first) & (positions < end)
        for first, end in zip(PLACES, ends, strict=True)
    }


def _quarters(nats: np.ndarray) -> dict[str, np.ndarray]:
    cuts = np.quantile(nats, [0, 0.25, 0.5, 0.75, 1])
    quarter = np.searchsorted(cuts[1:-1], nats, side="right")
    return {f"quarter {q + 1}, {cuts[q]:.2f} to {cuts[q + 1]:.2f} nats": quarter == q for q in range(4)}


def _words(found: list[tuple[str, list[int]]], mean: np.ndarray) -> str:
    of_word: dict[str, list[float]] = {}
    for word, tokens in found:
        of_word.setdefault(word, []).append(float(np.mean(mean[tokens])))
    means = sorted((np.mean(one), word, len(one)) for word, one in of_word.items() if len(one) >= LEAST)
    if not means:
        return ""
    ends = {"fewest": means[:WORDS], "most": means[: -WORDS - 1 : -1]}
    entry = '<span class="t">{}</span> <span class="k">{:.2f}</span>'
    body = [(end, " ".join(entry.format(text(word, 24), value) for value, word, _ in some)) for end, some in ends.items()]
    note = f"Pieces are merged to words; experts per token, mean over layers, of words that occur {LEAST} times or more."
    return "<h3>By word</h3>\n" + table(["", "words"], body, kinds=".w") + paragraph(note, note=True)


def _table_of_findings(taken, observed, mean) -> str:
    body = []
    for claim, what, difference in findings(taken, observed):
        low, high = difference.low, difference.high
        span = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        verdict = "one row of text: not told" if low is None else "no" if low <= 0 <= high else "more" if low > 0 else "less"
        body.append((claim, what, f"{difference.mean:+.3f}{span}", verdict))
    real, chance = clustering(mean, observed.rows)
    spread = "rows of text differ in their mean"
    together = "yes" if real > 1.5 * chance else "no"
    body.append(("tokens that need more come together", spread, f"{real:.3f}, by chance {chance:.3f}", together))
    head = ["observation", "here: experts per token", "difference", "seen"]
    note = (
        "Observations of arXiv:2310.07188, section 4.3. Differences are means over rows of text, with Student's 95 % interval. "
        "no: the interval holds 0."
    )
    return "<h3>What the paper saw</h3>\n" + table(head, body, kinds="..nn") + paragraph(note, note=True)
