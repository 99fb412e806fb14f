"""The saddle hunt against the atlas, the saddle of THEORY 8.4 in closed form, dense Hessians and doctored atlases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab import census as module
from ufm.lab.census import hunt, settle, tied_classes
from ufm.lab.claims.landscape import opposed_norm
from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, balanced, class_mean_problem, init, objective, penalty, tie_features
from ufm.theory.atlas import coarse_etf
from ufm.theory.optimum import balanced_value
from ufm.theory.orbits import point_of_logits

pytestmark = pytest.mark.usefixtures("hastily")

PROBLEM = balanced(3, 1, 3, lam_W=0.05, lam_H=0.02)


@functools.cache
def census():
    return hunt(PROBLEM, 40, jax.random.key(0))


def opposed(problem):
    """Two classes opposed and the third at zero, n = 1 and a free bias: p₁p₂ = p² e^{2(β−β₃)}, p₁/p₂ = e^{2z}."""
    p, kappa = opposed_norm(problem), 3 * float(problem.s)
    p1, p2 = (1 - p + 1 - kappa) / 2, (1 - p - 1 + kappa) / 2
    e = jnp.array([1.0, -1, 0])
    beta = np.log(p1 * p2 / p**2) / 2
    return point_of_logits(problem, np.log(p1 / p2) / 2 * jnp.outer(e, e), beta * (e**2 - 2 / 3))


def replayed(monkeypatch, points):
    """A hunt whose searches end at these points."""
    ends = iter(points)
    monkeypatch.setattr(module, "_searcher", lambda tied: lambda key: next(ends))
    return lambda problem=PROBLEM: hunt(problem, len(points), jax.random.key(0))


def signs(x, problem=PROBLEM):
    values = dense_eigenvalues(problem, x)
    return (values < -1e-9 * values[-1]).sum(), (np.abs(values) <= 1e-9 * values[-1]).sum(), values[0]


def test_every_partition_saddle_is_met_and_identified():
    found, atlas = census(), module.critical_points(PROBLEM)
    assert found.missed == ()
    known = [orbit for orbit in found.orbits if orbit.known]
    assert [orbit.value for orbit in known] == pytest.approx([point.value for point in atlas], rel=1e-11)
    for orbit, point in zip(known, atlas, strict=True):
        assert sorted(map(len, orbit.partition)) == sorted(map(len, point.partition))
        assert (orbit.rank, orbit.index, orbit.nullity) == (point.rank, point.index, point.nullity)
        assert orbit.smallest_eigenvalue == pytest.approx(point.smallest_eigenvalue, abs=1e-11)


def test_every_orbit_is_critical_and_classified_like_dense_eigenvalues():
    for orbit in census().orbits:
        gradient = jax.grad(functools.partial(objective, PROBLEM))(orbit.params)
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-12
        assert (orbit.index, orbit.nullity) == signs(orbit.params)[:2]
        assert orbit.smallest_eigenvalue == pytest.approx(signs(orbit.params)[2], abs=1e-13)
        assert orbit.value == pytest.approx(float(objective(PROBLEM, orbit.params)), rel=1e-14)


def test_what_is_new_is_the_saddle_of_two_opposed_classes():
    (new,) = census().new
    x = opposed(PROBLEM)
    assert new.partition == ((0,), (1,), (2,))
    assert not new.known
    stated = module._invariants(tie_features(PROBLEM), x)
    assert module._invariants(tie_features(PROBLEM), new.params) == pytest.approx(stated, abs=1e-10)
    assert (new.rank, new.index, new.nullity) == (1, 2, 3)


def test_no_critical_point_above_the_optimum_lacks_negative_curvature():
    found = census()
    assert found.spurious == ()
    assert found.lowest == pytest.approx(float(balanced_value(PROBLEM)), rel=1e-12)
    assert found.starts == 40
    assert found.converged == sum(orbit.hits for orbit in found.orbits) <= 40
    assert len(found.orbits) == 4


def test_without_searches_everything_is_missed():
    found = hunt(PROBLEM, 0, jax.random.key(0))
    assert (found.starts, found.converged, found.orbits, found.spurious) == (0, 0, (), ())
    assert [point.groups for point in found.missed] == [(1, 1, 1), (2, 1), (3,)]
    assert found.lowest == pytest.approx(float(balanced_value(PROBLEM)), rel=1e-12)


def test_missed_are_those_that_no_search_ended_on(monkeypatch):
    ends = [opposed(PROBLEM), None, coarse_etf(PROBLEM, 3), coarse_etf(PROBLEM, 3)]
    found = replayed(monkeypatch, ends)()
    assert (found.starts, found.converged) == (4, 3)
    assert [orbit.hits for orbit in found.orbits] == [2, 1]
    assert [orbit.known for orbit in found.orbits] == [True, False]
    assert [point.groups for point in found.missed] == [(2, 1), (3,)]


@pytest.mark.parametrize("doctor", ["left out", "other energy"])
def test_a_doctored_atlas_makes_its_saddle_new(monkeypatch, doctor):
    atlas = module.critical_points(PROBLEM)
    origin = dataclasses.replace(atlas[-1], value=atlas[-1].value * (1 + 1e-5))
    doctored = atlas[:-1] if doctor == "left out" else (*atlas[:-1], origin)
    monkeypatch.setattr(module, "critical_points", lambda problem: doctored)
    found = replayed(monkeypatch, [point.params for point in atlas])()
    assert [orbit.partition for orbit in found.new] == [((0, 1, 2),)]
    assert len(found.missed) == len(doctored) - 2


def test_a_saddle_said_to_have_no_negative_curvature_is_spurious(monkeypatch):
    count = module.inertia
    monkeypatch.setattr(module, "inertia", lambda *arguments: count(*arguments)._replace(negative=0))
    found = replayed(monkeypatch, [coarse_etf(PROBLEM, 1), coarse_etf(PROBLEM, 3), opposed(PROBLEM)])()
    assert [orbit.value for orbit in found.spurious] == [orbit.value for orbit in found.orbits[1:]]
    assert len(found.spurious) == 2


def test_a_minimum_at_the_optimal_value_is_not_spurious_for_rounding(monkeypatch):
    found = replayed(monkeypatch, [coarse_etf(PROBLEM, 3)])()
    above = dataclasses.replace(found.orbits[0], value=found.lowest * (1 + 1e-12))
    assert dataclasses.replace(found, orbits=(above,)).spurious == ()
    assert (
        len(dataclasses.replace(found, orbits=(dataclasses.replace(above, value=found.lowest * 1.01),)).spurious) == 1
    )


def _copies(problem, x, seed):
    """x turned by a random isometry, with alike classes exchanged, and with its bias shifted."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((problem.d, problem.d)))[0]
    order = np.arange(problem.K)
    for n in set(np.asarray(problem.counts).tolist()):
        alike = np.flatnonzero(np.asarray(problem.counts) == n)
        order[alike] = rng.permutation(alike)
    yield "turned", Params(x.W @ Q, Q.T @ x.H, x.b)
    yield "exchanged", Params(x.W[order], x.H[:, order], x.b[order])
    yield "shifted", Params(x.W, x.H, x.b + 3.7)
    yield "all", Params((x.W @ Q)[order], (Q.T @ x.H)[:, order], x.b[order] - 1.3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3, 1, 1]])
