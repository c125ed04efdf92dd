"""Repairs of Triton's interpreter, so that kernels run on the CPU with the arithmetic of a GPU.

Triton 3.6 to 3.9 interpret bf16 as raw 16-bit integers in ``tl.dot`` and in conversions from integers, truncate fp32
-> bf16, and lose the carry of fp32 -> fp8. :func:`activate` replaces these; then they are bit-equal to torch's, which
``tests/test_triton_interpreter.py`` proves. ``TRITON_INTERPRET=1`` must be set before a kernel module is imported, so
that what needs it runs in a process of its own. :func:`burnish.testing.run` calls it first.

It also searches ``triton.language`` for what to replace at every call of a device function, a third of a run's time;
:func:`activate` keeps it to one search a launch, which finds the same. And it describes the type of every value anew, a
quarter of what is left: after :func:`activate` of each type once.
"""

from __future__ import annotations

import os
from typing import Any

_active = False


def interpreting() -> bool:
    """Whether this process runs Triton kernels under the interpreter, and therefore nothing else."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def activate() -> None:
    """Repair the interpreter of this process; a second call does nothing.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is not 1.
    """
    global _active
    if not interpreting():
        raise RuntimeError("TRITON_INTERPRET is not 1: set it before the first kernel module is imported")
    if not _active:
        _repair()
        _search_once()
        _describe_types_once()
        _active = True


def _repair() -> None:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, dot, from_signed = interpreter._convert_float, builder.create_dot, builder.create_si_to_fp
    fp8_types = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    fp8_types |= {tl.float8e4b8: torch.float8_e4m3fnuz, tl.float8e5b16: torch.float8_e5m2fnuz}

    def to_bf16(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        return np.where(np.isnan(values), 0x7FC0 | (bits >> 16), rounded).astype(np.uint16)

    def from_bf16(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert_float(values, source, destination, rounding):  # type: ignore[no-untyped-def]
        if source == tl.float32 and destination == tl.bfloat16:
            return to_bf16(values.view(np.float32))
        if source == tl.bfloat16 and destination == tl.float32:
            return from_bf16(values.view(np.uint16))
        if source == tl.float32 and destination in fp8_types:
            narrow = torch.from_numpy(np.array(values, np.float32)).to(fp8_types[destination])
            return narrow.view(torch.uint8).numpy()
        return convert(values, source, destination, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(from_bf16(handle.data), tl.float32)

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return dot(self, widened(a), widened(b), *rest)

    def create_si_to_fp(self, value, kind):  # type: ignore[no-untyped-def]
        if kind.scalar != tl.bfloat16:
            return from_signed(self, value, kind)
        return interpreter.TensorHandle(to_bf16(value.data.astype(np.float32)), tl.bfloat16)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.create_si_to_fp = create_si_to_fp
    builder.create_ui_to_fp = create_si_to_fp


def _search_once() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_lang(fn):  # type: ignore[no-untyped-def]
        seen = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return None  # of a device function, which asks for nothing back
        patched.update(seen)
        return patch(fn)

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        patched.clear()  # what the launch before replaced, it has put back
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call


def _describe_types_once() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    np_dtype = interpreter._get_np_dtype
    describe_block, describe_tensor = tl.block_type.__init__, tl.tensor.__init__
    np_dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    def get_np_dtype(kind):  # type: ignore[no-untyped-def]
        if kind.name not in np_dtypes:
            np_dtypes[kind.name] = np_dtype(kind)
        return np_dtypes[kind.name]

    def init_block(self, element_ty, shape):  # type: ignore[no-untyped-def]
        if not all(type(size) is int for size in shape):
            return describe_block(self, element_ty, shape)
        key = (element_ty.name, *shape)
        if key not in blocks:
            describe_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        self.__dict__.update(blocks[key])

    def init_tensor(self, handle, kind):  # type: ignore[no-untyped-def]
        if kind.name not in shapes:
            describe_tensor(self, handle, kind)
            shapes[kind.name] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[kind.name]

    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__ = init_block
    tl.tensor.__init__ = init_tensor
