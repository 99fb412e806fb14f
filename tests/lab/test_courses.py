"""Courses measured point by point, and the saddles they pass: known, and found by Newton from where they rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ufm.lab import courses as module
from ufm.lab.courses import along_path, course, rests
from ufm.lab.optimisers import optimiser
from ufm.lab.paths import landmarks
from ufm.measure.collapse import collapse_metrics
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, objective
from ufm.numerics.dynamics import Fate, descend
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import certify
from ufm.theory.optimum import balanced_value
from ufm.theory.rates import separation

SMALL = imbalanced((3, 1, 2), 4, lam_W=2e-2, lam_H=1e-2)


@pytest.fixture(autouse=True)
def _hastily(hastily):
    pass


def stacked(points):
    return jax.tree.map(lambda *a: jnp.stack(a), *points)


def test_along_a_path_every_point_is_measured_by_itself():
    points = [init(SMALL, jax.random.key(seed)) for seed in range(3)]
    found, labels = along_path(SMALL, stacked(points)), [0, 0, 0, 1, 2, 2]
    assert set(found) == {"value", "grad_norm", "gap", "rounding", "nc0", "nc1", "nc2", "nc3", "W", "M", "b"}
    for i, x in enumerate(points):
        proof = certify(SMALL, x)
        c = collapse_metrics(np.asarray(x.H), np.array(labels), np.asarray(x.W), np.asarray(x.b))
        wanted = {"value": objective(SMALL, x), "grad_norm": proof.grad_norm, "gap": proof.gap, "nc0": c.nc0}
        wanted |= {"nc1": c.nc1_pinv, "nc2": c.nc2_etf_err_weights, "nc3": c.nc3_dual_err}
        for name, value in wanted.items():
            assert found[name][i] == pytest.approx(float(value), rel=1e-11), name
        assert found["rounding"][i] == pytest.approx(float(proof.rounding), rel=1e-6)
        means = [np.asarray(x.H)[:, [j for j in range(6) if labels[j] == k]].mean(1) for k in range(3)]
        np.testing.assert_allclose(found["M"][i], np.stack(means, 1), atol=1e-14)
        np.testing.assert_array_equal(found["W"][i], x.W)
        np.testing.assert_array_equal(found["b"][i], x.b)


def test_points_that_are_not_finite_are_nan():
    x = init(SMALL, jax.random.key(0))
    found = along_path(SMALL, stacked([x, jax.tree.map(lambda a: a * jnp.nan, x)]))
    for name, value in found.items():
        assert np.isfinite(value[0]).all(), name
        assert np.isnan(value[1]).any(), name


# κ = K s = 0.3 at two pairs of classes, 01 and 23, that start apart by 1e-2 and within themselves by 1e-8


def pairs_apart():
    rng = np.random.default_rng(0)
    signs = np.array([1.0, 1, -1, -1])[:, None]
    W = 1e-2 * signs * rng.normal(size=(1, 4)) + 1e-8 * rng.normal(size=(4, 4))
    return Params(jnp.asarray(W), jnp.asarray(W.T), jnp.zeros(4))


@functools.cache
def staircase():
    problem = balanced(4, 1, 4, lam_W=0.075, lam_H=0.075)
    found = optimiser(problem, "sgd", 0.5)
    end, kept = course(problem, found, pairs_apart(), 500, every=5, key=jax.random.key(0))  # it does not draw
    return problem, found, end, kept


def test_a_course_is_the_descent_with_its_records():
    problem, found, end, kept = staircase()
    run = descend(
        found.fun, pairs_apart(), found.optimiser, 500, observe=functools.partial(objective, problem), every=5
    )
    np.testing.assert_array_equal(kept["step"], run.at)
    np.testing.assert_allclose(kept["value"], run.observed, rtol=1e-9)
    assert Fate(int(end.fate)) == Fate.DESCENDED
    assert {len(value) for value in kept.values()} == {101}
    optimum = float(balanced_value(problem))
    assert (kept["value"] - optimum <= kept["gap"] + kept["rounding"]).all()
    assert kept["gap"][-1] < 1e-3 * kept["gap"][0]
    sums = (1 - 0.5 * 0.075) ** kept["step"] * kept["nc0"][0] ** 0.5
    np.testing.assert_allclose(np.sqrt(kept["nc0"]), sums, rtol=1e-6, atol=1e-14)


def test_a_start_tied_in_pairs_passes_the_origin_and_the_saddle_of_the_pairs():
    problem, _, _, kept = staircase()
    first, second = rests(problem, landmarks(problem), kept)
    assert (first["nearest"], second["nearest"]) == ("0123", "01 23")
    assert first["first"] == first["middle"] == 0
    assert first["last"] < second["first"] < second["middle"] < second["last"] < 500
    assert second["distance"] < 1e-2 < 0.1 < np.linalg.norm(coarse_etf(problem, 2).W)
    curvature = 0.075 - 1 / 4  # THEORY 1.4, at either
    for rest, groups, index in ((first, 1, 12), (second, 2, 8)):
        saddle = rest["saddle"]
        assert saddle["partition"] == rest["nearest"]
        assert saddle["known"]
        assert saddle["value"] == pytest.approx(float(objective(problem, coarse_etf(problem, groups))), rel=1e-12)
        assert (saddle["rank"], saddle["index"]) == (groups - 1, index)
        assert saddle["smallest_eigenvalue"] == pytest.approx(curvature, abs=1e-12)
        assert rest["value"] == pytest.approx(saddle["value"], abs=1e-3)


def test_unequal_classes_rest_at_the_origin_which_is_no_partition_saddle():
    """With b at log frequencies f is their entropy; the index counts (λ_W+λ_H)/2 < √(...) for d directions each."""
    counts = np.array([3, 3, 1, 1])
    problem = class_mean_problem(counts, 4, lam_W=0.05, lam_H=0.04)
    W = 1e-6 * np.random.default_rng(0).normal(size=(4, 4))
    start = Params(jnp.asarray(W), jnp.asarray(W.T), jnp.zeros(4))
    _, kept = course(problem, optimiser(problem, "sgd", 0.5), start, 300, every=5)
    (rest,) = rests(problem, landmarks(problem), kept)
    saddle, curvatures = rest["saddle"], np.asarray(separation(problem).curvatures)
    assert not saddle["known"]
    assert saddle["value"] == pytest.approx(scipy.stats.entropy(counts / 8), rel=1e-12)
    assert rest["value"] == pytest.approx(saddle["value"], abs=1e-4)
    assert (saddle["rank"], saddle["index"]) == (0, 4 * int((curvatures < 0).sum()))
    assert saddle["smallest_eigenvalue"] == pytest.approx(curvatures[0], abs=1e-10)
    assert saddle["partition"] == "01 23"


def test_a_course_resumes_from_its_file_and_draws_with_its_key(tmp_path):
    found, start = optimiser(SMALL, "sgd", 0.1, batch=3), init(SMALL, jax.random.key(0))
    file, key = tmp_path / "course.npz", jax.random.key(1)
    one, other = (course(SMALL, found, start, 4, every=2, key=key, file=file) for _ in range(2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    run = descend(found.fun, start, found.optimiser, 4, every=2, key=key)
    np.testing.assert_allclose(one[0].params.W, run.params.W, atol=1e-13)
    with pytest.raises(ValueError, match=r"^key must be given for a descent that draws its samples$"):
        course(SMALL, found, start, 4)


def test_where_newton_finds_nothing_there_is_no_saddle(monkeypatch):
    problem, _, _, kept = staircase()
    monkeypatch.setattr(module, "settle", lambda *arguments: None)
    found = rests(problem, landmarks(problem), kept)
    assert [rest["saddle"] for rest in found] == [None, None]
