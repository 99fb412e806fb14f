"""The optimisers people use, each as a function to descend on and a step, with its weight decay coupled or not."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key, PyTree

from ufm.model.problem import Params, Problem, check_integer, mean_loss, objective, penalty, sample_columns

MOMENTUM = 0.9


class Descent(NamedTuple):
    """What numerics.descend takes: a function and an optimiser, and whether the function draws."""

    fun: Partial
    optimiser: optax.GradientTransformation
    draws: bool = False


class Recipe(NamedTuple):
    """An optimiser by name.

    Attributes:
        step: from the learning rate (a number, a traced one or a schedule).
        coupled: whether the penalty's gradient enters the optimiser as f's does (coupled weight decay), or is added
            after it, as in AdamW (decoupled).
    """

    step: Callable[[Any], optax.GradientTransformation]
    coupled: bool = True


def _momentum(lr: Any, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.sgd(lr, MOMENTUM, nesterov)


OPTIMISERS = {
    "sgd": Recipe(optax.sgd),
    "momentum": Recipe(_momentum),
    "nesterov": Recipe(partial(_momentum, nesterov=True)),
    "sgdw": Recipe(_momentum, coupled=False),
    "adam": Recipe(optax.adam),
    "adamw": Recipe(optax.adam, coupled=False),
    "sign": Recipe(optax.sign_sgd),
    "signum": Recipe(partial(optax.signum, beta=MOMENTUM)),
    "signumw": Recipe(partial(optax.signum, beta=MOMENTUM), coupled=False),
    "muon": Recipe(optax.contrib.muon),
    "muonw": Recipe(optax.contrib.muon, coupled=False),
    "lbfgs": Recipe(optax.lbfgs),
}


def optimiser(problem: Problem, name: str, lr: Any = None, *, batch: int | None = None) -> Descent:
    """The optimiser of that name on the problem, with its λ's as weight decay.

    Coupled: the optimiser is given ∇f = ∇g + (λ_W W, λ_H H, λ_b b). Decoupled (sgdw, adamw, signumw, muonw): it is
    given ∇g, and every step subtracts lr·(λ_W W, λ_H H, λ_b b) besides. A fixed point of sgdw is then a critical point
    of the model with (1 − β) times these λ's, for its momentum sums gradients to ∇g/(1 − β); one of adamw, signumw or
    muonw is in general a critical point of no such model. Momentum is 0.9, Adam's β (0.9, 0.999), ε 1e-8; Muon is
    optax's (its momentum 0.95), with Adam for b; L-BFGS searches lines and needs no lr.

    Args:
        problem: the model.
        name: one of OPTIMISERS.
        lr: learning rate, which may be traced, or a schedule.
        batch: so many samples at random in every step (sample_columns) instead of all.

    Raises:
        ValueError: if there is no such optimiser, or lr is missing.

    Source: zhao2026 compares these couplings; AdamW is Loshchilov and Hutter's (2019).
    """
    if name not in OPTIMISERS:
        raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {name!r}")
    if (lr is None) != (name == "lbfgs"):
        raise ValueError(
            f"lr must be {'left out for lbfgs, which searches lines' if name == 'lbfgs' else f'given for {name}'}"
        )
    if isinstance(lr, int | float) and not 0 < lr < np.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if batch is not None:
        check_integer("batch", batch, at_least=1)
    recipe = OPTIMISERS[name]
    step = recipe.step(lr) if recipe.coupled else optax.chain(recipe.step(lr), _decay(problem, lr))
    f = objective if recipe.coupled else mean_loss
    fun = Partial(f, problem) if batch is None else Partial(partial(_on_sample, f, batch), problem)
    return Descent(fun, step, batch is not None)


def _on_sample(
    f: Callable[[Problem, Params], Array], batch: int, problem: Problem, x: Params, key: Key[Array, ""]
) -> Float[Array, ""]:
    return f(sample_columns(problem, key, batch), x)


def _decay(problem: Problem, lr: Any) -> optax.GradientTransformation:
    """Subtract lr times the penalty's gradient from the updates."""

    def update(updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree) -> tuple[PyTree, Any]:
        rate = lr(state.count) if callable(lr) else lr
        slope = jax.grad(partial(penalty, problem))(params)
        updates = jax.tree.map(lambda u, s: u - rate * s, updates, slope)
        return updates, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jax.numpy.zeros((), int)), update)
