"""Ball arithmetic: every ball contains the number meant, and nothing is claimed without a proof."""

import numpy as np
import pytest
from flint import arb

from ufm.theory import balls


def test_spectral_bounds_enclose_a_known_norm():
    """Reflections of diagonal matrices of integers: multiple, clustered and tiny eigenvalues."""
    for values in ([1.0, 1, 1, 1], [4, 4, 4, 0], [1, 1 - 2.0**-50, 1 - 2.0**-50, 0], [2.0**-300, 0, 0, 0]):
        v = balls.exact(np.array([1.0, 2, 3, 5]))
        Q = balls.exact(np.eye(4)) - np.outer(v, v) * 2 / np.sum(v * v)
        low, high = balls.spectral_bounds(balls.product(Q * balls.exact(values), Q.T))
        assert not low * low > arb(values[0])
        assert high * high >= arb(values[0])
        assert high <= low * (1 + arb(2) ** -36)


def test_positive_definiteness_is_claimed_only_with_a_proof():
    one = balls.exact(np.ones((2, 2)))
    shift = balls.exact(np.eye(2) * 2.0**-40)
    assert balls.is_positive_definite(one + shift)
    assert not balls.is_positive_definite(one)
    assert not balls.is_positive_definite(one - shift)
    assert not balls.is_positive_definite(np.array([[arb(1), arb(1)], [arb(1), arb(1, 1e-3) + 1e-4]], object))


def test_roots_and_entropies_of_balls_across_zero():
    for middle, radius in ((0.0, 1e-3), (1e-3, 2e-3), (0.25, 0.0)):
        ball = arb(middle, radius)
        for q in (arb(max(0.0, middle - radius)), arb(middle), arb(middle + radius)):
            assert ball.contains(q)
            assert balls.root(ball).overlaps(q.sqrt())
            assert balls.xlogx(ball).overlaps(q * q.log() if q > 0 else q)


@pytest.mark.parametrize("x", [1 / 3, -1 / 3, 1e-320, 0.0, 3.0])
def test_conversions_round_outwards(x):
    ball = arb(x) / 3
    low, high = balls.below(ball), balls.above(ball)
    assert arb(low) <= ball <= arb(high)
    assert high <= np.nextafter(np.nextafter(low, np.inf), np.inf)
    assert (balls.below(arb(x)), balls.above(arb(x))) == (x, x)
    assert (balls.below(arb("1e400")), balls.above(arb("1e400"))) == (np.finfo(float).max, np.inf)
    assert (balls.below(arb.nan()), balls.above(arb.nan())) == (-np.inf, np.inf)
