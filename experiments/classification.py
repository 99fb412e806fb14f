"""Is a verdict ever wrong? certify at optima, saddles of every kind, points near them and random points.

Every verdict is judged by what the point is known to be and by f, f* and ∇f in extended precision. UNDECIDED and
NOT_CRITICAL are declined answers, counted by kind; the latter is wrong where the gradient is small after all.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from ufm import Params, Verdict, balanced, certify, coarse_etf, critical_points
from ufm.lab.census import hunt
from ufm.lab.records import write_run

SHAPES = (
    (2, 3, 2, {}),
    (3, 1, 2, {"lam_b": 1e-2}),
    (4, 2, 5, {"use_bias": False}),
    (6, 2, 6, {}),
    (6, 1, 5, {"lam_b": 1.0}),
)
HUNTED = ((3, 1, 3, {}), (4, 2, 4, {"use_bias": False}))
GRAD_TOL = 1e-6  # certify's own
WIDE = np.longdouble


@dataclass(frozen=True)
class Config:
    """Classify so many points and judge every verdict."""

    out: tyro.conf.Positional[Path]
    """New folder for config.json and summary.json."""
    points: int = 60_000
    """Number of points, about; spread over shapes, kinds and λ's."""
    precision: str = "float64"
    """Arithmetic of the certificate, float64 or float32; the judge's is extended either way."""
    tol: float = 1e-8
    """Relative gap below which a point counts as global; float32 rounds f by more than the default."""
    seed: int = 0
    """Seed of λ's, perturbations and random points."""


def main(config: Config) -> Path:
    """Run it and write the record; exit status 1 from the command line if a verdict was wrong."""
    start = time.perf_counter()
    if config.precision not in ("float64", "float32"):
        raise ValueError(f"precision must be float64 or float32, got {config.precision!r}")
    jax.config.update("jax_enable_x64", True)
    batches = list(tqdm(_batches(config), desc="points", disable=not sys.stderr.isatty()))
    jax.config.update("jax_enable_x64", config.precision == "float64")
    table: Counter[tuple[str, str]] = Counter()
    wrong: list[dict[str, Any]] = []
    for batch in tqdm(batches, desc="verdicts", disable=not sys.stderr.isatty()):
        codes = batch.verdicts(config.tol)
        table.update((kind, Verdict(int(code)).name) for kind, code in zip(batch.kinds, codes, strict=True))
        wrong += batch.mistakes(codes, config.tol)
    total = sum(table.values())
    result = {
        "points": total,
        "wrong": len(wrong),
        "undecided": sum(count for (_, verdict), count in table.items() if verdict == "UNDECIDED"),
        "table": {kind: {v.name: table[kind, v.name] for v in Verdict} for kind in sorted({kind for kind, _ in table})},
        "mistakes": wrong[:20],
    }
    print(f"{total} points in {config.precision}: {len(wrong)} wrong verdicts, {result['undecided']} undecided")
    for kind, row in result["table"].items():
        print(f"  {kind:<32}" + "".join(f"{name} {count:>7}  " for name, count in row.items()))
    return write_run(config.out, config, result, start=start)


