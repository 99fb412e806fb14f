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

    One product at a point of the features model costs six matrix products, the fewest there can be: the two factors'
    first and second occurrence forwards and backwards; what depends on params alone is computed here.

    Args:
        fun: a scalar function, twice differentiable; pass data as functools.partial(fun, data).
        params: a pytree of finite floating arrays.

    Raises:
        ValueError: if fun is not scalar, or params hold what is not a finite floating number.
    """
    fun = as_pytree_function(fun)
    check_point(params)
    shape = jax.tree.map(jnp.shape, jax.eval_shape(fun, params))
    if shape != ():
        raise ValueError(f"fun must return one scalar, got shape {shape}; sum or average it")
    return _linearised(fun, params)


@jax.jit
def _linearised(fun: Partial, params: PyTree) -> Any:
    return jax.linearize(jax.grad(fun), params)[1]  # a Partial, which jit returns with its arrays as leaves


def check_point(point: PyTree, name: str = "params") -> None:
    """ValueError unless the leaves are finite floating arrays; traced values are not looked at."""
    if not jax.tree.leaves(point):
        raise ValueError(f"{name} must hold at least one array, got {point!r}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(point):
        where = name + jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{where} must be floating, got {jnp.result_type(leaf)}; cast it")
        if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(leaf).all():
            raise ValueError(f"{where} must be finite; it holds NaN or infinity")


def flat_operator(matvec: Callable[[PyTree], PyTree], like: PyTree) -> Partial:
    """The operator on the flattened pytree; a pytree itself.

    Raises:
        ValueError: if matvec does not map pytrees like this one to their like.
    """
    matvec = as_pytree_function(matvec)
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)  # noqa: E731
    if (got := shapes(jax.eval_shape(matvec, like))) != (want := shapes(like)):
        raise ValueError(f"matvec must return what it takes, {want}; got {got}")
    return Partial(_flat_product, matvec, like)


def _flat_product(matvec: Partial, like: PyTree, v: Array) -> Array:
    return ravel_pytree(matvec(ravel_pytree(like)[1](v)))[0]


def check_symmetric(operator: Callable[[Array], Array], like: Array, key: Key[Array, ""]) -> None:
    """ValueError unless the flat operator is finite and ⟨u, Av⟩ = ⟨Au, v⟩ up to rounding, u and v random."""
    u, v = jax.random.normal(key, (2, *like.shape), like.dtype)
    Au, Av = np.asarray(_apply(operator, u)), np.asarray(_apply(operator, v))
    if not np.isfinite(Au).all() & np.isfinite(Av).all():
        raise ValueError("matvec must return finite numbers; it returned NaN or infinity on a random vector")
    defect: Any = abs(np.vdot(u, Av) - np.vdot(Au, v))
    size = np.linalg.norm(Au) * np.linalg.norm(v) + np.linalg.norm(u) * np.linalg.norm(Av)
    if defect > SYMMETRY * jnp.finfo(like.dtype).eps * size:
        raise ValueError(
            f"matvec must be symmetric: ⟨u, Av⟩ and ⟨Au, v⟩ differ by {defect:.1e} on random vectors; symmetrise it"
        )


@jax.jit
def _apply(operator: Partial, v: Array) -> Array:
    return operator(v)
