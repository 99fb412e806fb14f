"""Bad input to the command `ufm` is one line that names it, exit 2, and leaves no trace."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ufm import cli
from ufm.measure.features import Features
from ufm.model.problem import balanced
from ufm.theory.optimum import balanced_minimiser

pytestmark = pytest.mark.usefixtures("hastily")

FLAGS = "--limit 20 --batch 10 --epochs 1 --width 1 --d 10 --regulariser features --lam-W 5e-3"


def _tree(folder="."):
    """Every path below a folder, with the bytes of files."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


# Bad input: the command, and what its one line must say.

SOLVE = "solve --K 3 --n 2 --d 3 --out new"
CERTIFY, MEASURE = "certify good.npz --lam-W 5e-3 --out new", "measure good.npz --out new"
CLASSIFY = CERTIFY.replace("certify", "classify")
LANDSCAPE = "landscape --K 2 --n 1 --d 2 --hunt 0 --out new"
TRAIN = f"train new {FLAGS}"
BAD = {
    **{f"{SOLVE} --lam-W {value}": "lam_W must be positive" for value in (0, -1, "nan", "inf")},
    **{f"{SOLVE} --lam-H {value}": "lam_H must be positive" for value in (0, "-1e-3", "nan", "inf")},
    **{f"{SOLVE} --lam-b {value}": "lam_b must be zero .* or positive" for value in ("-1", "nan", "inf")},
    **{f"{SOLVE} --K {value}": "K must be an integer of at least 2" for value in (1, 0, -3)},
    **{f"{SOLVE} --n {value}": "n must be an integer of at least 1" for value in (0, -1)},
    **{f"{SOLVE} --counts {value}": "counts must" for value in ("3", "3 0", "3 -1", "1 2 0")},
    **{f"{SOLVE} --counts {value}": "counts.*see --help" for value in ("1.5 2", "nan 1", "a b")},
    f"{SOLVE} --d 1": "d must be at least K - 1 = 2",
    f"{SOLVE} --d 0": "d must be an integer of at least 1",
    f"{SOLVE} --counts 5 2 1 --d 1": "d must be at least K - 1 = 2",
    f"{SOLVE} --K three": "--K.*'three'.*see --help",
    f"{SOLVE} --width 3": "--width.*see --help",
    "solve --K 3 --n 2 --d 3 --out taken": "taken exists already: a run is never overwritten, name another",
    "solve --K 3 --n 2 --d 3 --out good.npz": "good.npz exists already",
    "solve --K 3 --n 2 --d 3 --out good.npz/run": "good.npz/run cannot be made .*: name a writable one",
    "certify good.npz": "--lam-W.*see --help",
    f"{CERTIFY} --lam-W 0": "lam_W must be positive",
    f"{CERTIFY} --lam-W nan --lam-H 1e-3": "lam_W must be positive",
    f"{CERTIFY} --lam-H 0": "lam_H must be positive",
    f"{CERTIFY} --lam-b -1": "lam_b must be",
    "certify good.npz --lam-W 5e-3 --out taken": "taken exists already",
    "certify good.npz --lam-W 5e-3 --out good.npz/run": "cannot be made",
    "certify flat.npz --lam-W 5e-3 --out new": "d must be at least K - 1 = 2",
    "certify zero.npz --lam-W 5e-3 --out new": "to imply lam_H",
    "classify good.npz": "--lam-W.*see --help",
    f"{CLASSIFY} --lam-W 0": "lam_W must be positive",
    f"{CLASSIFY} --lam-H nan": "lam_H must be positive",
    f"{CLASSIFY} --lam-b -1": "lam_b must be",
    f"{CLASSIFY} --seed 1.5": "--seed.*see --help",
    f"{CLASSIFY} --seed 99999999999999999999": "too (large|big)|overflow",
    "classify zero.npz --lam-W 5e-3 --out new": "to imply lam_H",
    f"{LANDSCAPE} --saddle 3 2": r"saddle must be the group sizes of a saddle of this problem \(2\), got \[3, 2\]",
    f"{LANDSCAPE} --saddle 1 1": "saddle must be the group sizes of a saddle",
    f"{LANDSCAPE} --lam-W 2 --lam-H 2": r"lam_W and lam_H must be smaller",
    f"{LANDSCAPE} --lam-W 0": "lam_W must be positive",
    f"{LANDSCAPE} --K 1": "K must be an integer of at least 2",
    f"{LANDSCAPE} --K 20 --d 20": "627 types",
    f"{LANDSCAPE} --hunt x": "--hunt.*see --help",
    f"{LANDSCAPE} --network absent": "absent/config.json cannot be read",
    LANDSCAPE.replace("new", "taken"): "taken exists already: a run is never overwritten, name another",
    LANDSCAPE.replace("new", "good.npz/run"): "cannot be made",
    "measure good.npz --out taken": "taken exists already",
    "measure good.npz --out good.npz/run": "cannot be made",
    f"{MEASURE} --centre middle": "--centre.*see --help",
    **{
        f"{command} {name} {rest} --out new": complaint
        for command, rest in (("certify", "--lam-W 5e-3"), ("classify", "--lam-W 5e-3"), ("measure", ""))
        for name, complaint in {
            "absent.npz": "absent.npz cannot be read",
            "cut.npz": "cut.npz cannot be read",
            "flipped.npz": "flipped.npz cannot be read",
            "cut.safetensors": "cut.safetensors cannot be read",
            "pickled.npz": "pickled.npz cannot be read",
            "other.csv": "other.csv ends in neither",
            "nan.npz": r"H\[0, 0\] is nan: every entry must be finite",
            "inf.npz": "W holds inf: every entry must be finite",
            "transposed.npz": "H has shape .*: pass its transpose",
            "short.npz": "labels have shape",
            "real.npz": "labels have dtype float64",
            "missing.npz": "no sample of class 2",
            "lone.npz": "W has shape",
            "nolabels.npz": "has no labels: export labels",
        }.items()
    },
    f"{TRAIN} --data cifar": "name = 'cifar': give one of digits, fashion-mnist, mnist, cifar10",
    f"{TRAIN} --data mnist": "train-images-idx3-ubyte has .* bytes, its header says",
    f"{TRAIN} --data fashion-mnist": "begins with the bytes",
    f"{TRAIN} --data cifar10": "data_batch_1.bin has 10 bytes",
    f"{TRAIN} --limit 7": "limit = 7",
    f"{TRAIN} --width 0": "width = 0",
    f"{TRAIN} --d 8": "d must be at least K - 1 = 9",
    f"{TRAIN} --epochs 0": "epochs must be positive",
    f"{TRAIN} --batch 21": "batch must be at most the 20 training images",
    f"{TRAIN} --lr nan": "lr must be positive",
    f"{TRAIN} --momentum 1": r"momentum must be in \[0, 1\)",
    f"{TRAIN} --lam-W 0": "lam_W must be positive",
    f"{TRAIN} --lam-H -1": "lam_H must be positive",
    f"{TRAIN} --regulariser decay --lam-b 1": "lam_b belongs to the regulariser 'features'",
    f"{TRAIN} --stem large": "--stem.*see --help",
    f"{TRAIN} --resume": "new/config.json cannot be read",
    TRAIN.replace("new", "taken"): "taken exists already",
    TRAIN.replace("new", "good.npz/run"): "cannot be made",
    TRAIN.replace("new", "taken") + " --resume": "taken holds no training run",
    "verify --out taken": "taken exists already",
    "verify --out good.npz/run": "cannot be made",
    "": "Missing subcommand|Expected one of.*verify.*see --help",
    "prove": "prove.*see --help",
}  # fmt: skip


