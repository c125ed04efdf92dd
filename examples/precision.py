"""Mixed precision for the examples: what a device has, and a training step in it.

    mixed = Mixed("bf16")
    with mixed.autocast():
        loss = F.cross_entropy(model(images), labels)
    mixed.step(loss, optimizer)

Parameters stay in the dtype that they have; products are in the chosen one. With fp16, whose range is small, the loss
is scaled by torch.amp.GradScaler, which leaves out a step where that was too much. burnish's optimizers take scale and
infinities as they are and do all of it in the step.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

__all__ = ["PRECISIONS", "Mixed", "check"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def objection(name: str, device: str) -> str | None:
    """Why a device does not train in a precision, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU here"
    if name == "fp16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU multiplies no fp16; a GPU does"
    return None


def check(parser: argparse.ArgumentParser, name: str, device: str = "cpu") -> None:
    """End the program, with the reason, where a device does not train in a precision."""
    reason = objection(name, device)
    if reason:
        parser.error(f"--precision {name} on {device}: {reason}")


class Mixed:
    """Autocast to a precision and, for fp16, a scaler."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.dtype, self.device = PRECISIONS[name], device
        self.scaler = torch.amp.GradScaler(device, enabled=name == "fp16")

    def autocast(self) -> Any:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not torch.float32)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward, the optimizer's step, and no gradients after it."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
