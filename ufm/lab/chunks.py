"""Long trajectories in chunks: a progress bar, and a file with which what was interrupted goes on bit for bit."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from ufm.lab.identity import without_addresses
from ufm.lab.records import write_arrays
from ufm.model.problem import check_integer
from ufm.numerics.dynamics import Fate, Trajectory, check_steps, descend

Kept = dict[str, np.ndarray]


def descend_in_chunks(
    fun: Callable[..., Array],
    params: PyTree,
    optimiser: optax.GradientTransformation,
    steps: int,
    *,
    observe: Callable[[PyTree], PyTree],
    keep: Callable[[PyTree], Kept],
    every: int = 1,
    chunk: int = 20,
    key: Key[Array, ""] | None = None,
    file: Path | None = None,
    quiet: bool = True,
) -> tuple[Trajectory, Kept]:
    """What descend gives, a chunk of records at a time, each reduced on the host before the next is computed.

    Args:
        fun: as for descend, and so params, optimiser, steps, observe, every and key.
        params: where to start.
        optimiser: of optax.
        steps: in all, a multiple of every.
        observe: what to record of a point.
        keep: from a chunk's records (a leading axis) to the arrays that are kept of them, with the same leading axis.
        every: steps between records.
        chunk: records at a time.
        key: for a fun that draws.
        file: an .npz file that keeps what is done; a run of the same program from the same start goes on from it.
        quiet: without a progress bar.

    Returns:
        The trajectory, with nothing observed and the last step alone in `at`, and what was kept, records first.

    Raises:
        ValueError: as descend does, or if the file is that of another run, or cannot be read.
    """
    check_steps(steps, every)
    check_integer("chunk", chunk, at_least=1)
    go = partial(descend, fun, optimiser=optimiser, observe=observe, every=every, key=key)
    begun = go(params, steps=0)
    first = keep(begun.observed)
    identity = _identity(go, begun, steps, first)
    found = None if file is None or not file.exists() else _resumed(file, begun, identity)
    now, kept = found or (_bare(begun), first)
    with tqdm(total=steps, initial=int(now.steps), unit="step", disable=quiet, leave=False) as bar:
        while now.fate != Fate.NOT_FINITE and (left := steps - int(now.steps)) > 0:
            alone = left == (chunk + 1) * every  # a last record is not left alone: one step is compiled unlike others
            piece = go(now, steps=left if alone else min(left, chunk * every))
            new = keep(jax.tree.map(lambda x: x[1:], piece.observed))
            kept = {name: np.concatenate([kept[name], new[name]]) for name in kept}
            bar.update(int(piece.steps) - int(now.steps))
            now = _bare(piece)
            if file is not None:
                _save(file, identity, now, kept)
    return now, kept


def _bare(x: Trajectory) -> Trajectory:
    """The trajectory without its records."""
    return Trajectory(x.params, x.value, x.steps, x.fate, x.steps[None], None, x.start_value, x.state)


def _identity(go: Callable, begun: Trajectory, steps: int, kept: Kept) -> str:
    """A digest of the start, what is kept of it, the data bound to the functions, and the program of one record."""
    program = jax.jit(lambda x: go(x, steps=go.keywords["every"])).lower(_bare(begun)).as_text()  # type: ignore[attr-defined]
    digest = hashlib.blake2b(f"{steps} {without_addresses(program)}".encode(), digest_size=16)
    for leaf in _arrays(_bare(begun)) + [part for name in sorted(kept) for part in (np.array(name), kept[name])]:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return digest.hexdigest()


def _arrays(x: Trajectory) -> list[np.ndarray]:
    """The leaves, keys as their data."""
    return [np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf) for leaf in jax.tree.leaves(x)]


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _restored(array: np.ndarray, like: Array) -> Array:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    return jnp.asarray(array)


def _save(file: Path, identity: str, x: Trajectory, kept: Kept) -> None:
    leaves = {f"leaf {i}": leaf for i, leaf in enumerate(_arrays(x))}
    write_arrays(file, {"identity": identity, **leaves, **{f"kept {name}": value for name, value in kept.items()}})


def _resumed(file: Path, begun: Trajectory, identity: str) -> tuple[Trajectory, Kept]:
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as saved:
            arrays = dict(saved)
    except Exception as error:  # a damaged archive raises what zipfile, zlib and NumPy please
        raise ValueError(f"{file} cannot be read as what an earlier run kept: remove it to begin anew") from error
    like, structure = jax.tree.flatten(_bare(begun))
    names = [f"leaf {i}" for i in range(len(like))]
    if str(arrays.get("identity")) != identity or not arrays.keys() >= set(names):
        raise ValueError(f"{file} is of another run (start, program, steps or what is kept differ): name another file")
    leaves = [_restored(arrays[name], leaf) for name, leaf in zip(names, like, strict=True)]
    kept = {name.removeprefix("kept "): value for name, value in arrays.items() if name.startswith("kept ")}
    return jax.tree.unflatten(structure, leaves), kept
