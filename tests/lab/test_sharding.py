"""Eight devices give the numbers of one, hold an eighth of H each, and exchange nothing that has a column a sample."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.compare import problem_of_features
from ufm.lab.optimum import global_minimiser
from ufm.lab.sharding import samples_mesh, shard, shard_local
from ufm.lab.sweep import sweep
from ufm.measure.features import Features
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, balanced, init, objective
from ufm.numerics.curvature import hessian_operator
from ufm.numerics.eigenpairs import extreme_eigenpairs
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish
from ufm.theory.certificate import Verdict, certify

DEVICES = 8
COUNTS, D = (32, 16, 10, 6), 5
K, N = len(COUNTS), sum(COUNTS)
ORDER = 1e-12  # relative: sums of some 100 terms in another order differ by 100 eps of their size, less than 1e-13
HANG = 100  # seconds after which a process counts as hung
COMMUNICATION = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
GRAD = jax.grad(objective, argnums=1)


def example():
    """Unequal classes and columns that stand for one, two or three samples, with a free bias."""
    Y = np.repeat(np.eye(K), COUNTS, axis=1)
    problem = Problem(Y, 1.0 + np.arange(Y.shape[1]) % 3, CrossEntropy(), 5e-3, 2e-3, 0.0, D, True)
    draw = np.random.default_rng(0).normal
    return problem, Params(*(jnp.asarray(draw(size=size) / 2) for size in ((K, D), (D, N), K)))


def numbers(problem, x):
    """What can be computed of a problem and a point, by name."""
    fun = functools.partial(objective, problem)
    value, gradient = jax.jit(jax.value_and_grad(objective, argnums=1))(problem, x)
    product = hessian_operator(fun, x)
    end = polish(fun, minimise(fun, x, tol=1e-7).params)
    start, optimum = certify(problem, x), certify(problem, end.params)
    return {
        "objective": value,
        **{f"gradient_{name}": value for name, value in vars(gradient).items()},
        **{f"product_{name}": value for name, value in vars(product(x)).items()},
        "minimum": end.value,
        "certificate": [start.value, start.gap, start.dual_norm, start.grad_norm],
        "lower_bound": optimum.value - optimum.gap,
        "dual_norm": optimum.dual_norm,
        "verdicts": [start.code, optimum.code],
        "eigenvalues": extreme_eigenpairs(product, x, 2, "smallest", jax.random.key(1)).eigenvalues,
    }


def swept():
    """f* and ‖∇_Z g‖₂ over a grid of 15 cells, which eight devices do not divide."""
    grid = {"K": [2, 4, 5], "lam_W": np.geomspace(1e-4, 1, 5), "lam_H": 1e-2, "n": 3, "d": D}
    cell = lambda p: {"f": (c := certify(p, global_minimiser(p))).value, "norm": c.dual_norm}  # noqa: E731
    found = sweep(cell, grid, pad=True, method="map")
    assert (found.status == 1).all()
    return np.stack([found.f, found.norm])


def most_exchanged(function, *arguments):
    """The most numbers that devices tell one another at once."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = [re.findall(r"f64\[([\d,]*)\]", result) for result in re.findall(COMMUNICATION, text)]
    return max(sum(np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in one) for one in shapes)


def run(path):
    """Everything on eight devices, into a file."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    problem, x = shard(*example(), samples_mesh())
    end = minimise(functools.partial(objective, problem), x, max_steps=1)
    split = (problem.Y, problem.multiplicity, x.H, jax.jit(GRAD)(problem, x).H, end.params.H)
    product = lambda p, x, v: jax.jvp(functools.partial(GRAD, p), (x,), (v,))[1]  # noqa: E731
    ragged = balanced(3, 10, D, lam_W=1, lam_H=1)
    try:
        shard(ragged, init(ragged, jax.random.key(0)), samples_mesh())
    except ValueError as error:
        refusal = str(error)
    np.savez(
        path,
        widths=[part.data.shape[-1] for leaf in split for part in leaf.addressable_shards],
        exchanged=[most_exchanged(f, problem, *p) for f, p in ((objective, [x]), (GRAD, [x]), (product, [x, x]))],
        refusal=refusal,
        swept=swept(),
        **numbers(problem, x),
    )


def test_eight_devices_give_the_numbers_of_one(tmp_path):
    path = tmp_path / "eight.npz"
    with subprocess.Popen([sys.executable, __file__, str(path)]) as eight:
        try:
            one = numbers(*example()) | {"swept": swept()}
            assert eight.wait(timeout=HANG) == 0
        finally:
            eight.kill()
    with np.load(path) as found:
        for name, value in one.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=ORDER * np.abs(value).max(), err_msg=name)
        assert found["verdicts"].tolist() == [Verdict.NOT_CRITICAL, Verdict.GLOBAL]
        assert set(found["widths"]) == {N // DEVICES}
        assert (found["exchanged"] <= [3, K * D + K + 1, 2 * K * D + K]).all()  # nothing that grows with N
        assert str(found["refusal"]) == (
            "N = 30 columns cannot be split equally over 8 devices; take 6, as in samples_mesh(devices[:6])"
        )


# One process with one device: the same calls


FEATURES = Features(np.random.default_rng(0).normal(size=(3, 6)), np.arange(6) % 4, np.ones((4, 3)), np.ones(4))


@pytest.mark.parametrize("b", [np.ones(4), None])
def test_one_process_makes_the_problem_of_its_features(b):
    features = Features(FEATURES.H, FEATURES.labels, FEATURES.W, b)
    shared = shard_local(features, samples_mesh(), lam_W=0.1, lam_H=0.2, lam_b=0.3)
    alone = problem_of_features(features, lam_W=0.1, lam_H=0.2, lam_b=0.3)
    assert jax.tree.structure(shared) == jax.tree.structure(alone)
    for left, right in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"H": FEATURES.H.T}, r"H has shape \(6, 3\), but must be d×N with d = 3"),
        ({"labels": FEATURES.labels[:5]}, r"labels must be 6 integers, one a column of H, got int64\(5,\)"),
        ({"labels": FEATURES.labels * 1.0}, r"labels must be 6 integers, one a column of H, got float64\(6,\)"),
        ({"labels": FEATURES.labels + 1}, "labels hold 4: number the classes of W from 0 to K−1 = 3"),
        ({"labels": FEATURES.labels // 2}, r"labels have no sample of class \[2, 3\] in any process; drop the class"),
        ({"W": FEATURES.W[0]}, r"W has shape \(3,\)"),
        ({"b": np.ones(3)}, r"b must have shape \(4,\)"),
        ({"b": np.full(4, np.nan)}, "b must be finite"),
        ({"H": FEATURES.H * np.inf}, "H must be finite"),
    ],
)
def test_bad_features_are_named_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        shard_local(Features(**{**vars(FEATURES), **change}), samples_mesh(), lam_W=0.1, lam_H=0.2)
    assert "\n" not in str(error.value)


def test_a_mesh_needs_a_device():
    with pytest.raises(ValueError, match=r"^devices must list at least one device, got none; leave it out for all$"):
        samples_mesh([])


if __name__ == "__main__":
    run(sys.argv[1])
