"""DeepSpeedCPUAdam: a C++ kernel a tensor, which DeepSpeed compiles for this machine at its first use."""

import os
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

from burnish.bench import Peer
from burnish.bench.steps import optimizer, states, stepping
from burnish.registry import Case, dtype_name
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

CPUAdamBuilder().load(verbose=False)


def supports(op: str, case: Case) -> str | None:
    if op != "adam_step":
        return "only a step of Adam is timed here"
    if set(case.options) - {"state", "stochastic"}:
        return "DeepSpeedCPUAdam has no such step"
    state = case.options.get("state", "fp32")
    return None if state in ("fp32", dtype_name(case.dtype)) else f"DeepSpeedCPUAdam has no {state} state"


def make(op: str, args: tuple) -> Callable[[], None]:
    made, params = optimizer(DeepSpeedCPUAdam, args)
    for param, (step, first, second) in zip(params, states(args), strict=True):
        made.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return stepping(made)


PEER = Peer("deepspeed-adam", version("deepspeed"), supports, make)
