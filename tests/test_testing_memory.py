"""Memory that tells on a kernel: guard pages around tensors of any layout, poisoned results, more than RAM holds."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from burnish import testing

GUARD = """
import ctypes, torch
from burnish import testing
t = testing.guarded(torch.arange(100, dtype=torch.float32), {side!r})
assert t.sum() == 4950 and not t.requires_grad
print("ready", flush=True)
{deed}
"""


BEYOND = """
import ctypes
from burnish import dispatch, registry
from burnish.testing import values
spec = registry.get("int8_quantize_rows")
called = dispatch.call
def careless(spec, args, *rest):  # one element too far, which a slice of a larger tensor has
    if not args[0].is_contiguous():
        ctypes.string_at(args[0][-1, -1].data_ptr() + args[0].itemsize, 1)
    return called(spec, args, *rest)
dispatch.call = careless
print("ready", flush=True)
values.layout(spec, "cpu", next(case for case in spec.cases.test if case.dims["M"] > 1), "sliced")
print("went on")
"""


@pytest.mark.parametrize(
    ("side", "deed"),
    [
        ("end", "ctypes.string_at(t.data_ptr() + t.nbytes, 1)"),
        ("start", "ctypes.string_at(t.data_ptr() - 1, 1)"),
        ("end", "t[0] = 1"),
        ("start", "ctypes.memset(t.data_ptr() + 8, 0, 1)"),
    ],
)
def test_a_guarded_tensor_stops_the_culprit(side: str, deed: str) -> None:
    code = GUARD.format(side=side, deed=deed)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.stdout.strip() == "ready", done.stderr
    assert done.returncode == -11


@pytest.mark.parametrize("name", sorted(testing.layouts.LAYOUTS))
@pytest.mark.parametrize("side", ["end", "start"])
def test_a_guarded_tensor_keeps_its_layout_and_nothing_beyond(side: Any, name: str) -> None:
    t = testing.layouts.LAYOUTS[name](torch.randn(5, 7))
    kept = testing.guarded(t, side)
    assert torch.equal(kept, t)
    assert kept.stride() == t.stride()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    assert kept.untyped_storage().nbytes() == 4 * (last + 1)


def test_a_read_beyond_the_last_element_of_a_strided_input_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.stdout.strip() == "ready", done.stderr
    assert done.returncode == -11


def test_poisoned_memory_is_nan_and_ends() -> None:
    with testing.poisoned():
        assert torch.empty(100).isnan().all()
        assert (torch.empty(100, dtype=torch.int8) == 127).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_lazy_memory_takes_none() -> None:
    big = testing.lazy((2**31 + 1, 8), torch.float32)  # 64 GiB
    big[-1] = 1.0
    assert big[-1].sum() == 8
    assert big[2**30].sum() == 0
