"""Operators, Lanczos, eigenpairs and densities against dense matrices of prescribed spectrum, on pytrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ufm.model.problem import balanced, init, objective
from ufm.numerics.curvature import hessian_operator
from ufm.numerics.density import spectral_density
from ufm.numerics.eigenpairs import extreme_eigenpairs
from ufm.numerics.krylov import lanczos

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
KEY = jax.random.key(0)
LIKE = {"a": jnp.zeros((5, 4)), "b": [jnp.zeros(()), jnp.zeros(39)]}  # 60 numbers


def matrix(eigenvalues, seed=1):
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    A = Q * np.asarray(eigenvalues) @ Q.T
    return jnp.asarray((A + A.T) / 2)


def on_pytree(A, like, x):
    return ravel_pytree(like)[1](A @ ravel_pytree(x)[0])


def operator(eigenvalues, like=LIKE, seed=1):
    return functools.partial(on_pytree, matrix(eigenvalues, seed), like)


SPECTRA = {
    "spread": np.linspace(-2, 3, 60),
    "clustered": np.r_[-1 - 1e-5 * np.arange(20), np.linspace(0, 4, 40)],
    "few distinct": np.repeat([-2.0, 0.0, 1.0], [7, 40, 13]),
    "two": np.repeat([0.0, 1.0], [2, 58]),
    "identity": np.ones(60),
    "zero": np.zeros(60),
    "rank one": np.r_[5.0, np.zeros(59)],
    "many scales": np.r_[-1e-6 * np.arange(1, 21), np.geomspace(1e-6, 1e3, 40)],
}


@pytest.mark.parametrize("which", ["smallest", "largest"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("block", [None, 1])
def test_the_eigenvalues_are_the_dense_ones_with_their_multiplicities(name, which, block):
    wanted = np.sort(SPECTRA[name])[:5] if which == "smallest" else np.sort(SPECTRA[name])[::-1][:5]
    found = extreme_eigenpairs(operator(SPECTRA[name]), LIKE, 5, which, KEY, block=block)
    assert bool(found.converged.all())
    size = np.abs(SPECTRA[name]).max()
    np.testing.assert_allclose(found.eigenvalues, wanted, atol=1e-8 * size)
    assert float(found.norm) == pytest.approx(size, rel=1e-6)


def test_vectors_are_orthonormal_pytrees_and_residuals_are_theirs():
    A = operator(SPECTRA["spread"])
    found = extreme_eigenpairs(A, LIKE, 3, "largest", KEY)
    flat = jax.vmap(lambda v: ravel_pytree(v)[0])(found.vectors)
    assert jax.tree.map(jnp.shape, found.vectors) == {"a": (3, 5, 4), "b": [(3,), (3, 39)]}
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=100 * EPS)
    R = jax.vmap(lambda v: ravel_pytree(A(v))[0])(found.vectors) - found.eigenvalues[:, None] * flat
    np.testing.assert_allclose(found.residuals, np.linalg.norm(R, axis=1), atol=100 * EPS)


def test_a_large_operator_with_restarts_keeps_its_multiplicities():
    eigenvalues = np.r_[np.repeat([-1.0, -0.999], [3, 4]), np.linspace(-0.99, 2, 393)]
    like = jnp.zeros(400)
    found = extreme_eigenpairs(operator(eigenvalues, like), like, 6, "smallest", KEY, tol=1e-10)
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.eigenvalues, [-1] * 3 + [-0.999] * 3, atol=1e-9)


def test_too_few_products_are_said_and_the_residual_still_bounds():
    eigenvalues = np.r_[-1.0, -1 + 1e-7 * np.arange(1, 200), np.linspace(0, 1, 200)]
    like = jnp.zeros(400)
    found = extreme_eigenpairs(operator(eigenvalues, like), like, 2, "smallest", KEY, tol=1e-13, max_products=120)
    assert not bool(found.converged.all())
    for theta, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert np.abs(eigenvalues - float(theta)).min() <= float(residual) + 100 * EPS


def test_deflated_directions_are_left_out():
    A = matrix(np.r_[np.zeros(4), np.linspace(1, 2, 56)])
    null = np.linalg.eigh(A)[1][:, :4].T
    unravel = ravel_pytree(LIKE)[1]
    known = [unravel(jnp.asarray(v)) for v in [*null, null[0] + null[1]]]
    found = extreme_eigenpairs(functools.partial(on_pytree, A, LIKE), LIKE, 3, "smallest", KEY, deflate=known)
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.eigenvalues, 1 + np.arange(3) / 55, atol=1e-8)


def test_every_eigenvalue_of_a_small_operator():
    like = jnp.zeros(6)
    for k in (1, 4, 6):
        found = extreme_eigenpairs(operator(np.arange(6.0), like), like, k, "smallest", KEY)
        np.testing.assert_allclose(found.eigenvalues, np.arange(k), atol=1e-8)


def test_single_precision_stays_single():
    like = jnp.zeros(60, jnp.float32)
    A = matrix(SPECTRA["spread"]).astype(jnp.float32)
    found = extreme_eigenpairs(functools.partial(on_pytree, A, like), like, 2, "smallest", KEY)
    assert found.vectors.dtype == found.eigenvalues.dtype == jnp.float32
    assert bool(found.converged.all())
    np.testing.assert_allclose(found.eigenvalues, SPECTRA["spread"][:2], atol=1e-5)


# The Hessian of the features model


@pytest.fixture(scope="module")
def model():
    problem = balanced(4, 3, 6, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2)
    return functools.partial(objective, problem), init(problem, jax.random.key(3))


def test_the_hessian_operator_is_the_dense_hessian(model):
    fun, x = model
    flat, unravel = ravel_pytree(x)
    dense = jax.hessian(lambda v: fun(unravel(v)))(flat)
    v = jax.random.normal(KEY, flat.shape)
    np.testing.assert_allclose(ravel_pytree(hessian_operator(fun, x)(unravel(v)))[0], dense @ v, atol=1e-13)
    for which, wanted in (("smallest", slice(0, 5)), ("largest", slice(-1, -6, -1))):
        found = extreme_eigenpairs(hessian_operator(fun, x), x, 5, which, KEY)
        np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(dense)[wanted], atol=1e-8)


def test_the_origin_has_as_many_descent_directions_as_the_theory_says(model):
    fun, x = model
    zero = jax.tree.map(jnp.zeros_like, x)
    found = extreme_eigenpairs(hessian_operator(fun, zero), zero, 20, "smallest", KEY)
    least = (5e-3 + 2e-3) / 2 - np.hypot((5e-3 - 2e-3) / 2, 1 / (4 * np.sqrt(3)))
    np.testing.assert_allclose(found.eigenvalues[:18], least, atol=1e-8)  # (K − 1)d of them, THEORY 1.4
    assert float(found.eigenvalues[18]) > 0


def test_a_new_point_compiles_nothing_new(model):
    fun, x = model
    first, second = (hessian_operator(fun, y) for y in (x, jax.tree.map(lambda y: 2 * y, x)))
    assert jax.tree.structure(first) == jax.tree.structure(second)


# Lanczos and densities


def test_lanczos_keeps_the_spectrum_and_ends_where_the_space_is_invariant():
    v = jax.tree.map(lambda x: x + 1.0, LIKE)
    T = lanczos(operator(SPECTRA["few distinct"]), v, 10)
    assert int(T.valid) == 3
    np.testing.assert_allclose(T.off_diagonal[2:], 0)
    inner = np.diag(T.diagonal[:3]) + np.diag(T.off_diagonal[:2], 1) + np.diag(T.off_diagonal[:2], -1)
    np.testing.assert_allclose(np.linalg.eigvalsh(inner), [-2, 0, 1], atol=1e-12)
    for same in (np.ones(60), np.zeros(60)):
        T = lanczos(operator(same), v, 4)
        assert int(T.valid) == 1
        assert float(T.diagonal[0]) == pytest.approx(same[0], abs=1e-13)
    full = lanczos(operator(SPECTRA["spread"]), v, 60)
    np.testing.assert_allclose(full.eigh()[0], SPECTRA["spread"], atol=1e-10)


def test_lanczos_moments_are_those_of_the_operator():
    A, v = matrix(SPECTRA["spread"]), np.random.default_rng(5).normal(size=60)
    nodes, vectors = lanczos(lambda x: A @ x, jnp.asarray(v), 6).eigh()
    for power in range(11):
        exact = v @ np.linalg.matrix_power(A, power) @ v / (v @ v)
        assert float(vectors[0] ** 2 @ nodes**power) == pytest.approx(exact, abs=1e-11 * 3**power)


def test_a_density_is_a_probability_measure_with_the_traces_as_moments():
    eigenvalues = SPECTRA["spread"]
    density = spectral_density(operator(eigenvalues), LIKE, KEY, probes=200, steps=12)
    assert float(density.weights.sum()) == pytest.approx(1, abs=1e-12)
    for power in (1, 2, 3, 4):
        each = np.sum(200 * density.weights * density.nodes**power, axis=1)
        assert abs(each.mean() - np.mean(eigenvalues**power)) <= 5 * each.std() / np.sqrt(200)
    grid = jnp.linspace(-6, 8, 2001)
    assert float(jnp.trapezoid(density.smoothed(grid, 0.3), grid)) == pytest.approx(1, abs=1e-6)


def test_few_distinct_eigenvalues_are_the_nodes_that_have_weight():
    density = spectral_density(operator(SPECTRA["few distinct"]), LIKE, KEY, probes=5, steps=10)
    heavy = np.asarray(density.nodes)[np.asarray(density.weights) > 1e-12]
    assert np.abs(heavy[:, None] - [-2, 0, 1]).min(1).max() <= 1e-12


# Bad input


def test_what_is_not_symmetric_or_not_finite_is_said():
    skew = jnp.asarray(np.random.default_rng(0).normal(size=(60, 60)))
    with pytest.raises(ValueError, match="matvec must be symmetric"):
        extreme_eigenpairs(functools.partial(on_pytree, skew, LIKE), LIKE, 1, "smallest", KEY)
    with pytest.raises(ValueError, match="matvec must return finite"):
        spectral_density(functools.partial(on_pytree, skew * jnp.nan, LIKE), LIKE, KEY)


def test_sizes_are_checked():
    A = operator(np.ones(60))
    for k, said in ((0, "k must be an integer of at least 1"), (61, "k must be at most 60")):
        with pytest.raises(ValueError, match=said):
            extreme_eigenpairs(A, LIKE, k, "smallest", KEY)
    with pytest.raises(ValueError, match="k must be at most 59"):
        extreme_eigenpairs(A, LIKE, 60, "smallest", KEY, deflate=[jax.tree.map(lambda x: x + 1.0, LIKE)])
    with pytest.raises(ValueError, match="steps must be between 1 and the dimension 60"):
        lanczos(A, LIKE, 61)
    for size in ("probes", "steps"):
        with pytest.raises(ValueError, match=f"{size} must be an integer of at least 1"):
            spectral_density(A, LIKE, KEY, **{size: 0})


def test_a_wrong_end_block_or_structure_is_said(unchecked):
    with pytest.raises(ValueError, match="which must be 'smallest' or 'largest', got 'SA'"):
        extreme_eigenpairs(operator(np.ones(60)), LIKE, 1, "SA", KEY)
    with pytest.raises(ValueError, match="block must be an integer of at least 1"):
        extreme_eigenpairs(operator(np.ones(60)), LIKE, 1, "smallest", KEY, block=0)
    with pytest.raises(ValueError, match="matvec must return what it takes"):
        lanczos(lambda x: x["a"], LIKE, 2)


def test_functions_that_have_no_hessian_are_said(unchecked):
    with pytest.raises(ValueError, match="fun must return one floating scalar"):
        hessian_operator(lambda x: x**2, jnp.ones(3))
    with pytest.raises(ValueError, match="params must be floating"):
        hessian_operator(jnp.sum, jnp.arange(3))
    with pytest.raises(ValueError, match=r"params\['a'\] must be finite"):
        hessian_operator(lambda x: jnp.sum(x["a"]), {"a": jnp.array([1.0, jnp.nan])})
    with pytest.raises(ValueError, match="params must hold at least one number"):
        hessian_operator(lambda x: 1.0, {})


@pytest.mark.parametrize("size", [1e-290, 1e-160, 1.0, 1e200])
def test_scale_of_the_operator_changes_nothing(size):
    D = size * np.linspace(-1, 1, 60)
    found = extreme_eigenpairs(operator(D), LIKE, 3, "smallest", KEY)
    np.testing.assert_allclose(found.eigenvalues, D[:3], rtol=1e-12)
    assert bool(found.converged.all())
    run = lanczos(operator(D), jax.tree.map(lambda x: x + 1e-200, LIKE), 10)
    unit = lanczos(operator(D / size), jax.tree.map(lambda x: x + 1.0, LIKE), 10)
    np.testing.assert_allclose(np.asarray(run.diagonal) / size, unit.diagonal, atol=1e-12)


def test_deflated_directions_of_any_length_stay_out(unchecked):
    A = functools.partial(on_pytree, jnp.diag(jnp.arange(60.0)), LIKE)
    first, second = (ravel_pytree(LIKE)[1](c * jnp.eye(60)[i]) for i, c in ((0, 1e-14), (1, 1.0)))
    found = extreme_eigenpairs(A, LIKE, 2, "smallest", KEY, deflate=[first, second])
    np.testing.assert_allclose(found.eigenvalues, [2, 3], rtol=1e-9)
    with pytest.raises(ValueError, match="deflate must hold pytrees like the vectors"):
        extreme_eigenpairs(A, LIKE, 2, "smallest", KEY, deflate=[np.ones(60)])
    with pytest.raises(ValueError, match="v0 must not be zero"):
        lanczos(A, jax.tree.map(jnp.zeros_like, LIKE), 2)
    with pytest.raises(ValueError, match="tol must be between 0 and 1"):
        extreme_eigenpairs(A, LIKE, 1, "smallest", KEY, tol=-1.0)
