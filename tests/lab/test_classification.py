"""What kind of point it is, against theory, dense eigenvalues, the atlas and symmetry; where downhill leads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab import classification as chapter
from ufm.lab.atlas import critical_points
from ufm.lab.classification import SLACK, classify
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.optimum import global_minimiser
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, balanced, imbalanced, init, objective, tie_features
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import Verdict
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

LAMBDAS = {"lam_W": 5e-3, "lam_H": 2e-3}
KEY = jax.random.key(0)
EQUAL = balanced(4, 2, 4, **LAMBDAS)
UNEQUAL = imbalanced([5, 1, 1, 1], 4, **LAMBDAS)
PAIRS = ((0, 1), (2, 3))
APART = ((0,), (1,), (2,), (3,))


def _origin(problem):
    """W = H = 0 at the best free bias, the logarithm of the class frequencies."""
    zero = jax.tree.map(jnp.zeros_like, init(problem, KEY))
    return Params(zero.W, zero.H, jnp.log(problem.counts / problem.total))


def _optimum(problem):
    """The optimum at d = K − 1, in one more dimension."""
    x = global_minimiser(dataclasses.replace(problem, d=3))
    return Params(jnp.pad(x.W, ((0, 0), (0, 1))), jnp.pad(x.H, ((0, 1), (0, 0))), x.b)


def _moved(x, size, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + size * rng.normal(size=a.shape), x)


POINTS = {
    "optimum": (EQUAL, global_minimiser, Verdict.GLOBAL),
    "origin": (EQUAL, _origin, Verdict.STRICT_SADDLE),
    "coarse ETF": (EQUAL, lambda p: coarse_etf(p, PAIRS), Verdict.STRICT_SADDLE),
    "perturbed saddle": (EQUAL, lambda p: _moved(coarse_etf(p, PAIRS), 1e-3), Verdict.NOT_CRITICAL),
    "random": (EQUAL, lambda p: init(p, KEY), Verdict.NOT_CRITICAL),
    "optimum, unequal classes": (UNEQUAL, _optimum, Verdict.GLOBAL),
    "origin, unequal classes": (UNEQUAL, _origin, Verdict.STRICT_SADDLE),
    "random, unequal classes": (UNEQUAL, lambda p: init(p, KEY), Verdict.NOT_CRITICAL),
}


@functools.cache
def point(name):
    problem, of, verdict = POINTS[name]
    return problem, of(problem), verdict


@functools.cache
def found(name):
    return classify(*point(name)[:2], key=KEY)


def check_curvature(problem, x, c):
    """Signs and least eigenvalue are those of the dense Hessian."""
    values = dense_eigenvalues(problem, x)
    norm = abs(values).max()
    zero = 1e-9 * norm
    counts = (values < -zero).sum(), (abs(values) <= zero).sum(), (values > zero).sum()
    assert (c.signs.negative, c.signs.zero, c.signs.positive) == counts
    assert c.steepest.converged
    assert c.steepest.lower_bound == pytest.approx(c.steepest.eigenvalue - SLACK * norm, abs=SLACK * norm / 10)
    assert values[0] - 1e-14 <= c.steepest.eigenvalue <= values[0] + 1e-7 * norm
    assert min(abs(values - c.steepest.eigenvalue)) <= c.steepest.residual + 1e-14


def check_descent(problem, x, c):
    """f at the end is f*, where no spurious minimum is known, and no higher than the drop on the way says."""
    assert c.descent.value == pytest.approx(float(objective(problem, _optimum(problem))), rel=1e-11)
    assert (c.descent.verdict, c.descent.index) == (Verdict.GLOBAL, 0)
    assert c.descent.gap <= 1e-11
    assert c.descent.value <= float(objective(problem, x)) - c.descent.drop + 1e-14


@pytest.mark.parametrize("name", POINTS)
def test_verdict_curvature_excess_and_descent(name):
    problem, x, verdict = point(name)
    c = found(name)
    assert c.verdict == c.certificate.verdict == verdict
    assert c.critical == (verdict != Verdict.NOT_CRITICAL)
    assert c.excess == pytest.approx(float(objective(problem, x) - objective(problem, _optimum(problem))), abs=1e-11)
    check_curvature(problem, x, c)
    if verdict == Verdict.GLOBAL:
        assert c.descent is None
    else:
        check_descent(problem, x, c)
        assert c.descent.partition == APART
        assert c.descent.drop > 0 or not c.critical


@pytest.mark.parametrize(
    ("name", "at"),
    [("optimum", "optimum"), ("origin", "origin"), ("coarse ETF", PAIRS), ("origin, unequal classes", "origin")],
)
def test_index_nullity_and_steepest_descent_are_those_of_theory(name, at):
    spectrum, c = hessian_spectrum(point(name)[0], at), found(name)
    assert (c.signs.negative, c.signs.zero) == (spectrum.index, spectrum.nullity)
    assert c.steepest.eigenvalue == pytest.approx(float(spectrum.eigenvalues.min()), abs=1e-13)


def test_the_steepest_direction_is_an_eigenvector_of_unit_length_along_which_f_falls_by_half_the_curvature():
    problem, x, _ = point("coarse ETF")
    steepest = found("coarse ETF").steepest
    v, step = steepest.direction, 1e-3
    assert sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(v)) == pytest.approx(1, abs=1e-13)
    up, down = (jax.tree.map(lambda a, da, t=t: a + t * da, x, v) for t in (step, -step))
    second = (float(objective(problem, up) + objective(problem, down)) - 2 * float(objective(problem, x))) / step**2
    assert second == pytest.approx(steepest.eigenvalue, abs=1e-6)  # f's fourth derivative times step²/12


@pytest.mark.parametrize("name", [name for name in POINTS if "unequal" not in name])
def test_neighbours_are_the_next_values_of_the_atlas_in_the_points_own_dimension(name):
    problem, x, _ = point(name)
    c, f = found(name), float(objective(problem, x))
    values = np.array([entry.value for entry in critical_points(problem)])
    assert c.omitted is None
    assert c.neighbours.entries == len(values)
    below, above = values[values < f - 1e-9], values[values > f + 1e-9]
    for side, expected in ((c.neighbours.below, below[-1:]), (c.neighbours.above, above[:1])):
        assert ([side.value] if side else []) == pytest.approx(list(expected), rel=1e-11)
    if c.critical:
        assert c.neighbours.alike.value == pytest.approx(f, rel=1e-11)
        assert sorted(map(len, c.neighbours.alike.partition)) == sorted(map(len, c.partition))


@pytest.mark.parametrize(
    ("name", "partition"), [("optimum", APART), ("origin", ((0, 1, 2, 3),)), ("coarse ETF", PAIRS)]
)
def test_merged_classes_are_seen_also_through_float32(name, partition):
    problem, x, verdict = point(name)
    assert found(name).partition == partition
    c = classify(problem, jax.tree.map(lambda a: a.astype(jnp.float32), x), key=KEY)
    assert (c.verdict, c.partition, c.critical) == (verdict, partition, True)
    assert c.signs[:2] == found(name).signs[:2]
    assert c.steepest.eigenvalue == pytest.approx(found(name).steepest.eigenvalue, abs=1e-7)


@pytest.mark.parametrize("name", ["coarse ETF", "random"])
def test_nothing_depends_on_the_frame_nor_on_the_order_of_samples_and_classes(name):
    problem, x, verdict = point(name)
    rng = np.random.default_rng(1)
    rotation, classes = np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.permutation(4)
    samples = rng.permutation(8)
    turned = Params(x.W[classes] @ rotation, rotation.T @ x.H[:, samples], x.b[classes])
    p = problem
    other = type(p)(
        p.Y[classes][:, samples], p.multiplicity, CrossEntropy(), p.lam_W, p.lam_H, p.lam_b, p.d, p.use_bias
    )
    a, b = found(name), classify(other, turned, key=jax.random.key(1))
    assert b.verdict == verdict
    assert b.signs[:3] == a.signs[:3]
    assert b.excess == pytest.approx(a.excess, rel=1e-12)
    assert b.steepest.eigenvalue == pytest.approx(a.steepest.eigenvalue, rel=1e-6)
    assert b.descent.value == pytest.approx(a.descent.value, rel=1e-11)
    assert b.neighbours.below.value == pytest.approx(a.neighbours.below.value, rel=1e-11)


@pytest.mark.parametrize("name", ["origin", "coarse ETF", "perturbed saddle", "random"])
def test_where_variables_are_many_movements_alike_within_classes_stand_in_and_say_how_well(name, monkeypatch):
    problem, x, _ = point(name)
    monkeypatch.setattr(chapter, "VARIABLES", 0)
    steepest, values = classify(problem, x, key=KEY).steepest, dense_eigenvalues(problem, x)
    assert steepest.eigenvalue >= values[0] - 1e-14
    assert min(abs(values - steepest.eigenvalue)) <= steepest.residual + 1e-14
    assert steepest.converged == (steepest.lower_bound <= values[0])
    if name in ("origin", "coarse ETF"):
        assert steepest.converged
        assert steepest.residual <= 1e-7


def test_columns_that_stand_for_several_samples_count_as_so_many():
    """The class-mean problem has the eigenvalues of movements alike within classes, the least among them."""
    problem, x, _ = point("origin, unequal classes")
    first = np.argmax(np.asarray(problem.Y), axis=1)
    c, full = (
        classify(tie_features(problem), Params(x.W, x.H[:, first], x.b), key=KEY),
        found("origin, unequal classes"),
    )
    assert c.signs[:3] == full.signs[:3]
    assert c.steepest.eigenvalue == pytest.approx(full.steepest.eigenvalue, rel=1e-9)
    assert c.excess == pytest.approx(full.excess, rel=1e-11)
    v = c.steepest.direction
    length = jnp.sum(v.W**2) + jnp.sum(problem.counts * v.H**2) + jnp.sum(v.b**2)
    assert float(length) == pytest.approx(1, abs=1e-13)


def test_below_the_dimension_of_the_theory_a_saddle_of_full_rank_is_known_by_its_curvature():
    """d = 1 < K − 1, no bias: the certificate's direction needs rank W < d; inertia and the measured fall do not."""
    problem = balanced(4, 2, 1, **LAMBDAS, use_bias=False)
    x = coarse_etf(problem, PAIRS)
    value = float(objective(problem, x))
    c = classify(problem, x, key=KEY)
    assert (c.certificate.verdict, c.verdict) == (Verdict.UNDECIDED, Verdict.STRICT_SADDLE)
    check_curvature(problem, x, c)
    assert c.signs.negative == hessian_spectrum(problem, PAIRS).index
    assert not c.steepest.direction.b.any()
    assert (c.excess, c.neighbours) == (None, None)
    assert c.omitted == "d = 1 is less than K - 1 = 3"
    assert c.descent.index == 0
    assert c.descent.value < value - c.descent.drop < value
    proved = classify(problem, x, rigorous=True, key=KEY)
    assert (proved.verdict, proved.signs) == (Verdict.UNDECIDED, c.signs)


