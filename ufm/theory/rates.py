"""How fast a saddle is left and a minimum approached, by the linear dynamics about a critical point (THEORY 1.3, 1.4).

About a critical point, along a Hessian eigenvector of curvature c, the flow ẋ = −∇f moves like e^{−ct}. Gradient
descent with momentum is the optimiser x ← x − ηm, m ← g + βm from m = 0 (in Nesterov's form x ← x − η(g + βm) with the
new m), so that x_k = A z₊^k + B z₋^k with z± the roots of

    z² − (1 + β − ηc) z + β = 0,    in Nesterov's form    z² − (1 + β)(1 − ηc) z + β(1 − ηc) = 0,

and z₊ = 1 − ηc, z₋ = 0 without momentum. In e = z − 1 and a = −ηc they are e² + pe − a = 0 with p = 1 − β − a, or
1 − β − (1+β)a, which loses nothing where a is small. Everything here is asymptotic: for small distances, and many
steps; and it is about descent on all N columns of H: class means have another dynamics with other curvatures.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float, Num

from ufm.model.padding import check_unpadded
from ufm.model.problem import Problem, tie_features
from ufm.theory.duality import sample_gradient
from ufm.theory.optimum import origin_logits
from ufm.theory.spectrum import Spectrum

Real = int | float | np.number | Num[Array | np.ndarray, "..."]


class Method(NamedTuple):
    """Gradient descent with step size η and momentum β, perhaps Nesterov's: optax.sgd(eta, momentum, nesterov)."""

    eta: Any
    momentum: Any = 0.0
    nesterov: bool = False


def _quadratic(curvature: Real, method: Method) -> tuple[Array, Array, Array]:
    """a, p and x_1/x_0 − 1 from rest: the roots are z± = 1 + (−p ± √(p² + 4a))/2."""
    a = jnp.asarray(-method.eta * curvature)
    first = (1 + method.momentum) * a if method.nesterov else a
    return a, 1 - method.momentum - first, first


def _larger(a: Array, p: Array, root: Array) -> Array:
    """z₊ − 1, the root = √(p² + 4a) being real."""
    return jnp.where(p > 0, 2 * a / jnp.where(p + root > 0, p + root, 1), (root - p) / 2)


def _log_of_excess(e: Array) -> Array:
    """log |1 + e|, to full accuracy near 0."""
    return jnp.where(e > -0.5, jnp.log1p(jnp.maximum(e, -0.5)), jnp.log(jnp.abs(1 + e)))


def log_factor(curvature: Real, method: Method) -> Float[Array, "..."]:
    """log max |z±|: by what a step adds to the log distance along an eigenvector of this curvature, asymptotically.

    Positive for negative curvature, negative for positive up to step_limit; without momentum log |1 − ηc|.

    Source: THEORY 1.4 for gradient descent; the roots for momentum are Polyak's (1964), derived in this file's top.
    """
    a, p, _ = _quadratic(curvature, method)
    square = p**2 + 4 * a
    root = jnp.sqrt(jnp.maximum(square, 0))
    product = method.momentum * (1 + a if method.nesterov else 1)  # of the roots
    larger, smaller = _larger(a, p, root), -(p + root) / 2
    real = jnp.maximum(_log_of_excess(larger), _log_of_excess(smaller))
    return jnp.where(square >= 0, real, jnp.log(jnp.abs(product)) / 2)


def step_factor(curvature: Real, method: Method) -> Float[Array, "..."]:
    """max |z±|, the exponential of log_factor."""
    return jnp.exp(log_factor(curvature, method))


def escape_rate(curvature: Real, method: Method) -> Float[Array, "..."]:
    """log(max |z±|)/η, the growth rate per unit of time ηk; log(1 + η|c|)/η without momentum, −c as η → 0.

    With momentum time runs faster: −c/(1 − β) as η → 0.

    Source: THEORY 1.4.
    """
    return log_factor(curvature, method) / method.eta


def escape_steps(curvature: Real, distance: Real, radius: Real, method: Method) -> Float[Array, "..."]:
    """The (fractional) steps k at which A distance z₊^k = radius, from rest along an eigenvector; inf if never.

    With A = (x_1/x_0 − z₋)/(z₊ − z₋), 1 without momentum. It holds where the radius is so small that f is quadratic up
    to it (the relative error of the rate is of the order of radius over the size of the saddle), the curvature is
    negative and not so near zero that cubic terms win (at the threshold κ = 1 it is zero and the escape is
    algebraic), and with momentum after the first 1/log(z₊/z₋) steps. A start in a generic direction adds the stable
    part, see projection_loss.

    Args:
        curvature: of the Hessian eigenvector that the start lies along; negative to escape.
        distance: from the saddle at the start.
        radius: where the saddle counts as left, larger than the distance.
        method: the step.

    Source: THEORY 1.4; momentum derived for this project.
    """
    a, p, first = _quadratic(curvature, method)
    negative = jnp.asarray(curvature) < 0
    root = jnp.sqrt(jnp.where(negative, p**2 + 4 * a, 1))
    share = (first + (p + root) / 2) / root
    steps = jnp.log(radius / (distance * share)) / jnp.log1p(_larger(a, p, root))
    return jnp.where(negative, jnp.maximum(steps, 0), jnp.inf)


