"""What torch runs for a step under GradScaler with clipping: unscale_, clip_grad_norm_, the fused step.

Each writes the gradients anew. Calls after the first find them unscaled and clipped, and undo the clipping as they
unscale, so that the gradients neither vanish nor grow. The norm clipped to is the one that gives the case's
coefficient with the gradients' own norm.
"""

from collections.abc import Callable

import torch
from burnish.bench import Peer
from burnish.bench.steps import amp_only, clipped_to, named
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    return amp_only(op, case)


def make(op: str, args: tuple) -> Callable[[], None]:
    given = named(args)
    limit, coefficient = clipped_to(args)
    with torch.inference_mode(False):
        params = [torch.nn.Parameter(param) for param in given["params"]]
        grads = [grad.clone() for grad in given["grads"]]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        inverse, again = 1 / given["grad_scale"], torch.full_like(given["grad_scale"], 1 / coefficient)
        found = torch.zeros_like(given["grad_scale"])
    moments = [given[name] for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")]

    def run() -> None:
        with torch.inference_mode(False), torch.no_grad():
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, inverse)
            torch.nn.utils.clip_grad_norm_(params, limit, foreach=True)
            torch._foreach_add_(given["steps"], 1)
            torch._fused_adamw_(
                given["params"],
                grads,
                *moments,
                lr=given["lr"],
                beta1=given["beta1"],
                beta2=given["beta2"],
                weight_decay=given["weight_decay"],
                eps=given["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=found,
            )
            inverse.copy_(again)

    return run


PEER = Peer("torch-sequence", torch.__version__, supports, make)
