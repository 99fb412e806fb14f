"""Landmarks against Bell numbers and gradients, distances against SciPy's Procrustes, rests on made-up curves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ufm.lab import paths as module
from ufm.lab.census import tied_classes
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.paths import Plateau, class_path, landmarks, nearest, partition_name, plateaus
from ufm.model.problem import Params, Problem, balanced, class_mean_problem, imbalanced, init, objective
from ufm.theory.optimum import balanced_value

CASES = {
    "four in a line": balanced(4, 2, 1, lam_W=2e-2, lam_H=1e-2),
    "two sizes": imbalanced((3, 3, 1), 3, lam_W=2e-2, lam_H=1e-2, lam_b=1e-2),
    "no bias": balanced(3, 2, 2, lam_W=1e-2, lam_H=1e-2, use_bias=False),
}


@pytest.fixture(autouse=True)
def _hastily(hastily):
    pass


@functools.cache
def marks(case):
    return landmarks(CASES[case])


def every(case):
    """All landmarks as one path."""
    m = marks(case)
    return stacked([Params(*map(jnp.asarray, point)) for point in zip(m.W, m.M, m.b, strict=True)])


def stacked(points):
    return jax.tree.map(lambda *a: jnp.stack(a), *points)


def test_their_number_is_bells_within_classes_of_one_size():
    assert [len(list(module._labelled(np.ones(K)))) for K in range(1, 7)] == [1, 2, 5, 15, 52, 203]
    assert len(set(module._labelled(np.ones(5)))) == 52
    assert len(set(module._labelled(np.array([2, 1, 2, 1, 2, 9])))) == 5 * 2
    for partition in module._labelled(np.array([2, 1, 2, 1])):
        assert all({k % 2 for k in group} != {0, 1} for group in partition)
    assert [len(marks(case).values) for case in CASES] == [8, 2, 5]
    assert marks("two sizes").names == ("0 1 2", "01 2")
    assert set(marks("four in a line").names) == {
        "0123", "0 123", "023 1", "013 2", "012 3", "01 23", "02 13", "03 12",
    }  # fmt: skip
    assert set(marks("no bias").names) == {"0 1 2", "01 2", "02 1", "0 12", "012"}


@pytest.mark.parametrize("case", CASES)
def test_each_is_critical_with_its_value_its_curvature_and_its_classes_tied(case):
    m, x = marks(case), every(case)
    grad = jax.jit(jax.vmap(jax.grad(functools.partial(objective, m.problem))))(x)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 1e-9
    values = jax.vmap(functools.partial(objective, m.problem))(x)
    np.testing.assert_allclose(m.values, values, rtol=1e-12)
    assert (np.diff(m.values) >= 0).all()
    for i, partition in enumerate(m.partitions):
        point = jax.tree.map(lambda a, i=i: a[i], x)
        assert tied_classes(m.problem, point) == partition
        if i:
            assert m.curvatures[i] == pytest.approx(dense_eigenvalues(m.problem, point)[0], abs=1e-9)
            assert m.curvatures[i] < 0
    if case != "four in a line":
        assert m.partitions[0] == tuple((k,) for k in range(m.problem.K))
    if case == "no bias":
        assert m.values[0] == pytest.approx(float(balanced_value(CASES[case])), rel=1e-12)


def test_saddles_that_have_merged_are_left_out():
    collapsed = landmarks(balanced(3, 2, 3, lam_W=1.0, lam_H=1.0))
    assert collapsed.names == ("012",)


def test_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST", 4)
    with pytest.raises(ValueError, match=r"^K must be smaller .*: 5 are more than 4$"):
        landmarks(CASES["no bias"])


def test_names_are_groups_of_classes():
    assert partition_name(((0, 1, 2), (3, 4))) == "012 34"
    assert partition_name(((0, 10), (1,))) == "(0 10) (1)"


def turned(case, seed, noise=0.0):
    """Every landmark under a rotation or reflection of its own, its bias shifted if free, and noise."""
    problem, x, rng = marks(case).problem, every(case), np.random.default_rng(seed)
    free = problem.use_bias and float(problem.lam_b) == 0
    points = []
    for W, M, b in zip(x.W, x.H, x.b, strict=True):
        Q = np.linalg.qr(rng.normal(size=(problem.d, problem.d)))[0]
        point = Params(W @ Q, Q.T @ M, b + free * rng.normal())
        points.append(jax.tree.map(lambda a: a + noise * rng.normal(size=a.shape), point))
    return stacked(points)


@pytest.mark.parametrize("case", CASES)
def test_each_is_nearest_to_itself_however_turned_and_shifted(case):
    index, away = nearest(marks(case), turned(case, 0))
    np.testing.assert_array_equal(index, np.arange(len(index)))
    assert away.max() < 1e-7
    index, away = nearest(marks(case), turned(case, 1, noise=1e-2))
    np.testing.assert_array_equal(index, np.arange(len(index)))
    assert (away > 1e-3).all()


def without_shift(problem, b):
    """What is left of a difference of biases: nothing without a bias, not its mean where it is free."""
    if not problem.use_bias:
        return 0 * b
    return b - b.mean() if problem.lam_b == 0 else b


@pytest.mark.parametrize("case", CASES)
def test_the_distance_is_scipys_procrustes_over_all_samples_and_no_rotation_is_nearer(case):
    problem, m, rng = CASES[case], marks(case), np.random.default_rng(3)
    x = init(m.problem, jax.random.key(1))
    columns = [np.asarray(m.M[i] @ problem.Y) for i in range(len(m.values))]
    mine = np.vstack([x.W, (x.H @ problem.Y).T])
    exact = []
    for i, H in enumerate(columns):
        its = np.vstack([m.W[i], H.T])
        shift = np.linalg.norm(without_shift(problem, np.asarray(x.b) - m.b[i]))
        R = scipy.linalg.orthogonal_procrustes(its, mine)[0]
        exact.append(np.hypot(np.linalg.norm(mine - its @ R), shift))
        turns = [np.linalg.qr(rng.normal(size=2 * (problem.d,)))[0] for _ in range(50)]
        found = module._distances(m, np.asarray(m.problem.counts), *map(np.asarray, (x.W, x.H, x.b)))[i]
        assert found == pytest.approx(exact[-1], rel=1e-12)
        assert all(found <= (1 + 1e-12) * np.hypot(np.linalg.norm(mine - its @ Q), shift) for Q in turns)
    index, away = nearest(m, jax.tree.map(lambda a: a[None], x))
    assert (int(index[0]), float(away[0])) == (int(np.argmin(exact)), pytest.approx(min(exact), rel=1e-12))


def test_a_class_path_is_the_weighted_means():
    problem = imbalanced((3, 1, 2), 4, lam_W=2e-2, lam_H=1e-2)
    x = init(problem, jax.random.key(0))
    means = np.stack([np.asarray(x.H)[:, list(c)].mean(1) for c in ((0, 1, 2), (3,), (4, 5))], 1)
    np.testing.assert_allclose(class_path(problem, x).H, means, atol=1e-15)
    tied = class_mean_problem((3, 1, 2), 4, lam_W=2e-2, lam_H=1e-2)
    y = init(tied, jax.random.key(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, atol=1e-15)), class_path(tied, y), y))
    Y, omega = np.eye(2)[:, [0, 0, 1]], np.array([1.0, 3, 2])
    weighted = Problem(Y, omega, problem.loss, 0.1, 0.1, 0.0, 1, True)
    point = Params(jnp.ones((2, 1)), jnp.array([[0.0, 4, 5]]), jnp.zeros(2))
    np.testing.assert_allclose(class_path(weighted, point).H, [[3, 5]])


# Plateaus: f from log‖∇f‖, as along a path of gradient descent, where f falls by ‖∇f‖² a step


def curve(*decades):
    """f and ‖∇f‖ whose logarithm runs in straight lines of 100 records through these decades."""
    knots = np.arange(len(decades)) * 100
    grad = 10 ** np.interp(np.arange(knots[-1] + 1), knots, decades)
    return np.cumsum(grad[::-1] ** 2)[::-1], grad


@pytest.mark.parametrize(
    ("decades", "middles"),
    [
        ((0, -5), []),  # down to the end
        ((-5, 0), [0]),  # up from the start
        ((-5, 0, -5), [0]),
        ((0, -5, 0, -5), [100]),
        ((-5, 0, -4, 0, -8), [0, 200]),
        ((-5, 0, -4, 0, -3, 0, -8), [0, 200, 400]),
        ((0, -0.8, 0, -5), []),  # less than a decade deep
        ((0, -5, -4.2), []),  # it ends before a decade is climbed
        ((-1, -0.2, -5), []),
        ((0, -5, -2, -8), []),  # a decade deep, but f has fallen before: the end is on the same level
    ],
)
def test_plateaus_are_the_deep_minima_of_the_gradient_that_f_falls_from(decades, middles):
    f, grad = curve(*decades)
    found = plateaus(f, grad)
    assert [plateau.middle for plateau in found] == middles
    whole = f.max() - f.min()
    for p in found:
        near = np.abs(f - f[p.middle]) <= 0.01 * whole
        assert near[p.first : p.last + 1].all()
        assert not near[p.last + 1]
        assert p.first == 0 or not near[p.first - 1]


def test_a_constant_gradient_is_no_rest_and_a_stair_has_its_steps():
    assert plateaus(np.linspace(1, 0, 101), np.ones(101)) == []
    f = np.repeat([3.0, 2.0, 1.0], 10)
    grad = np.where(np.arange(30) % 10 < 9, 1e-6, 1.0)
    grad[20:] = 1e-6
    assert plateaus(f, grad) == [Plateau(0, 9, 4), Plateau(10, 19, 14)]
