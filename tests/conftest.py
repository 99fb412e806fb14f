"""float64 everywhere, and every annotated shape of the package checked at run time."""

import pathlib
import tempfile

import jax
import jaxtyping
import pytest
from jax._src import compiler

MAPS = 30_000  # of 65,530 that Linux allows

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jaxtyping.install_import_hook("ufm", "beartype.beartype")


def pytest_configure(config):
    """Programs compiled by one test serve all; their folder goes with the run, so that none depends on an earlier."""
    folder = getattr(config, "workerinput", {}).get("compiled")
    if folder is None:
        own = tempfile.TemporaryDirectory(prefix="ufm-compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(own.cleanup)
        folder = own.name
    config.compiled = folder
    jax.config.update("jax_compilation_cache_dir", folder)
    # a program that another worker has half written is compiled again
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


def pytest_configure_node(node):
    """Workers share the folder."""
    node.workerinput["compiled"] = node.config.compiled


def pytest_runtest_teardown():
    """Drop compiled programs before their memory maps reach the system's limit, where the compiler aborts."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
        jax.clear_caches()


@pytest.fixture
def unchecked():
    """No type checks at run time: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_a_user(tmp_path, monkeypatch, unchecked):
    """In an empty folder, without data and without type checks at run time."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("UFM_DATA", raising=False)


@pytest.fixture
def ufm(capsys, as_a_user):
    """Run a command here: exit status, standard output, standard error."""
    from ufm.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def hastily():
    """Compile without most optimisations, by the emitters that take half the time: for numbers with tolerances."""
    options, emitters = compiler.get_compile_options, {"xla_cpu_use_fusion_emitters": False}

    def hasty(*arguments, env_options_overrides=None, **settings):
        return options(*arguments, env_options_overrides=emitters | (env_options_overrides or {}), **settings)

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = hasty
    yield
    compiler.get_compile_options = options
    jax.config.update("jax_disable_most_optimizations", False)
