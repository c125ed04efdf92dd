"""How a call is timed: arguments that come from memory, batches long enough for the clock, contestants interleaved.

Each contestant has the same number of argument sets, together several times the last-level cache, and uses the next
ones on every call, so that weights come from memory as they do in a model. A round samples every contestant once, in
random order; one untimed call goes before each sample, so that nobody pays for waking threads or for another's code in
the instruction cache.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from burnish.arguments import map_tensors, places
from burnish.bench import machine
from burnish.registry import Backend, Case, OpSpec

Call = Callable[[], Any]

#: rotated bytes over bytes of cache: what an LRU cache of the given size cannot hold by far
CACHE_FACTOR = 4
#: sets of tiny cases stop here: building them would take longer than timing them
MAX_SETS = 512
#: a batch is never longer, or a round would not be short beside the drift of the machine; a GPU's queue of about a
#: thousand launches must hold a batch of ten kernels a call
MAX_BATCH = {"cpu": 256, "cuda": 64}
#: a set that takes longer to make is copied where the same values are wanted elsewhere in memory
MAKE_SECONDS = 0.25
#: different sets; the others are made of the same values, elsewhere in memory. On a GPU, whose time does not hang on
#: the values, they are copies of one
SEEDS = 2
#: calls that show how long launching takes, and how much longer the GPU sleeps at its fastest clock: a batch is queued
#: before its first kernel starts
_LAUNCHES, _SLEEP_FACTOR, _CLOCK_HZ = 17, 1.25, 2e9


def argument_sets(spec: OpSpec, case: Case, backend: Backend, device: str, contestants: int) -> list[tuple[Any, ...]]:
    """Argument sets for ``case``: enough to overflow the cache, as few as memory allows, at least two."""

    def make(seed: int) -> tuple[Any, ...]:
        return map_tensors(lambda t: t.to(device), spec.make(case, backend, seed))

    start = time.perf_counter()
    first = make(0)
    copied = device == "cuda" or time.perf_counter() - start > MAKE_SECONDS
    size = max(1, sum(tensor.nbytes for tensor in places(first).values()))
    wanted = sets_wanted(size, device)
    # a contestant may keep its weights in fp32: four times the bytes
    affordable = machine.free_memory(device) // 2 // (4 * size * max(1, contestants))
    count = max(SEEDS, min(wanted, affordable, MAX_SETS))
    different = 1 if device == "cuda" else SEEDS
    sets = [first, *(make(seed) for seed in range(1, different))]
    for index in range(different, count):
        sets.append(map_tensors(torch.clone, sets[index % different]) if copied else make(index % SEEDS))
    return sets


def sets_wanted(size: int, device: str) -> int:
    """How many arguments of ``size`` bytes overflow the cache."""
    return math.ceil(CACHE_FACTOR * machine.last_level_cache(device) / size) + 1


class Contestant:
    """A name, its calls (one an argument set) and the samples taken so far, in seconds a call."""

    def __init__(self, name: str, calls: Sequence[Call]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.batch = 1
        self.launch = 0.0  # host seconds a call on a GPU
        self._calls = calls
        self._next = 0

    def take(self, count: int) -> list[Call]:
        """The next ``count`` calls of the rotation."""
        taken = [self._calls[(self._next + index) % len(self._calls)] for index in range(count)]
        self._next = (self._next + count) % len(self._calls)
        return taken


def interleave(
    contestants: Sequence[Contestant],
    probes: Mapping[str, Callable[[], float]],
    *,
    device: str,
    rounds: int,
    min_ms: float,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Sample every contestant ``rounds`` times into its ``seconds``; returns what the probes measured each round.

    A sample is a batch of at least ``min_ms`` milliseconds, divided by its length.
    """
    order: list[Contestant | str] = [*contestants, *probes]
    shuffle = random.Random(seed).shuffle
    peaks: dict[str, list[float]] = {kind: [] for kind in probes}
    with _quiet():
        for contestant in contestants:
            if device == "cuda":
                contestant.launch = _launch_seconds(contestant.take(_LAUNCHES))
            first = min(_sample(contestant, device, 2) for _ in range(2))
            contestant.batch = max(1, min(MAX_BATCH[device], math.ceil(min_ms / 1e3 / max(first, 1e-9))))
        for _ in range(rounds):
            shuffle(order)
            for entry in order:
                if isinstance(entry, str):
                    peaks[entry].append(probes[entry]())
                else:
                    entry.seconds.append(_sample(entry, device, entry.batch + 1))
            tick()
    return peaks


def _sample(contestant: Contestant, device: str, count: int) -> float:
    calls = contestant.take(count)
    return _sample_cuda(calls, contestant.launch) if device == "cuda" else _sample_cpu(calls)


def _sample_cpu(calls: list[Call]) -> float:
    """Seconds a call over ``calls[1:]``; the first is not timed."""
    warm, *timed = calls
    warm()
    start = time.perf_counter_ns()
    for call in timed:
        call()
    return (time.perf_counter_ns() - start) / len(timed) / 1e9


def _launch_seconds(calls: list[Call]) -> float:
    """Host seconds a call over ``calls[1:]``, while the GPU works on others."""
    warm, *timed = calls
    warm()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for call in timed:
        call()
    seconds = (time.perf_counter_ns() - start) / len(timed) / 1e9
    torch.cuda.synchronize()
    return seconds


def _sample_cuda(calls: list[Call], launch: float) -> float:
    warm, *timed = calls
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    warm()
    torch.cuda._sleep(int(_SLEEP_FACTOR * launch * len(timed) * _CLOCK_HZ))
    start.record()
    for call in timed:
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / len(timed) / 1e3


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection and no autograd while timing."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if collecting:
            gc.enable()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 %, linear between neighbours."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    return at(0.25), at(0.5), at(0.75)