def _bad_files():
    """A folder of damaged and unsuitable files."""
    x = balanced_minimiser(balanced(3, 4, 5, lam_W=5e-3, lam_H=2e-3))
    f = Features(np.asarray(x.H), np.repeat(np.arange(3), 4), np.asarray(x.W), np.asarray(x.b))
    good = vars(f)
    nan, inf = f.H.copy(), f.W.copy()
    nan[0, 0], inf[0, 0] = np.nan, np.inf
    changes = {
        "good": {}, "nan": {"H": nan}, "inf": {"W": inf}, "transposed": {"H": f.H.T}, "short": {"labels": f.labels[1:]},
        "real": {"labels": f.labels + 0.0}, "missing": {"labels": f.labels % 2},
        "flat": {"H": f.H[:1], "W": f.W[:, :1]},
        "lone": {"W": f.W[:1], "labels": 0 * f.labels, "b": f.b[:1]}, "zero": {"H": 0 * f.H},
    }  # fmt: skip
    for name, change in changes.items():
        np.savez(f"{name}.npz", **good | change)
    np.savez("nolabels.npz", H=f.H, W=f.W)
    np.savez("pickled.npz", **good | {"H": np.array([{}], object)})
    save_file({k: np.ascontiguousarray(v) for k, v in good.items()}, "cut.safetensors")
    whole = Path("good.npz").read_bytes()
    Path("cut.npz").write_bytes(whole[: len(whole) // 2])
    Path("flipped.npz").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-9])
    Path("other.csv").write_text("1,2\n")
    Path("taken").mkdir()
    Path("taken/config.json").write_text('{"mine": true}')


