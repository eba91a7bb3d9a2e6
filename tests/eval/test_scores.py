"""How sure a share is."""

import pytest

from eval.scores import wilson


@pytest.mark.parametrize(
    ("share", "num", "low", "high"),
    [(1.0, 10, 0.72247, 1.0), (0.0, 10, 0.0, 0.27753), (0.5, 10, 0.23659, 0.76341), (1.0, 1, 0.20655, 1.0)],
)
def test_wilson_is_the_published_interval(share, num, low, high):
    assert wilson(share, num) == pytest.approx((low, high), abs=1e-5)
