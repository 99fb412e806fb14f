"""A network's features beside the theory: every number by hand, agreement where theory says so, refusal of the rest."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

from ufm.lab.compare import class_margins, compare, implied_lam_H, problem_of_features, summarise
from ufm.lab.optimum import global_minimiser
from ufm.measure.features import Features
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, objective
from ufm.theory.certificate import Verdict
from ufm.theory.optimum import nonnegative_minimiser

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
BIAS = ({}, {"lam_b": 1e-2}, {"use_bias": False})  # free, regularised, absent
LAMBDAS = {"lam_W": 5e-3, "lam_H": 2e-3}


def _features(counts=(3, 1, 2), d=4, seed=0, *, bias=True):
    rng, K = np.random.default_rng(seed), len(counts)
    labels = rng.permutation(np.repeat(np.arange(K), counts))
    b = rng.normal(size=K).astype(np.float32) if bias else None
    return Features(
        rng.normal(size=(d, labels.size)).astype(np.float32), labels, rng.normal(size=(K, d)).astype(np.float32), b
    )


@pytest.mark.parametrize("bias", [True, False])
def test_observed_is_what_a_hand_computes_sample_by_sample(bias):
    f = _features(bias=bias)
    lam_W, lam_H, lam_b = 0.01, 0.003, 0.02
    observed = compare(*problem_of_features(f, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b))[0]["observed"]
    W, H = f.W.astype(float), f.H.astype(float)
    b = f.b.astype(float) if bias else np.zeros(3)
    losses, margins = [], []
    for h, y in zip(H.T, f.labels, strict=True):
        z = W @ h + b
        losses.append(-np.log(np.exp(z[y]) / np.exp(z).sum()))
        margins.append(z[y] - np.delete(z, y).mean())
    value = np.mean(losses) + lam_W / 2 * (W**2).sum() + lam_H / 2 * (H**2).sum() + bias * lam_b / 2 * (b**2).sum()
    by_hand = {
        "value": value,
        "margin_mean": np.mean(margins),
        "margin_min": min(margins),
        "w_norm2_mean": np.mean([w @ w for w in W]),
        "h_norm2_mean": np.mean([h @ h for h in H.T]),
        "balance": lam_W * (W**2).sum() / (lam_H * (H**2).sum()),
        "bias_spread": max(b) - min(b),
    }
    assert observed == pytest.approx(by_hand, rel=100 * EPS)


def test_columns_stand_for_as_many_samples_as_their_multiplicity():
    counts = [3, 1, 2]
    tied = class_mean_problem(counts, 4, **LAMBDAS)
    x = init(tied, jax.random.key(0))
    full = imbalanced(counts, 4, **LAMBDAS)
    spread = Params(x.W, x.H @ full.Y, x.b)
    assert summarise(tied, x) == pytest.approx(summarise(full, spread), rel=100 * EPS)


@pytest.mark.parametrize("bias", BIAS, ids=str)
@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 1, 2]], ids=str)
def test_at_the_optimum_observed_is_predicted_and_the_gap_closes(counts, bias):
    problem = imbalanced(counts, 4, **LAMBDAS, **bias)
    best = global_minimiser(problem)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    turned = Params(best.W @ rotation, rotation.T @ best.H, best.b)
    sides, certificate = compare(problem, turned)
    assert sides["observed"] == pytest.approx(sides["predicted"], rel=1e-12, abs=1e-12)
    assert certificate.verdict == Verdict.GLOBAL
    assert float(certificate.gap) < 1e-10
    assert sides["observed"]["balance"] == pytest.approx(1, rel=1e-9)


def test_margins_at_the_optimum_are_those_of_the_theory():
    """Worked example of THEORY 1.2: K = 4, n = 5."""
    problem = balanced(4, 5, 6, **LAMBDAS)
    expected = {"value": 0.126028943439, "margin_mean": 4.93030234, "w_norm2_mean": 5.22937533}
    expected |= {"margin_min": 4.93030234, "h_norm2_mean": 2.61468766, "balance": 1.0, "bias_spread": 0.0}
    assert summarise(problem, global_minimiser(problem)) == pytest.approx(expected, rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2, 2), (3, 1, 2)]))
def test_nothing_observed_is_below_the_prediction_nor_further_above_than_the_gap(seed, counts):
    problem, point = problem_of_features(_features(counts, seed=seed), **LAMBDAS, lam_b=0.0)
    sides, certificate = compare(problem, point)
    excess = sides["observed"]["value"] - sides["predicted"]["value"]
    rounding = float(certificate.rounding) + 1e-11
    assert -rounding <= excess <= float(certificate.gap) + rounding


def test_the_optimum_under_H_nonnegative_is_set_beside_features_that_are_nowhere_negative():
    signed = _features((2, 2, 2))
    positive = Features(np.abs(signed.H), signed.labels, signed.W, signed.b)
    assert "predicted_nonnegative" not in compare(*problem_of_features(signed, **LAMBDAS, lam_b=0.0))[0]
    problem, point = problem_of_features(positive, **LAMBDAS, lam_b=0.0)
    found = compare(problem, point)[0]
    assert found["predicted_nonnegative"] == summarise(problem, nonnegative_minimiser(problem))
    assert found["predicted"]["value"] < found["predicted_nonnegative"]["value"] < found["observed"]["value"]


@pytest.mark.parametrize(("counts", "d"), [((3, 1, 2), 4), ((2, 2, 2), 2)], ids=["unequal counts", "d = K − 1"])
def test_where_the_theory_under_H_nonnegative_does_not_reach_none_is_given(counts, d):
    f = _features(counts, d)
    sides, _ = compare(*problem_of_features(Features(np.abs(f.H), f.labels, f.W, f.b), **LAMBDAS, lam_b=0.0))
    assert sides.keys() == {"observed", "predicted"}


@pytest.mark.parametrize("bias", BIAS, ids=str)
@pytest.mark.parametrize("lam", [LAMBDAS, {"lam_W": 0.05, "lam_H": 0.03}, {"lam_W": 0.3, "lam_H": 0.2}], ids=str)
def test_no_box_constrained_descent_gets_below_the_optimum_under_H_nonnegative(bias, lam):
    """SciPy's L-BFGS-B with bounds H ≥ 0 from random starts; the last λ's are above the threshold."""
    problem = balanced(4, 3, 6, **lam, **bias)
    theory = nonnegative_minimiser(problem)
    assert float(jnp.min(theory.H)) >= 0
    stated = float(objective(problem, theory))
    zeros = jax.tree.map(jnp.zeros_like, theory)
    bounded = np.asarray(ravel_pytree(Params(zeros.W, zeros.H + 1, zeros.b))[0]) > 0
    _, unravel = ravel_pytree(zeros)
    fun = jax.jit(jax.value_and_grad(lambda v: objective(problem, unravel(v))))
    found = []
    for seed in range(4):
        x0 = np.asarray(ravel_pytree(init(problem, jax.random.key(seed)))[0])
        result = minimize(
            lambda v: tuple(np.asarray(a) for a in fun(v)), np.where(bounded, np.abs(x0), x0), jac=True,
            method="L-BFGS-B", bounds=[(0 if positive else None, None) for positive in bounded],
            options={"maxiter": 20000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-11},
        )  # fmt: skip
        found.append(result.fun)
    assert min(found) >= stated - 1e-12
    assert min(found) == pytest.approx(stated, abs=1e-9)  # gtol 1e-11 over the least curvature, min(λ) = 2e-3


@pytest.mark.parametrize("K", [2, 3, 10])
@pytest.mark.parametrize("load", [1e-3, 0.3, 0.999, 1.001])
def test_the_optimum_under_H_nonnegative_is_that_of_theory_for_equal_counts(K, load):
    """THEORY 3.7 with n_k = n, by its q_k = N √(λ_Wλ_H/(n K(K−1))); load is K q_k, and from 1 on all is zero."""
    n, N = 3, 3 * K
    s = load * np.sqrt(n * K * (K - 1)) / N / K
    problem = balanced(K, n, K, lam_W=2 * s, lam_H=s / 2)
    t = max(0.0, np.log(K / load - K + 1))
    stated = np.log1p((K - 1) * np.exp(-t)) + K * s * np.sqrt(n * (K - 1) / K) * t
    x = nonnegative_minimiser(problem)
    assert float(objective(problem, x)) == pytest.approx(stated, rel=1e-13)
    np.testing.assert_allclose(class_margins(problem, x), t, rtol=1e-12, atol=1e-12)
    h2 = t * np.sqrt((K - 1) / K) * np.sqrt(float(problem.lam_W / problem.lam_H) / n)
    np.testing.assert_allclose(x.H.T @ x.H, h2 * problem.Y.T @ problem.Y, rtol=1e-12, atol=1e-12 * (1 + h2))


@pytest.mark.parametrize("bias", BIAS, ids=str)
def test_the_optimum_under_H_nonnegative_is_critical_within_its_bounds(bias):
    """∇f = 0 where an entry is free to move, and ∇_H f ≥ 0 where H = 0."""
    problem = balanced(5, 2, 7, lam_W=3e-3, lam_H=1e-3, **bias)
    x = nonnegative_minimiser(problem)
    slope = jax.grad(partial(objective, problem))(x)
    np.testing.assert_allclose(slope.W, 0, atol=1e-16)
    np.testing.assert_allclose(slope.b, 0, atol=1e-16)
    np.testing.assert_allclose(slope.H[x.H > 0], 0, atol=1e-16)
    assert float(jnp.min(slope.H)) > -1e-16


def test_the_implied_lam_H_balances_the_norms():
    f = _features()
    lam_H = implied_lam_H(f, 0.05)
    assert lam_H == pytest.approx(0.05 * (f.W.astype(float) ** 2).sum() / (f.H.astype(float) ** 2).sum(), rel=4 * EPS)
    problem, point = problem_of_features(f, lam_W=0.05, lam_H=None, lam_b=0.0)
    assert float(problem.lam_H) == lam_H
    assert summarise(problem, point)["balance"] == pytest.approx(1, rel=4 * EPS)


def test_at_a_critical_point_the_implied_lam_H_is_the_true_one():
    problem = balanced(4, 5, 6, **LAMBDAS)
    x = global_minimiser(problem)
    f = Features(x.H, np.asarray(problem.Y).argmax(0), x.W, None)
    assert implied_lam_H(f, 5e-3) == pytest.approx(2e-3, rel=1e-13)


@pytest.mark.parametrize("name", ["W", "H"])
@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
def test_what_implies_no_lam_H_is_refused(name, entry):
    f = vars(_features())
    f = Features(**f | {name: np.full_like(f[name], entry)})
    with pytest.raises(ValueError, match="W and H must be finite and nonzero to imply lam_H"):
        implied_lam_H(f, 0.05)


def test_features_become_the_model_in_float64_whatever_they_were():
    problem, point = problem_of_features(_features(), **LAMBDAS, lam_b=0.0)
    assert {x.dtype for x in jax.tree.leaves((problem, point))} == {np.dtype(float)}
    np.testing.assert_array_equal(np.asarray(problem.counts), [3, 1, 2])
    assert problem.use_bias
    assert not problem_of_features(_features(bias=False), **LAMBDAS, lam_b=0.0)[0].use_bias


BAD = {
    "W of one axis": ({"W": np.ones(4)}, "W has shape"),
    "W of another width": ({"W": np.ones((3, 5))}, "H has shape"),
    "W of one class": ({"W": np.ones((1, 4)), "labels": np.zeros(6, int), "b": None}, "2 classes"),
    "H transposed": ({"H": np.ones((6, 4))}, "pass its transpose"),
    "labels too few": ({"labels": np.array([0, 1, 2])}, "labels have shape"),
    "labels not whole": ({"labels": np.array([0.0, 0, 0, 1, 2, 2])}, "labels have dtype"),
    "label too large": ({"labels": np.array([0, 0, 0, 1, 2, 3])}, "labels hold 3"),
    "negative label": ({"labels": np.array([0, 0, 0, 1, 2, -1])}, "labels hold -1"),
    "a class without samples": ({"labels": np.array([0, 0, 0, 1, 1, 1])}, "no sample of class 2"),
    "NaN in H": ({"H": np.full((4, 6), np.nan)}, "H.*nan"),
    "infinity in W": ({"W": np.full((3, 4), np.inf)}, "W must be finite"),
    "NaN in b": ({"b": np.array([0, np.nan, 0])}, "b must be finite"),
    "b of another length": ({"b": np.zeros(2)}, "b must have shape"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "complaint"), BAD.values(), ids=BAD.keys())
def test_what_are_not_features_of_K_classes_is_refused_in_one_line_that_names_it(change, complaint):
    f = Features(**vars(_features()) | change)
    with pytest.raises(ValueError, match=complaint) as error:
        problem_of_features(f, **LAMBDAS, lam_b=0.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lam_W", "lam_H", "lam_b"])
@pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf])
def test_lambdas_out_of_range_are_refused_by_name(name, value):
    lambdas = LAMBDAS | {"lam_b": 0.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be"):
        problem_of_features(_features(), **lambdas)


def test_a_feature_dimension_too_small_for_the_theory_is_refused():
    with pytest.raises(ValueError, match="d must be at least K - 1 = 2"):
        compare(*problem_of_features(_features(d=1), **LAMBDAS, lam_b=0.0))


@pytest.mark.usefixtures("unchecked")
def test_a_point_of_another_shape_is_refused_before_anything_is_computed():
    problem, point = problem_of_features(_features(), **LAMBDAS, lam_b=0.0)
    with pytest.raises(ValueError, match="H must have shape"):
        compare(problem, Params(point.W, point.H[:, :1], point.b))