def test_near_the_optimum_f_star_tells_more_than_the_gap_unless_proof_is_asked_for():
    problem, x, _ = point("optimum")
    near = _moved(x, 1e-6)
    c = classify(problem, near, key=KEY)
    assert (c.certificate.verdict, c.verdict, c.descent) == (Verdict.NOT_CRITICAL, Verdict.GLOBAL, None)
    assert 0 < c.excess <= 1e-8 * float(c.certificate.value) < float(c.certificate.gap)
    assert classify(problem, near, rigorous=True, key=KEY).verdict == Verdict.NOT_CRITICAL


def test_what_is_not_known_is_omitted_and_said(monkeypatch):
    def fail(problem):
        raise ArithmeticError("not certified")

    problem, x, verdict = point("coarse ETF")
    monkeypatch.setattr(chapter, "TYPES", 4)  # of the five
    assert classify(problem, x, key=KEY).omitted == "the 4 classes have more than 4 types of partitions"
    monkeypatch.setattr(chapter, "TYPES", 5)
    monkeypatch.setattr(chapter, "critical_points", fail)
    monkeypatch.setattr(chapter, "optimal_value", fail)
    c = classify(problem, x, key=KEY)
    assert (c.verdict, c.excess, c.neighbours, c.omitted) == (verdict, None, None, "not certified")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"H": np.zeros((4, 7))}, "H must have shape"), ({"W": np.full((4, 4), np.nan)}, "W must be finite")],
)
def test_what_is_no_point_is_refused(change, complaint):
    x = Params(**{**vars(_origin(EQUAL)), **change})
    with pytest.raises(ValueError, match=complaint):
        classify(EQUAL, x, key=KEY)
