"""Eigenvectors of every level: Hv = μv by automatic differentiation, orthogonality, and spanning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, objective, tie_features
from ufm.theory.atlas import coarse_etf
from ufm.theory.eigenvectors import eigenvector
from ufm.theory.optimum import origin_logits
from ufm.theory.spectrum import hessian_spectrum

SADDLES = [
    (6, 2, 7, [[0, 3], [1, 5], [2, 4]], {"lam_b": 1e-2}),
    (6, 1, 4, [[0, 3], [1, 5], [2, 4]], {"use_bias": False}),
    (8, 2, 4, [[0, 3, 6, 7], [1, 2, 4, 5]], {}),
    (4, 3, 5, [[0], [1], [2], [3]], {"lam_b": 1e-2}),
    (3, 2, 2, [[0, 1, 2]], {}),
    (2, 2, 2, [[0], [1]], {}),
]


def check_levels(problem, at, x):
    product = jax.linearize(jax.grad(functools.partial(objective, problem)), x)[1]
    spectrum = hessian_spectrum(problem, at)
    vectors = [eigenvector(problem, at, i, jax.random.key(i)) for i in range(len(spectrum.labels))]
    for value, label, v in zip(spectrum.eigenvalues, spectrum.labels, vectors, strict=True):
        residual = jax.tree.map(lambda a, c, value=value: a - value * c, product(v), v)
        assert float(optax.tree.norm(residual)) < 1e-14, label
        assert float(optax.tree.norm(v)) == pytest.approx(1, abs=1e-12), label
    for i, u in enumerate(vectors):
        for j, v in enumerate(vectors[:i]):
            assert abs(float(optax.tree.vdot(u, v))) < 1e-12, (spectrum.labels[i], spectrum.labels[j])


@pytest.mark.parametrize(("K", "n", "d", "partition", "kind"), SADDLES)
def test_every_level_of_a_saddle(K, n, d, partition, kind):
    problem = balanced(K, n, d, lam_W=5e-3, lam_H=2e-3, **kind)
    check_levels(problem, partition, coarse_etf(problem, partition))


@pytest.mark.parametrize("kind", [{}, {"lam_b": 0.1}, {"use_bias": False}])
def test_every_level_of_the_origin_of_unequal_classes(kind):
    problem = imbalanced([5, 3, 2, 2], 5, lam_W=5e-3, lam_H=2e-3, **kind)
    b = origin_logits(tie_features(problem))[:, 0]
    check_levels(problem, "origin", Params(jnp.zeros((4, 5)), jnp.zeros((5, 12)), b))


@pytest.mark.parametrize("level", range(24))
def test_draws_span_the_level_and_no_more(level):
    problem = balanced(6, 2, 4, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2)
    partition = [[0, 3], [1, 5], [2, 4]]
    multiplicity = hessian_spectrum(problem, partition).multiplicities[level]
    draws = [eigenvector(problem, partition, level, jax.random.key(i)) for i in range(multiplicity + 2)]
    rows = np.stack([np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(v)]) for v in draws])
    assert np.linalg.matrix_rank(rows, tol=1e-10) == multiplicity


def test_refuses_what_it_cannot_give(unchecked):
    problem = balanced(4, 2, 5, lam_W=5e-3, lam_H=2e-3)
    with pytest.raises(ValueError, match="level must be one of the 19 levels"):
        eigenvector(problem, "optimum", 19, jax.random.key(0))
    with pytest.raises(ValueError, match="multiplicity must be 1"):
        eigenvector(class_mean_problem([2] * 4, 5, lam_W=5e-3, lam_H=2e-3), "optimum", 0, jax.random.key(0))
    with pytest.raises(ValueError, match="traced"):
        jax.vmap(lambda lam: eigenvector(balanced(4, 2, 5, lam_W=lam, lam_H=1.0), "origin", 0, jax.random.key(0)))(
            jnp.ones(2)
        )
