"""The model in PyTorch, as its users write it: samples in rows, autograd, float64."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from ufm.model.problem import Params, Problem


class TorchObjective:
    """f of leaves W (K×d), H (N×d) and b."""

    def __init__(self, problem: Problem) -> None:
        self.labels = torch.from_numpy(np.argmax(problem.Y, axis=0))
        self.lams = [float(lam) for lam in (problem.lam_W, problem.lam_H, problem.lam_b)]

    def __call__(self, W: torch.Tensor, H: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """f(W, H, b)."""
        penalty = sum(lam * part.square().sum() for lam, part in zip(self.lams, (W, H, b), strict=True) if lam)
        return cross_entropy(linear(H, W, b), self.labels) + penalty / 2


def leaves(params: Params) -> list[torch.Tensor]:
    """W, Hᵀ and b as new leaves."""
    parts = np.array(params.W), np.array(params.H.T, order="C"), np.array(params.b)
    return [torch.from_numpy(part).requires_grad_() for part in parts]


def solve_by_torch(
    fun: TorchObjective, start: Params, *, steps: int, memory: int, tol: float = 0.0
) -> list[np.ndarray]:
    """Where torch.optim.LBFGS with its strong Wolfe line search is after so many steps, or once |∇f| ≤ tol: W, H, b."""
    x = leaves(start)
    solver = torch.optim.LBFGS(
        x, max_iter=steps, max_eval=10**9, tolerance_grad=tol, tolerance_change=0,
        history_size=memory, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = fun(*x)
        value.backward()
        return value

    solver.step(closure)
    return _arrays(x)


def descend_by_torch(fun: TorchObjective, start: Params, *, steps: int, eta: float) -> list[np.ndarray]:
    """Where gradient descent is after so many steps of size η."""
    x = leaves(start)
    for _ in range(steps):
        grads = torch.autograd.grad(fun(*x), x)
        with torch.no_grad():
            for part, grad in zip(x, grads, strict=True):
                part.sub_(grad, alpha=eta)
    return _arrays(x)


@torch.no_grad()
def descend_batch_by_torch(
    labels: np.ndarray, lams: np.ndarray, start: Params, *, steps: int, eta: float
) -> list[list[np.ndarray]]:
    """Where gradient descent with every (λ_W, λ_H), the rows of lams, and a free bias leads: batched, in place.

    Samples lie in columns, as in the mathematics, which here is three times as fast as PyTorch's habit of rows.
    """
    W, H, b = (torch.from_numpy(np.stack([part] * len(lams))) for part in (start.W, start.H, start.b))
    Y = torch.nn.functional.one_hot(torch.from_numpy(labels)).T.to(W.dtype)
    shrink_W, shrink_H = torch.from_numpy(1 - eta * lams).T[:, :, None, None]
    for _ in range(steps):
        R = torch.softmax(torch.baddbmm(b[:, :, None], W, H), 1).sub_(Y).mul_(-eta / len(labels))
        slope = R @ H.mT
        H.mul_(shrink_H).baddbmm_(W.mT, R)
        W.mul_(shrink_W).add_(slope)
        b.add_(R.sum(2))
    return [[part[i].numpy() for part in (W, H, b)] for i in range(len(lams))]


def _arrays(x: list[torch.Tensor]) -> list[np.ndarray]:
    W, H, b = (part.detach().numpy() for part in x)
    return [W, H.T, b]
