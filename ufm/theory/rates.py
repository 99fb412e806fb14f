"""How fast a saddle is left and a minimum approached, by the linear dynamics about a critical point (THEORY 1.3, 1.4).

About a critical point, along a Hessian eigenvector of curvature c, the flow ẋ = −∇f moves like e^{−ct}. Gradient
descent with momentum is the optimiser x ← x − ηm, m ← g + βm from m = 0 (in Nesterov's form x ← x − η(g + βm) with the
new m), so that x_k = A z₊^k + B z₋^k with z± the roots of

    z² − (1 + β − ηc) z + β = 0,    in Nesterov's form    z² − (1 + β)(1 − ηc) z + β(1 − ηc) = 0,

and z₊ = 1 − ηc, z₋ = 0 without momentum. Everything here is asymptotic: for small distances, and many steps.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, polygamma
from jaxtyping import Array, Float, Num

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
    """Sum and product of the roots z±, and x_1/x_0 from rest."""
    eta, beta, nesterov = method
    step = jnp.asarray(eta * curvature)
    if nesterov:
        return (1 + beta) * (1 - step), beta * (1 - step), 1 - (1 + beta) * step
    return 1 + beta - step, beta + 0 * step, 1 - step


def step_factor(curvature: Real, method: Method) -> Float[Array, "..."]:
    """max |z±|: by what a step multiplies the distance along an eigenvector of this curvature, asymptotically.

    Above 1 for negative curvature, below 1 for positive up to step_limit; without momentum |1 − ηc|.

    Source: THEORY 1.4 for gradient descent; the roots for momentum are Polyak's (1964), derived in this file's top.
    """
    total, product, _ = _quadratic(curvature, method)
    root = jnp.sqrt(jnp.maximum(total**2 / 4 - product, 0))
    return jnp.where(total**2 / 4 >= product, jnp.abs(total) / 2 + root, jnp.sqrt(jnp.abs(product)))


def escape_rate(curvature: Real, method: Method) -> Float[Array, "..."]:
    """log(max |z±|)/η, the growth rate per unit of time ηk; log(1 + η|c|)/η without momentum, −c as η → 0.

    With momentum time runs faster: −c/(1 − β) as η → 0.

    Source: THEORY 1.4.
    """
    return jnp.log(step_factor(curvature, method)) / method.eta


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
    total, product, first = _quadratic(curvature, method)
    root = jnp.sqrt(jnp.maximum(total**2 / 4 - product, 0))
    high, low = total / 2 + root, total / 2 - root
    share = (first - low) / jnp.where(root > 0, 2 * root, 1)
    steps = jnp.log(radius / (distance * share)) / jnp.log(high)
    return jnp.where(jnp.asarray(curvature) < 0, jnp.maximum(steps, 0), jnp.inf)


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
    return jnp.asarray(2 * (1 + beta) / ((1 + 2 * beta if method.nesterov else 1) * largest))


def terminal_factor(spectrum: Spectrum, method: Method) -> Float[Array, ""]:
    """By what a step shrinks the distance to a minimum's orbit in the end: the largest step_factor over the spectrum.

    Zeros of the symmetry orbit left out; 1 − ημ without momentum for η ≤ 2/(μ + λ_max), μ the least nonzero eigenvalue.
    It is reached from generic starts, once the slowest eigenvector alone is left; at 1 or above there is no rate: the
    minimum is degenerate (κ = 1), or steps are too large.

    Source: THEORY 1.3 (ii); momentum as in step_factor.
    """
    factors = step_factor(spectrum.eigenvalues, method)
    return jnp.max(jnp.where(spectrum.symmetry, 0, factors))


def steps_to_gap(factor: Real, now: Real, gap: Real) -> Float[Array, "..."]:
    """log(gap/now)/(2 log factor): the steps from f − f* = now to gap, for f − f* falls by factor² a step.

    Source: THEORY 1.3 (ii).
    """
    factor = jnp.asarray(factor)
    steps = jnp.maximum(jnp.log(gap / jnp.asarray(now)) / (2 * jnp.log(factor)), 0)
    return jnp.where(factor < 1, steps, jnp.inf)


class Separation(eqx.Module):
    """Which contrasts between classes grow from a small start, fastest first.

    Attributes:
        curvatures: λ_min of each contrast at the origin, ascending; a contrast grows where it is negative.
        contrasts: a column for each, unit: the left singular vectors of ∇_Z g at W = H = 0 and the best bias.
        sizes: the class sizes that it tells apart, Σ_k u_k² n_k.
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
    tied = tie_features(problem)
    G = sample_gradient(tied, tied.loss.residual(origin_logits(tied), tied.Y))
    U, sigma, _ = jnp.linalg.svd(jnp.asarray(G))
    U, sigma = U[:, :-1], sigma[:-1]
    mean, half = (problem.lam_W + problem.lam_H) / 2, (problem.lam_W - problem.lam_H) / 2
    return Separation(jnp.asarray(mean - jnp.hypot(half, sigma)), U, jnp.asarray(problem.counts) @ U**2)
