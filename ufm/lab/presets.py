"""The field's phase diagrams as sweeps: what is computed, over which grid, and how it is drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ufm.lab.compare import quantities
from ufm.lab.grid import problem_at
from ufm.lab.optimum import solve_tied
from ufm.lab.sweep import sweep
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Problem, class_mean_problem, init, objective
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish
from ufm.theory.atlas import successive_groups
from ufm.theory.certificate import certify
from ufm.theory.optimum import balanced_minimiser, balanced_value
from ufm.theory.orbits import tie_kinds
from ufm.theory.spectrum import hessian_spectrum

if TYPE_CHECKING:
    from xarray import Dataset

Numbers = dict[str, Any]
ZERO = 1e-6  # ‖w‖² that is left by rounding where a classifier has collapsed
NATS = {"units": "nats"}
LAM = {"long_name": "λ_W = λ_H of (UFM), per sample"}
LOAD = {"long_name": "K√(nλ_Wλ_H), 1 at the threshold"}


@dataclass(frozen=True)
class Preset:
    """A phase diagram.

    Attributes:
        title: what it shows.
        cell: the function swept.
        make: what makes its argument.
        grid: what varies and what does not, given how many points a continuous axis has.
        describe: attributes of the outputs and of axes of its own.
        pad: whether one program serves all K.
    """

    title: str
    cell: Callable[..., Numbers]
    make: Callable[..., Any]
    grid: Callable[[int], dict[str, Any]]
    describe: Mapping[str, Mapping[str, Any]]
    pad: bool = False

    def sweep(self, points: int, changes: Mapping[str, Any] | None = None, **options: Any) -> "Dataset":
        """Run it with so many points along every continuous axis; changes replace parts of the grid."""
        grid = self.grid(points) | dict(changes or {})
        return sweep(self.cell, grid, make=self.make, pad=self.pad, describe=self.describe, **options)


def solved(problem: Problem, key: Key[Array, ""]) -> Numbers:
    """Where L-BFGS and Newton's method end from a random start, beside the closed form for equal counts."""
    fun = partial(objective, problem)
    start = init(problem, key)
    x = polish(fun, minimise(fun, start, tol=1e-9 * jnp.sqrt(problem.s)).params).params
    found, known = quantities(problem, x), quantities(problem, balanced_minimiser(problem))
    names = ("margin_mean", "w_norm2_mean", "h_norm2_mean")
    return {
        **{name: found[name] for name in names},
        **{f"predicted_{name}": known[name] for name in names},
        "excess": found["value"] - balanced_value(problem),
        "gap": certify(problem, x).gap,
    }


def equal_lambdas(*, lam: Any, **settings: Any) -> Problem:
    """problem_at with λ_W = λ_H = lam."""
    return problem_at(lam_W=lam, lam_H=lam, **settings)


def two_sizes(*, K: int, n: int, R: Any, d: int, lam: Any, use_bias: bool = True) -> Problem:
    """Half of the classes with n samples, the others with n/R, which need not be whole; λ_W = λ_H = lam."""
    kind = np.arange(K) >= (K + 1) // 2
    return Problem(np.eye(K), n / jnp.where(kind, R, 1.0), CrossEntropy(), lam, lam, np.zeros(()), d, use_bias)


