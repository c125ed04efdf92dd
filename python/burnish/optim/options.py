"""The options of parameter groups: what they may be, and the sentence where one is not.

Every option is an entry of each group, as in torch.optim: schedulers may change it between steps, a state dict carries
it, and a group may have its own. ``max_grad_norm`` alone is of all groups together and must be the same in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

#: the format of a group and its state in a state dict; one that is greater is refused
VERSION = 1

STATE_DTYPES = ("fp32", "bf16", "int8")
MASTER_WEIGHTS = (None, "fp32", "split")


class Extras(TypedDict, total=False):
    """What burnish's optimizers take beyond torch.optim's keywords.

    max_grad_norm: clip the norm of all gradients together to this, as torch.nn.utils.clip_grad_norm_ does, in the step
        and without writing to the gradients; None clips nothing.
    state_dtype: of the moments: "fp32", "bf16", or "int8" in blocks of 256 elements with a scale each.
    master_weights: of 16-bit parameters: None, "fp32" (a copy that is stepped and rounded to the parameter), or "split"
        (8 more bits below the parameter's own). Parameters in fp32 need none. A step with "fp32" does not read the
        parameter: where something else has written to it since the last one (``model.load_state_dict``,
        ``prune.SecondOrder``), take the copy out, ``state.pop("master", None)`` for ``optimizer.state.values()``, and
        the next step makes it anew.
    stochastic_rounding: round to 16-bit parameters and moments at random, so that the expectation is exact. The bits
        follow from ``seed``, the number of the step and where an element is: the same on every replica.
    seed: an int of up to 64 bits. The group's moves on at each step, and a state dict carries it.
    ema_decay: keep an exponential moving average of each parameter, ``ema = decay * ema + (1 - decay) * new value``,
        in fp32; ``swap_ema()`` puts it in the parameters' place. It moves in the steps of its parameter, those with a
        gradient. None keeps none.
    masks: which elements of a parameter stay, by the parameter or, where parameters came by name, by the name of it or
        of its layer (so ``prune.masks(model)`` is one): bool, True where an element is kept; the others end a step as
        zeros. The tensors are used as they are, not copied, so they may change between steps. They are of all groups
        together, and no state dict has them: give them again to an optimizer that is resumed.
    """

    max_grad_norm: float | None
    state_dtype: Literal["fp32", "bf16", "int8"]
    master_weights: Literal["fp32", "split"] | None
    stochastic_rounding: bool
    seed: int
    ema_decay: float | None
    masks: Mapping[Any, Tensor] | None


DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "state_dtype": "fp32",
    "master_weights": None,
    "stochastic_rounding": False,
    "seed": 0,
    "ema_decay": None,
}


def with_defaults(who: str, extras: Extras) -> dict[str, Any]:
    """The entries of a group that ``extras`` stand for, masks aside.

    Raises:
        TypeError: an unknown keyword.
    """
    unknown = sorted(set(extras) - set(DEFAULTS) - {"masks"})
    if unknown:
        raise TypeError(f"{who}: unknown keyword {unknown[0]!r}; beyond torch.optim's there are {', '.join(DEFAULTS)}")
    given = {name: value for name, value in extras.items() if name != "masks"}
    return DEFAULTS | given | {"burnish_version": VERSION}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    """A number of Python, numpy or torch."""
    return isinstance(value, (float, int, Tensor, Real))


_EXTRAS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_grad_norm": (lambda v: v is None or (_number(v) and 0 < v < math.inf), "a positive number or None"),
    "state_dtype": (lambda v: v in STATE_DTYPES, "'fp32', 'bf16' or 'int8'"),
    "master_weights": (lambda v: v in MASTER_WEIGHTS, "None, 'fp32' or 'split'"),
    "stochastic_rounding": (lambda v: isinstance(v, bool), "True or False"),
    "seed": (lambda v: _number(v) and isinstance(v, int) and 0 <= v < 2**64, "an int in [0, 2**64)"),
    "ema_decay": (lambda v: v is None or (_number(v) and 0 <= v < 1), "a number in [0, 1) or None"),
}


def check_extras(who: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError where an option that all of burnish's optimizers have is not what it may be."""
    for name, (allowed, expected) in _EXTRAS.items():
        if not allowed(group[name]):
            raise ValueError(f"{who}: {name} is {group[name]!r}, expected {expected}")
    if group.get("capturable") and group["stochastic_rounding"]:
        raise ValueError(f"{who}: a captured step repeats its random bits, so capturable excludes stochastic_rounding")


def check_rate(group: Mapping[str, Any]) -> None:
    """Raise torch.optim's errors where the learning rate, or what concerns its implementations, is not allowed."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if group["foreach"] and "capturable" in group and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    check_not_negative(group, "lr", "learning rate")
    if group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_not_negative(group: Mapping[str, Any], name: str, words: str) -> None:
    """Raise torch.optim's error where an option is negative, infinite or not a number.

    A tensor on a GPU is left unread, since that would wait for it.
    """
    value = group[name]
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not _real(value) or not 0.0 <= value < math.inf:
        raise ValueError(f"Invalid {words}: {value}")


def check_finite(group: Mapping[str, Any], name: str, words: str) -> None:
    """Raise ValueError where an option is infinite or not a number."""
    if not _real(group[name]) or not math.isfinite(group[name]):
        raise ValueError(f"Invalid {words}: {group[name]}")


def check_alike(defaults: Mapping[str, Any]) -> None:
    """Raise torch.optim's error where one of the two betas is a tensor; of groups, where schedulers put floats."""
    if len({isinstance(beta, Tensor) for beta in defaults.get("betas", ())}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")


def check_betas(who: str, group: Mapping[str, Any]) -> None:
    """Raise torch.optim's errors where the betas are not two numbers, or CPU tensors, in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{who}: betas is {betas!r}, expected two numbers or two tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if group["foreach"] and not group["capturable"]:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
            if beta.device.type != "cpu":
                raise ValueError(f"{who}: betas[{i}] is on {beta.device}, expected a float or a CPU tensor")
        if not _real(beta) or not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def rate(group: Mapping[str, Any], device: torch.device) -> Tensor:
    """The learning rate as a scalar fp32 or fp64 tensor on ``device``, made without waiting for the device."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return torch.full((), lr, dtype=torch.float64, device=device)
    dtype = lr.dtype if lr.dtype in (torch.float32, torch.float64) else torch.float64
    return lr.detach().to(device=device, dtype=dtype, non_blocking=True).reshape(())
