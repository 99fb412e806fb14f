"""The simplex ETF and the distance between geometries, from their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.geometry import centring, geometry_distance, simplex_etf

EPS = np.finfo(float).eps


@pytest.mark.parametrize(("K", "d"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 30), (200, 199)])
def test_gram_of_the_simplex_is_the_centring_projector(K, d):
    M = simplex_etf(K, d)
    assert M.shape == (K, d)
    np.testing.assert_allclose(M @ M.T, centring(K), rtol=0, atol=2 * K * EPS)


@pytest.mark.parametrize("K", [2, 3, 7, 50])
def test_simplex_vertices_are_equinorm_and_equiangular(K):
    M = simplex_etf(K, K + 1)
    norms = np.linalg.norm(M, axis=1)
    cosines = (M @ M.T / np.outer(norms, norms))[~np.eye(K, dtype=bool)]
    np.testing.assert_allclose(norms**2, 1 - 1 / K, rtol=4 * K * EPS)
    np.testing.assert_allclose(cosines, -1 / (K - 1), rtol=8 * K * EPS)


def test_centring_is_a_projector_that_kills_constants():
    P = centring(6)
    np.testing.assert_allclose(P @ P, P, atol=6 * EPS)
    np.testing.assert_allclose(P @ np.ones(6), 0, atol=6 * EPS)
    assert np.linalg.matrix_rank(P) == 5


def test_a_simplex_does_not_fit_below_its_dimension():
    with pytest.raises(ValueError, match=r"^d must be at least K - 1 = 3 .*, got 2$"):
        simplex_etf(4, 2)


def test_geometry_distance_ignores_scale_and_sees_everything_else():
    A, B = np.diag([1.0, 2.0, 3.0]), np.diag([1.0, 2.0, 4.0])
    by_hand = np.linalg.norm(A / np.sqrt(14) - B / np.sqrt(21))
    assert abs(geometry_distance(A, 7 * A)) < 4 * EPS
    assert geometry_distance(A, B) == pytest.approx(by_hand, rel=8 * EPS)
    assert geometry_distance(jnp.asarray(A), -A) == pytest.approx(2, rel=8 * EPS)
