"""How ``planted.cu`` is built and called: by ``test_emulation.py``, and by itself in a process under AddressSanitizer.

python planted.py LIBRARY KERNEL BUG
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
HOST = sorted(path for path in (ROOT / "csrc/cuda/host").glob("*.cpp") if path.stem != "control")
FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
KERNELS = ["reverse", "copy", "largest", "count", "sum", "overlap", "tile", "gemm"]


def build(source: Path, library: Path, *flags: str) -> Path:
    """A .cu file and the machine it runs on, as one library; those of a folder share the machine."""
    machine = build_once(library.parent, f"machine{''.join(flags)}.o", lambda to: _compile(HOST, to, "-r", *flags))
    return _compile([source], library, "-shared", *flags, links=(str(machine), "-ldl"))


def _compile(sources: list[Path], to: Path, *flags: str, links: tuple[str, ...] = ()) -> Path:
    inputs = [word for path in sources for word in ("-x", "c++", str(path))]
    command = ["g++", *FLAGS, *flags, f"-I{ROOT / 'csrc'}", *inputs, "-x", "none", *links, "-o", str(to)]
    subprocess.run(command, check=True)
    return to


def shared_folder(factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where all workers of a test run find what one of them builds."""
    base = factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def build_once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    library = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            make(library)
    return library


def bugs_of(source: Path) -> list[str]:
    """The names in a source's enum of bugs, in order."""
    return re.findall(r"^  k(\w+),$", source.read_text().partition("enum class Bug")[2].partition("};")[0], re.M)


def run_sanitized(library: Path, kernel: str, bug: int) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own, of a library that was built with SANITIZE."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    options = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, __file__, str(library), kernel, str(bug)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | options)


class Planted:
    """The library. A kernel runs on inputs of its own."""

    def __init__(self, library: Path, kernels: list[str] = KERNELS) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.run_planted.restype = self._library.count_planted.restype = ctypes.c_char_p
        self._problems = {kernel: problem(kernel) for kernel in kernels}

    def call(self, kernel: str, bug: int = 0, seed: int = 0) -> tuple[str | None, bool]:
        """One run: the message that stopped it, and whether its result is right."""
        message, y, expected = self.run(kernel, bug, seed)
        return message, np.array_equal(y, expected)

    def run(self, kernel: str, bug: int = 0, seed: int = 0) -> tuple[str | None, np.ndarray, np.ndarray]:
        """One run: the message that stopped it, its result, and the right one."""
        a, b, expected = self._problems[kernel]
        y, scratch = _on_sector(np.zeros_like(expected)), _on_sector(np.zeros(64, np.int32))
        message = self._library.run_planted(
            kernel.encode(), bug, ctypes.c_uint64(seed), *map(_data, (a, b, y, scratch))
        )
        return message and message.decode(), y, expected

    def count(self, kernel: str, seed: int = 0) -> str:
        """The counters of one run, as JSON."""
        a, b, expected = self._problems[kernel]
        y, scratch = _on_sector(np.zeros_like(expected)), _on_sector(np.zeros(64, np.int32))
        call = self._library.count_planted
        return call(kernel.encode(), ctypes.c_uint64(seed), *map(_data, (a, b, y, scratch))).decode()


def problem(kernel: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a kernel reads, and what it must give."""
    draw = np.random.default_rng(1)
    if kernel in ("tile", "gemm"):  # small integers in bf16: every sum is exact
        size = (256, 512) if kernel == "gemm" else (128, 128)
        a, b = (draw.integers(-2, 3, size).astype(np.float32) for _ in range(2))
        return *(_on_sector((x.view(np.uint32) >> 16).astype(np.uint16)) for x in (a, b)), a @ b.T
    if kernel == "ring":  # the same; kept are the two middle values of every four
        x, values = (draw.integers(-2, 3, size).astype(np.float32) for size in ((256, 256), (64, 128)))
        kept = x.reshape(256, -1, 4)[..., 1:3].reshape(256, -1)
        operands = (_on_sector((each.view(np.uint32) >> 16).astype(np.uint16)) for each in (x, values))
        return *operands, (kept @ values.T).astype(np.float16)
    if kernel == "pair":
        words = draw.integers(0, 2**31, 64).astype(np.uint32)
        blocks = [
            [2 * (block // 2) + rank + 2 * turn + 1 for rank in range(2)] for block in range(4) for turn in range(2)
        ]
        fetched = words.reshape(4, 16)[np.array(blocks) % 4] + np.uint32(1)
        return _on_sector(words), words, np.append(fetched, np.uint32(1 << 31))
    x = draw.integers(-(2**31), 2**31, {"copy": 1024, "sum": 512}.get(kernel, 256)).astype(np.int32)
    if kernel == "reverse":
        expected = x.reshape(4, 64)[:, ::-1]
    elif kernel == "copy":
        expected = x
    elif kernel == "largest":
        expected = x.view(np.uint32).reshape(2, 128).max(1).repeat(32)
    elif kernel == "count":
        expected = np.array([8 * 64], np.uint32)
    elif kernel == "sum":
        x %= 1000
        expected = np.array([x.sum(dtype=np.int32)])
    else:
        expected = x[:64] + np.int32(1)
    return x, x, np.ascontiguousarray(expected)


def _on_sector(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 32 bytes."""
    room = np.empty(array.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 32
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _data(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


if __name__ == "__main__":
    print(Planted(Path(sys.argv[1]), [sys.argv[2]]).call(sys.argv[2], int(sys.argv[3])))
