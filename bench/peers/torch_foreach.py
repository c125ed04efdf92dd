"""torch.optim.AdamW(foreach=True): one call an operation on all tensors; its state has the parameter's dtype."""

from collections.abc import Callable

import torch
from burnish.bench import Peer
from burnish.bench.steps import optimizer, states, stepping
from burnish.registry import Case, dtype_name


def supports(op: str, case: Case) -> str | None:
    if op != "adam_step":
        return "only a step of Adam is timed here"
    if set(case.options) - {"state", "stochastic"}:
        return (
            "torch's own sequence is timed by torch-sequence" if case.options.get("amp") else "torch has no such step"
        )
    same = case.options.get("state", "fp32") == dtype_name(case.dtype)
    return None if same else f"its state is {dtype_name(case.dtype)}, as the parameters are"


def make(op: str, args: tuple) -> Callable[[], None]:
    made, params = optimizer(lambda params, **kwargs: torch.optim.AdamW(params, foreach=True, **kwargs), args)
    for param, (step, first, second) in zip(params, states(args), strict=True):
        made.state[param] = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
    return stepping(made)


PEER = Peer("torch-foreach", torch.__version__, supports, make)
