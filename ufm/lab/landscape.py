"""What the landscape looks like: f along an escape, spectra, the atlas, and where a network sits; as plain records."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ufm.lab.atlas import CriticalPoint, critical_points, lattice
from ufm.lab.census import Orbit, hunt
from ufm.lab.compare import problem_of_features
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.records import read_json
from ufm.measure.features import load_features
from ufm.model.problem import Params, Problem, logits, objective, tie_features
from ufm.theory.atlas import Partition
from ufm.theory.duality import sample_gradient, top_singular_pair
from ufm.theory.elimination import inertia
from ufm.theory.escape import LENGTHS, escape_direction, predicted_curvature
from ufm.theory.optimum import is_balanced
from ufm.theory.spectrum import Where, hessian_spectrum

LINE, PLANE = 201, 61  # points along an escape, and along each side of its plane
SAME_LEVEL = 1e-12  # of the largest eigenvalue
DENSE = 2500  # variables up to which the Hessian is also taken apart by brute force


def escape_profile(problem: Problem, x: Params) -> dict[str, Float[np.ndarray, "..."]]:
    """f along the steepest escape from a saddle, its parabola, and f on the plane that w and h move in.

    Returns:
        tau, along, parabola: distance (full-size norm), f and f(x) + λ_min τ²/2 along the unit escape direction.
        side, plane: distances along the two halves, unit rows of W (first axis) and unit features; f there.
    """
    if np.linalg.matrix_rank(np.asarray(x.W), tol=1e-6) == problem.d:
        raise ValueError(
            f"d must exceed the rank of W at the saddle, for the null vector of THEORY 0; got d = {problem.d}"
        )
    R = problem.loss.residual(logits(problem, x), problem.Y)
    v = escape_direction(problem, x, R)
    curvature = predicted_curvature(problem, top_singular_pair(sample_gradient(problem, R))[0])
    zero, n = 0 * v.b, jnp.sqrt(jnp.sum(problem.multiplicity * v.H**2))
    halves = Params(v.W / jnp.linalg.norm(v.W), 0 * v.H, zero), Params(0 * v.W, v.H / n, zero)
    along = jax.jit(jax.vmap(lambda tau: objective(problem, _moved(x, v, tau))))
    reach = 1.6 * LENGTHS[int(jnp.argmin(along(jnp.asarray(LENGTHS))))]
    tau, side = np.linspace(-reach, reach, LINE), np.linspace(-reach, reach, PLANE)

    @jax.jit
    def row(a: Array) -> Array:
        on_row = _moved(x, halves[0], a)
        return jax.lax.map(lambda c: objective(problem, _moved(on_row, halves[1], c)), jnp.asarray(side))

    grid = [row(a) for a in side]
    values = along(jnp.asarray(tau))
    parabola = float(objective(problem, x)) + float(curvature) * tau**2 / 2
    return {"tau": tau, "along": np.asarray(values), "parabola": parabola, "side": side, "plane": np.asarray(grid)}


def _moved(x: Params, v: Params, tau: Array) -> Params:
    return jax.tree.map(lambda a, da: a + tau * da, x, v)


def spectrum_rows(problem: Problem, at: Where, x: Params, *, dense_up_to: float = DENSE) -> list[dict[str, Any]]:
    """The levels of the spectrum at x, ascending, each with the number of dense eigenvalues found on it.

    Levels closer than rounding are one row. `dense` is None where there are more variables than dense_up_to, or columns
    stand for more than one sample.
    """
    levels = hessian_spectrum(problem, at).levels()
    scale = max(abs(value) for value, _, _ in levels)
    rows: list[dict[str, Any]] = []
    for value, count, label in levels:
        if rows and value - rows[-1]["eigenvalue"] <= SAME_LEVEL * scale:
            rows[-1]["theory"] += count
            rows[-1]["what"] += f"; {label}"
        else:
            rows.append({"eigenvalue": value, "theory": count, "dense": None, "what": label})
    if sum(row["theory"] for row in rows) <= dense_up_to and np.all(np.asarray(problem.multiplicity) == 1):
        dense = dense_eigenvalues(problem, x)
        for row in rows:
            row["dense"] = int((np.abs(dense - row["eigenvalue"]) <= 2 * SAME_LEVEL * scale).sum())
    return rows


def atlas_rows(points: tuple[CriticalPoint, ...]) -> list[dict[str, Any]]:
    """A row for every partition saddle, for tables and figures."""
    return [
        {
            "groups": _sum(p.partition),
            "value": p.value,
            "rank": p.rank,
            "index": p.index,
            "nullity": p.nullity,
            "orbit_dimension": p.orbit_dimension,
            "smallest_eigenvalue": p.smallest_eigenvalue,
            "points": p.points,
        }
        for p in points
    ]


def hunted_rows(orbits: tuple[Orbit, ...]) -> list[dict[str, Any]]:
    """A row for every critical point of a hunt."""
    return [
        {
            "groups": _sum(o.partition),
            "known": o.known,
            "value": o.value,
            "rank": o.rank,
            "index": o.index,
            "nullity": o.nullity,
            "smallest_eigenvalue": o.smallest_eigenvalue,
            "hits": o.hits,
        }
        for o in orbits
    ]


def survey(
    problem: Problem, *, saddle: tuple[int, ...] = (), hunted: int = 0, key: Key[Array, ""], quiet: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The landscape of a problem as records: (tables and scalars, arrays), which plots.draw_landscape takes.

    Args:
        problem: cross-entropy, concrete, small enough for critical_points.
        saddle: group sizes of the saddle to look down from; if none are given, the lowest one of equal groups.
        hunted: searches for critical points that are no partition saddles.
        key: for them.
        quiet: without a progress bar.

    Raises:
        ValueError: if there is no such saddle, or as critical_points and hunt do.
    """
    points = critical_points(problem)
    here = _chosen(points, saddle)
    result: dict[str, Any] = {
        "atlas": atlas_rows(points),
        "arrows": [list(pair) for pair in lattice(points, np.asarray(problem.counts))],
        "saddle": {"groups": _sum(here.partition), "value": here.value, "curvature": here.smallest_eigenvalue},
        "spectra": _spectra(problem, points, here),
    }
    if hunted:
        census = hunt(problem, hunted, key, quiet=quiet)
        result["hunt"] = {
            "starts": census.starts,
            "converged": census.converged,
            "distinct": len(census.orbits),
            "new": len(census.new),
            "spurious": len(census.spurious),
            "missed": [_sum(point.partition) for point in census.missed],
            "orbits": hunted_rows(census.orbits),
        }
    return result, escape_profile(problem, here.params)


