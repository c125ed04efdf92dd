"""For test modules that call Triton kernels on the CPU: they skip where this process interprets nothing."""

from __future__ import annotations

import pytest
from burnish.testing import interpreter, interpreting

REASON = "runs under Triton's interpreter, in its own process: TRITON_INTERPRET=1"


def require() -> None:
    """Skip the calling test module, with the reason, unless this process interprets; then repair the interpreter."""
    if not interpreting():
        pytest.skip(REASON, allow_module_level=True)
    pytest.importorskip("triton", reason="triton is not installed")
    interpreter.activate()
