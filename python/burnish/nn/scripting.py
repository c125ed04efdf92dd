"""What torch.jit.script, which would compile their Python, is told by layers that call one op."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse(layer: Any) -> NoReturn:
    """A layer's ``__prepare_scriptable__``, the hook that torch.jit.script calls first."""
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(layer).__name__}: use torch.jit.trace in eval mode, or torch.export"
    )
