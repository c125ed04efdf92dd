"""Tensors made from other tensors, kept shared.

Layers that share one packed weight must still share it after a move to another device, after loading, and in the
state dict. Each layer converts its own buffer, so the conversions meet here: the result of the first is remembered,
weakly, for as long as somebody uses it, and handed to the second.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_made: Any = WeakTensorKeyDictionary()


def derive(source: torch.Tensor, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``make()``, or its earlier result for the same source and key if that is still in use and neither the source nor
    the result was written to since. Inference tensors do not count their writes, so nothing is remembered for them."""
    entries = _made.setdefault(source, {})
    if key in entries and not source.is_inference():
        reference, versions = entries[key]
        result = reference()
        if result is not None and (source._version, result._version) == versions:
            return result
    result = make()
    if result is not source and not (source.is_inference() or result.is_inference()):
        entries[key] = TensorWeakRef(result), (source._version, result._version)
    return result
