"""Constraints that many ops share, each with the message users see: op, argument, what came, what is allowed."""

from __future__ import annotations

import torch

from burnish.registry import dtype_name

#: the floating types that ops take
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError unless each tensor is fp32, bf16 or fp16 (None passes)."""
    for name, tensor in tensors.items():
        torch._check(
            tensor is None or tensor.dtype in FLOATING,
            lambda name=name, tensor=tensor: f"{op}: {name} is {dtype_name(tensor.dtype)}, expected fp32, bf16 or fp16",
        )


def check_devices(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise RuntimeError unless each tensor is on ``first``'s device (None passes)."""
    for name, tensor in others.items():
        torch._check(
            tensor is None or tensor.device == first.device,
            lambda name=name, tensor=tensor: f"{op}: {name} is on {tensor.device}, expected {first.device}",
        )


def check_scalar(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError unless each tensor is one fp32 or fp64 element (None passes)."""
    for name, tensor in tensors.items():
        torch._check(
            tensor is None or tensor.dtype in (torch.float32, torch.float64),
            lambda name=name, tensor=tensor: f"{op}: {name} is {dtype_name(tensor.dtype)}, expected fp32 or fp64",
        )
        torch._check(
            tensor is None or tensor.numel() == 1,
            lambda name=name, tensor=tensor: f"{op}: {name} has shape {tuple(tensor.shape)}, expected one element",
        )
