"""The native libraries: found, loaded, and explained when they are not there.

``_native.so`` holds the CPU kernels and loads with ``import burnish``; ``_cuda.so`` holds the CUDA kernels and loads
where torch was built for CUDA. ``_emulated.so`` holds the same CUDA kernels, built to run on a CPU; with
``BURNISH_EMULATE_CUDA=1`` in the environment it takes the place of ``_cuda.so``, for tests. Loading registers kernels
with PyTorch and does nothing else: no build, no CUDA start.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

# what the CPU library says of itself: the instruction set in use, and measured ceilings (see csrc/cpu/peak.cpp)
_probes = torch.library.Library("burnish", "FRAGMENT")
_probes.define("cpu_isa() -> str")
_probes.define("cpu_peak(str kind, int millis) -> float")
# steps of the CPU that are checked wait between the two, see csrc/cpu/held_steps.h
_probes.define("hold_steps() -> ()")
_probes.define("release_steps(bool done) -> ()")
# lists that wait for the next step, see csrc/cpu/kept_lists.h; to change them, so that nobody hands over copies
_probes.define("keep_tensors(Tensor(a!)[] tensors) -> int")
_probes.define("drop_tensors(int number) -> ()")

_HERE = Path(__file__).parent


def emulating() -> bool:
    """Whether this process runs the CUDA C++ kernels on the CPU."""
    return os.environ.get("BURNISH_EMULATE_CUDA") == "1"


@cache
def warpgroups(device: torch.device) -> bool:
    """Whether the kernels of csrc/cuda/warpgroup.cuh run on a GPU, or on the CPU in its place."""
    return emulating() or (torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0))


#: the library with the CUDA C++ kernels that this process may load
CUDA_LIBRARY = "_emulated.so" if emulating() else "_cuda.so"
if emulating():
    _probes.define("emulation_seed(int seed) -> ()")
    _probes.define("emulation_count(bool on) -> ()")
    _probes.define("emulation_counters() -> str")

#: why a library is not loaded, by file name; empty where all that can load is loaded
missing: dict[str, str] = {}


def get_include() -> str:
    """The folder of the headers that CUDA C++ kernels outside burnish include: ``cuda/launch.cuh``, ``cuda/ptx.cuh``,
    ``math/*.h``."""
    installed = _HERE / "include"
    return str(installed if installed.is_dir() else _HERE.parents[1] / "csrc")


def load() -> None:
    """Load the libraries this torch can use. What is absent is remembered in :data:`missing`, not raised."""
    _load("_native.so", "the CPU kernels were not built: run pip install --no-build-isolation .")
    word = os.environ.get("BURNISH_EMULATE_CUDA", "")
    if word not in ("", "0", "1"):
        missing[CUDA_LIBRARY] = f"BURNISH_EMULATE_CUDA is {word!r}, expected 0 or 1"
    elif emulating():
        _load(CUDA_LIBRARY, "the CUDA kernels were not built for the CPU: run pip install --no-build-isolation .")
    elif torch.version.cuda is None:
        missing["_cuda.so"] = "this torch is built without CUDA"
    else:
        _load("_cuda.so", "the CUDA kernels were not built: install nvcc and rebuild, or set BURNISH_BUILD_CUDA=1")


def lacks(namespace: str) -> bool:
    """Whether the CPU kernels of ops in ``namespace`` are missing because our library is not loaded."""
    return namespace == "burnish" and "_native.so" in missing


def _load(name: str, reason: str) -> None:
    path = _HERE / name
    if not path.is_file():
        missing[name] = reason
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        missing[name] = f"{path} does not load: {error}"
