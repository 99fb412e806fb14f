"""What the tests of measurement share: random features, comparison of two results, and a user's view of errors."""

import dataclasses

import numpy as np
import pytest

from ufm.measure.collapse import Collapse

FIELDS = [field.name for field in dataclasses.fields(Collapse)]
TOL = 1e-10  # what the metrics promise, relative
EPS = np.finfo(float).eps


@pytest.fixture(scope="session")
def draw():
    """Features of well separated classes in random order, with a random classifier."""

    def draw(seed, counts, d, spread=0.3):
        rng = np.random.default_rng(seed)
        K = len(counts)
        labels = rng.permutation(np.repeat(np.arange(K), counts))
        H = rng.normal(size=(d, K))[:, labels] + spread * rng.normal(size=(d, labels.size)) + 1.0
        return H, labels, rng.normal(size=(K, d)), rng.normal(size=K)

    return draw


@pytest.fixture(scope="session")
def simplex_etf():
    """K unit vectors in R^d, d ≥ K−1, with all cosines −1/(K−1), as columns."""

    def simplex_etf(K, d, rng):
        basis = np.linalg.svd(np.eye(K) - 1 / K)[0][:, : K - 1]
        frame = np.linalg.qr(rng.normal(size=(d, K - 1)))[0] @ basis.T
        return frame / np.linalg.norm(frame, axis=0)

    return simplex_etf


@pytest.fixture(scope="session")
def assert_same():
    """NC1 agrees relatively, however small; the rest are differences of numbers of size 1, which may cancel."""

    def assert_same(left, right, but=(), rel=TOL):
        for name in set(FIELDS) - set(but):
            expected = pytest.approx(getattr(right, name), rel=rel, abs=0 if "nc1" in name else 20 * EPS)
            assert getattr(left, name) == expected, name

    return assert_same
