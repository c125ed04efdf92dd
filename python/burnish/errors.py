"""The exceptions of burnish. Bad arguments raise ValueError, TypeError or, from inside an op, RuntimeError."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No implementation can run a call, or the one that was asked for cannot; the message lists the reasons."""


class SwapError(ValueError):
    """A swap that was asked for cannot be done; the model is as it was before."""


class CheckpointError(RuntimeError):
    """A saved model is damaged, incomplete, of another model or of a newer format; nothing was loaded."""


class PatternError(ValueError):
    """A weight does not have its zeros where a sparse layer needs them; the message says where it fails."""


class PluginError(RuntimeError):
    """An installed package announces ops, but its module cannot be imported; the message says which and why."""
