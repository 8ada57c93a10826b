"""The section on how the routing settles: its figures by hand, and the section in a page."""

import re

import numpy as np
import pytest

from moe_jax.report.settling import _changed, _cohesion, _switch, _to_change
from moe_jax.train.routing_history import RoutingHistory, _write
from tests.report.test_report import make_config, make_run, page_of

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

EXPERTS = np.array([[0, 1, 1, 2], [0, 2, 1, 2], [0, 2, 0, 3], [0, 2, 0, 3]])


def history(tokens: int = 4) -> RoutingHistory:
    packed = np.packbits(np.eye(4, dtype=bool)[np.tile(EXPERTS, tokens // 4)], axis=2)
    return RoutingHistory(np.array([1, 2, 3, 4]), np.arange(tokens) % 4, {"layer_01": packed}, {"layer_01": 4})


def test_by_hand():
    one = history()
    assert _switch(one, "layer_01") == 3
    assert _to_change(one, "layer_01").values.tolist() == [0.75, 0.5, 0, 0]
    changed = _changed(one, "layer_01")
    assert changed.steps.tolist() == [2, 3, 4] and changed.values.tolist() == [0.25, 0.5, 0]


def test_pieces_that_decide():
    """The same piece always has the same expert: the share, corrected for chance, is 1 at each record."""
    np.testing.assert_allclose(_cohesion(history(400), "layer_01").values, 1, atol=1e-9)


def test_in_a_page(tmp_path, capsys):
    config = make_config(tmp_path, moe={"top_k": 1})
    config.train.steps = 5
    folder = make_run(tmp_path, config)
    said = "".join(page_of(folder, capsys=capsys).text)
    assert "How the routing settles" not in said
    _write(folder, history(40))
    said = "".join(page_of(folder, capsys=capsys).text)
    assert "How the routing settles" in said and "Of 40 held-out tokens" in said and "recorded 4 times" in said
    assert re.search(r"layer_01\s*50.0 %\s*0.0 %\s*–\s*3", said)
