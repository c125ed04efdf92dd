"""Properties of the device a kernel runs on. Answers without a GPU, and without starting CUDA for a CPU tensor.

``arch`` is one of :data:`ARCHITECTURES`, the columns of the tile tables: the newest listed architecture that the device
can run, so that an unlisted device gets a conservative column. Under Triton's interpreter (``TRITON_INTERPRET=1``)
kernels run on CPU tensors and take the ``sm_80`` column.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

#: multiprocessors assumed where there is no device to ask: few, so that the interpreter runs few programs
_DEFAULT_SM_COUNT = 4


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def arch(device: torch.device) -> str:
    """The column of the tile tables for a device."""
    return "sm_80" if device.type == "cpu" else _properties(device.index)[0]


def sm_count(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device."""
    return _DEFAULT_SM_COUNT if device.type == "cpu" else _properties(device.index)[1]


@cache
def _properties(index: int | None) -> tuple[str, int]:
    device = torch.device("cuda", index)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip is not None:
        return "gfx942", count
    major, minor = torch.cuda.get_device_capability(device)
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory and no wgmma or tcgen05: they are sm_80 devices here
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get((major, minor), "sm_80"), count


def registers(limit: int) -> dict[str, int]:
    """The launch option of a kernel whose threads may have that many registers. Without one, ptxas goes by its own
    measure of occupancy, for which it spills a few; where ROCm compiles, there is none to give."""
    return {} if torch.version.hip is not None else {"maxnreg": limit}


def objection(tensor: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on a tensor's device, in words; None if they can."""
    if tensor.device.type == "cpu":
        return None if interpreting() else "the tensors are on the CPU, Triton runs on a GPU"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}, expected CUDA"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if major < 8:
            return f"the GPU is sm_{major}{minor}, the kernels need sm_80 or newer"
    return None


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
