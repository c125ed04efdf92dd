"""Memory that tells on a kernel: guard pages, read-only inputs, poisoned outputs, and tensors larger than RAM.

A guarded tensor ends (or starts) at a page that cannot be touched and lies in pages that cannot be written: reading one
byte too far, or writing to an input, ends the process with SIGSEGV at the culprit, and ``faulthandler`` prints where.
Results get the same treatment by standing in for torch's allocator while a kernel runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.arguments import places
from burnish.testing.calls import Violation

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
#: what fits a cache, in few enough mappings: a process has 65530
_FOLD = 2**22


def _map(size: int, address: int | None = None, file: int = -1) -> int:
    """The address of new pages, or of those of ``file`` in place of what is mapped at ``address``."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    flags = private if address is None else mmap.MAP_SHARED | _MAP_FIXED
    mapped = _libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if mapped in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"cannot map {size} bytes")
    return int(mapped)


def _protect(address: int, size: int, protection: int) -> None:
    if _libc.mprotect(address, size, protection):
        raise OSError(ctypes.get_errno(), f"cannot protect {size} bytes at {address:#x}")


def _storage(address: int, nbytes: int, base: int, mapped: int) -> torch.Tensor:
    """uint8 [nbytes] at ``address``; the mapping goes when the last tensor on it does."""
    buffer = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, base, mapped).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


def lazy(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of any size: pages take memory only once written."""
    elements = 1
    for size in shape:
        elements *= size
    nbytes = max(elements * dtype.itemsize, 1)
    base = _map(nbytes)
    return _storage(base, nbytes, base, nbytes)[: elements * dtype.itemsize].view(dtype).view(shape)


def folded(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of any size that may be written: but for the end, each 4 MiB is the same memory.

    What runs over all of it takes the time of its arithmetic, and what it writes to the folded part must be one value.
    """
    nbytes = elements * dtype.itemsize
    base, file = _map(nbytes), os.memfd_create("folded")
    try:
        os.ftruncate(file, _FOLD)
        for offset in range(0, nbytes - 2 * _FOLD, _FOLD):
            _map(_FOLD, base + offset, file)
    finally:
        os.close(file)
    return _storage(base, nbytes, base, nbytes).view(dtype)


def guarded(tensor: torch.Tensor, side: Literal["end", "start"] = "end", writable: bool = False) -> torch.Tensor:
    """A read-only copy of the same strides with its last byte before, or its first byte after, an untouchable page."""
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    nbytes = span * tensor.itemsize
    base, body = _between_guards(nbytes)
    start = body - nbytes if side == "end" else 0
    copy = _storage(base + start, nbytes, base - mmap.PAGESIZE, body + 2 * mmap.PAGESIZE).view(tensor.dtype)
    copy.copy_(tensor.detach().as_strided((span,), (1,)))
    if not writable:
        _protect(base, body, mmap.PROT_READ)
    return copy.as_strided(tensor.shape, tensor.stride(), 0)


def _between_guards(nbytes: int) -> tuple[int, int]:
    """Address and size of whole pages for ``nbytes``, with an untouchable page before and after them."""
    page = mmap.PAGESIZE
    body = (nbytes + page - 1) // page * page
    base = _map(body + 2 * page)
    for guard in (base, base + page + body):
        _protect(guard, page, _PROT_NONE)
    return base + page, body


class GuardedOutputs(TorchDispatchMode):
    """Inside, what a kernel of ``namespace`` allocates through torch lies before an untouchable page and is filled with
    NaN. It starts at a multiple of 64 bytes, as torch's own memory does; :meth:`check` looks at what is in between."""

    ALIGNMENT, CANARY = 64, 0xA5

    def __init__(self, namespace: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.namespace = namespace
        self.allocated = 0
        self._gaps: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            with self:  # below this mode, or it would see the op again
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"):
            return self._guard(out) if out.numel() and out.is_contiguous() else out
        return out

    def _guard(self, out: torch.Tensor) -> torch.Tensor:
        nbytes = out.numel() * out.itemsize
        padded = (nbytes + self.ALIGNMENT - 1) // self.ALIGNMENT * self.ALIGNMENT
        base, body = _between_guards(padded)
        mapped = body + 2 * mmap.PAGESIZE
        whole = _storage(base + body - padded, padded, base - mmap.PAGESIZE, mapped)
        self._gaps.append(whole[nbytes:].fill_(self.CANARY))
        self.allocated += 1
        typed = whole[:nbytes].view(out.dtype).view(out.shape)
        return typed.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

    def check(self) -> None:
        """Raise if a byte between an allocation and its guard page was written."""
        if not all(bool((gap == self.CANARY).all()) for gap in self._gaps):
            raise Violation("C5: the kernel wrote beyond the end of a result")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every tensor that torch allocates uninitialised with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    fill: Any = torch.utils.deterministic
    filled = fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        fill.fill_uninitialized_memory = filled


def snapshot(args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The whole storage of each tensor, the gaps between its elements included."""
    return [_bytes(tensor).clone() for tensor in places(args).values()]


def unchanged(before: list[torch.Tensor], args: tuple[Any, ...]) -> bool:
    """Whether every byte of every input is what it was."""
    after = [_bytes(tensor) for tensor in places(args).values()]
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
