"""Below which density a sparse layer beats the dense one, as measured on this machine.

``burnish bench --break-even`` measures the table and keeps it in the cache folder (:mod:`burnish.tables`), a file a
machine, device and number of threads. :func:`burnish.swap_` asks it for layers that it is not to measure itself: one
that the table knows to be slower than the dense layer at every number of rows stays. Without a table none is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from burnish import durable, tables


@dataclass(frozen=True)
class Entry:
    """What was measured of one op at M rows of a layer ``[N, K]``.

    ``form`` is the op's variant (a block's size, int8 values), empty for its plain one. ``density`` is the largest
    share of kept weights at which the op is not slower than the dense layer, 0 where the dense one always wins.
    ``curve`` holds what that is read from, pairs of density and speed-up.
    """

    op: str
    form: str
    dtype: str
    M: int
    N: int
    K: int
    density: float
    curve: tuple[tuple[float, float], ...]


def save(entries: Sequence[Entry], device: str) -> Path:
    """Keep entries for this machine, beside those of other ops, forms, dtypes and sizes; returns the file.

    Raises:
        OSError: the folder cannot be written.
    """
    return _table(device).add({_name(entry): asdict(entry) for entry in entries})


def check_writable(device: str) -> None:
    """Raise OSError, before anything is measured, where :func:`save` could not write; a table stays as it was."""
    durable.check_writable(_table(device).path)


def to_json(about: Mapping[str, Any], entries: Iterable[Entry]) -> str:
    return json.dumps({"machine": about, "entries": [asdict(entry) for entry in entries]}, indent=1) + "\n"


def _table(device: str) -> tables.Table:
    return tables.Table("break-even", tables.facts(device))


def _name(entry: Entry) -> str:
    return f"{entry.op} {entry.form} {entry.dtype} M{entry.M}-N{entry.N}-K{entry.K}"


def load(device: str) -> list[Entry]:
    """The entries measured on this machine; none where nothing was."""
    entries = _table(device).read().values()
    return [Entry(**{**entry, "curve": tuple(map(tuple, entry["curve"]))}) for entry in entries]


def objection(op: str, form: str, weight: torch.Tensor, density: float) -> str | None:
    """Why a layer whose dense weight is ``weight`` ``[N, K]`` had better stay dense, by what was measured of the size
    next to its own: a clause, or None where the sparse form wins at some number of rows or nothing was measured."""
    from burnish.registry import dtype_name

    dtype, size = dtype_name(weight.dtype), math.log(max(1, weight.numel()))
    fitting = [entry for entry in load(weight.device.type) if (entry.op, entry.form, entry.dtype) == (op, form, dtype)]
    if not fitting:
        return None
    next_to = min(abs(math.log(entry.N * entry.K) - size) for entry in fitting)
    best = max(
        (entry for entry in fitting if abs(math.log(entry.N * entry.K) - size) == next_to),
        key=lambda entry: entry.density,
    )
    if density <= best.density:
        return None
    wins = f"up to a density of {best.density:.2f}, at M = {best.M}" if best.density else "at no density"
    return f"dense is faster here: it keeps {density:.0%} of its weights, and {op} wins {wins}"
