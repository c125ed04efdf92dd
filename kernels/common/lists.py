"""Lists of tensors as one kernel takes them: a table of addresses in device memory, one column an item.

A table has int64 rows of ``items`` entries: :data:`START` (the first of the item's blocks, counted within its launch),
:data:`COUNT` (its elements), :data:`INDEX` (its place in the lists), then one row of addresses a list. Items are sorted
into launches, by the dtypes that a kernel needs at compile time and by whether it may load whole vectors. Kernels that
divide the same items into chunks of another size find a last row: the first of the item's chunks, counted in the table.

A table goes up in one copy from pinned memory, without waiting for the device, and is kept by what it holds and by the
stream that it was copied on: a call with tensors where they were finds it there. A CUDA graph gets a table of its own,
whose copy is part of the graph; the host's memory of it is kept for good, since each replay reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl

Tensors = Sequence[torch.Tensor]

#: rows of a table; addresses follow
START, COUNT, INDEX, ADDRESSES = (tl.constexpr(row) for row in range(4))

#: bytes that an address, and elements that an item, must be a multiple of to be read in whole vectors
ALIGNMENT = 16
#: codes of either sign are bytes
TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8,
    torch.uint8: tl.int8,
}  # fmt: skip
#: tables kept: some for each group of parameters, since gradients come at other addresses from time to time
_KEPT = 64

_captured: list[torch.Tensor] = []
_dtype = attrgetter("dtype")


@dataclass(frozen=True)
class Launch:
    """Items ``first`` to ``first + count`` of a table: ``types`` of the lists that have various, in ``blocks``, and in
    ``chunks`` where there are such."""

    types: tuple[tl.dtype, ...]
    aligned: bool
    first: int
    count: int
    blocks: int
    chunks: int


@dataclass(frozen=True)
class Table:
    rows: torch.Tensor
    items: int
    launches: tuple[Launch, ...]

    @property
    def blocks(self) -> int:
        return sum(launch.blocks for launch in self.launches)

    @property
    def chunks(self) -> int:
        return sum(launch.chunks for launch in self.launches)


def table(
    block: int,
    various: Sequence[Tensors],
    loose: Sequence[Tensors] = (),
    others: Sequence[Tensors] = (),
    chunk: int | None = None,
) -> Table:
    """The table of lists of equal length, or empty ones, whose addresses are 0. Rows are in the order of the arguments.

    Args:
        block: elements of a block, which one program takes.
        various: lists with any dtypes, their items of equal numbers of elements; the first is not empty.
        loose: lists that are not read in whole vectors, of any numbers of elements.
        others: lists with one dtype each, of as many elements as ``various``.
        chunk: elements of a chunk, if there shall be chunks.
    """
    device = various[0][0].device
    none = (0,) * len(various[0])
    addresses = [
        [tuple(map(torch.Tensor.data_ptr, tensors)) or none for tensors in lists] for lists in (various, loose, others)
    ]
    dtypes = tuple(tuple(map(_dtype, tensors)) for tensors in various)
    counts = tuple(map(torch.Tensor.numel, various[0]))
    return _resident(_table, device)(_place(device), (block, chunk), dtypes, counts, *map(tuple, addresses))


def numbers(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """``values`` as fp64 in device memory."""
    return _resident(_numbers, device)(_place(device), values)


def _place(device: torch.device) -> tuple[torch.device, int]:
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _resident(function: Any, device: torch.device) -> Any:
    """A function that keeps its results; under capture, the one that makes each anew."""
    return function.__wrapped__ if _capturing(device) else function


@lru_cache(maxsize=_KEPT)
def _numbers(place: tuple[torch.device, int], values: tuple[float, ...]) -> torch.Tensor:
    return _uploaded(values, torch.float64, place[0])


@lru_cache(maxsize=_KEPT)
def _table(
    place: tuple[torch.device, int],
    sizes: tuple[int, int | None],
    dtypes: tuple[tuple[torch.dtype, ...], ...],
    counts: tuple[int, ...],
    various: tuple[tuple[int, ...], ...],
    loose: tuple[tuple[int, ...], ...],
    others: tuple[tuple[int, ...], ...],
) -> Table:
    aligned = [all(one % ALIGNMENT == 0 for one in item) for item in zip(counts, *various, *others, strict=True)]
    groups: dict[tuple[tuple[torch.dtype, ...], bool], list[int]] = {}
    for item, key in enumerate(zip(zip(*dtypes, strict=True), aligned, strict=True)):
        groups.setdefault(key, []).append(item)
    block, chunk = sizes
    starts: list[int] = []
    chunk_starts = [0]
    launches = []
    for (types, whole), members in groups.items():
        first, end = len(starts), 0
        for item in members:
            starts.append(end)
            end += -(-counts[item] // block)
            chunk_starts.append(chunk_starts[-1] + (-(-counts[item] // chunk) if chunk else 0))
        chunks = chunk_starts[-1] - chunk_starts[first]
        launches.append(Launch(tuple(TYPES[one] for one in types), whole, first, len(members), end, chunks))
    order = [item for members in groups.values() for item in members]
    rows = [*starts, *(counts[item] for item in order), *order]
    for row in (*various, *loose, *others):
        rows += [row[item] for item in order]
    if chunk:
        rows += chunk_starts[:-1]
    return Table(_uploaded(rows, torch.int64, place[0]), len(order), tuple(launches))


def _uploaded(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    if _capturing(device):
        _captured.append(host)
    return host.to(device, non_blocking=True)


@triton.jit
def item_of(starts_ptr, first, count, block):
    """Which item has a block, and the block's number within it, by a row of starts, which is a table's first."""
    low = first + block * 0
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, block - tl.load(starts_ptr + low)


@triton.jit
def entry(where, ROW: tl.constexpr):
    """What a row holds of an item; ``where`` is the table, its number of items, and the item."""
    table_ptr, items, item = where
    return tl.load(table_ptr + ROW * items + item)


@triton.jit
def pointer(where, ROW: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of an item in a row's list, as a pointer."""
    address = entry(where, ROW).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address
