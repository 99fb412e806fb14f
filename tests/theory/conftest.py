"""What the tests of the theory share: batches of problems, and their objective by NumPy in extended precision."""

import dataclasses

import numpy as np
import pytest

from ufm.model.problem import imbalanced

EXTENDED = np.longdouble


@dataclasses.dataclass
class Family:
    """Problems of one shape: counts, d and whether there is a bias; the λ's are arrays, one entry a problem."""

    counts: tuple[int, ...]
    d: int
    use_bias: bool
    lam_W: np.ndarray
    lam_H: np.ndarray
    lam_b: np.ndarray

    @property
    def lams(self):
        """The λ's as a tree for vmap."""
        return {"lam_W": self.lam_W, "lam_H": self.lam_H, "lam_b": self.lam_b}

    @property
    def Y(self):
        """One-hot targets, shared by all."""
        return np.repeat(np.eye(len(self.counts)), self.counts, axis=1)

    def problem(self, lams):
        """One of them."""
        return imbalanced(self.counts, self.d, **lams, use_bias=self.use_bias)

    def value_and_gradient(self, W, H, b):
        """f and its gradient at one point per problem, in extended precision, from (UFM) and the softmax."""
        W, H, b, Y = (np.asarray(a, EXTENDED) for a in (W, H, b, self.Y))
        lam_W, lam_H, lam_b = (np.asarray(a, EXTENDED)[:, None, None] for a in self.lams.values())
        N = Y.shape[1]
        Z = W @ H + (b[:, :, None] if self.use_bias else 0)
        gap = Z - np.sum(Y * Z, axis=1, keepdims=True)
        top = gap.max(axis=1, keepdims=True)
        e = np.exp(gap - top)
        wrong = np.sum((1 - Y) * e, axis=1)
        losses = np.where(
            top[:, 0] > 1, top[:, 0] + np.log(e.sum(1)), np.log1p(wrong * np.exp(np.minimum(top[:, 0], 1)))
        )
        G = (1 - Y) * e / e.sum(1, keepdims=True)
        G = (G - Y * G.sum(1, keepdims=True)) / N
        f = losses.sum(1) / N + (lam_W[:, 0, 0] * np.sum(W**2, (1, 2)) + lam_H[:, 0, 0] * np.sum(H**2, (1, 2))) / 2
        grad = [G @ H.transpose(0, 2, 1) + lam_W * W, W.transpose(0, 2, 1) @ G + lam_H * H, 0 * b]
        if self.use_bias:
            f = f + lam_b[:, 0, 0] * np.sum(b**2, 1) / 2
            grad[2] = G.sum(2) + lam_b[:, :, 0] * b
        return f, grad

    def value(self, W, H, b):
        """f at one point per problem, in extended precision."""
        return self.value_and_gradient(W, H, b)[0]

    def subset(self, index):
        """The problems at index."""
        return dataclasses.replace(self, **{name: value[index] for name, value in self.lams.items()})

    def closed_form_value(self):
        """f* of THEORY 1.2 in extended precision, for equal counts."""
        K, n = len(self.counts), self.counts[0]
        q = np.sqrt(n * np.asarray(self.lam_W, EXTENDED) * np.asarray(self.lam_H, EXTENDED))
        t = np.log1p(np.maximum(0, 1 - K * q) / q)
        return np.log1p((K - 1) * np.exp(-t)) + (K - 1) * t * q


@pytest.fixture(scope="session")
def family():
    """A Family by its arguments."""
    return Family
