"""The catalogue of partition saddles against gradients, dense Hessians, inertia and counting."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.atlas import critical_points, lattice, partition_type
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.optimum import optimal_value
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, objective
from ufm.numerics.minimise import minimise
from ufm.theory.certificate import Verdict, certify
from ufm.theory.elimination import inertia
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

CASES = {
    "balanced": lambda: balanced(5, 1, 5, lam_W=5e-3, lam_H=5e-3, lam_b=5e-3),
    "free bias": lambda: balanced(5, 2, 5, lam_W=8e-3, lam_H=2e-3),
    "near the threshold": lambda: balanced(6, 1, 6, lam_W=0.0833, lam_H=0.1633, lam_b=0.0),
    "unequal": lambda: imbalanced([4, 4, 4, 2, 2], 5, lam_W=1e-2, lam_H=1e-2, lam_b=1e-2),
    "minority collapse": lambda: imbalanced([40, 40, 40, 1, 1], 5, lam_W=1e-2, lam_H=1e-2),
    "narrow": lambda: balanced(4, 3, 2, lam_W=1e-2, lam_H=1e-3, use_bias=False),
    "one dimension": lambda: imbalanced([3, 2], 1, lam_W=1e-2, lam_H=1e-3, lam_b=0.1),
    "balanced, nothing but the origin": lambda: balanced(3, 1, 3, lam_W=0.5, lam_H=0.5, lam_b=0.1),
    "nothing but the origin": lambda: imbalanced([3, 2, 2], 3, lam_W=1.0, lam_H=1.0, lam_b=0.1),
}
VALUE_AND_GRAD = jax.jit(jax.value_and_grad(objective, argnums=1))


@functools.cache
def atlas(name):
    problem = CASES[name]()
    return problem, critical_points(problem)


@pytest.mark.parametrize("name", CASES)
def test_every_point_is_critical_and_classified_like_dense_eigenvalues(name):
    problem, points = atlas(name)
    for point in points:
        value, grad = VALUE_AND_GRAD(problem, point.params)
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 1e-10
        assert point.value == pytest.approx(float(value), rel=1e-13)
        assert np.linalg.matrix_rank(point.params.W, tol=1e-6) == point.rank
        values = dense_eigenvalues(problem, point.params)
        zero = 1e-9 * values[-1]
        assert point.index == (values < -zero).sum()
        assert point.nullity == (np.abs(values) <= zero).sum()
        assert point.smallest_eigenvalue == pytest.approx(values[0], abs=1e-9 * values[-1])
        found = inertia(problem, point.params)
        assert (found.negative, found.zero) == (point.index, point.nullity)


@pytest.mark.parametrize("name", CASES)
def test_the_lowest_is_the_optimum_and_all_others_are_strict_saddles(name):
    problem, points = atlas(name)
    if problem.d >= problem.K - 1:
        assert points[0].value == pytest.approx(float(optimal_value(problem)), rel=1e-11)
        assert certify(problem, points[0].params).verdict == Verdict.GLOBAL
        assert points[0].index == 0
    for point in points[1:]:
        assert point.index > 0
        assert point.smallest_eigenvalue < 0
        assert certify(problem, point.params).verdict == Verdict.STRICT_SADDLE


def test_values_of_theory_8_3():
    """Found there by brute force, K = 5, n = 1, all three λ = 5e-3; f does not depend on d ≥ 4."""
    stated = {(5,): 1.609438, (4, 1): 1.156636, (3, 2): 1.001561, (3, 1, 1): 0.742574, (2, 2, 1): 0.647261,
              (2, 1, 1, 1): 0.386865, (1, 1, 1, 1, 1): 0.125765}  # fmt: skip
    _, points = atlas("balanced")
    assert {point.groups: pytest.approx(point.value, abs=1e-6) for point in points} == stated
    for point in points:
        assert point.index == 5 * (5 - len(point.partition))


def test_the_index_pattern_fails_where_the_block_says():
    """κ = 0.7 > κ*(3) = 0.62: three groups lose one direction for each merged difference, two lose none."""
    _, points = atlas("near the threshold")
    found = {point.groups: point.index for point in points}
    assert found[(3, 3)] == 6 * 4
    assert found[(2, 2, 2)] == 5 * 3
    lost = {groups: 6 * (6 - len(groups)) - index for groups, index in found.items()}
    assert all(0 <= loss <= (6 - len(groups)) for groups, loss in lost.items())


def test_equal_groups_are_their_closed_form():
    problem, points = atlas("near the threshold")
    for point in points:
        if len(set(point.groups)) == 1:
            spectrum = hessian_spectrum(problem, point.partition)
            assert (point.index, point.nullity) == (spectrum.index, spectrum.nullity)
            assert point.orbit_dimension == spectrum.orbit_dimension
            assert point.smallest_eigenvalue == pytest.approx(float(spectrum.eigenvalues.min()), abs=1e-15)


@pytest.mark.parametrize(("name", "number"), [("balanced", 52), ("near the threshold", 203), ("unequal", 10)])
def test_points_count_all_partitions(name, number):
    """Bell numbers; for three classes of one size and two of another, 5 × 2."""
    assert sum(point.points for point in atlas(name)[1]) == number


def test_minority_classes_that_merge_at_the_optimum_are_listed_once():
    _, points = atlas("minority collapse")
    assert [point.partition[-1] for point in points] == [(3, 4)] * 3
    assert sum(point.points for point in points) == 5


def test_above_the_threshold_there_is_the_origin_alone():
    _, points = atlas("balanced, nothing but the origin")
    assert [(point.partition, point.rank) for point in points] == [(((0, 1, 2),), 0)]


def test_lattice_is_refinement_by_one_split():
    problem, points = atlas("balanced")
    arrows = lattice(points, problem.counts)

    def finer(fine, coarse):
        """Whether some relabelling of fine splits one group of coarse in two."""
        return len(fine) == len(coarse) + 1 and any(
            sorted([*(g for i, g in enumerate(coarse) if i != j), *pair]) == sorted(fine)
            for j in range(len(coarse))
            for pair in itertools.combinations(fine, 2)
            if sum(pair) == coarse[j]
        )

    sizes = [point.groups for point in points]
    expected = {(i, j) for i in range(len(sizes)) for j in range(len(sizes)) if finer(sizes[j], sizes[i])}
    assert set(arrows) == expected
    assert all(points[i].value > points[j].value and points[i].index > points[j].index for i, j in arrows)


def test_a_saddle_falls_to_where_its_arrow_points():
    """Splitting one merged group and going down with all else tied ends at the saddle of the finer partition."""
    problem, points = atlas("balanced")
    by_groups = {point.groups: point for point in points}
    coarse, fine = by_groups[(3, 2)], by_groups[(3, 1, 1)]
    left, right = next(g for g in coarse.partition if len(g) == 2)
    ties = [[k] if k in (left, right) else next(g for g in coarse.partition if k in g) for k in range(5)]
    tie = np.stack([np.isin(np.arange(5), group) / len(group) for group in ties])
    e = np.eye(5)[left] - np.eye(5)[right]
    a = np.linalg.svd(np.asarray(coarse.params.W))[2][-1]
    W, H, b = coarse.params.W + 0.1 * np.outer(e, a), coarse.params.H + 0.1 * np.outer(a, e), coarse.params.b

    def tied(x):
        return objective(problem, Params(tie @ x[0], x[1] @ tie.T, tie @ x[2]))

    assert float(minimise(tied, (W, H, b)).value) == pytest.approx(fine.value, rel=1e-12)


def test_large_K_by_samples():
    problem = class_mean_problem([2] * 16, 16, lam_W=1e-3, lam_H=1e-3)
    with pytest.raises(ValueError, match="samples must be given for so many classes: there are 231 types"):
        critical_points(problem)
    with pytest.raises(ValueError, match="key must be given"):
        critical_points(problem, samples=4)
    points = critical_points(problem, samples=4, key=jax.random.key(0))
    assert len(points) == 4
    assert (points[0].groups, points[-1].groups) == ((1,) * 16, (16,))
    assert [point.index for point in points] == [16 * (16 - len(point.groups)) for point in points]
    for point in points:
        found = inertia(problem, point.params)
        assert (found.negative, found.zero) == (point.index, point.nullity)


def test_number_of_partitions_of_a_type():
    counts = np.array([1, 1, 1, 1, 2, 2])
    types = {}
    for labels in itertools.product(range(6), repeat=6):
        if all(label <= max(labels[:i], default=-1) + 1 for i, label in enumerate(labels)):
            groups = tuple(tuple(k for k in range(6) if labels[k] == g) for g in range(max(labels) + 1))
            if all(len({counts[k] for k in group}) == 1 for group in groups):
                t = partition_type(counts, groups)
                types[t] = types.get(t, 0) + 1
    points = critical_points(class_mean_problem(counts, 6, lam_W=1e-4, lam_H=1e-4))
    assert {partition_type(counts, point.partition): point.points for point in points} == types
    assert math.prod((15, 2)) == sum(types.values())


def test_refuses_merging_unequal_classes_and_traced_problems(unchecked):
    from ufm.theory.orbits import tie_classes

    with pytest.raises(ValueError, match="merge classes of equal size"):
        tie_classes(imbalanced([2, 1], 2, lam_W=1e-2, lam_H=1e-2), [[0, 1]])
    with pytest.raises(ValueError, match="traced"):
        jax.vmap(lambda lam: critical_points(balanced(3, 1, 3, lam_W=lam, lam_H=1.0))[0].value)(jnp.ones(2))


def test_random_starts_end_at_the_lowest():
    problem, points = atlas("balanced")
    for seed in range(3):
        found = minimise(functools.partial(objective, problem), init(problem, jax.random.key(seed)))
        assert float(found.value) == pytest.approx(points[0].value, rel=1e-11)
