"""burnish: smaller, faster PyTorch models by swapping layers and optimizers for fused ones.

    report = burnish.swap_(model, burnish.Int8())
    print(report)

Importing needs torch alone: no compiler, no GPU, no Triton; it builds nothing and does not start CUDA.
"""

from burnish import native as _native

_native.load()  # before the schemas below are defined, so that a mismatch is an exception here

from burnish import ops  # noqa: E402
from burnish.dispatch import explain, use_backend  # noqa: E402
from burnish.errors import BackendError, CheckpointError, SwapError  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "SwapError",
    "explain",
    "ops",
    "use_backend",
]
