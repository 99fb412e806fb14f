"""The ends of the Hessian's spectrum: ours, SciPy's eigsh, PyHessian and curvlinops on the same function.

error is the worst residual ‖Av − θv‖ over ‖A‖ of five pairs, or of 150 where descent directions are counted.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg as sla
from jax.experimental.sparse.linalg import lobpcg_standard
from jax.flatten_util import ravel_pytree

from benchmarks.race import Row, clock
from ufm.model.problem import Params, Problem, balanced, init, objective
from ufm.numerics.curvature import flat_operator, hessian_operator
from ufm.numerics.eigenpairs import Eigenpairs, extreme_eigenpairs
from ufm.theory.atlas import coarse_etf, successive_groups
from ufm.theory.optimum import balanced_minimiser

TOL = 1e-8
EIGSH_RESTARTS = 100  # some 1500 products: it would run for minutes where an eigenvalue is many-fold
LOBPCG_STEPS = 200  # some 1000 products


def points(problem: Problem) -> dict[str, Params]:
    """The origin, the optimum, a partition saddle and a random point."""
    some = init(problem, jax.random.key(1), scale=0.1)
    saddle = coarse_etf(problem, successive_groups(problem.K, problem.K // 2))
    return {
        "origin": jax.tree.map(np.zeros_like, some),
        "optimum": balanced_minimiser(problem),
        "saddle": saddle,
        "random": some,
    }


def compare_ends(K: int, n: int, d: int, lam_W: float, lam_H: float, *, places: int = 4) -> list[Row]:
    """Five pairs from each end at the first so many points: ours, eigsh and lobpcg with their steps capped."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    rows: list[Row] = []
    for name, x in list(points(problem).items())[:places]:
        operator = hessian_operator(functools.partial(objective, problem), x)
        for which in ("smallest", "largest"):
            job = f"5 {which} at the {name}, K={K} d={d} n={n}"
            rows += list(_pair(job, operator, x, which))
    return rows


def _pair(job: str, operator: Any, x: Params, which: str) -> Iterator[Row]:
    ours = functools.partial(extreme_eigenpairs, operator, x, 5, which, jax.random.key(0), tol=TOL)
    cold, _ = clock(lambda: jax.block_until_ready(ours()))
    seconds, found = clock(lambda: jax.block_until_ready(ours()))
    norm = float(found.norm)
    worst = float(found.residuals.max()) / norm
    yield Row(job, "ufm.extreme_eigenpairs", None, seconds, found.products, worst, 1.0, max(cold - seconds, 0.0))
    flat = ravel_pytree(x)[0]
    product = jax.jit(flat_operator(operator, x))
    A = sla.LinearOperator((flat.size, flat.size), lambda v: np.asarray(product(v)), dtype=flat.dtype)
    took, (worst, note) = clock(lambda: _eigsh(A, 5, {"smallest": "SA", "largest": "LA"}[which], norm, EIGSH_RESTARTS))
    yield Row(job, "scipy eigsh", None, took, None, worst, took / seconds, note=note)
    took, (worst, note) = clock(lambda: _lobpcg(product, flat, which, norm))
    yield Row(job, "jax lobpcg_standard", None, took, None, worst, took / seconds, note=note)


def _lobpcg(product: Callable, like: jax.Array, which: str, norm: float) -> tuple[float, str]:
    """jax's block solver for the top of −A or A, shifted to be positive, and its worst residual over ‖A‖."""
    sign = 1 if which == "largest" else -1
    X = jax.random.normal(jax.random.key(2), (like.size, 5), like.dtype)
    theta, V, steps = lobpcg_standard(
        jax.jit(lambda X: 1.01 * norm * X + sign * jax.vmap(product, 1, 1)(X)), X, m=LOBPCG_STEPS
    )
    values = sign * (theta - 1.01 * norm)
    worst = jnp.linalg.norm(jax.vmap(product, 1, 1)(V) - V * values, axis=0).max() / norm
    return float(worst), f"{int(steps)} steps of at most {LOBPCG_STEPS}"


def _eigsh(A: Any, k: int, which: str, norm: float, restarts: int | None) -> tuple[float | None, str]:
    try:
        values, V = sla.eigsh(
            A,
            k,
            which=which,
            tol=TOL,
            maxiter=restarts,
            v0=np.random.default_rng(0).normal(size=A.shape[0]),
        )
    except sla.ArpackNoConvergence as failure:
        return None, f"no convergence: {len(failure.eigenvalues)} of {k} after {restarts} restarts"
    return max(float(np.linalg.norm(A @ v - value * v)) for value, v in zip(values, V.T, strict=True)) / norm, ""


