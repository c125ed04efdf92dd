"""Where a sparse op breaks even with the dense layer: ``burnish bench --break-even``.

An op takes part whose benchmark cases say by an option ``density`` what share of a weight ``[N, K]`` is kept; it is
varied where the cases vary it, and is the pattern's where they do not. At each number of rows the op at
every density and the record's torch path, the dense layer, are sampled in turns, on weights that come from memory; the
break-even is where the times cross, between the densities by a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from burnish.bench import machine
from burnish.bench.runner import implementations
from burnish.bench.timing import CACHE_FACTOR, MAX_SETS, SEEDS, Contestant, interleave, quartiles
from burnish.density_table import Entry
from burnish.registry import Case, OpSpec, all_ops, dtype_name, get

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
ROWS = (1, 4, 16, 128, 512)
SIZE = (4096, 4096)


@dataclass(frozen=True)
class Subject:
    """One form of an op, and the density of its pattern where that cannot be varied."""

    spec: OpSpec
    case: Case
    form: str
    fixed: float | None


def subjects(ops: Sequence[str], dtype: torch.dtype) -> tuple[Subject, ...]:
    """The forms to measure: of the ops named, or of all that are sparse.

    Raises:
        KeyError: no such op.
        ValueError: an op that is not sparse, or none with a benchmark in this dtype.
    """
    specs = [get(name) for name in ops] if ops else list(all_ops().values())
    found: dict[tuple[str, str], Subject] = {}
    for spec in specs:
        sparse = [case for case in spec.cases.bench if "density" in case.options]
        if ops and not sparse:
            raise ValueError(f"{spec.name} has no density: its benchmark cases name none")
        if spec.baseline is None or spec.stem.endswith("_backward"):
            continue
        for case in (case for case in sparse if case.dtype == dtype):
            form = "-".join(str(value) for name, value in case.options.items() if name not in ("density", "bias"))
            varied = len({other.options["density"] for other in sparse}) > 1
            fixed = None if varied else case.options["density"]
            found.setdefault((spec.name, form), Subject(spec, case, form, fixed))
    if not found:
        raise ValueError(f"no sparse op has a benchmark in {dtype_name(dtype)}")
    return tuple(found.values())


def measure(
    found: Sequence[Subject],
    *,
    device: str = "cpu",
    rows: Sequence[int] = ROWS,
    size: tuple[int, int] = SIZE,
    rounds: int = 7,
    min_ms: float = 2.0,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Iterator[Entry]:
    """The entries, as they are measured.

    Args:
        found: what :func:`subjects` gave.
        device: ``cpu`` or ``cuda``.
        rows: the numbers of rows M.
        size: N and K.
        rounds: samples a contestant, each of at least ``min_ms`` milliseconds.
        progress: called with (steps done, steps in all, what is being timed).
    """
    total = len(found) * len(rows)
    for index, subject in enumerate(found):
        progress(index * len(rows), total, f"{subject.spec.name} {subject.form}")
        sets = {density: _sets(subject, density, max(rows), size, device) for density in _densities(subject)}
        for step, m in enumerate(rows, 1):
            yield _entry(subject, sets, m, size, device, rounds, min_ms)
            progress(index * len(rows) + step, total, f"{subject.spec.name} {subject.form}")


def _densities(subject: Subject) -> tuple[float, ...]:
    return DENSITIES if subject.fixed is None else (subject.fixed,)


def _sets(subject: Subject, density: float, m: int, size: tuple[int, int], device: str) -> list[tuple[Any, ...]]:
    """Argument sets at a density, with as many rows as are asked for at most."""
    options = dict(subject.case.options)
    if subject.fixed is None:
        options["density"] = density
    case = replace(subject.case, dims={**subject.case.dims, "M": m, "N": size[0], "K": size[1]}, options=options)
    backend = implementations(subject.spec, device)[0]

    def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.to(device, copy=True) if isinstance(arg, torch.Tensor) else arg for arg in args)

    made = [subject.spec.make(case, backend, seed) for seed in range(SEEDS)]
    bytes_each = max(1, sum(arg.nbytes for arg in made[0][1:] if isinstance(arg, torch.Tensor)))
    wanted = math.ceil(CACHE_FACTOR * machine.last_level_cache(device) / bytes_each) + 1
    return [moved(made[index % SEEDS]) for index in range(min(max(wanted, SEEDS), MAX_SETS))]


def _entry(
    subject: Subject,
    sets: dict[float, list[tuple[Any, ...]]],
    m: int,
    size: tuple[int, int],
    device: str,
    rounds: int,
    min_ms: float,
) -> Entry:
    spec = subject.spec
    assert spec.baseline is not None
    few = {density: [(args[0][:m], *args[1:]) for args in found] for density, found in sets.items()}
    dense = Contestant("dense", [spec.baseline(*args) for args in few[max(few)]])
    sparse = {
        density: Contestant(str(density), [partial(spec.entry, *args) for args in found])
        for density, found in few.items()
    }
    with torch.no_grad():
        interleave([dense, *sparse.values()], {}, device=device, rounds=rounds, min_ms=min_ms)
    reference = quartiles(dense.seconds)[1]
    curve = tuple((density, round(reference / quartiles(one.seconds)[1], 4)) for density, one in sorted(sparse.items()))
    return Entry(spec.name, subject.form, dtype_name(subject.case.dtype), m, *size, round(break_even(curve), 4), curve)


def break_even(curve: Sequence[tuple[float, float]]) -> float:
    """The density up to which every point of a curve of (density, speed-up) is at least 1; to the first that is not,
    times are taken to grow evenly. 0 where the first point already loses."""
    last = None
    for density, speedup in curve:
        if speedup < 1:
            if last is None:
                return 0.0
            below, above = 1 / last[1], 1 / speedup
            return last[0] + (density - last[0]) * (1 - below) / (above - below)
        last = (density, speedup)
    return last[0] if last else 0.0
