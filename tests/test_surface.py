"""The public surface: the names, their first sentences, and what importing them costs."""

import inspect
import subprocess
import sys

import pytest

import ufm

NAMES = {
    "Certificate", "Classification", "Collapse", "CriticalPoint", "CrossEntropy", "Eigenpairs", "Fate",
    "Features", "Flow", "Inertia", "Loss", "Method", "Params", "Problem", "Separation", "Solution",
    "SpectralDensity", "Spectrum", "Status", "Trajectory", "Verdict", "balanced", "certify",
    "certify_stream", "class_mean_problem", "classify", "coarse_etf", "collapse_metrics",
    "collapse_metrics_stream", "collapse_threshold", "compare", "critical_points", "descend",
    "eigenvector", "escape_steps", "escape_time", "extreme_eigenpairs", "global_minimiser",
    "gradient_flow", "hessian_operator", "hessian_spectrum", "imbalanced", "inertia", "init", "lanczos",
    "load_features", "minimise", "objective", "optimal_value", "padded", "polish", "problem_of_features",
    "samples_mesh", "save_features", "separation", "shard", "shard_local", "simplex_etf",
    "spectral_density", "step_limit", "steps_to_gap", "sweep", "terminal_rate", "tie_features",
}  # fmt: skip


def public():
    """What `from ufm import name` offers, submodules aside."""
    return [name for name, value in vars(ufm).items() if not (name.startswith("_") or inspect.ismodule(value))]


def test_the_public_names_are_exactly_these():
    assert set(public()) == NAMES


def test_no_public_name_is_a_module_of_its_own():
    """Submodules show up as attributes once imported; none may hide a function."""
    assert not [name for name in NAMES if inspect.ismodule(getattr(ufm, name))]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_opens_with_a_sentence(name):
    first = inspect.getdoc(getattr(ufm, name)).splitlines()[0]
    assert first.endswith(".")
    assert len(first) <= 120


@pytest.mark.parametrize("name", sorted(name for name in NAMES if inspect.isfunction(getattr(ufm, name))))
def test_every_public_function_is_annotated(name):
    signature = inspect.signature(getattr(ufm, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def fresh(code):
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_ufm_imports_no_network_and_no_figures():
    heavy = ("flax", "matplotlib", "orbax", "sklearn", "cvxpy", "torch", "flint")
    assert fresh(f"import sys, ufm; print([name for name in {heavy} if name in sys.modules])").strip() == "[]"


def test_importing_ufm_neither_starts_jax_nor_sets_its_precision():
    code = "import jax, ufm; x64 = jax.config.jax_enable_x64; jax.config.update('jax_num_cpu_devices', 3)"
    assert fresh(f"{code}; print(x64, jax.device_count('cpu'))").split() == ["False", "3"]
