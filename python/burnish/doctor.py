"""What this machine can run: the report behind ``burnish doctor``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

import burnish
from burnish import native, tables
from burnish.bench import machine
from burnish.dispatch import candidates
from burnish.registry import BACKENDS, importable_ops, plugins

_LIBRARIES = ("_native.so", native.CUDA_LIBRARY)


def exit_code() -> int:
    """0 if the CPU kernels and every plug-in are loaded, else 1."""
    return 1 if "_native.so" in native.missing or any(plugin.error for plugin in plugins()) else 0


def report() -> str:
    """Machine, libraries, environment, plug-ins, what was measured; for each op, each backend with yes or why not."""
    sections = {
        "machine": _machine(),
        "native libraries": {name: native.missing.get(name, "loaded") for name in _LIBRARIES},
        "environment": _environment(),
        "plug-ins": {plugin.module: f"{plugin.state()} (package {plugin.package})" for plugin in plugins()},
        "measured here": {"folder": str(tables.folder()), **tables.kept()},
    }
    lines = [f"burnish {burnish.__version__}"]
    for title, entries in sections.items():
        if entries:
            lines += ["", title, *_columns(entries)]
    for name, spec in importable_ops().items():
        lines += ["", f"op {name}", *_columns(candidates(spec))]
    return "\n".join(lines)


def _columns(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {name:<{width}}  {text}" for name, text in entries.items()]


def _machine() -> dict[str, str]:
    visible = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if visible else []
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    cuda = f"{built}, {', '.join(gpus) if gpus else 'no GPU is visible'}"
    if native.emulating():
        cuda += "; CUDA C++ kernels run on the CPU, for tests (BURNISH_EMULATE_CUDA)"
    return {
        "cpu": machine.cpu_model(),
        "isa": _isa(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "cache": f"{machine.last_level_cache() >> 20} MiB last level",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton") or "not installed",
        "cuda": cuda,
    }


def _isa() -> str:
    try:
        return machine.cpu_isa() or f"unknown: {native.missing['_native.so']}"
    except RuntimeError as error:  # BURNISH_CPU_ISA asks for what there is not
        return f"none: {str(error).partition(chr(10))[0]}"


def _one_of(*words: str) -> Callable[[str], str | None]:
    return lambda value: None if value in words else f"expected one of: {', '.join(filter(None, words))}"


def _folder(value: str) -> str | None:
    path = Path(value)
    if path.exists() and not path.is_dir():
        return "expected a folder"
    return None


_VARIABLES: dict[str, Callable[[str], str | None]] = {
    "BURNISH_BACKEND": _one_of("", *BACKENDS, "auto"),
    "BURNISH_CPU_ISA": _one_of("", "generic", "avx2", "avx512"),
    "BURNISH_CACHE_DIR": _folder,
    "BURNISH_BUILD_CUDA": _one_of("", "0", "1"),
    "BURNISH_TUNE": _one_of("", "0", "1"),
    "BURNISH_EMULATE_CUDA": _one_of("", "0", "1"),
}


def _environment() -> dict[str, str]:
    """Every variable of ours with its value and whether it is one we take; names we do not know are listed, too."""
    entries = {}
    for name in sorted({*_VARIABLES, *(name for name in os.environ if name.startswith("BURNISH_"))}):
        value = os.environ.get(name)
        if value is None:
            entries[name] = "not set"
        elif name not in _VARIABLES:
            entries[name] = f"{value!r}: burnish reads no variable of this name"
        else:
            problem = _VARIABLES[name](value)
            entries[name] = f"{value!r}: invalid, {problem}" if problem else f"{value!r}"
    return entries
