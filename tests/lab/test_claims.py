"""Every claim of the registry holds, and none would hold of a theory that is a little wrong."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from ufm.lab import atlas as lab_atlas
from ufm.lab import grid as lab_grid
from ufm.lab import program
from ufm.lab.census import Census, Orbit
from ufm.lab.claims import REGISTRY, balanced, diagrams, dynamics, grid, imbalanced, landscape, saddles
from ufm.lab.claims.claim import Claim, check, claim
from ufm.model.problem import Params
from ufm.theory import atlas, certificate, duality, elimination, spectrum
from ufm.theory.orbits import point_of_logits

pytestmark = pytest.mark.usefixtures("hastily")  # `make verify` runs them as compiled for users


def _of(*residuals, tolerance=1e-6):
    def cases(full):
        yield from ((f"case {i}", residual) for i, residual in enumerate(residuals))

    return claim("name", "statement", "source", tolerance)(cases)


@pytest.mark.parametrize("claim", REGISTRY, ids=[claim.name for claim in REGISTRY])
def test_every_claim_holds_on_the_quick_grid(claim):
    evidence = check(claim)
    assert evidence.holds, evidence
    assert evidence.cases >= 4


def test_every_statement_of_the_specification_is_there():
    names = [claim.name for claim in REGISTRY]
    assert len(set(names)) == len(names)
    for statement in ("optimum", "Unique", "zero", "Balance", "gap is sound", "both sides", "Escape curvature",
                      "Origin's curvature", "Minority collapse", "SELI, logarithmically", "NC1 to NC4",
                      "Whole spectrum", "144 down, 99 flat", "Partition saddles", "index d(K−m)", "elimination",
                      "no partitions", "Steepest everywhere alike", "Escape times", "Terminal rate", "NC0",
                      "part on time", "decoupled decay"):  # fmt: skip
        assert any(statement in name for name in names), statement
    for found in REGISTRY:
        assert "THEORY" in found.source or "20" in found.source
        assert 0 <= found.tolerance < math.inf
        assert found.cases.__doc__


def test_evidence_is_the_worst_case_and_says_where_it_was():
    evidence = check(_of(1e-9, 3e-7, 2e-7))
    assert evidence.holds
    assert (evidence.cases, evidence.worst, evidence.worst_case) == (3, 3e-7, "case 1")
    assert evidence.seconds >= 0
    assert (evidence.name, evidence.statement, evidence.source) == ("name", "statement", "source")


@pytest.mark.parametrize("residual", [1e-6 * (1 + 1e-9), math.inf, math.nan, jnp.nan], ids=str)
@pytest.mark.parametrize("place", [0, 2])
def test_one_case_outside_the_tolerance_fails_the_claim(residual, place):
    residuals = [0.0, 0.0]
    residuals.insert(place, residual)
    evidence = check(_of(*residuals))
    assert not evidence.holds
    assert evidence.worst_case == f"case {place}"
    assert evidence.worst == (residual if residual < math.inf else math.inf)


def test_a_residual_at_the_tolerance_still_agrees():
    assert check(_of(1e-6)).holds
    assert check(_of(0.0, tolerance=0.0)).holds
    assert not check(_of(5e-324, tolerance=0.0)).holds


def test_a_claim_without_a_case_fails():
    evidence = check(_of())
    assert not evidence.holds
    assert evidence.cases == 0


@pytest.mark.parametrize("error", [ArithmeticError("optimum not certified"), ValueError("d too small")])
def test_a_claim_that_breaks_down_fails_and_says_why(error):
    def cases(full):
        yield "first", 0.0
        raise error

    evidence = check(Claim("name", "statement", "source", 1.0, cases))
    assert not evidence.holds
    assert evidence.cases == 2
    assert str(error) in evidence.worst_case


def test_an_interrupted_claim_is_no_evidence():
    def cases(full):
        yield "first", 0.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(Claim("name", "statement", "source", 1.0, cases))


def test_the_wide_grid_contains_the_quick_one_and_every_regime():
    def texts(full):
        return [text for text, _ in grid.balanced_problems(full)]

    assert set(texts(False)) < set(texts(True))
    shapes = grid.shapes(True)
    assert {2, 3} <= {K for K, *_ in shapes}
    assert any(n == 1 for _, n, *_ in shapes)
    assert {0, 1} <= {d - K + 1 for K, _, d, _ in shapes}  # d = K − 1 and d = K
    assert {frozenset(kind) for *_, kind in shapes} == {frozenset(), frozenset({"lam_b"}), frozenset({"use_bias"})}
    assert min(grid.LOADS) < 1e-3
    assert 1.0 in grid.LOADS
    assert max(grid.LOADS) > 1


def _scaled(factor):
    return lambda f: lambda *arguments: f(*arguments) * factor


def _shifted(amount):
    return lambda f: lambda *arguments: f(*arguments) + amount


def _swapped(f):
    return lambda *arguments, **options: f(*arguments, **options)[::-1]


def _moved(**factors):
    def mutate(f):
        def mutant(*arguments):
            x = f(*arguments)
            return dataclasses.replace(x, **{name: getattr(x, name) * factor for name, factor in factors.items()})

        return mutant

    return mutate


def _noisy(f):
    def mutant(problem, seed):
        x = f(problem, seed)
        return Params(x.W, x.H * (1 + 1e-4 * jax.random.normal(jax.random.key(0), x.H.shape)), x.b)

    return mutant


def _frame_moved(**factors):
    def mutate(f):
        def mutant(*arguments):
            frame = f(*arguments)
            return frame._replace(**{name: getattr(frame, name) * factor for name, factor in factors.items()})

        return mutant

    return mutate


def _points_moved(**factors):
    def mutate(f):
        def moved(point):
            return dataclasses.replace(point, **{name: getattr(point, name) * x for name, x in factors.items()})

        return lambda *arguments: tuple(moved(point) for point in f(*arguments))

    return mutate


def _first_scaled(factor):
    return lambda f: lambda *arguments: (f(*arguments)[0] * factor, *f(*arguments)[1:])


def _first_classes_moved(f):
    """The tied optimum with one row of W a millionth off."""

    def mutant(*arguments):
        x = f(*arguments)
        return Params(x.W.at[0].multiply(1 + 1e-6), x.H, x.b)

    return mutant


def _opposed_census(problem, starts, key):
    """What a hunt for three classes finds, by its closed form: two classes opposed, the third at zero (THEORY 8.4)."""
    p, kappa, e = landscape.opposed_norm.unbroken(problem), 3 * float(problem.s), jnp.array([1.0, -1, 0])
    p1, p2 = (2 - p - kappa) / 2, (kappa - p) / 2
    beta = math.log(p1 * p2 / p**2) / 2
    x = point_of_logits(problem, math.log(p1 / p2) / 2 * jnp.outer(e, e), beta * (e**2 - 2 / 3))
    signs = elimination.inertia(problem, x)
    found = Orbit(x, 0.0, 1, signs.negative, signs.zero, 0.0, ((0,), (1,), (2,)), False, 1)
    return Census(starts, 1, (found,), (), 0.0)


def _remembering(f):
    """A formula a millionth off that remembers the right one."""
    mutant = _scaled(1 + 1e-6)(f)
    mutant.unbroken = f
    return mutant


def _weighted(padded):
    return lambda *sizes, lam_W, **settings: padded(*sizes, lam_W=lam_W * (1 + 1e-9), **settings)


def _forget():
    jax.clear_caches()
    program._program.cache_clear()


TRACED = (certificate, duality, lab_grid)  # modules whose functions run compiled
MUTANTS = {
    "f* by 1e-9": (balanced.optimum_value, balanced, "balanced_value", _scaled(1 + 1e-9)),
    "W* by 1e-9": (balanced.optimum_certified, balanced, "balanced_minimiser", _moved(W=1 + 1e-9)),
    "W*, H* balance by 1e-6": (
        balanced.optimum_unique, balanced, "balanced_minimiser", _moved(W=1 + 1e-6, H=1 - 1e-6),
    ),
    "threshold by 1e-9": (balanced.zero_threshold, balanced, "collapse_threshold", _scaled(1 + 1e-9)),
    "minimiser's W by 1e-8": (balanced.balance, balanced, "solved", _moved(W=1 + 1e-8)),
    "eigenvalue by 1e-9": (balanced.origin_index, balanced, "dense_eigenvalues", _scaled(1 + 1e-9)),
    "features by 1e-4": (balanced.collapsed, balanced, "solved", _noisy),
    "gap of coarse ETFs by 1e-6": (saddles.two_sides, atlas, "margin", _scaled(1 + 1e-6)),
    "escape curvature by 1e-8": (saddles.escape_curvature, saddles, "predicted_curvature", _scaled(1 + 1e-8)),
    "minority threshold by 2e-5": (imbalanced.minority_collapse, imbalanced, "minority_threshold", _scaled(1 + 2e-5)),
    "margins by 0.03": (imbalanced.margin_law, imbalanced, "ridge_margins", _shifted(0.03)),
    "SELI's Gram": (imbalanced.seli_limit, imbalanced, "seli_grams", _swapped),
    "imbalanced threshold by 1e-9": (imbalanced.zero_threshold, imbalanced, "collapse_threshold", _scaled(1 + 1e-9)),
    "dual value by 1e-6": (saddles.gap_soundness, certificate, "dual_value", _first_scaled(1 + 1e-6)),
    "norm of ∇g by 1e-3": (saddles.gap_soundness, duality, "top_singular_pair", _first_scaled(0.999)),
    **{
        f"spectrum's {name} by 1e-6": (
            landscape.whole_spectrum, spectrum, "_frame", _frame_moved(**{name: 1 + 1e-6}),
        )
        for name in ("t", "p", "q", "theta", "s", "sigma")
    },
    "σ by 1e-6 at the threshold": (landscape.down_and_flat, spectrum, "_frame", _frame_moved(sigma=1 - 1e-6)),
    "the optimum by 1e-6": (landscape.down_and_flat, landscape, "coarse_etf", _moved(W=1 + 1e-6)),
    "f of partition saddles by 1e-6": (
        landscape.partition_saddles, landscape, "critical_points", _points_moved(value=1 + 1e-6),
    ),
    "partition saddles by 1e-6": (landscape.partition_saddles, lab_atlas, "_tied_optimum", _first_classes_moved),
    "κ* by 1e-6": (landscape.index_pattern, landscape, "index_threshold", _scaled(1 + 1e-6)),
    "Schur complement by 1e-6": (
        landscape.signs_by_elimination, elimination, "_accumulate", _first_scaled(1 + 1e-6),
    ),
    "norm of ∇g at the third saddle by 1e-6": (
        landscape.other_saddles, landscape, "opposed_norm", _remembering,
    ),
    "steepest curvature by 1e-6": (landscape.steepest_alike, landscape, "predicted_curvature", _scaled(1 + 1e-6)),
    "escape times by 2 %": (dynamics.escape_times, dynamics, "escape_steps", _scaled(1.02)),
    "terminal rate by 2 %": (dynamics.arrival, dynamics, "terminal_rate", _scaled(1.02)),
    "decay of NC0 by 1e-8": (dynamics.nc0_decay, dynamics, "log_factor", _scaled(1 + 1e-8)),
    "rate of parting by 4 %": (dynamics.parting, dynamics, "log_factor", _scaled(1.04)),
    "f* of the lighter model by 1e-8": (dynamics.decoupled_decay, dynamics, "optimal_value", _scaled(1 + 1e-8)),
    "λ_W of padded problems by 1e-9": (diagrams.padding, lab_grid, "padded", _weighted),
    "threshold of the diagram by 2": (diagrams.minority_diagram, diagrams, "minority_threshold", _scaled(2)),
    "the atlas's least eigenvalue by 1e-6": (
        landscape.steepest_alike, landscape, "critical_points", _points_moved(smallest_eigenvalue=1 + 1e-6),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("claim", "module", "name", "mutate"), MUTANTS.values(), ids=MUTANTS.keys())
def test_a_formula_a_little_off_is_noticed(monkeypatch, request, claim, module, name, mutate):
    monkeypatch.setattr(grid, "QUICK", ((3, 2, 3, {"lam_b": 1e-2}),))
    monkeypatch.setattr(imbalanced, "COUNTS", ([10, 10, 10, 1, 1],))
    monkeypatch.setattr(saddles, "_unequal_problems", tuple)
    monkeypatch.setattr(diagrams, "KINDS", {"free bias": {}})
    monkeypatch.setattr(landscape, "COUNTS", ([1, 1, 1],))
    monkeypatch.setattr(landscape, "EQUAL", ((3, 2, 3, {}),))
    monkeypatch.setattr(landscape, "hunt", _opposed_census)
    if module in TRACED:
        _forget()  # what was traced before would run unmutated, and what is traced now must not stay
        request.addfinalizer(_forget)
    monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    evidence = check(claim)
    assert not evidence.holds, evidence
