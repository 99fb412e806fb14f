"""Kills, writers at once, a full disk and a read-only one, all real: bitwise what an undisturbed run writes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import zarr  # noqa: F401 (before the forks, which then start at once)

from ufm.lab.sweep import sweep

KILLS, STORES, WRITERS = 20, 4, 2
HANG = 300  # seconds after which a process counts as hung
GRID = {"x": (np.arange(30) / 30).tolist(), "kind": ["a", "bc"]}
BATCH, BLOCKS = 4, 16
NOISE = {"x": np.arange(60.0), "power": 2}  # 16 kB that do not compress in every cell
control = {"delay": 0.0}


def cell(settings):
    """Numbers, an array, a NaN and an error, after a delay."""
    x, kind = settings["x"], settings["kind"]
    time.sleep(control["delay"])
    if x == 0.5:
        raise ArithmeticError(f"no {kind} at one half")
    return {"square": x**2 if x != 0.1 else np.nan, "pair": np.array([x, len(kind)]), "long": x > 0.3}


def noise(settings):
    return jax.random.normal(jax.random.key(settings["x"].astype(int)), (2000,)) ** settings["power"]


def run(folder, *, swept=cell, grid=GRID, make=dict, method="python", batch_size=BATCH, **options):
    return sweep(swept, grid, make=make, method=method, batch_size=batch_size, store=folder, **options)


def files(folder):
    """The content of every file but summaries and what a killed writer left unfinished beside them."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != "summary.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.suffix not in (".part", ".partial")}


def marks(folder):
    return len(list(folder.glob("done/*.json")))


def child(*command):
    """What this file prints when run with these arguments."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    if done.returncode and done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forked(folder, seconds_a_cell):
    """Another process at work on the store."""
    if pid := os.fork():
        return pid
    control["delay"] = seconds_a_cell
    with contextlib.suppress(BaseException):
        run(folder)
        os._exit(0)
    os._exit(1)


def kill_at_random(folders):
    """Marks in every store after each kill: half of them while a run starts, half after it has kept a block or more."""
    draw, found = random.Random(0), {folder.name: [] for folder in folders}
    for i in range(KILLS):
        folder = folders[i % STORES]
        before, pid = marks(folder), forked(folder, 0.02)
        at_work = i // STORES % 2
        while at_work and marks(folder) == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2 if at_work else 0.6))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        found[folder.name].append(marks(folder))
    return found


def write_together(folder):
    """Exit codes of processes that write one store at the same time."""
    pids = [forked(folder, 0.001) for _ in range(WRITERS)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def attack(folder):
    """The imports are done once, before the forks, and JAX has started no thread by then."""
    folders = [folder / f"killed{i}" for i in range(STORES)]
    killed = kill_at_random(folders)
    together = [write_together(folder / f"together{i}") for i in range(2)]
    for unfinished in (*folders, folder / "whole"):
        run(unfinished)
    return {"killed": killed, "together": together}


def test_kills_at_random_moments_and_writers_at_once(tmp_path):
    found = child(sys.executable, __file__, "attack", str(tmp_path))
    for counts in found["killed"].values():
        assert counts == sorted(counts)  # what was kept stays
        assert 0 < counts[-1] < BLOCKS
    assert found["together"] == [[0] * WRITERS] * 2
    stores = [folder for folder in tmp_path.iterdir() if not folder.name.endswith(".part")]  # what a kill left unnamed
    for folder in stores:
        assert files(folder) == files(tmp_path / "whole")
    assert len(stores) == STORES + 3


def refusal(*arguments, **options):
    try:
        run(*arguments, **options)
    except ValueError as error:
        return str(error)
    return "none"


def mount(option, folder):
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def fill_up(disk):
    """On a disk of 1 MB: full when a store is made and in the middle of a sweep; then with space; then read only."""
    noisy = {"swept": noise, "grid": NOISE, "method": "map"}
    found = {"middle": refusal(disk / "store", **noisy), "marks": marks(disk / "store")}
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(1024)):
            pass
    found["new"], found["left"] = refusal(disk / "new"), sorted(path.name for path in disk.iterdir())
    mount("size=16m", disk)
    ds, plain = run(disk / "store", **noisy).load(), run(None, **noisy)
    found["computed"], found["same"] = json.loads(ds.computed), bool((ds.value == plain.value).all())
    shutil.copytree(disk / "store", disk / "unfinished")
    (disk / "unfinished" / "done" / "3.json").unlink()
    mount("ro", disk)
    found["opened"] = bool((run(disk / "store", **noisy).value == plain.value).all())
    found["readonly"], found["elsewhere"] = refusal(disk / "unfinished", **noisy), refusal(disk / "new")
    return found


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to mount a small disk with")
def test_a_full_disk_and_a_read_only_one(tmp_path):
    script = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    (tmp_path / "disk").mkdir()
    disk = str(tmp_path / "disk")
    found = child("unshare", "-rm", "sh", "-c", script, disk, sys.executable, __file__, "fill_up", disk)
    for name, where, why in [
        ("middle", "store", "No space left on device"),
        ("new", "new", "No space left on device"),
        ("readonly", "unfinished", "Read-only file system"),
        ("elsewhere", "new", "Read-only file system"),
    ]:
        assert f"{disk}/{where}" in found[name]
        assert why in found[name]
        assert "\n" not in found[name]
    assert 0 < found["marks"] < 15  # of 15 blocks
    assert found["left"] == ["filler", "store"]
    assert found["computed"] == 60 - found["marks"] * BATCH
    assert found["same"]
    assert found["opened"]


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps({"attack": attack, "fill_up": fill_up}[sys.argv[1]](Path(sys.argv[2]))))
