"""burnish: smaller, faster PyTorch models by swapping layers and optimizers for fused ones.

    report = burnish.swap_(model, burnish.Int8())
    print(report)

Importing needs torch alone: no compiler, no GPU, no Triton; it builds nothing and does not start CUDA.
"""

from burnish import native as _native

_native.load()  # before the schemas below are defined, so that a mismatch is an exception here

from burnish import factorize, nn, ops, optim, prune  # noqa: E402
from burnish.adapters import adapter_state_dict, load_adapter, save_adapter, trainable_only  # noqa: E402
from burnish.calibration import Calibration, calibrate  # noqa: E402
from burnish.checkpoint import load, save  # noqa: E402
from burnish.configs import BlockSparse, Int8, Keep, LoRA, LowRank, Sparse, Sparse24  # noqa: E402
from burnish.dispatch import explain, use_backend  # noqa: E402
from burnish.errors import BackendError, CheckpointError, PatternError, SwapError  # noqa: E402
from burnish.native import get_include  # noqa: E402
from burnish.peft_format import lora_rules  # noqa: E402
from burnish.report import Report  # noqa: E402
from burnish.swap import swap_  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockSparse",
    "Calibration",
    "CheckpointError",
    "Int8",
    "Keep",
    "LoRA",
    "LowRank",
    "PatternError",
    "Report",
    "Sparse",
    "Sparse24",
    "SwapError",
    "adapter_state_dict",
    "calibrate",
    "explain",
    "factorize",
    "get_include",
    "load",
    "load_adapter",
    "lora_rules",
    "nn",
    "ops",
    "optim",
    "prune",
    "save",
    "save_adapter",
    "swap_",
    "trainable_only",
    "use_backend",
]
