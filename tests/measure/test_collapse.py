"""Collapse metrics against loops over the definitions, exact rational arithmetic, and three public code bases."""

import ast
import inspect
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from ufm.measure import collapse
from ufm.measure.collapse import Collapse, collapse_metrics

DATA = Path(__file__).parents[1] / "data"
TOL = 1e-10  # what the metrics promise, relative
EPS = np.finfo(float).eps


# Independent oracle: the definitions, one loop for each index.


def by_loops(H, labels, W, b, centre):
    d, N = H.shape
    K = len(W)
    n = [int((labels == k).sum()) for k in range(K)]
    mu = [sum(H[:, i] for i in range(N) if labels[i] == k) / n[k] for k in range(K)]
    G = sum(mu) / K if centre == "class_means" else sum(H[:, i] for i in range(N)) / N
    m = [mu[k] - G for k in range(K)]
    S_W = sum(np.outer(H[:, i] - mu[labels[i]], H[:, i] - mu[labels[i]]) for i in range(N)) / N
    S_B = sum(np.outer(v, v) for v in m) / K
    v = [sum(np.sum((H[:, i] - mu[k]) ** 2) for i in range(N) if labels[i] == k) / n[k] for k in range(K)]
    unbiased = [v[k] * n[k] / (n[k] - 1) if n[k] > 1 else math.nan for k in range(K)]
    pairs = list(itertools.combinations(range(K), 2))
    cos = lambda x, y: float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))  # noqa: E731
    cos_m, cos_w = ([cos(u[k], u[j]) for k, j in pairs] for u in (m, W))
    norm_m, norm_w = ([math.sqrt(x @ x) for x in u] for u in (m, W))
    cdnv = lambda s: np.mean([(s[k] + s[j]) / 2 / np.sum((mu[k] - mu[j]) ** 2) for k, j in pairs])  # noqa: E731
    logs = [-math.log(np.linalg.norm(m[k] / norm_m[k] - m[j] / norm_m[j])) for k, j in pairs]
    self_dual = sum(
        (W[k, a] / np.linalg.norm(norm_w) - m[k][a] / np.linalg.norm(norm_m)) ** 2 for k in range(K) for a in range(d)
    )
    nearest = [min(range(K), key=lambda k: np.sum((H[:, i] - mu[k]) ** 2)) for i in range(N)]
    chosen = [max(range(K), key=lambda k: W[k] @ H[:, i] + b[k]) for i in range(N)]
    plain = [max(range(K), key=lambda k: W[k] @ H[:, i]) for i in range(N)]
    disagree = sum(x != y for x, y in zip(chosen, nearest, strict=True)) / N
    values, vectors = np.linalg.eigh(S_B)
    leading = range(len(values) - min(K - 1, d), len(values))
    return Collapse(
        nc0=float(sum(W[:, a].sum() ** 2 for a in range(d))),
        nc1_pinv=np.trace(S_W @ np.linalg.pinv(S_B, rcond=1e-10)) / K,
        nc1_svd=sum(vectors[:, j] @ S_W @ vectors[:, j] / values[j] for j in leading) / K,
        nc1_quot=np.trace(S_W) / np.trace(S_B),
        nc1_cdnv=cdnv(v),
        nc2_equinorm_means=np.std(norm_m, ddof=1) / np.mean(norm_m),
        nc2_equinorm_weights=np.std(norm_w, ddof=1) / np.mean(norm_w),
        nc2_equiangle_means=np.std(cos_m),
        nc2_equiangle_weights=np.std(cos_w),
        nc2_maxangle_means=np.mean([abs(c + 1 / (K - 1)) for c in cos_m]),
        nc2_maxangle_weights=np.mean([abs(c + 1 / (K - 1)) for c in cos_w]),
        nc2_etf_err=distance_to_etf([[x @ y for y in m] for x in m]),
        nc2_etf_err_weights=distance_to_etf([[x @ y for y in W] for x in W]),
        nc2g_log=np.var(logs),
        nc3_self_dual=self_dual,
        nc3_dual_err=distance_to_etf([[x @ y for y in m] for x in W]),
        nc3u_uni_dual=np.var([W[k] @ m[k] for k in range(K)], ddof=1),
        nc4_disagree=disagree,
        nc4_agree=sum(x == y for x, y in zip(plain, nearest, strict=True)) / N,
        bias_collapse=math.sqrt(sum((W[k] @ G + b[k]) ** 2 for k in range(K))),
        toolbox_nc1_cdnv=cdnv(unbiased),
        toolbox_nc2_equinormness=np.mean([math.log(norm_m[k]) - math.log(norm_m[j]) for k, j in pairs]),
        toolbox_nc2_equiangularity=np.mean([c + 1 / (K - 1) for c in cos_m]),
        toolbox_nc3_self_duality=math.sqrt(self_dual),
        toolbox_nc4_agreement=1 - disagree,
    )


