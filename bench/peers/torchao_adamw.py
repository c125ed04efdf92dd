"""torchao's AdamW: 8-bit state, or bf16 parameters rounded at random; each tensor's step is compiled.

Small second moments become codes of zero, and steps of these elements, one in a thousand at most, are far too long.
"""

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its CUDA libraries that a CPU does not need
    for _name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    from torchao.optim import AdamW8bit, _AdamW

from burnish.bench import Peer
from burnish.bench.steps import coded_only, named, optimizer, states, stepping
from burnish.registry import Case

RANDOM = {"state": "bf16", "stochastic": True}


def supports(op: str, case: Case) -> str | None:
    if op == "adam_step" and case.dtype == torch.bfloat16 and case.options == RANDOM:
        return None
    return coded_only(op, case)


def make(op: str, args: tuple) -> Callable[[], None]:
    random = named(args)["seed"] is not None
    kind = _AdamW if random else AdamW8bit
    made, params = optimizer(lambda params, **kwargs: kind(params, bf16_stochastic_round=random, **kwargs), args)
    for param, (step, *moments) in zip(params, states(args), strict=True):
        with torch.inference_mode(False):
            kept = [made._new_buffer(param.detach(), signed) for signed in (True, False)]
            for buffer, moment in zip(kept, moments, strict=True):
                buffer.copy_(moment)
        made.state[param] = {"step": torch.tensor(float(step)), "exp_avg": kept[0], "exp_avg_sq": kept[1]}
    return stepping(made)


PEER = Peer("torchao-adamw", version("torchao"), supports, make, tolerance=0.1, spared=1e-3)
