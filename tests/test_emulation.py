"""CUDA on the CPU: planted bugs are found within sixteen schedules, and right kernels are left in peace."""

from __future__ import annotations

import ctypes
import fcntl
import re
import subprocess
from pathlib import Path

import pytest
import torch
from burnish import testing

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "tests/emulation/planted.cu", *sorted((ROOT / "csrc/cuda/host").glob("[!c]*.cpp"))]
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
REVERSE, COPY, LARGEST, COUNT, PRODUCT = range(5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> ctypes.CDLL:
    """The kernels of ``emulation/planted.cu``, built once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    library = shared / "planted.so"
    with (shared / "planted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            inputs = [word for source in SOURCES for word in ("-x", "c++", str(source))]
            subprocess.run(["g++", *FLAGS, f"-I{ROOT / 'csrc'}", *inputs, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run_planted.restype = ctypes.c_char_p
    loaded.run_planted.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, *[ctypes.c_void_p] * 3]
    return loaded


def call(planted: ctypes.CDLL, kernel: int, bug: int, seed: int) -> tuple[str | None, bool]:
    """One launch: the message that stopped it, and whether its result is right."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (4 * 64 * 16 + 16,), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (8, 32), dtype=torch.int8, generator=generator)
    words = x[: 4 * 64 * 16].view(torch.int32)
    if kernel == REVERSE:
        expected = words[:256].view(4, 64).flip(1).flatten()
    elif kernel == COPY:
        expected = words
    elif kernel == LARGEST:
        most = (words[:256].view(2, -1).long() & 0xFFFFFFFF).max(1).values
        expected = (most - (most >= 2**31).long() * 2**32).to(torch.int32).repeat_interleave(32)
    elif kernel == COUNT:
        expected = torch.tensor([8 * 64], dtype=torch.int32)
    else:
        expected = (x[:512].view(16, 32).long() @ b.long().T).to(torch.int32).flatten()
    y = torch.zeros_like(expected) if kernel == COUNT else torch.full_like(expected, -1)
    message = planted.run_planted(kernel, bug, seed, x.data_ptr(), b.data_ptr(), y.data_ptr())
    return message and message.decode(), torch.equal(y, expected)


@pytest.mark.parametrize("kernel", [REVERSE, COPY, LARGEST, COUNT, PRODUCT])
def test_a_right_kernel_is_right_under_every_schedule(planted: ctypes.CDLL, kernel: int) -> None:
    for seed in range(1000):
        assert call(planted, kernel, 0, seed) == (None, True)


#: bug, kernel, what the report says; None where the result gives it away
BUGS = {
    "no barrier before the read": (1, REVERSE, None),
    "no barrier after the read": (2, REVERSE, None),
    "no wait for a copy": (3, COPY, None),
    "uninitialised shared memory": (4, REVERSE, None),
    "past the end of shared memory": (5, REVERSE, "wrote past the end of its 256 bytes of shared memory"),
    "unaligned": (6, LARGEST, r"lane \d+, planted.cu:\d+: an access of 16 bytes is not aligned"),
    "a barrier that half the threads skip": (7, REVERSE, "deadlock"),
    "a return before a barrier": (
        8,
        REVERSE,
        r"deadlock.*Threads 0-6, 8-63 wait in __syncthreads at planted.cu:\d+.*Threads 7 returned",
    ),
    "a collective without one lane": (9, LARGEST, r"deadlock.*Threads 32-39, 41-63 wait in warp_max at planted.cu:\d+"),
    "an update that is not atomic": (10, COUNT, None),
    "a wrong lane in a fragment": (11, PRODUCT, None),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(planted: ctypes.CDLL, name: str) -> None:
    bug, kernel, report = BUGS[name]
    results = [call(planted, kernel, bug, seed) for seed in range(testing.SCHEDULES)]
    if report is None:
        assert not all(right for _, right in results)
        assert all(message is None for message, _ in results)
    else:
        messages = [message for message, _ in results if message]
        assert messages
        for message in messages:
            assert message.startswith("CUDA on the CPU: the kernel launched at planted.cu:")
            assert re.search(report, message), message