def _bad_data(folder):
    """Image sets: MNIST cut short, Fashion-MNIST that is something else, CIFAR-10 cut short."""
    names = [f"{p}-{k}" for p in ("train", "t10k") for k in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    for name in names:
        axes = 3 if "images" in name else 1
        header = bytes((0, 0, 8, axes)) + np.array([5, 4, 4][:axes], ">u4").tobytes()
        for data, content in (("mnist", header + b"1234"), ("fashion-mnist", b"<!DOCTYPE html>")):
            (folder / data).mkdir(parents=True, exist_ok=True)
            (folder / data / name).write_bytes(content)
    cifar = folder / "cifar10" / "cifar-10-batches-bin"
    cifar.mkdir(parents=True)
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        (cifar / name).write_bytes(bytes(10))


@pytest.mark.parametrize(
    ("line", "complaint"), BAD.items(), ids=[line.replace(FLAGS, "...") or "nothing" for line in BAD]
)
def test_bad_input_is_one_line_that_names_it_exit_2_and_no_trace(ufm, tmp_path, monkeypatch, line, complaint):
    _bad_files()
    _bad_data(tmp_path / "data")
    monkeypatch.setenv("UFM_DATA", str(tmp_path / "data"))
    before = _tree(tmp_path)
    code, out, err = ufm(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("ufm: ")
    assert err.count("\n") == 1
    assert not any(word in err for word in ("Traceback", "│", ".part"))
    assert re.search(complaint, err), err
    assert _tree(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device"), 2, "ufm: [Errno 28] No space left on device\n"),
        (MemoryError("Unable to allocate 8 TiB"), 2, "ufm: Unable to allocate 8 TiB\n"),
        (ArithmeticError("two\nlines"), 2, "ufm: two lines\n"),
        (KeyboardInterrupt(), 130, "ufm: interrupted\n"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line_too(ufm, monkeypatch, error, code, line):
    def fail(self):
        raise error

    monkeypatch.setattr(cli.Solve, "run", fail)
    assert ufm("solve") == (code, "", line)


@pytest.mark.parametrize(("package", "modules"), [("matplotlib", ["ufm.lab.plots"]), ("flax", ["ufm.nets.train"])])
def test_a_package_not_installed_is_missed_before_anything_is_made(ufm, monkeypatch, package, modules):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = ufm("verify", "--out", "new")
    assert (code, out) == (2, "")
    assert err == f"ufm: {package} is not installed; pip install 'ufm[all]'\n"
    assert _tree() == {}
