"""Two processes, each with its own columns of H and no others, get the numbers of one that has them all."""

import contextlib
import functools
import socket
import subprocess
import sys

import jax
import numpy as np

from ufm.lab.compare import problem_of_features
from ufm.lab.sharding import samples_mesh, shard_local
from ufm.measure.features import Features
from ufm.model.problem import objective
from ufm.numerics.curvature import hessian_operator
from ufm.numerics.minimise import minimise
from ufm.theory.certificate import certify

PROCESSES, DEVICES = 2, 2
COUNTS, D = (14, 9, 6, 3), 4  # in class order: no process has a sample of every class
LAMS = {"lam_W": 5e-3, "lam_H": 2e-3, "lam_b": 1e-2}
ORDER = 1e-12  # relative: sums of some 50 terms in another order differ by 50 eps of their size, about 1e-14
HANG = 100  # seconds after which a process counts as hung


def features():
    """All samples, and a classifier."""
    draw = np.random.default_rng(0).normal
    K, N = len(COUNTS), sum(COUNTS)
    labels = np.repeat(np.arange(K), COUNTS)
    return Features(draw(size=(D, N)) / 2, labels, draw(size=(K, D)) / 2, draw(size=K) / 2)


def numbers(problem, x):
    """What every process can read: scalars, W's part of a gradient and of a Hessian product."""
    fun = functools.partial(objective, problem)
    value, gradient = jax.jit(jax.value_and_grad(objective, argnums=1))(problem, x)
    product = hessian_operator(fun, x)(gradient)
    start, end = certify(problem, x), minimise(fun, x, tol=1e-8)
    return {
        "objective": value,
        "gradient_W": gradient.W,
        "product_W": product.W,
        "product_b": product.b,
        "certificate": np.array([start.value, start.gap, start.dual_norm, start.grad_norm, start.code], float),
        "minimum": end.value,
        "converged": end.converged,
    }


def refusal(H, labels, W, mesh):
    try:
        shard_local(Features(H, labels, W, None), mesh, **LAMS)
    except ValueError as error:
        return str(error)
    return "none"


def run(path, rank, port):
    """One of the processes, into a file."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, rank, initialization_timeout=HANG)
    whole, mesh = features(), samples_mesh()
    H, labels = (np.split(part, PROCESSES, axis=-1)[rank] for part in (whole.H, whole.labels))
    problem, x = shard_local(Features(H, labels, whole.W, whole.b), mesh, **LAMS)
    refusals = {
        "ragged": refusal(H[:, rank:], labels[rank:], whole.W, mesh),
        "odd": refusal(H[:, 1:], labels[1:], whole.W, mesh),
        "missing": refusal(H, 0 * labels, whole.W, mesh),
        "differing": refusal(H, labels, whole.W + rank, mesh),
    }
    np.savez(
        path,
        widths=[part.data.shape[1] for part in x.H.addressable_shards],
        **numbers(problem, x),
        **refusals,
    )
    jax.distributed.shutdown()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_get_the_numbers_of_one(tmp_path):
    paths, port = [tmp_path / f"{rank}.npz" for rank in range(PROCESSES)], free_port()
    processes = []
    with contextlib.ExitStack() as stack:
        for rank, path in enumerate(paths):
            process = subprocess.Popen([sys.executable, __file__, str(path), str(rank), str(port)])
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        one = numbers(*problem_of_features(features(), **LAMS))
        assert [process.wait(timeout=HANG) for process in processes] == [0] * PROCESSES
    for path in paths:
        with np.load(path) as found:
            for name, value in one.items():
                tolerance = ORDER * np.abs(value).max()
                np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)
            assert found["widths"].tolist() == [8, 8]
            assert str(found["ragged"]) == "H must have equally many columns in every process, got [16, 15]; move some"
            assert str(found["odd"]).startswith("N = 30 columns cannot be split equally over 4 devices; take 3")
            assert str(found["differing"]).startswith("W, b and the λ's must be finite and the same in every process")
            assert str(found["missing"]) == "labels have no sample of class [1, 2, 3] in any process; drop the class"


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3])
