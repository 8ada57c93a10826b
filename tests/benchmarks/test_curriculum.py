"""The figures of waiting by hand."""

import numpy as np
import pytest

from benchmarks import curriculum


def test_waiting():
    """One step, one layer, 16 rows over 8 shards, 16 experts."""
    shares = np.ones((1, 1, 16))
    shares[0, 0, :2] = 2.0, 1.6  # the first shard has 0.8 second choices a token, the others none
    counts = np.ones((1, 1, 16))
    counts[0, 0, 4:6] = 3, 2
    found = curriculum.waiting(shares, counts)
    assert found["second_choices"] == pytest.approx(8.0)
    assert found["step"] == pytest.approx(1.8 / 1.1)
    assert found["experts"] == pytest.approx(5 / (19 / 8))
    even = curriculum.waiting(np.full((3, 2, 16), 1.25), np.ones((3, 2, 16)))
    assert all(value == pytest.approx(1.0) for value in even.values())


def test_bad_epochs(capsys):
    with pytest.raises(SystemExit):
        curriculum.main(["--epochs=1"])
    assert "--epochs=1" in capsys.readouterr().err
