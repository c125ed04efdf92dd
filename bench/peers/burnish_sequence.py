"""burnish's two ops of a step under GradScaler with clipping: grad_norm, then adam_step.

No peer, but what torch-sequence is to be compared with: the op's own row of the case is the step alone.
"""

from collections.abc import Callable

from burnish import __version__, ops
from burnish.bench import Peer
from burnish.bench.steps import amp_only, clipped_to, named
from burnish.registry import Case


def supports(op: str, case: Case) -> str | None:
    return amp_only(op, case)


def make(op: str, args: tuple) -> Callable[[], None]:
    given = named(args)
    given["max_grad_norm"], _ = clipped_to(args)

    def run() -> None:
        given["grad_norm"], given["found_inf"] = ops.grad_norm(given["grads"], given["grad_scale"])
        ops.adam_step(**given)

    return run


PEER = Peer("burnish-sequence", __version__, supports, make)