def _chosen(points: tuple[CriticalPoint, ...], groups: tuple[int, ...]) -> CriticalPoint:
    saddles = [point for point in points if point.index > 0]
    wanted = [point for point in saddles if point.groups == tuple(sorted(groups, reverse=True))]
    if not groups:  # equal groups have a spectrum in closed form
        wanted = [point for point in saddles if point.rank and len(set(point.groups)) == 1] + saddles
    if not wanted:
        if not saddles:
            raise ValueError("lam_W and lam_H must be smaller for a saddle to exist: all classes collapse here")
        listed = ", ".join(dict.fromkeys(_sum(point.partition) for point in saddles))
        raise ValueError(f"saddle must be the group sizes of a saddle of this problem ({listed}), got {list(groups)}")
    return wanted[0]


def _spectra(problem: Problem, points: tuple[CriticalPoint, ...], here: CriticalPoint) -> dict[str, Any]:
    """Spectra in closed form at the optimum, the chosen saddle and the origin, where there is one."""
    origin, spectra = points[-1], {}
    if is_balanced(problem) and problem.d >= problem.K - 1:
        spectra["optimum"] = spectrum_rows(problem, "optimum", points[0].params)
        if here is not origin and len(set(here.groups)) == 1:
            spectra[f"saddle {_sum(here.partition)}"] = spectrum_rows(problem, here.partition, here.params)
    if origin.rank == 0:
        spectra["origin"] = spectrum_rows(problem, "origin", origin.params)
    return spectra


def network_place(run: Path) -> dict[str, Any]:
    """Where a train run's features end, and came along, among the saddles of the model with the run's λ's.

    Raises:
        ValueError: if the folder is not one of a train run, or as critical_points does.
    """
    config, history = _train_run(run)
    lam_b = config["lam_W"] if config["lam_b"] is None else config["lam_b"]
    features = load_features(run / "features.npz")
    problem, params = problem_of_features(features, lam_W=config["lam_W"], lam_H=history[-1]["lam_H"], lam_b=lam_b)
    signs, fixed = inertia(problem, params), config["regulariser"] == "features"
    epochs = [row for row in history if fixed or row is history[-1]]  # implied λ_H's change the model with every epoch
    return {
        "run": run.name,
        "value": float(objective(problem, params)),
        "negative": signs.negative,
        "zero": signs.zero,
        "relative_gradient": signs.relative_gradient,
        "epochs": [row["epoch"] for row in epochs],
        "values": [row["observed"]["value"] for row in epochs],
        "atlas": atlas_rows(critical_points(tie_features(problem))),
    }


def _train_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    config, history = read_json(run / "config.json"), read_json(run / "history.json")
    try:
        config["lam_W"], config["lam_b"], config["regulariser"], history[-1]["lam_H"]
        [(row["epoch"], row["observed"]["value"]) for row in history]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{run} must be the folder of a train run: its config or history lacks {error}") from None
    return config, history


def _sum(partition: Partition) -> str:
    return "+".join(map(str, sorted(map(len, partition), reverse=True)))