@dataclass
class Batch:
    """Points of one shape (K, n, d, bias), with their λ's, as NumPy float64 arrays."""

    shape: tuple[int, int, int, dict[str, Any]]
    lams: np.ndarray  # 2 × points
    W: np.ndarray
    H: np.ndarray
    b: np.ndarray
    kinds: list[str]

    def verdicts(self, tol: float) -> np.ndarray:
        """certify's codes, in the default float type."""
        return np.asarray(
            _codes(self.shape[:3], tuple(self.shape[3].items()), tol, self.lams.T, self.W, self.H, self.b)
        )

    def mistakes(self, codes: np.ndarray, tol: float) -> list[dict[str, Any]]:
        """The verdicts that are false of the point as the certificate was given it."""
        dtype = jnp.result_type(float)
        W, H, b, lams = (np.asarray(x, dtype).astype(WIDE) for x in (self.W, self.H, self.b, self.lams))
        value, best, gradient = _truth(self.shape, lams, W, H, b)
        K, n = self.shape[:2]
        excess = np.asarray((value - best) / value, float)
        collapsed = np.asarray(K * np.sqrt(n * lams[0] * lams[1]), float) >= 1
        near_optimum = np.array([kind.startswith("optimum") for kind in self.kinds])
        false = {
            Verdict.GLOBAL: excess > tol * (1 + 1e-3),
            Verdict.STRICT_SADDLE: (excess <= tol) | near_optimum | collapsed,
            Verdict.NOT_CRITICAL: np.asarray(gradient, float) <= GRAD_TOL * (1 - 1e-3),
            Verdict.UNDECIDED: np.zeros(len(codes), bool),
        }
        return [
            {"kind": self.kinds[i], "shape": str(self.shape), "lams": lams[:, i].astype(float), "excess": excess[i]}
            | {"gradient": float(gradient[i]), "verdict": Verdict(int(code)).name}
            for i, code in enumerate(codes)
            if false[Verdict(int(code))][i]
        ]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _codes(shape: tuple[int, int, int], kind: tuple, tol: float, lams: Any, W: Any, H: Any, b: Any) -> jax.Array:
    def code(point: Any) -> jax.Array:
        lam, W, H, b = point
        return certify(balanced(*shape, lam_W=lam[0], lam_H=lam[1], **dict(kind)), Params(W, H, b), tol=tol).code

    return jax.lax.map(code, tuple(jnp.asarray(x, float) for x in (lams, W, H, b)), batch_size=256)


