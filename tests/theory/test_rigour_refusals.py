"""What a proof refuses: traced numbers, points of another shape, a missing library."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from ufm.model.problem import Params, balanced, init
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser

SHAPE = (4, 4, 5)
WORKED = balanced(*SHAPE, lam_W=5e-3, lam_H=2e-3)
prove = functools.partial(certify, rigorous=True)


def test_traced_numbers_are_refused(unchecked):
    x = balanced_minimiser(WORKED)
    cases = {
        "W": lambda y: prove(WORKED, y),
        "lam_W": lambda y: prove(balanced(*SHAPE, lam_W=y.W[0, 0], lam_H=1e-3), x),
    }
    for name, case in cases.items():
        with pytest.raises(
            ValueError, match=f"^rigorous=True needs concrete numbers, but {name} is traced; certify outs"
        ):
            jax.jit(case)(x)
    for name in ("tol", "grad_tol"):
        with pytest.raises(
            ValueError, match=f"^rigorous=True needs concrete numbers, but {name} is traced; certify outs"
        ):
            jax.vmap(lambda t, name=name: prove(WORKED, x, **{name: t}))(jnp.ones(2))
    with pytest.raises(ValueError, match="but certify is traced"):
        jax.jit(lambda _: prove(WORKED, x))(0.0)


def test_without_flint_the_module_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        prove(WORKED, balanced_minimiser(WORKED))
    assert missing.value.name == "flint"
    assert certify(WORKED, balanced_minimiser(WORKED)).verdict == Verdict.GLOBAL


def test_points_are_checked_as_ever():
    x = init(WORKED, jax.random.key(0))
    with pytest.raises(ValueError, match=r"^W must be finite"):
        prove(WORKED, Params(x.W.at[0].set(jnp.nan), x.H, x.b))
    with pytest.raises(ValueError, match=r"^H must have shape \(5, 16\) for this problem"):
        prove(WORKED, Params(x.W, x.H[:, :3], x.b))
