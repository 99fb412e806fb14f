"""Frames: the centring projector, the simplex equiangular tight frame, distance between geometries."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def centring(K: int) -> Float[np.ndarray, "K K"]:
    """P = I − 11ᵀ/K, the projector onto class differences and the Gram of the simplex ETF."""
    return np.eye(K) - 1 / K


def simplex_etf(K: int, d: int) -> Float[np.ndarray, "K d"]:
    """M with M Mᵀ = I − 11ᵀ/K, for d ≥ K − 1: Helmert's orthonormal basis of 1^⊥, padded with zeros.

    The rows have squared norm 1 − 1/K and cosines −1/(K−1); any other simplex ETF is a scaled M times an
    isometry of R^d.

    Raises:
        ValueError: if d < K − 1, where K vectors cannot form a simplex.
    """
    if d < K - 1:
        raise ValueError(f"d must be at least K - 1 = {K - 1} for a simplex ETF of {K} vectors, got {d}")
    j = np.arange(1, K)
    M = np.zeros((K, d))
    M[:, : K - 1] = (np.triu(np.ones((K, K - 1))) - np.eye(K, K - 1, -1) * j) / np.sqrt(j * (j + 1))
    return M


def geometry_distance(A: Float[Array | np.ndarray, "K K"], B: Float[Array | np.ndarray, "K K"]) -> Float[Array, ""]:
    """‖A/‖A‖_F − B/‖B‖_F‖_F, the distance between two Gram matrices up to scale."""
    return jnp.linalg.norm(A / jnp.linalg.norm(A) - B / jnp.linalg.norm(B))