def _truth(shape: tuple, lams: np.ndarray, W: np.ndarray, H: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """f, f* and the relative gradient, each from its formula in extended precision."""
    K, n, _, kind = shape
    Y, N, bias = np.repeat(np.eye(K), n, axis=1).astype(WIDE), K * n, kind.get("use_bias", True)
    lam_W, lam_H, lam_b = lams[0], lams[1], WIDE(kind.get("lam_b", 0.0))
    Z = W @ H + bias * b[:, :, None]
    gap = Z - np.sum(Y * Z, axis=1, keepdims=True)
    top = np.maximum(gap.max(axis=1, keepdims=True), 0)
    e = np.exp(gap - top)
    wrong = (1 - Y) * e
    losses = np.where(
        top[:, 0] > 1, top[:, 0] + np.log(e.sum(1)), np.log1p((wrong * np.exp(np.minimum(top, 1))).sum(1))
    )
    R = wrong / e.sum(1, keepdims=True)
    R = R - Y * R.sum(1, keepdims=True)
    square = [np.sum(x**2, axis=tuple(range(1, x.ndim))) for x in (W, H, b)]
    value = losses.mean(1) + (lam_W * square[0] + lam_H * square[1] + bias * lam_b * square[2]) / 2
    grad_W = R @ H.transpose(0, 2, 1) / N + lam_W[:, None, None] * W
    grad_H = W.transpose(0, 2, 1) @ R / N + lam_H[:, None, None] * H
    grad_b = R.sum(2) / N + lam_b * b
    features = np.sqrt(np.sum(grad_W**2, (1, 2)) + np.sum(grad_H**2, (1, 2)))
    penalty = np.sqrt(lam_W**2 * square[0] + lam_H**2 * square[1])
    fit = np.sqrt(np.sum(R**2, axis=1)).mean(1)
    tiny = np.finfo(float).tiny
    relative = np.maximum(
        features / np.maximum(penalty, tiny), bias * np.sqrt(np.sum(grad_b**2, 1)) / np.maximum(fit, tiny)
    )
    q = np.sqrt(n * lam_W * lam_H)
    t = np.log1p(np.maximum(0, 1 - K * q) / q)
    return value, np.log1p((K - 1) * np.exp(-t)) + (K - 1) * t * q, relative


def _batches(config: Config) -> Iterator[Batch]:
    """Closed forms at λ's log-uniform over 8 decades each; hunted and unequal saddles at a few λ's."""
    rng = np.random.default_rng(config.seed)
    for shape in SHAPES:
        yield _closed_forms(shape, config.points * 9 // (10 * len(SHAPES)), rng)
    for shape in HUNTED:
        yield _found(shape, config.points // (10 * len(HUNTED)), rng)


def _closed_forms(shape: tuple, count: int, rng: np.random.Generator) -> Batch:
    K, n, d, kind = shape
    lams, points, kinds = 10.0 ** rng.uniform(-8, 0, (2, count)), [], []
    groups = [m for m in range(1, K + 1) if K % m == 0]
    make = jax.jit(
        lambda lam_W, lam_H, m: coarse_etf(balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, **kind), m), static_argnums=2
    )
    for lam_W, lam_H in lams.T:
        problem = (lam_W, lam_H)
        case = int(rng.integers(4))
        m = groups[int(rng.integers(len(groups)))] if case != 0 else K
        x = _arrays(make(*problem, m)) if case < 3 else [rng.standard_normal(s) for s in ((K, d), (d, K * n), (K,))]
        critical = "optimum" if m == K or K * np.sqrt(n * lam_W * lam_H) >= 1 else f"saddle of {m} groups"
        if case == 2:
            size = 10.0 ** rng.uniform(-16, 0)
            x = [a + size * (1 + np.linalg.norm(a)) * rng.standard_normal(a.shape) / np.sqrt(a.size) for a in x]
            critical += ", moved"
        if case == 3:
            size = 10.0 ** rng.uniform(-8, 1)
            x, critical = [size * a for a in x], "random"
        if not kind.get("use_bias", True):
            x[2] = 0 * x[2]
        points.append(x)
        kinds.append(critical)
    W, H, b = (np.stack(part) for part in zip(*points, strict=True))
    return Batch(shape, lams, W, H, b, kinds)


def _arrays(x: Params) -> list[np.ndarray]:
    return [np.asarray(x.W), np.asarray(x.H), np.asarray(x.b)]


def _found(shape: tuple, count: int, rng: np.random.Generator) -> Batch:
    """Unequal partition saddles and the saddles of a hunt, each turned and exchanged at random, exact or moved."""
    K, n, d, kind = shape
    base = []
    for load in (1e-4, 1e-2, 0.1, 0.4):
        s, ratio = load / (K * np.sqrt(n)), 10.0 ** rng.uniform(-1, 1)
        problem = balanced(K, n, d, lam_W=s * ratio, lam_H=s / ratio, **kind)
        found = [("partition saddle" if p.index else "optimum", p.params) for p in critical_points(problem)]
        for orbit in hunt(problem, 40, jax.random.key(int(rng.integers(1 << 30)))).new:
            x = orbit.params
            found.append(("saddle of no partition", Params(x.W, x.H @ problem.Y, x.b)))
        base += [(s * ratio, s / ratio, name, _arrays(x)) for name, x in found]
    points, kinds, lams = [], [], []
    for _ in range(count):
        lam_W, lam_H, name, (W, H, b) = base[int(rng.integers(len(base)))]
        Q, order = np.linalg.qr(rng.standard_normal((d, d)))[0], rng.permutation(K)
        columns = (order[:, None] * n + np.arange(n)).ravel()
        x = [(W @ Q)[order], (Q.T @ H)[:, columns], b[order]]
        if rng.integers(2):
            size, name = 10.0 ** rng.uniform(-16, -1), f"{name}, moved"
            x = [a + size * (1 + np.linalg.norm(a)) * rng.standard_normal(a.shape) / np.sqrt(a.size) for a in x]
        if not kind.get("use_bias", True):
            x[2] = 0 * x[2]
        points.append(x)
        kinds.append(name)
        lams.append((lam_W, lam_H))
    W, H, b = (np.stack(part) for part in zip(*points, strict=True))
    return Batch(shape, np.array(lams).T, W, H, b, kinds)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.classification"))
