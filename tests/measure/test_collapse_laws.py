"""Laws of the collapse metrics: collapse itself, invariances, degrees, and what degenerate features give."""

import dataclasses
import math

import numpy as np
import pytest

from ufm.measure.collapse import Collapse, collapse_metrics

FIELDS = [field.name for field in dataclasses.fields(Collapse)]
TOL = 1e-10  # what the metrics promise, relative
EPS = np.finfo(float).eps


@pytest.mark.parametrize(("K", "d", "counts"), [(2, 1, (3, 3)), (4, 3, (5, 1, 2, 9)), (10, 16, (4,) * 10)])
def test_a_simplex_etf_with_an_aligned_classifier_is_collapsed(K, d, counts, simplex_etf):
    rng = np.random.default_rng(K)
    M, offset = simplex_etf(K, d, rng), rng.normal(size=d)
    labels = np.repeat(np.arange(K), counts)
    W = 3 * M.T
    got = collapse_metrics(2 * M[:, labels] + offset[:, None], labels, W, -W @ offset)
    assert got.toolbox_nc4_agreement == 1
    assert math.isnan(got.toolbox_nc1_cdnv) == (min(counts) == 1)
    apart = {"toolbox_nc4_agreement", "toolbox_nc1_cdnv", "nc4_agree"}  # nc4_agree: only b undoes the offset
    assert all(abs(getattr(got, name)) < 100 * EPS for name in set(FIELDS) - apart), got


def test_about_the_sample_mean_an_etf_with_unequal_counts_is_none(simplex_etf):
    labels = np.repeat(np.arange(3), (8, 1, 1))
    M = simplex_etf(3, 2, np.random.default_rng(0))
    about = lambda centre: collapse_metrics(M[:, labels], labels, M.T.copy(), None, centre=centre)  # noqa: E731
    assert about("class_means").nc2_etf_err < 1e-14
    assert about("samples").nc2_etf_err > 0.1


@pytest.mark.parametrize("centre", ["class_means", "samples"])
def test_rotating_features_and_classifier_together_changes_nothing(centre, draw, assert_same):
    H, labels, W, b = draw(1, (3, 8, 5, 2), 6)
    Q = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    assert_same(
        collapse_metrics(Q @ H, labels, W @ Q.T, b, centre=centre),
        collapse_metrics(H, labels, W, b, centre=centre),
    )


def test_moving_all_features_while_the_bias_makes_up_for_it_changes_nothing_that_sees_b(draw, assert_same):
    H, labels, W, b = draw(3, (3, 8, 5, 2), 6)
    move = np.arange(6.0)
    moved = collapse_metrics(H + move[:, None], labels, W, b - W @ move)
    assert_same(moved, collapse_metrics(H, labels, W, b), but=["nc4_agree"])


def test_renaming_classes_changes_nothing_but_the_signed_norm_gap(draw, assert_same):
    H, labels, W, b = draw(4, (3, 8, 5, 2), 6)
    new = np.array([2, 0, 3, 1])
    old = np.argsort(new)
    renamed, plain = collapse_metrics(H, new[labels], W[old], b[old]), collapse_metrics(H, labels, W, b)
    assert_same(renamed, plain, but=["toolbox_nc2_equinormness"])
    assert abs(renamed.toolbox_nc2_equinormness - plain.toolbox_nc2_equinormness) > 0.01


def test_scaling_features_and_classifier_scales_each_metric_by_its_degree(draw, assert_same):
    H, labels, W, b = draw(5, (3, 8, 5, 2), 6)
    plain, scaled = collapse_metrics(H, labels, W, b), collapse_metrics(5 * H, labels, 7 * W, 35 * b)
    degrees = {"nc0": 49, "nc3u_uni_dual": 35**2, "bias_collapse": 35}
    expected = {name: getattr(plain, name) * degrees.get(name, 1) for name in FIELDS}
    assert_same(scaled, Collapse(**expected))


def test_one_sample_a_class_has_no_variance(draw):
    H, labels, W, b = draw(6, (1, 1, 1, 1), 5)
    got = collapse_metrics(H, labels, W, b)
    assert (got.nc1_pinv, got.nc1_svd, got.nc1_quot, got.nc1_cdnv) == (0, 0, 0, 0)
    assert math.isnan(got.toolbox_nc1_cdnv)


def test_no_bias_is_a_bias_of_zero(draw):
    H, labels, W, _ = draw(7, (4, 4, 4), 3)
    assert collapse_metrics(H, labels, W, None) == collapse_metrics(H, labels, W, np.zeros(3))


# Degenerate features: defined results, and no warning (pytest turns one into an error).

NAN_WITHOUT_MEANS = {
    "nc2_equinorm_means", "nc2_equiangle_means", "nc2_maxangle_means", "nc2_etf_err", "nc2g_log", "nc3_self_dual",
    "nc3_dual_err", "toolbox_nc2_equinormness", "toolbox_nc2_equiangularity", "toolbox_nc3_self_duality",
}  # fmt: skip
NC1 = {"nc1_pinv", "nc1_svd", "nc1_quot", "nc1_cdnv", "toolbox_nc1_cdnv"}


def where(predicate, got):
    return {name for name, value in dataclasses.asdict(got).items() if predicate(value)}


@pytest.mark.parametrize("point", [0.0, 0.1])
def test_all_features_at_one_point(point):
    got = collapse_metrics(np.full((4, 6), point), np.arange(6) % 3, np.eye(3, 4), None)
    assert where(math.isnan, got) == NAN_WITHOUT_MEANS | NC1
    assert got.nc3u_uni_dual == 0


@pytest.mark.parametrize("n", [2, 300])
def test_classes_that_share_their_mean(n):
    half = np.random.default_rng(0).normal(size=(4, n // 2)) + 1
    one = np.hstack([half, 2 - half])  # mean 1 up to rounding
    H, labels = np.hstack([one, one[:, ::-1], one]), np.repeat(np.arange(3), n)
    got = collapse_metrics(H, labels, np.eye(3, 4), None)
    assert where(math.isnan, got) == NAN_WITHOUT_MEANS
    assert where(math.isinf, got) == NC1


def test_two_of_three_classes_that_share_their_mean(draw):
    H, labels, W, b = draw(14, (50, 50, 50), 4)
    H[:, labels == 1] = H[:, labels == 0][:, ::-1]
    got = collapse_metrics(H, labels, W, b)
    assert where(math.isnan, got) == {"nc2g_log"}
    assert where(math.isinf, got) == {"nc1_svd", "nc1_cdnv", "toolbox_nc1_cdnv"}
    assert got.nc1_pinv == pytest.approx(by_loops_pinv(H, labels), rel=TOL)


def by_loops_pinv(H, labels):
    mu = np.stack([H[:, labels == k].mean(1) for k in range(3)], 1)
    D, M = H - mu[:, labels], mu - mu.mean(1, keepdims=True)
    return np.trace(D @ D.T / labels.size @ np.linalg.pinv(M @ M.T / 3, rcond=1e-10)) / 3


def test_a_classifier_of_zeros(draw):
    H, labels, _, _ = draw(15, (5, 5, 5), 4)
    got = collapse_metrics(H, labels, np.zeros((3, 4)), None)
    names = {"equinorm", "equiangle", "maxangle", "etf_err"}
    assert where(math.isnan, got) == {f"nc2_{name}_weights" for name in names} | {
        "nc3_self_dual", "nc3_dual_err", "toolbox_nc3_self_duality"
    }  # fmt: skip
    assert (got.nc0, got.nc3u_uni_dual, got.bias_collapse) == (0, 0, 0)
