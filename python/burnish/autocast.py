"""What autocast does to the operands of a linear layer, for layers whose op autocast does not know."""

from __future__ import annotations

import torch

from burnish.checks import FLOATING


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a linear layer's result on x's device; None where it is off or does not exist."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def operands(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``x`` and the others as autocast gives them to a linear layer: in its dtype, or untouched where it is off."""
    dtype = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if dtype is None:
        return x, *others
    return tuple(tensor.to(dtype) if tensor.dtype in FLOATING else tensor for tensor in (x, *others))