def test_symmetric_copies_fall_on_one_orbit(counts, seed):
    problem = class_mean_problem(counts, 4, lam_W=0.05, lam_H=0.02)
    x = init(problem, jax.random.key(seed))
    x = Params(x.W, x.H, jax.random.normal(jax.random.key(seed + 9), x.b.shape))
    found = []
    for _, copy in [("itself", x), *_copies(problem, x, seed)]:
        module._collect(found, module._invariants(problem, copy), copy)
    assert [hits for *_, hits in found] == [5]
    assert found[0][1] is x


def test_what_is_no_symmetry_makes_another_orbit():
    problem = class_mean_problem([3, 1, 1], 4, lam_W=0.05, lam_H=0.02, lam_b=0.1)
    x = init(problem, jax.random.key(0))
    swapped = [1, 0, 2]  # classes of unequal size
    others = [
        Params(x.W[jnp.array(swapped)], x.H[:, jnp.array(swapped)], x.b),
        Params(x.W, x.H, x.b + 0.1),  # the bias is penalised
        Params(x.W * (1 + 1e-4), x.H / (1 + 1e-4), x.b),
    ]
    found = []
    for point in [x, *others]:
        module._collect(found, module._invariants(problem, point), point)
    assert len(found) == 4


def test_tied_classes_agree_in_everything():
    problem = class_mean_problem([2, 2, 2, 1], 4, lam_W=0.05, lam_H=0.02)
    x = init(problem, jax.random.key(0))
    merged = jnp.array([0, 1, 0, 0])
    tied = Params(x.W[merged], x.H[:, merged], x.b[merged])
    assert tied_classes(problem, tied) == ((0, 2), (1,), (3,))  # the fourth class has another size
    for other in (
        Params(tied.W.at[2, 0].add(1e-4), tied.H, tied.b),
        Params(tied.W, tied.H.at[0, 2].add(1e-4), tied.b),
        Params(tied.W, tied.H, tied.b.at[2].add(1e-4)),
    ):
        assert tied_classes(problem, other) == ((0,), (1,), (2,), (3,))


