"""The global optimum for any class counts: in closed form, or solved and certified."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, is_concrete, tie_features
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish
from ufm.theory.certificate import certify
from ufm.theory.optimum import balanced_minimiser, balanced_value, check_dimension, is_balanced
from ufm.theory.orbits import (
    Orbit,
    TiedProblem,
    class_logits,
    initial_orbit,
    orbit_objective,
    point_of_logits,
    tie_classes,
)

CERTIFIED = 1e-8  # relative gap above which a solved optimum is refused


def global_minimiser(problem: Problem) -> Params:
    """A global minimiser of f, unique up to a common isometry of R^d and, in a free bias, a multiple of 1.

    Equal counts, also padded: the closed form of THEORY 1.2. Others: the convex problem reduced to distinct class sizes
    (THEORY 8.2), solved by L-BFGS and Newton's method, certified and expanded; a free bias is given mean zero.

    Raises:
        ValueError: if d < K − 1, the counts are traced, unequal counts come with traced λ's, or the loss is not
            cross-entropy.
        ArithmeticError: if the solver ends at NaN, or its certified gap and rounding exceed 1e-8 of the value.
    """
    if problem.is_padded or is_balanced(problem):
        return balanced_minimiser(problem)
    means = _class_mean_minimiser(problem)
    return Params(means.W, means.H @ problem.Y, means.b)


def optimal_value(problem: Problem) -> Float[Array, ""]:
    """f*, in nats: in closed form for equal counts, else from global_minimiser's class means.

    Raises:
        ValueError, ArithmeticError: as global_minimiser does.
    """
    if problem.is_padded or is_balanced(problem):
        return balanced_value(problem)
    tied = tie_features(problem)
    return certify(tied, _class_mean_minimiser(problem)).value


def _class_mean_minimiser(problem: Problem) -> Params:
    check_dimension(problem)
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(f"loss must be CrossEntropy for the optimum, got {type(problem.loss).__name__}")
    if not all(is_concrete(getattr(problem, name)) for name in ("lam_W", "lam_H", "lam_b")):
        raise ValueError("lam_W, lam_H or lam_b is traced; with unequal counts loop over λ's instead")
    point = solve_tied(tie_classes(problem), tie_features(problem))
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(point)):
        raise ArithmeticError("optimum not found: the solver left the finite numbers")
    certificate = certify(tie_features(problem), point)
    if not abs(certificate.gap) + certificate.rounding <= CERTIFIED * certificate.value:
        raise ArithmeticError(
            f"optimum not certified: gap {float(certificate.gap):.1e} at f = {float(certificate.value):.6g}"
        )
    return point


@jax.jit
def solve_tied(tied: TiedProblem, problem: Problem) -> Params:
    """The class-mean optimum of problem from its tied form, not yet certified."""
    start = initial_orbit(tied)
    unit = orbit_objective(tied, start)
    fun = Partial(_rescaled, tied, unit)
    orbit = _in_units(start, 1 / unit)
    orbit = polish(fun, minimise(fun, orbit, tol=1e-7).params).params
    orbit = _in_units(orbit, unit)
    b = orbit.b - jnp.where(problem.lam_b > 0, 0, tied.sizes * tied.widths @ orbit.b / problem.K)
    return point_of_logits(problem, class_logits(tied, orbit), b[tied.kind])


def _in_units(orbit: Orbit, unit: Float[Array, ""]) -> Orbit:
    root = jnp.sqrt(unit)
    return Orbit(root * orbit.u, root * orbit.W, root * orbit.H, orbit.b)


def _rescaled(tied: TiedProblem, unit: Float[Array, ""], orbit: Orbit) -> Float[Array, ""]:
    """The objective in units of its value at the start, so that one tolerance serves every λ."""
    return orbit_objective(tied, _in_units(orbit, unit)) / unit