def escape_time(curvature: Real, distance: Real, radius: Real) -> Float[Array, "..."]:
    """log(radius/distance)/|c|, the time at which the gradient flow leaves the ball; inf if c ≥ 0.

    Under the conditions of escape_steps, of which it is the limit as η → 0.

    Source: THEORY 1.4.
    """
    negative = jnp.asarray(curvature) < 0
    time = jnp.log(radius / jnp.asarray(distance)) / jnp.where(negative, -curvature, 1)
    return jnp.where(negative, jnp.maximum(time, 0), jnp.inf)


def projection_loss(unstable: Real, variables: Real) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean and standard deviation of log(‖x‖/‖P x‖), P onto `unstable` of the `variables` dimensions, x isotropic.

    What a start in a random direction loses: its escape takes that much more of log(radius/distance). For ‖Px‖²/‖x‖²
    has the beta distribution of (m/2, (D−m)/2): the mean is (ψ(D/2) − ψ(m/2))/2, the variance (ψ₁(m/2) − ψ₁(D/2))/4.
    Exact where the unstable eigenvalues are equal, as at the origin of equal counts; where they are not, m is the
    multiplicity of the least and the others must have fallen behind, by (z/z_min)^k after k steps.

    Source: derived for this project.
    """
    m, D = jnp.asarray(unstable) / 2, jnp.asarray(variables) / 2
    return (digamma(D) - digamma(m)) / 2, jnp.sqrt(jnp.maximum(polygamma(1, m) - polygamma(1, D), 0)) / 2


def step_limit(largest: Real, method: Method) -> Float[Array, "..."]:
    """The step size from which on descent diverges at a minimum: 2(1+β)/λ_max, in Nesterov's form 2(1+β)/((1+2β)λ_max).

    There a root z passes −1. 2/λ_max without momentum.

    Source: THEORY 1.3 for gradient descent; derived for this project.
    """
    beta = method.momentum
    return 2 * (1 + beta) / ((1 + 2 * beta if method.nesterov else 1) * jnp.asarray(largest))


def terminal_rate(spectrum: Spectrum, method: Method) -> Float[Array, ""]:
    """−log of the factor by which a step shrinks the distance to a minimum's orbit in the end: the least −log_factor.

    Zeros of the symmetry orbit left out; −log(1 − ημ) without momentum for η ≤ 2/(μ + λ_max), μ the least nonzero
    eigenvalue. It is reached from generic starts, once the slowest eigenvector alone is left; at 0 or below there is
    no rate: the minimum is degenerate (κ = 1), or steps are too large.

    Source: THEORY 1.3 (ii); momentum as in log_factor.
    """
    logs = log_factor(spectrum.eigenvalues, method)
    return -jnp.max(jnp.where(spectrum.symmetry, -jnp.inf, logs))


def steps_to_gap(rate: Real, now: Real, gap: Real) -> Float[Array, "..."]:
    """log(now/gap)/(2 rate): the steps from f − f* = now to gap, since f − f* falls by 2 rate in its logarithm a step.

    Source: THEORY 1.3 (ii).
    """
    rate = jnp.asarray(rate)
    steps = jnp.maximum(jnp.log(now / jnp.asarray(gap)) / (2 * jnp.where(rate > 0, rate, 1)), 0)
    return jnp.where(rate > 0, steps, jnp.inf)


class Separation(eqx.Module):
    """Which contrasts between classes grow from a small start, fastest first.

    Attributes:
        curvatures: λ_min of each contrast at the origin, ascending; a contrast grows where it is negative.
        contrasts: a column for each, unit: the left singular vectors of ∇_Z g at W = H = 0 and the best bias.
        sizes: Σ_k u_k² n_k, the size of the classes where a contrast is within one size.
    """

    curvatures: Float[Array, " contrasts"]
    contrasts: Float[Array, "K contrasts"]
    sizes: Float[Array, " contrasts"]


def separation(problem: Problem) -> Separation:
    """(λ_W+λ_H)/2 − √((λ_W−λ_H)²/4 + σ_i²) for every singular value σ_i of ∇_Z g at the origin.

    From a start of size ε contrast i reaches size r after escape_time(curvatures[i], ε, r), so the contrasts of large
    classes come first. For contrasts within classes of one size n_B, σ = √n_B/N, and the time holds although others
    have grown before: it is the singular value as long as these classes are tied, whatever else has happened (THEORY
    3.4). For the others it holds for the first, and is the order only after that.

    Source: THEORY 1.4, 1.5; the order and its condition derived for this project.
    """
    check_unpadded(problem)
    tied = tie_features(problem)
    G = sample_gradient(tied, tied.loss.residual(origin_logits(tied), tied.Y))
    U, sigma, _ = jnp.linalg.svd(jnp.asarray(G))
    U, sigma = U[:, :-1], sigma[:-1]
    mean, half = (problem.lam_W + problem.lam_H) / 2, (problem.lam_W - problem.lam_H) / 2
    return Separation(jnp.asarray(mean - jnp.hypot(half, sigma)), U, jnp.asarray(problem.counts) @ U**2)