def compare_counts(K: int, n: int, d: int, lam_W: float, lam_H: float) -> list[Row]:
    """Negative eigenvalues found at the origin, (K − 1)d in truth."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    truth = (K - 1) * d
    job = f"negative eigenvalues at the origin: {truth}"
    rows = []
    for name, count in COUNTERS.items():
        if count is None:
            rows.append(Row(job, name, note="not installed"))
            continue
        seconds, found = clock(lambda count=count: count(problem, truth + 6))
        rows.append(
            Row(job, name, None, seconds, ratio=seconds / (rows[0].seconds if rows else seconds), note=f"{found} found")
        )
    return rows


def count_by_ours(problem: Problem, k: int) -> int:
    x = points(problem)["origin"]
    operator = hessian_operator(functools.partial(objective, problem), x)
    found: Eigenpairs = extreme_eigenpairs(operator, x, k, "smallest", jax.random.key(0))
    return int((found.eigenvalues + found.residuals < 0).sum())


def count_by_eigsh(problem: Problem, k: int) -> int:
    x = points(problem)["origin"]
    product = jax.jit(flat_operator(hessian_operator(functools.partial(objective, problem), x), x))
    size = ravel_pytree(x)[0].size
    A = sla.LinearOperator((size, size), lambda v: np.asarray(product(v)), dtype=float)
    return _negatives(A, k)


def _negatives(A: Any, k: int) -> int:
    try:
        values = sla.eigsh(A, k, which="SA", tol=TOL, maxiter=EIGSH_RESTARTS, return_eigenvectors=False)
    except sla.ArpackNoConvergence as failure:
        values = failure.eigenvalues
    return int((values < 0).sum())


def count_by_pyhessian(problem: Problem, k: int) -> int:
    """Its density by stochastic Lanczos, the one way in which it sees negative eigenvalues."""
    import torch
    from pyhessian import hessian

    def eig(T: Any, eigenvectors: bool) -> tuple[Any, Any]:  # which PyHessian calls and torch no longer has
        values, vectors = torch.linalg.eigh(T)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    torch.set_default_dtype(torch.float64)
    try:
        model, loss, inputs, labels = _torch_model(problem)
        torch.eig = eig
        values, _ = hessian(model, loss, data=(inputs, labels), cuda=False).density(iter=100, n_v=1)
    finally:
        torch.set_default_dtype(torch.float32)
    return int((np.real(np.asarray(values[0])) < -TOL).sum())


def count_by_curvlinops(problem: Problem, k: int) -> int:
    """Its Hessian of the fit, the penalty's diagonal added, in eigsh."""
    import torch
    from curvlinops import HessianLinearOperator

    model, _, inputs, labels = _torch_model(problem)
    parameters = dict(model.named_parameters())
    fit = HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), list(parameters.values()), [(inputs, labels)], check_deterministic=False
    )
    lam = {"W": problem.lam_W, "H": problem.lam_H, "b": problem.lam_b}
    diagonal = np.concatenate([np.full(p.numel(), float(lam[name])) for name, p in parameters.items()])
    A = fit.to_scipy() + sla.aslinearoperator(_diagonal(diagonal))
    return _negatives(A, k)


def _diagonal(entries: np.ndarray) -> Any:
    from scipy.sparse import diags_array

    return diags_array(entries)


def _torch_model(problem: Problem) -> tuple[Any, Callable, Any, Any]:
    import torch

    K, N = problem.Y.shape

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = torch.nn.Parameter(torch.zeros(K, problem.d, dtype=torch.float64))
            self.H = torch.nn.Parameter(torch.zeros(N, problem.d, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.zeros(K, dtype=torch.float64))

        def forward(self, index: Any) -> Any:
            return self.H[index] @ self.W.T + self.b

    model, fit = Model(), torch.nn.CrossEntropyLoss()

    def loss(outputs: Any, labels: Any) -> Any:
        penalty = sum(float(lam) * p.square().sum() for lam, p in ((problem.lam_W, model.W), (problem.lam_H, model.H)))
        return fit(outputs, labels) + penalty / 2 + float(problem.lam_b) * model.b.square().sum() / 2

    return model, loss, torch.arange(N), torch.from_numpy(np.argmax(problem.Y, axis=0))


def _installed(name: str, count: Callable) -> Callable | None:
    return count if importlib.util.find_spec(name) and importlib.util.find_spec("torch") else None


COUNTERS: dict[str, Callable[[Problem, int], int] | None] = {
    "ufm.extreme_eigenpairs": count_by_ours,
    "scipy eigsh": count_by_eigsh,
    "PyHessian density": _installed("pyhessian", count_by_pyhessian),
    "curvlinops and eigsh": _installed("curvlinops", count_by_curvlinops),
}