# Newton from near


def near(x, size, seed=0):
    """x moved by so much in a random direction of each of its arrays."""
    moves = init(PROBLEM, jax.random.key(seed), scale=1.0)
    return jax.tree.map(lambda a, m: a + size * m / jnp.linalg.norm(m), x, moves)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(
    ("groups", "rank", "index", "known"),
    [(1, 0, 6, True), (3, 2, 0, True), ("opposed", 1, 2, False)],
)
def test_newton_settles_on_the_critical_point_nearby(groups, rank, index, known):
    x = opposed(PROBLEM) if groups == "opposed" else coarse_etf(PROBLEM, groups)
    found = settle(PROBLEM, near(x, 1e-2))
    gradient = jax.grad(functools.partial(objective, PROBLEM))(found.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-12
    assert found.value == pytest.approx(float(objective(PROBLEM, x)), rel=1e-12)
    tied = tie_features(PROBLEM)
    stated = module._invariants(tied, x)
    assert module._invariants(tied, found.params) == pytest.approx(stated, abs=1e-10)
    assert (found.rank, found.index, found.known, found.hits) == (rank, index, known, 1)
    assert found.smallest_eigenvalue == pytest.approx(signs(x)[2], abs=1e-10)
    # Newton's step of least norm leaves the orbit's directions alone, so it ends near where it began
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (found.params, x)), strict=True)) < 0.1


@pytest.mark.usefixtures("hastily")
def test_newton_takes_class_means_of_a_problem_with_samples():
    problem = balanced(3, 2, 3, lam_W=0.05, lam_H=0.02, use_bias=False)
    means = coarse_etf(tie_features(problem), 3)
    found = settle(problem, Params(1.01 * means.W, 0.99 * means.H, means.b))
    assert found.value == pytest.approx(float(balanced_value(problem)), rel=1e-12)
    assert (found.index, found.rank, found.partition, found.known) == (0, 2, ((0,), (1,), (2,)), True)


@pytest.mark.usefixtures("hastily")
def test_newton_from_far_away_finds_nothing():
    assert settle(PROBLEM, init(PROBLEM, jax.random.key(0), scale=1e3)) is None


@pytest.mark.parametrize("use_bias", [True, False])
def test_units_weigh_both_penalties_by_one(use_bias):
    """f/s = g/s + (‖x‖² without b)/2, for a problem whose λ's differ and whose classes have samples."""
    tied = class_mean_problem([3, 1, 2], 4, lam_W=0.05, lam_H=0.002, use_bias=use_bias)
    units, x = module._Units(tied), init(tied, jax.random.key(0))
    vector = units.vector(x)
    assert vector.shape == (2 * 3 * 4 + 3 * use_bias,)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-14)), units.point(vector), x))
    assert float(units.fun(vector) * tied.s) == pytest.approx(float(objective(tied, x)), rel=1e-14)
    assert float(penalty(tied, x) / tied.s) == pytest.approx(float(np.sum(vector[:24] ** 2)) / 2, rel=1e-14)
