"""The Hessian of any scalar function of any pytree as an operator, and what is asked of an operator."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key, PyTree

from ufm.numerics.minimise import as_pytree_function

SYMMETRY = 1e3  # how many roundings of ‖Au‖‖v‖ may lie between ⟨u, Av⟩ and ⟨Au, v⟩


def hessian_operator(fun: Callable[[PyTree], Float[Array, ""]], params: PyTree) -> Partial:
    """v ↦ ∇²fun(params) v, linearised once; a pytree, so that jitted code compiles once per function and shapes.

    One product at a point of the features model costs six matrix products: both factors' movements forwards, four ways
    backwards. What depends on params alone is computed here.

    Args:
        fun: a scalar function, twice differentiable; pass arrays of data as functools.partial(fun, data), anything else
            by a lambda.
        params: a pytree of finite floating arrays.

    Raises:
        ValueError: if fun is not scalar, or params hold what is not a finite floating number.
    """
    fun = as_pytree_function(fun)
    check_point(params)
    value = jax.eval_shape(fun, params)
    if jax.tree.map(jnp.shape, value) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"fun must return one floating scalar, got {value}; sum or average it")
    return _linearised(fun, params)


@jax.jit
def _linearised(fun: Partial, params: PyTree) -> Any:
    return jax.linearize(jax.grad(fun), params)[1]  # a Partial, which jit returns with its arrays as leaves


def check_point(point: PyTree, name: str = "params") -> None:
    """ValueError unless the leaves are finite floating arrays; traced values are not looked at."""
    check_floating(point, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(point):
        finite = jnp.isfinite if isinstance(leaf, jax.Array) else np.isfinite  # on the devices that hold it
        if not isinstance(leaf, jax.core.Tracer) and not finite(leaf).all():
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be finite; it holds NaN or infinity")


def check_floating(tree: PyTree, name: str) -> None:
    """ValueError unless there are leaves and all are float32 or float64."""
    if not sum(np.size(leaf) for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"{name} must hold at least one number, got {tree!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.result_type(leaf) not in (jnp.float32, jnp.float64):
            where = name + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be floating (float32 or float64), got {jnp.result_type(leaf)}; cast it")


def flat_operator(matvec: Callable[[PyTree], PyTree], like: PyTree) -> Partial:
    """The operator on the flattened pytree; a pytree itself.

    Raises:
        ValueError: if this is no pytree of floating arrays, or matvec does not map its like to their like.
    """
    check_floating(like, "like")
    matvec = as_pytree_function(matvec)
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)  # noqa: E731
    if (got := shapes(jax.eval_shape(matvec, like))) != (want := shapes(like)):
        raise ValueError(f"matvec must return what it takes, {want}; got {got}")
    return Partial(_flat_product, matvec, like)


def _flat_product(matvec: Partial, like: PyTree, v: Array) -> Array:
    return ravel_pytree(matvec(ravel_pytree(like)[1](v)))[0]


def check_symmetric(operator: Callable[[Array], Array], like: Array, key: Key[Array, ""], *, eps: float) -> float:
    """The size of the operator's largest numbers on random u and v, once it is seen to be symmetric.

    Args:
        operator: on flat vectors.
        like: such a vector.
        key: draws u and v.
        eps: the rounding unit of its arithmetic.

    Raises:
        ValueError: if what it returns is not finite, or ⟨u, Av⟩ and ⟨Au, v⟩ differ by more than rounding.
    """
    u, v = jax.random.normal(key, (2, *like.shape), like.dtype)
    Au, Av = np.asarray(_apply(operator, u)), np.asarray(_apply(operator, v))
    if not np.isfinite(Au).all() & np.isfinite(Av).all():
        raise ValueError("matvec must return finite numbers; it returned NaN or infinity on a random vector")
    largest = max(np.abs(Au).max(), np.abs(Av).max())
    if not largest:
        return 0.0
    Au, Av = Au / largest, Av / largest  # whose squares neither vanish nor overflow
    defect: Any = abs(np.vdot(u, Av) - np.vdot(Au, v))
    size = np.linalg.norm(Au) * np.linalg.norm(v) + np.linalg.norm(u) * np.linalg.norm(Av)
    if defect > SYMMETRY * eps * size:
        raise ValueError(
            f"matvec must be symmetric: ⟨u, Av⟩ and ⟨Au, v⟩ differ by {defect:.1e} of their size; symmetrise it"
        )
    return float(largest)


def rounding_unit(like: PyTree) -> float:
    """eps of the coarsest leaf."""
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(like))


@jax.jit
def _apply(operator: Partial, v: Array) -> Array:
    return operator(v)


def check_count(name: str, count: Any) -> None:
    """ValueError unless it is an integer of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
