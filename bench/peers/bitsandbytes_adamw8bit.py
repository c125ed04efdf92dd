"""bitsandbytes' AdamW8bit: dynamic 8-bit codes in blocks of 256, on a CPU by PyTorch's operations one by one.

Its codes are finest near a block's largest second moment, and coarse for the smallest ones, whose steps are largest:
half of all steps are within 1 %, 99.9 % of them are off by 3 % in norm, and the last 0.1 % by more than all together.
"""

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # it announces kernels that have nothing to do with optimizers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.optim import AdamW8bit

from burnish.bench import Peer
from burnish.bench.steps import coded_only, optimizer, states, stepping
from burnish.registry import Case

MOMENTS = ("1", "2")


def supports(op: str, case: Case) -> str | None:
    return coded_only(op, case)


def make(op: str, args: tuple) -> Callable[[], None]:
    made, params = optimizer(AdamW8bit, args)
    for place, (param, (step, *moments)) in enumerate(zip(params, states(args), strict=True)):
        made.init_state(made.param_groups[0], param, 0, place)
        state = made.state[param]
        state["step"] = step
        for name, moment in zip(MOMENTS, moments, strict=True):
            kept = state[f"state{name}"]
            if kept.dtype == torch.uint8:
                codes, scales = torch.ops.bitsandbytes.quantize_blockwise(moment, state[f"qmap{name}"], 256)
                kept.copy_(codes)
                state[f"absmax{name}"].copy_(scales)
            else:
                kept.copy_(moment)
    return stepping(made)


PEER = Peer("bitsandbytes-adamw8bit", version("bitsandbytes"), supports, make, spared=1e-3)
