"""float64 everywhere, and every annotated shape of the package checked at run time."""

import pathlib

import jax
import jaxtyping
import pytest

MAPS = 30_000  # of 65,530 that Linux allows

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_enable_compilation_cache", False)  # no test depends on an earlier run
jaxtyping.install_import_hook("ufm", "beartype.beartype")


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
    """Compile without most optimisations: for what is run once to see that it runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
