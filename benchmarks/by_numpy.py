"""The model by hand in NumPy: value and analytic gradient in place, for SciPy and for plain descent."""

import numpy as np
from scipy.optimize import minimize

from ufm.model.problem import Params, Problem


class NumpyObjective:
    """f and ∇f of a flat point x = (W, H, b), row by row; the logits' buffer is kept between calls."""

    def __init__(self, problem: Problem) -> None:
        K, N = problem.Y.shape
        self.shapes = (K, problem.d), (problem.d, N), (K,)
        self.cuts = np.cumsum([np.prod(shape) for shape in self.shapes])[:-1]
        self.Y = np.asarray(problem.Y)
        self.lams = [float(lam) for lam in (problem.lam_W, problem.lam_H, problem.lam_b)]
        self.Z = np.empty((K, N))

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """(f(x), ∇f(x))."""
        W, H, b = self.split(x)
        Y, Z, N = self.Y, self.Z, self.Z.shape[1]
        np.matmul(W, H, out=Z)
        Z += b[:, None]
        Z -= Z.max(0)
        fit = -np.vdot(Y, Z)
        np.exp(Z, out=Z)
        total = Z.sum(0)
        fit += np.log(total).sum()
        Z /= total
        Z -= Y
        Z /= N
        grad = np.empty_like(x)
        penalty = 0.0
        slopes = Z @ H.T, W.T @ Z, Z.sum(1)
        for out, slope, lam, part in zip(self.split(grad), slopes, self.lams, (W, H, b), strict=True):
            np.multiply(lam, part, out=out)
            out += slope
            penalty += lam * np.vdot(part, part) / 2
        return fit / N + penalty, grad

    def split(self, x: np.ndarray) -> list[np.ndarray]:
        """Views of W, H and b in a flat point."""
        return [part.reshape(shape) for part, shape in zip(np.split(x, self.cuts), self.shapes, strict=True)]


def flatten(params: Params) -> np.ndarray:
    """(W, H, b) in one new vector."""
    return np.concatenate([np.ravel(part) for part in (params.W, params.H, params.b)])


def solve_by_scipy(
    fun: NumpyObjective, x: np.ndarray, *, steps: int, memory: int, tol: float = 0.0
) -> list[np.ndarray]:
    """Where SciPy's L-BFGS-B is after so many steps, or once |∇f| ≤ tol: W, H, b."""
    options = {"maxiter": steps, "maxfun": 10**9, "ftol": 0, "gtol": tol, "maxcor": memory}
    return fun.split(minimize(fun, x, jac=True, method="L-BFGS-B", options=options).x)


def descend_by_numpy(fun: NumpyObjective, x: np.ndarray, *, steps: int, eta: float) -> list[np.ndarray]:
    """Where gradient descent is after so many steps of size η."""
    x = x.copy()
    for _ in range(steps):
        x -= eta * fun(x)[1]
    return fun.split(x)