def distance_to_etf(G):
    K = len(G)
    size = math.sqrt(sum(G[k][j] ** 2 for k in range(K) for j in range(K)))
    ideal = lambda k, j: ((k == j) - 1 / K) / math.sqrt(K - 1)  # noqa: E731
    return math.sqrt(sum((G[k][j] / size - ideal(k, j)) ** 2 for k in range(K) for j in range(K)))


@pytest.mark.parametrize("centre", ["class_means", "samples"])
@pytest.mark.parametrize(
    ("counts", "d"),
    [((4, 4, 4), 5), ((1, 2, 7, 3), 3), ((3, 5), 1), ((2, 6), 4), ((2, 3, 4, 5, 6, 7, 8), 3), ((9, 1, 4), 2)],
)
def test_every_metric_is_its_definition(counts, d, centre, draw, assert_same):
    H, labels, W, b = draw(sum(counts) + d, counts, d)
    expected = by_loops(H, labels, W, b, centre)
    got = collapse_metrics(H, labels, W, b, centre=centre)
    assert_same(got, expected, but=["toolbox_nc1_cdnv"] if 1 in counts else [])
    assert math.isnan(got.toolbox_nc1_cdnv) == (1 in counts)


def test_a_case_worked_by_hand(assert_same):
    # μ_0 = (2, 1) and μ_1 = −μ_0, so Σ_B = [[4, 2], [2, 1]] = 5 v vᵀ, v = (2, 1)/√5; Σ_W = [[1, 1], [1, 5]]/2.
    H = np.array([[1.0, 3.0, -2.0, -2.0], [0.0, 2.0, 1.0, -3.0]])
    got = collapse_metrics(H, np.array([0, 0, 1, 1]), np.eye(2), np.array([0.0, 3.0]))
    expected = Collapse(
        nc0=2.0,  # ‖(1, 1)‖²
        nc1_pinv=1.3 / 5 / 2,  # vᵀΣ_W v = 1.3
        nc1_svd=1.3 / 5 / 2,
        nc1_quot=3 / 5,
        nc1_cdnv=(2 + 4) / (2 * 20),  # ‖μ_0 − μ_1‖² = 20
        nc2_equinorm_means=0.0,
        nc2_equinorm_weights=0.0,
        nc2_equiangle_means=0.0,
        nc2_equiangle_weights=0.0,
        nc2_maxangle_means=0.0,  # cos = −1 = −1/(K−1)
        nc2_maxangle_weights=1.0,  # cos = 0
        nc2_etf_err=0.0,
        nc2_etf_err_weights=math.sqrt(2 - math.sqrt(2)),  # ‖A − B‖² = 2 − 2⟨A, B⟩ for unit A, B
        nc2g_log=0.0,
        nc3_self_dual=2 - 2 / math.sqrt(20),
        nc3_dual_err=math.sqrt(2 - 2 / math.sqrt(10)),
        nc3u_uni_dual=4.5,  # of 2 and −1
        nc4_disagree=1 / 2,  # logits + b choose 1, 1, 1, 1; nearest means 0, 0, 1, 1
        nc4_agree=3 / 4,  # logits choose 0, 0, 1, 0
        bias_collapse=3.0,  # μ_G = 0
        toolbox_nc1_cdnv=(4 + 8) / (2 * 20),
        toolbox_nc2_equinormness=0.0,
        toolbox_nc2_equiangularity=0.0,
        toolbox_nc3_self_duality=math.sqrt(2 - 2 / math.sqrt(20)),
        toolbox_nc4_agreement=1 / 2,
    )
    assert_same(got, expected, rel=20 * EPS)


# The same file through three public code bases: which of their definitions each field is.
REFERENCE = {
    "tding1 NC1 = tr(S_W pinv S_B)/K, centre=sample_mean": ("nc1_pinv", "samples"),
    "tding1 NC2 of W, centre=sample_mean": ("nc2_etf_err_weights", "samples"),
    "tding1 NC3 = |WH~/|WH~| - P|, centre=sample_mean": ("nc3_dual_err", "samples"),
    "tding1 |W h_G + b|, centre=sample_mean": ("bias_collapse", "samples"),
    "tding1 NC1 = tr(S_W pinv S_B)/K, centre=mean_of_means": ("nc1_pinv", "class_means"),
    "tding1 NC2 of W, centre=mean_of_means": ("nc2_etf_err_weights", "class_means"),
    "tding1 NC3 = |WH~/|WH~| - P|, centre=mean_of_means": ("nc3_dual_err", "class_means"),
    "tding1 |W h_G + b|, centre=mean_of_means": ("bias_collapse", "class_means"),
    "rhubarbwu nc1_pinv": ("nc1_pinv", "class_means"),
    "rhubarbwu nc1_svd": ("nc1_svd", "class_means"),
    "rhubarbwu nc1_quot": ("nc1_quot", "class_means"),
    "rhubarbwu nc1_cdnv": ("nc1_cdnv", "class_means"),
    "rhubarbwu nc2_etf_err (means)": ("nc2_etf_err", "class_means"),
    "rhubarbwu nc3_dual_err": ("nc3_dual_err", "class_means"),
    "rhubarbwu nc4_agree (ignores b)": ("nc4_agree", "class_means"),
    "nc-toolbox nc1_cdnv (unbiased variance)": ("toolbox_nc1_cdnv", "samples"),
    "nc-toolbox nc2_equinormness": ("toolbox_nc2_equinormness", "samples"),
    "nc-toolbox nc2_equiangularity": ("toolbox_nc2_equiangularity", "samples"),
    "nc-toolbox nc3_self_duality": ("toolbox_nc3_self_duality", "samples"),
    "nc-toolbox nc4_classifier_agreement": ("toolbox_nc4_agreement", "samples"),
}


