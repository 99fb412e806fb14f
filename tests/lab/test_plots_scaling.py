"""The figure of costs: every ladder as measured, and a straight line of the derived slope from its largest rung."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.scaling import FULL, LARGEST, SAMPLES, SMALLEST, imagenet_like
from ufm.lab.plots_scaling import _ladders

RUNGS = [
    {"operation": "gradient", "K": K, "d": 7, "N": N, "cpu_seconds": K * N**0.9}
    for K in (2, 3)
    for N in (10, 100, 1000)
]


@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_ladder_ends_in_its_power(power):
    axes = Figure().subplots()
    _ladders(axes, RUNGS, "N", "cpu_seconds", {"gradient": power, "product": 1}, 1e6)
    assert len(axes.lines) == 4  # two ladders of gradient, none of product
    for K, measured, derived in zip((2, 3), axes.lines[::2], axes.lines[1::2], strict=True):
        np.testing.assert_array_equal(measured.get_xdata(), [10, 100, 1000])
        (x, far), (y, end) = derived.get_data()
        assert (x, far, y) == (1000, 1e6, K * 1000**0.9)
        assert np.log(end / y) == pytest.approx(power * np.log(far / x))
        assert measured.get_color() == derived.get_color()
        assert f"K = {K}, d = 7" in measured.get_label()


@pytest.mark.parametrize("K", [10, 100, 1000])
def test_class_sizes_are_like_imagenets(K):
    sizes = np.array(imagenet_like(K))
    missing = LARGEST - (SAMPLES - FULL * LARGEST) / (1000 - FULL)  # mean of a class that is not full
    spread = (LARGEST - SMALLEST) / np.sqrt(12 * max(K - K * FULL / 1000, 1))  # no wider than uniform
    assert sizes.shape == (K,)
    assert (sizes == LARGEST).sum() >= round(K * FULL / 1000)
    assert sizes.min() >= SMALLEST
    assert LARGEST - sizes[round(K * FULL / 1000) :].mean() == pytest.approx(missing, abs=3 * spread)
