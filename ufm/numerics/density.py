"""The density of an operator's eigenvalues by stochastic Lanczos quadrature."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from ufm.numerics.curvature import check_count, check_symmetric, flat_operator, rounding_unit
from ufm.numerics.krylov import flat_lanczos


class SpectralDensity(eqx.Module):
    """A probability measure Σ w_j δ(λ − θ_j) with E Σ w_j θ_j^p = tr A^p / n for every p < 2·steps.

    Attributes:
        nodes: Ritz values θ, a row per probe, filled up with zeros of weight zero where a Krylov space ended early.
        weights: w, of sum 1 over all probes.
    """

    nodes: Float[Array, "probes steps"]
    weights: Float[Array, "probes steps"]

    def smoothed(self, grid: Float[Array, " M"], width: float | Float[Array, ""]) -> Float[Array, " M"]:
        """The density on a grid, each node widened to a Gaussian of this standard deviation, positive."""
        z = (grid[:, None] - self.nodes.ravel()) / width
        return jnp.exp(-(z**2) / 2) @ self.weights.ravel() / (width * jnp.sqrt(2 * jnp.pi))


def spectral_density(
    matvec: Callable[[PyTree], PyTree], like: PyTree, key: Key[Array, ""], *, probes: int = 8, steps: int = 50
) -> SpectralDensity:
    """(1/n) Σ_i δ(λ − λ_i), estimated from the Krylov spaces of random unit vectors.

    Exact in expectation; with fewer distinct eigenvalues than steps the nodes of positive weight are the eigenvalues.

    Args:
        matvec: a symmetric operator on pytrees.
        like: a pytree of the shapes and dtypes it takes; values do not matter.
        key: draws the probes.
        probes: random vectors, one at a time in memory.
        steps: Lanczos steps for each; cut to the dimension.

    Raises:
        ValueError: if matvec is not symmetric or not finite, or probes or steps are no integers of at least 1.

    Source: Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao 2019 for Hessians, which are indefinite.
    """
    for name, count in (("probes", probes), ("steps", steps)):
        check_count(name, count)
    operator, flat = flat_operator(matvec, like), ravel_pytree(like)[0]
    check_key, probe_key = jax.random.split(key)
    check_symmetric(operator, flat, check_key, eps=rounding_unit(like))
    return _density(operator, flat, jax.random.split(probe_key, probes), min(steps, flat.size))


@eqx.filter_jit
def _density(operator: Callable, like: Array, keys: Array, steps: int) -> SpectralDensity:
    def probe(key: Array) -> tuple[Array, Array]:
        nodes, vectors = flat_lanczos(operator, jax.random.normal(key, like.shape, like.dtype), steps).eigh()
        return nodes, vectors[0] ** 2

    nodes, weights = jax.lax.map(probe, keys)
    return SpectralDensity(nodes, weights / len(keys))
