"""Losses on logits, each with the convex conjugate that its duality gap needs."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import xlog1py, xlogy
from jaxtyping import Array, Float
from numpy import ndarray


class Loss(eqx.Module):
    """A loss ℓ(z; y) of logits z ∈ R^K, convex in z, for one-hot targets y."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"]) -> Float[Array, " N"]:
        """ℓ(z_i; y_i) for every column i, unweighted."""

    @abc.abstractmethod
    def conjugate(self, R: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"]) -> Float[Array, " N"]:
        """ℓ*(r_i; y_i) = sup_z ⟨r_i, z⟩ − ℓ(z; y_i) for every column; its domain is the caller's to keep."""

    @abc.abstractmethod
    def mean_hessian(
        self, logits: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"], weights: Float[Array, " N"]
    ) -> Float[Array, "K K"]:
        """Σ_i w_i ∇²ℓ(z_i; y_i)."""

    def residual(self, logits: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"]) -> Float[Array, "K N"]:
        """∇ℓ(z_i; y_i) for every column; softmax − one-hot for cross-entropy."""
        return jax.grad(lambda z: jnp.sum(self(z, Y)))(logits)


class CrossEntropy(Loss):
    """ℓ(z; y) = log Σ_j exp(z_j − z_y), in nats.

    Written as log1p of the wrong classes' share, so that values and residuals keep full *relative* accuracy
    when the margin is large (λ → 0): the true class's residual is −Σ_{j≠y} p_j, never 1 − p_y.

    Attributes:
        present: 1 for the classes that exist, 0 for rows of padding after them, whose logits then count for nothing,
            whatever they are (padding.py); None, as usual, if all K exist. A column of an absent class gets some
            finite loss, to be weighted by 0.
    """

    present: Float[Array | ndarray, " K"] | None = None

    def __call__(self, logits: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"]) -> Float[Array, " N"]:
        """log Σ_j exp(z_j − z_y) for every column."""
        logits = self._of_present(logits)
        gap = self._of_present(logits - jnp.sum(Y * logits, axis=0))
        top = jax.lax.stop_gradient(jnp.max(gap, axis=0))
        wrong = jnp.sum(self._of_present(jnp.exp(gap - top)) * (1 - Y), axis=0)
        # wrong − 1 + e^{−top} ≥ 0, unless fused arithmetic rounds two copies of gap differently
        return top + jnp.log1p(jnp.maximum(-0.5, wrong + jnp.expm1(-top)))

    def conjugate(self, R: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"]) -> Float[Array, " N"]:
        """Σ_k q_k log q_k with q = r + y in the simplex of the classes that exist, 0 log 0 = 0 (THEORY 8.1)."""
        R = self._of_present(R)
        wrong = (1 - Y) * R
        true = jnp.sum(Y * R, axis=0)
        return jnp.sum(xlogy(wrong, wrong), axis=0) + xlog1py(1 + true, true)

    def mean_hessian(
        self, logits: Float[Array, "K N"], Y: Float[Array | ndarray, "K N"], weights: Float[Array, " N"]
    ) -> Float[Array, "K K"]:
        """Σ_i w_i (diag p_i − p_i p_iᵀ) with p the softmax, from the products p_k p_l: nothing cancels."""
        p = jax.nn.softmax(logits, axis=0, where=None if self.present is None else self.present[:, None] > 0)
        products = (p * weights) @ p.T * (1 - jnp.eye(len(p)))
        return jnp.diag(products.sum(1)) - products

    def _of_present(self, x: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """The rows of x of classes that exist, and zeros."""
        return x if self.present is None else jnp.where(self.present[:, None] > 0, x, 0)
