"""What a result must say of the machine it came from, and the sizes the timing needs from it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import burnish
from burnish import native

_CACHES = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
#: assumed where the system does not tell
_DEFAULT_CACHE = 32 << 20


def describe(device: str, command: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``machine`` entry of a result: date, commit, versions, CPU or GPU, threads and the command."""
    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "burnish": burnish.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa(),
        "cache_mib": last_level_cache() >> 20,
        "device": device,
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["cuda"] = torch.version.cuda
    return about | dict(extra or {})


def cpu_isa() -> str | None:
    """The instruction set the CPU kernels use: generic, avx2 or avx512; None without the native library."""
    return None if "_native.so" in native.missing else str(torch.ops.burnish.cpu_isa())


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this module runs from, ``-dirty`` where tracked files differ; None elsewhere."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True)
        if tracked.returncode != 0:
            return None
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def cpu_model() -> str:
    """The CPU's name as the system prints it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache the device's kernels can hit: every L3 that our cores reach, or the GPU's L2."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found = {}
    for core in allowed:
        for index in (_CACHES / f"cpu{core}" / "cache").glob("index*"):
            try:
                kind, level = (index / "type").read_text().strip(), int((index / "level").read_text())
                if level == 3 and kind in ("Unified", "Data"):
                    found[(index / "shared_cpu_list").read_text()] = parse_size((index / "size").read_text())
            except (OSError, ValueError):
                continue
    return sum(found.values()) or _DEFAULT_CACHE


class Neighbours:
    """How much of our cores other processes, or the host, took while :meth:`watch` was in force."""

    def __init__(self) -> None:
        self._taken = 0.0
        self._offered = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
        yield
        after = _busy_seconds()
        if busy is not None and after is not None:
            self._taken += max(0.0, after - busy - (time.process_time() - own))
            self._offered += (time.perf_counter() - start) * (os.cpu_count() or 1)

    @property
    def share(self) -> float | None:
        """0 on a quiet machine, 1 where they had everything; None if the system does not tell."""
        return min(1.0, self._taken / self._offered) if self._offered else None


def _busy_seconds() -> float | None:
    """Core seconds used so far by all processes, and stolen by the host."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def parse_size(text: str) -> int:
    """``32768K`` as bytes."""
    text = text.strip()
    return int(text[:-1]) * _UNITS[text[-1]] if text and text[-1] in _UNITS else int(text)


def free_memory(device: str = "cpu") -> int:
    """Bytes that can be allocated without swapping."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
