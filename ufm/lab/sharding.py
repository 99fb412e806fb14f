"""One big problem on many devices: everything that has a column per sample split over them, the rest on each."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from ufm.measure.features import Features
from ufm.model.problem import Params, Problem, class_mean_problem
from ufm.theory.certificate import check_point

AXIS = "samples"


def samples_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis "samples" over these devices, or over all there are, of every process.

    Raises:
        ValueError: if there are none.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("devices must list at least one device, got none; leave it out for all")
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def shard(problem: Problem, params: Params, mesh: Mesh) -> tuple[Problem, Params]:
    """The same problem and point with Y, ω and H split over their N columns and W, b and the λ's on every device.

    Whatever takes a problem and a point then runs on all devices, with the numbers of one up to the order of sums. An
    objective, a gradient, a Hessian product and a step of minimise or polish exchange W's gradient, K×d numbers, and
    nothing that has N of them; extreme_eigenpairs ravels H into vectors that are whole on every device. Under jit,
    problem and point must be arguments: closed over they would be constants, again whole on every device.

    With several processes each must hold the same whole problem and point; shard_local is for parts.

    Args:
        problem: with N columns, a multiple of the number of devices.
        params: a point of it.
        mesh: from samples_mesh.

    Raises:
        ValueError: if the devices cannot have equally many columns.
    """
    _check_divides(problem.Y.shape[1], mesh)
    whole, columns, entries = _shardings(mesh)
    everywhere: Any = jax.tree.map(lambda _: whole, (problem, params))
    split = lambda pair: (pair[0].Y, pair[0].multiplicity, pair[1].H)  # noqa: E731
    return jax.device_put((problem, params), eqx.tree_at(split, everywhere, (columns, entries, columns)))


def shard_local(features: Features, mesh: Mesh, *, lam_W: Any, lam_H: Any, lam_b: Any = 0.0) -> tuple[Problem, Params]:
    """The problem and point whose columns are those of all processes, in their order; none leaves its process.

    Every process calls it, with its own H and labels and with the same W, b and λ's. b = None is a model without bias.
    With one process this is shard of what problem_of_features makes.

    Args:
        features: H d×N_local and labels in 0..K−1; a class may be missing here but not everywhere.
        mesh: from samples_mesh.
        lam_W: λ_W.
        lam_H: λ_H per sample.
        lam_b: λ_b; ignored without b.

    Raises:
        ValueError: if a λ is out of range, shapes disagree, entries are not finite, a class has no sample anywhere, W,
            b and the λ's differ between processes, or not all devices can have equally many columns. What a process
            refuses in its own H and labels it refuses alone, while the others wait for it.
    """
    K, d, H, labels = _checked(features)
    tied = class_mean_problem([1] * K, d, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, use_bias=features.b is not None)
    sizes = np.ravel(process_allgather(np.asarray(labels.size)))
    if np.ptp(sizes):
        raise ValueError(f"H must have equally many columns in every process, got {sizes.tolist()}; move some")
    _check_divides(labels.size * len(sizes), mesh)
    whole, columns, entries = _shardings(mesh)
    dtype, join = jnp.result_type(float), jax.make_array_from_process_local_data
    shared = (tied, features.W, np.zeros(K) if features.b is None else features.b)
    tied, W, b = _everywhere(jax.tree.map(lambda x: np.asarray(x, dtype), shared), whole)
    own = join(columns, np.eye(K, dtype=dtype)[:, labels]), join(entries, np.ones(labels.size, dtype))
    problem = eqx.tree_at(lambda p: (p.Y, p.multiplicity), tied, own)
    if (missing := np.flatnonzero(np.asarray(problem.counts) == 0)).size:
        raise ValueError(f"labels have no sample of class {missing.tolist()} in any process; drop the class")
    params = Params(W, join(columns, H.astype(dtype)), b)
    check_point(problem, params)
    return problem, params


def _shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding, NamedSharding]:
    whole, columns, entries = (NamedSharding(mesh, spec) for spec in (Spec(), Spec(None, AXIS), Spec(AXIS)))
    return whole, columns, entries


def _everywhere(tree: Any, whole: NamedSharding) -> Any:
    try:
        return jax.device_put(tree, whole)
    except AssertionError:  # by which JAX says that the processes passed different values
        raise ValueError("W, b and the λ's must be finite and the same in every process; send them from one") from None


def _check_divides(N: int, mesh: Mesh) -> None:
    if N % mesh.size:
        most = max(count for count in range(1, mesh.size) if N % count == 0)
        raise ValueError(
            f"N = {N} columns cannot be split equally over {mesh.size} devices; "
            f"take {most}, as in samples_mesh(devices[:{most}])"
        )


def _checked(features: Features) -> tuple[int, int, np.ndarray, np.ndarray]:
    H, labels = np.asarray(features.H), np.asarray(features.labels)
    if np.ndim(features.W) != 2:
        raise ValueError(f"W has shape {np.shape(features.W)}, but must be K×d with a row for each class")
    K, d = np.shape(features.W)
    if H.ndim != 2 or H.shape[0] != d:
        raise ValueError(f"H has shape {H.shape}, but must be d×N with d = {d}, the width of W")
    if labels.shape != H.shape[1:] or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be {H.shape[1]} integers, one a column of H, got {labels.dtype}{labels.shape}")
    if (outside := labels[(labels < 0) | (labels >= K)]).size:
        raise ValueError(f"labels hold {outside[0]}: number the classes of W from 0 to K−1 = {K - 1}")
    return K, d, H, labels