def minority(problem: Problem) -> Numbers:
    """How alike the classes of the smaller size are at the certified optimum of two class sizes."""
    kind = [int(k >= (problem.K + 1) // 2) for k in range(problem.K)]
    x = solve_tied(tie_kinds(problem, kind), problem)
    Z, norm = x.W @ x.H, jnp.linalg.norm(x.W[-1]) * jnp.linalg.norm(x.W[-2])
    alive = norm > ZERO
    certificate = certify(problem, x)
    return {
        "minority_cosine": jnp.where(alive, x.W[-1] @ x.W[-2] / jnp.where(alive, norm, 1), 1),
        "minority_margin": Z[-1, -1] - Z[-2, -1],
        "majority_margin": Z[0, 0] - Z[1, 0],
        "value": certificate.value,
        "gap": certificate.gap,
    }


def at_load(*, K: int, n: int, d: int, load: Any, ratio: Any = 1.0, **settings: Any) -> Problem:
    """The problem with K√(nλ_Wλ_H) = load and λ_W/λ_H = ratio."""
    s = load / (K * np.sqrt(n))
    return class_mean_problem([n] * K, d, lam_W=s * jnp.sqrt(ratio), lam_H=s / jnp.sqrt(ratio), **settings)


def conditioning(problem: Problem) -> Numbers:
    """How well conditioned the optimum is across its orbit, and the rate of gradient descent there."""
    spectrum = hessian_spectrum(problem)
    return {"condition_number": spectrum.condition_number, "descent_rate": spectrum.descent_rate}


def merged(*, groups: int, K: int, **settings: Any) -> tuple[Problem, Sequence[Sequence[int]]]:
    """A problem at a load, and its partition into so many equal groups."""
    return at_load(K=K, **settings), successive_groups(K, groups)


def saddle_index(at: tuple[Problem, Sequence[Sequence[int]]]) -> Numbers:
    """Index, nullity and least eigenvalue of the saddle of a partition."""
    spectrum = hessian_spectrum(*at)
    return {
        "index": spectrum.index,
        "nullity": spectrum.nullity,
        "smallest_eigenvalue": jnp.min(spectrum.eigenvalues),
    }


PRESETS = {
    "collapse": Preset(
        "the logit margin that a solver finds, and the threshold K√(nλ_Wλ_H) = 1 above which all collapses to zero",
        solved,
        equal_lambdas,
        lambda points: {"K": range(2, 21), "lam": np.geomspace(3e-3, 0.3, points), "n": 10, "d": 20, "seed": 0},
        {
            "lam": LAM,
            "margin_mean": NATS | {"long_name": "logit margin t found, mean over classes"},
            "w_norm2_mean": {"long_name": "‖w‖² found, mean over classes"},
            "h_norm2_mean": {"long_name": "‖h‖² found, mean over samples"},
            "predicted_margin_mean": NATS | {"long_name": "logit margin t of the closed form"},
            "predicted_w_norm2_mean": {"long_name": "‖w‖² of the closed form"},
            "predicted_h_norm2_mean": {"long_name": "‖h‖² of the closed form"},
            "excess": NATS | {"long_name": "f − f*"},
            "gap": NATS | {"long_name": "certified duality gap"},
        },
        pad=True,
    ),
    "minority": Preset(
        "the angle between minority classes at the certified optimum, and the threshold √n_B = N√(λ_Wλ_H) of collapse",
        minority,
        two_sizes,
        lambda points: {
            "R": np.geomspace(1, 1000, points),
            "lam": np.geomspace(1e-5, 1e-2, points),
            "K": 10,
            "n": 500,
            "d": 10,
        },
        {
            "lam": LAM,
            "R": {"long_name": "imbalance ratio, majority over minority class size"},
            "minority_cosine": {"long_name": "cosine of two minority classifiers; 1 where both are zero"},
            "minority_margin": NATS | {"long_name": "logit margin between two minority classes"},
            "majority_margin": NATS | {"long_name": "logit margin between two majority classes"},
            "value": NATS | {"long_name": "f*"},
            "gap": NATS | {"long_name": "certified duality gap"},
        },
    ),
    "conditioning": Preset(
        "condition number of the optimum across its orbit, and the rate of gradient descent with step 1/λ_max",
        conditioning,
        at_load,
        lambda points: {
            "K": [2, 5, 10, 30, 100],
            "load": np.geomspace(1e-6, 0.99, points),
            "n": 100,
            "d": 128,
            "lam_b": 1e-2,
        },
        {
            "load": LOAD,
            "condition_number": {"long_name": "λ_max over the least eigenvalue across the orbit"},
            "descent_rate": {"long_name": "factor a step of size 1/λ_max, 1 − 1/condition number"},
        },
    ),
    "index": Preset(
        "Morse index of the saddles of equal groups, and the load at which it falls from d(K−m) to (d−1)(K−m)",
        saddle_index,
        merged,
        lambda points: {
            "groups": [1, 2, 3, 4, 6, 12],
            "load": np.linspace(0.02, 0.98, points),
            "K": 12,
            "n": 10,
            "d": 16,
        },
        {
            "load": LOAD,
            "groups": {"long_name": "groups that the classes are merged into, m"},
            "index": {"long_name": "negative eigenvalues"},
            "nullity": {"long_name": "zero eigenvalues"},
            "smallest_eigenvalue": {"long_name": "least eigenvalue"},
        },
    ),
}
PRESETS["norms"] = replace(
    PRESETS["collapse"],
    title="logit margin and squared norms that a solver finds, over those of the closed form",
    grid=lambda points: {"K": [2, 4, 10, 20], "lam": np.geomspace(1e-5, 0.3, points), "n": 10, "d": 20, "seed": 0},
)
