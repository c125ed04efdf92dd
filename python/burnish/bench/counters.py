"""What the CUDA C++ kernels move and do, counted while they run on the CPU: ``burnish bench --counters``.

Counts are exact and the same in every run, where a time is neither, and need no GPU. Memory traffic stands beside the
bytes that the op's record calls compulsory: what is more than 1.0x was read or written more often than it had to be.

    moved       bytes of the 32-byte sectors that a launch reads, each counted once, and of those it writes: the memory
                traffic with a cache that holds everything
    through L2  bytes of all sectors that its requests ask for
    request     one instruction of a warp on global memory; with 16 bytes a lane in a row it takes 16 sectors, with 4
                bytes 4, and up to 32 where the lanes are apart
    conflicts   passes through shared memory beyond the first, because lanes wanted different words of one bank

Cases of more than 2^31 operations or 2^26 bytes are left out: they take minutes, or more memory to keep count than
there is, and move what smaller ones move.

Only accesses through the wrappers of ``csrc/cuda/ptx.cuh`` count, which kernels make all of theirs through. The process
must emulate CUDA (``BURNISH_EMULATE_CUDA=1``); the command line starts one that does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish import dispatch, native
from burnish.bench.gate import Gate
from burnish.errors import BackendError
from burnish.registry import Case, OpSpec

_SECTOR = 32
_KINDS = ("load", "store", "atomic")
_MOST_OPERATIONS, _MOST_BYTES = 2**31, 2**26


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``counts`` has what happened at all, by the names of ``csrc/cuda/host/counters.cpp``."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    counts: Mapping[str, int]

    def count(self, name: str) -> int:
        return self.counts.get(name, 0)

    @property
    def moved(self) -> int:
        """Bytes of the sectors read and of those written, each counted once."""
        return self.count("read_bytes") + self.count("written_bytes")

    @property
    def through_l2(self) -> int:
        """Bytes of all sectors that the launch's requests ask for, and of the tiles that it copies."""
        tiles = self.count("tile_load_bytes") + self.count("tile_store_bytes")
        return _SECTOR * sum(self.count(f"global_{kind}_sectors") for kind in _KINDS) + tiles

    def sectors_per_request(self, kind: str) -> float | None:
        """Of global ``load`` or ``store`` requests; None where there is none."""
        requests = self.count(f"global_{kind}_requests")
        return self.count(f"global_{kind}_sectors") / requests if requests else None


@dataclass(frozen=True)
class Count:
    """A case's launches in order, or why it was not counted."""

    op: str
    case: str
    compulsory: int
    launches: tuple[Launch, ...] = ()
    skipped: str | None = None

    @property
    def moved(self) -> int:
        return sum(launch.moved for launch in self.launches)


def count(
    cases: Sequence[tuple[OpSpec, Case]], progress: Callable[[int, int, str], None] = lambda done, total, label: None
) -> list[Count]:
    """Run each case's CUDA C++ kernel once and count. A wrong result is an error, not a count.

    Args:
        cases: from :func:`burnish.bench.select_cases`.
        progress: called with (cases done, cases in all, what is being counted).

    Raises:
        BackendError: this process does not emulate CUDA, or a kernel's result is wrong.
    """
    if not native.emulating() or native.CUDA_LIBRARY in native.missing:
        reason = native.missing.get(native.CUDA_LIBRARY, "set BURNISH_EMULATE_CUDA=1")
        raise BackendError(f"this process does not run CUDA kernels on the CPU: {reason}")
    counts = []
    for index, (spec, case) in enumerate(cases):
        progress(index, len(cases), f"{spec.name} {case.id}")
        counts.append(_count(spec, case))
    progress(len(cases), len(cases), "")
    return counts


def _count(spec: OpSpec, case: Case) -> Count:
    compulsory = round(spec.cost(case).bytes)
    impl = next((impl for impl in spec.impls if impl.backend == "native"), None)
    if impl is None:
        return Count(spec.name, case.id, compulsory, skipped="the op has no CUDA C++ kernel")
    if spec.cost(case).ops > _MOST_OPERATIONS:
        return Count(spec.name, case.id, compulsory, skipped=f"more than {_MOST_OPERATIONS} operations")
    if compulsory > _MOST_BYTES:
        return Count(spec.name, case.id, compulsory, skipped=f"more than {_MOST_BYTES} bytes")
    args = spec.make(case, "native", 0)
    objection = dispatch.objection(impl, args)
    if objection:
        return Count(spec.name, case.id, compulsory, skipped=objection)
    kernel = dispatch.resolve(impl.target)
    gate = Gate(spec, args)
    own = gate.copies()
    torch.ops.burnish.emulation_seed(0)
    torch.ops.burnish.emulation_count(True)
    try:
        wrong = gate.objection(lambda: kernel(*own), own)
        document = json.loads(torch.ops.burnish.emulation_counters())
    finally:
        torch.ops.burnish.emulation_count(False)
    if wrong:
        raise BackendError(f"{spec.name} {case.id}: {wrong}")
    return Count(spec.name, case.id, compulsory, tuple(map(_launch, document)))


def _launch(found: dict[str, Any]) -> Launch:
    head = {name: found.pop(name) for name in ("kernel", "grid", "block", "shared_bytes")}
    return Launch(head["kernel"], tuple(head["grid"]), tuple(head["block"]), head["shared_bytes"], found)


def to_json(counts: Iterable[Count]) -> str:
    """A document that is the same in every run."""
    rows = [
        {"op": one.op, "case": one.case, "compulsory_bytes": one.compulsory, "moved_bytes": one.moved,
         "launches": [
             {"kernel": launch.kernel, "grid": launch.grid, "block": launch.block,
              "shared_bytes": launch.shared_bytes, **launch.counts} for launch in one.launches
         ]}
        for one in counts if not one.skipped
    ]  # fmt: skip
    return json.dumps({"counters": rows}, indent=1) + "\n"