def reference_features():
    with np.load(DATA / "features_a.npz", allow_pickle=False) as file:
        return file["H"], file["labels"], file["W"], file["b"]


def test_three_code_bases_are_reproduced_each_under_its_own_name():
    expected = json.loads((DATA / "features_a.json").read_text())
    assert expected.keys() == REFERENCE.keys()
    for key, (field, centre) in REFERENCE.items():
        got = getattr(collapse_metrics(*reference_features(), centre=centre), field)
        assert got == pytest.approx(expected[key], rel=TOL), key


def test_float32_does_not_revive_the_null_direction_as_a_default_pinv_does():
    H, labels, W, b = reference_features()
    mu = np.stack([H[:, labels == k].mean(1) for k in range(10)], 1)
    D, M = H - mu[:, labels], mu - H.mean(1, keepdims=True)
    naive = np.trace(D @ D.T / labels.size @ np.linalg.pinv(M @ M.T / 10)) / 10
    assert abs(naive) > 1e6
    assert collapse_metrics(H, labels, W, b).nc1_pinv == pytest.approx(0.025749240674881817, rel=TOL)


@pytest.mark.parametrize(
    ("dtype", "offset", "noise"), [(np.float32, 1e2, 1e-4), (np.float64, 1e6, 1e-8), (np.float64, 0, 1e-9)]
)
def test_near_full_collapse_equals_exact_rational_arithmetic(dtype, offset, noise):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), (5, 9, 6)))
    H = offset + rng.normal(size=(4, 3))[:, labels] + noise * rng.normal(size=(4, 20))
    H = H.astype(dtype)
    got = collapse_metrics(H, labels, np.ones((3, 4)), None)
    pinv, quotient = exact_nc1(H, labels)
    assert got.nc1_pinv == pytest.approx(float(pinv), rel=TOL)
    assert got.nc1_svd == pytest.approx(float(pinv), rel=TOL)
    assert got.nc1_quot == pytest.approx(float(quotient), rel=TOL)


def exact_nc1(H, labels):
    """K = 3: with M = B T, B = the first two centred means and T = [I, −1], M⁺ = T⁺ B⁺ and Σ_B^† = 3 M⁺ᵀ M⁺."""
    h = [[Fraction(float(x)) for x in column] for column in H.T]
    mean = lambda vectors: [sum(c) / len(vectors) for c in zip(*vectors, strict=True)]  # noqa: E731
    minus = lambda x, y: [p - q for p, q in zip(x, y, strict=True)]  # noqa: E731
    dot = lambda x, y: sum(p * q for p, q in zip(x, y, strict=True))  # noqa: E731
    mu = [mean([h[i] for i in range(len(h)) if labels[i] == k]) for k in range(3)]
    m = [minus(x, mean(mu)) for x in mu]
    a, b, c = dot(m[0], m[0]), dot(m[0], m[1]), dot(m[1], m[1])
    total_pinv = total = 0
    for x, k in zip(h, labels, strict=True):
        D = minus(x, mu[k])
        p, q = dot(m[0], D), dot(m[1], D)
        u, v = (c * p - b * q) / (a * c - b * b), (a * q - b * p) / (a * c - b * b)  # (BᵀB)⁻¹BᵀD
        total_pinv += 3 * (Fraction(2, 3) * (u * u + v * v) - Fraction(2, 3) * u * v)  # 3 ‖·‖² under (TTᵀ)⁻¹
        total += dot(D, D)
    between = sum(dot(x, x) for x in m) / 3
    return total_pinv / len(h) / 3, total / len(h) / between


def test_every_field_states_its_source():
    record = next(node for node in ast.parse(inspect.getsource(collapse)).body if isinstance(node, ast.ClassDef))
    for field, text in itertools.pairwise(record.body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), field.target.id
            assert "Source: " in text.value.value, field.target.id
