"""adam_step: one step of Adam, AdamW or their amsgrad forms on a list of parameters, in one pass over memory.

    t  = step + 1                                          each [], fp32; counted inside
    g  = grad * c                                          c = clip / grad_scale, negative to maximize
    g  = g + weight_decay * p                              unless decoupled
    m  = m + (g - m) * (1 - beta1)                         v = v * beta2 + g ** 2 * (1 - beta2)
    v' = max(v', v), which then stands for v below         where there are max_exp_avg_sqs
    p  = p * (1 - lr * weight_decay) - lr / (1 - beta1 ** t) * m / (sqrt(v) / sqrt(1 - beta2 ** t) + eps)
    p, e = 0 where the mask is false                       e = e * ema_decay + p * (1 - ema_decay)

with clip = min(1, max_grad_norm / (grad_norm + 1e-6)), as ``clip_grad_norm_`` has it. Where ``found_inf`` is not 0, or
``grad_norm`` is not finite beside a ``found_inf``, nothing changes, not a bit.

===============  =====================================================================================
params           fp32, bf16, fp16, mixed; dense in any order of dimensions
grads            fp32, bf16, fp16, mixed; shape and strides of the parameters, as all below
steps            fp32, one element each
exp_avgs, ...    m, v, v': fp32 or bf16; or int8, uint8, uint8 codes, see :mod:`burnish.moments`
scales           fp32 [2 or 3, ceil(numel / 256)], of codes
masters          p itself: fp32, or uint8, the low bits of a 16-bit parameter, see :mod:`burnish.rounding`
emas, masks      fp32; bool
lr               fp32 or fp64, one element, as are grad_norm, grad_scale and found_inf
===============  =====================================================================================

The arithmetic is fp32 with one rounding an operation in the order written, the scalars' double. Results are rounded
once: to nearest even, or with a seed stochastically (parameters without a master, and bf16 moments), by random bits
that are a function of the seed, the parameter's place in the list and the element's. EMAs follow the unrounded
parameter. Deterministic; the same bits at every number of threads and instruction set. No gradient.

Adam: Kingma and Ba 2015; AdamW: Loshchilov and Hutter 2019; amsgrad: Reddi et al. 2018. 24-bit parameters as FlashOptim
has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from burnish import dispatch, moments, rounding
from burnish.adam_cases import CASES, baseline, cost, make
from burnish.checks import check_devices, check_floating, check_scalar
from burnish.registry import OpSpec, dtype_name, register

__all__ = ["adam_step"]

Tensors = list[torch.Tensor]


def reference(
    params: Tensors,
    grads: Tensors,
    steps: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    scales: Tensors,
    masters: Tensors,
    emas: Tensors,
    masks: Tensors,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    ema_decay: float,
    max_grad_norm: float,
    grad_norm: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int | None,
) -> None:
    norm = 0.0 if grad_norm is None else float(grad_norm)
    if found_inf is not None and (float(found_inf) != 0 or not math.isfinite(norm)):
        return
    factor = -1.0 if maximize else 1.0
    if grad_scale is not None:
        factor = _divided(factor, float(grad_scale))
    if max_grad_norm > 0:
        clip = max_grad_norm / (norm + 1e-6)
        factor *= 1.0 if clip > 1 else clip
    kinds = [kind for kind in (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if kind]
    for i, param in enumerate(params):
        steps[i].copy_(steps[i] + 1)
        t = float(steps[i])
        p = _value(param, masters[i] if masters else None)
        g = grads[i].to(p.dtype) * factor
        if not decoupled and weight_decay:
            g = g + p * weight_decay
        m, v, *greatest = (_moment(kind[i], scales[i][k] if scales else None) for k, kind in enumerate(kinds))
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + g.square() * (1 - beta2)
        greatest = [torch.maximum(one, v) for one in greatest]
        correction1, correction2 = 1 - _power(beta1, t), 1 - _power(beta2, t)
        inverse = _divided(1.0, math.sqrt(correction2) if correction2 >= 0 else math.nan)
        update = m / (moments.square_root((greatest or [v])[0]) * inverse + eps)
        kept = 1 - float(lr) * weight_decay if decoupled and weight_decay else 1.0
        p = p * kept - update * _divided(float(lr), correction1)
        if masks:
            p = torch.where(masks[i], p, 0.0)
        if emas:
            e = emas[i] * ema_decay + p * (1 - ema_decay)
            emas[i].copy_(torch.where(masks[i], e, 0.0) if masks else e)
        for k, (kind, value) in enumerate(zip(kinds, (m, v, *greatest), strict=True)):
            _store_moment(kind[i], scales[i][k] if scales else None, value, k == 0, seed, i, 2 + k)
        _store(param, masters[i] if masters else None, p, seed, i)


def _divided(numerator: float, denominator: float) -> float:
    """IEEE division of Python's floats."""
    return float(torch.tensor(numerator, dtype=torch.float64) / denominator)


def _power(base: float, exponent: float) -> float:
    """IEEE power of Python's floats."""
    if math.isnan(exponent):
        return exponent
    return math.inf if exponent < 0 and base == 0 else base**exponent


def _value(param: torch.Tensor, master: torch.Tensor | None) -> torch.Tensor:
    if master is None:
        return param if param.dtype == torch.float64 else param.to(torch.float32)
    return rounding.join(param, master) if master.dtype == torch.uint8 else master


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor, as they lie in memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _like(flat: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Elements that lie in memory as ``tensor``'s do, in its shape."""
    return flat.view(tensor.shape) if tensor.is_contiguous() else flat.as_strided(tensor.shape, tensor.stride())


def _moment(stored: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        return _like(moments.decode(_flat(stored), scale), stored)
    return stored if stored.dtype == torch.float64 else stored.to(torch.float32)


def _random(value: torch.Tensor, like: torch.Tensor, seed: int, index: int, stream: int) -> torch.Tensor:
    random = rounding.random_bits(seed, index, stream, value.numel())
    return rounding.round_random(value, like.dtype, _like(random, like))


def _store_moment(
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    value: torch.Tensor,
    signed: bool,
    seed: int | None,
    index: int,
    stream: int,
) -> None:
    if scale is not None:
        codes, scales = moments.encode(_flat(value), signed)
        _flat(stored).copy_(codes)
        scale.copy_(scales)
    elif seed is not None and stored.dtype == torch.bfloat16:
        stored.copy_(_random(value, stored, seed, index, stream))
    else:
        stored.copy_(value)


def _store(param: torch.Tensor, master: torch.Tensor | None, value: torch.Tensor, seed: int | None, index: int) -> None:
    if master is not None and master.dtype == torch.uint8:
        high, low = rounding.split(value, param.dtype)
        param.copy_(high)
        master.copy_(low)
        return
    if master is not None:
        master.copy_(value)
    elif seed is not None and param.dtype in (torch.bfloat16, torch.float16):
        value = _random(value, param, seed, index, 1)
    param.copy_(value)


def fake(
    params: Tensors,
    grads: Tensors,
    steps: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    scales: Tensors,
    masters: Tensors,
    emas: Tensors,
    masks: Tensors,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    ema_decay: float,
    max_grad_norm: float,
    grad_norm: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int | None,
) -> None:
    required = {"grads": grads, "steps": steps, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    optional = {
        "max_exp_avg_sqs": max_exp_avg_sqs, "scales": scales, "masters": masters, "emas": emas, "masks": masks
    }  # fmt: skip
    for name, tensors in (required | optional).items():
        torch._check(
            len(tensors) == len(params) or (name in optional and not tensors),
            lambda name=name, tensors=tensors: (
                f"adam_step: {name} has {len(tensors)} tensors, expected {len(params)}, one for each of params"
                + (", or none" if name in optional else "")
            ),
        )
    _check_numbers(beta1=beta1, beta2=beta2, ema_decay=ema_decay)
    _check_numbers(math.inf, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    torch._check(
        max_grad_norm == 0 or grad_norm is not None,
        lambda: f"adam_step: max_grad_norm is {max_grad_norm}, but grad_norm is missing",
    )
    check_scalar("adam_step", lr=lr, grad_norm=grad_norm, grad_scale=grad_scale, found_inf=found_inf)
    if params:
        _check_formats(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, scales, masters)
    elementwise = {name: tensors for name, tensors in (required | optional).items() if name not in ("steps", "scales")}
    for index, param in enumerate(params):
        _check_param(index, param)
        check_floating("adam_step", **{f"grads[{index}]": grads[index]})
        for name, tensors in elementwise.items():
            if tensors:
                _check_alike(f"{name}[{index}]", tensors[index], index, param)
        check_scalar("adam_step", **{f"steps[{index}]": steps[index]})
        _check_dtype("steps", index, steps, (torch.float32,))
        if emas:
            _check_dtype("emas", index, emas, (torch.float32,))
        if masks:
            _check_dtype("masks", index, masks, (torch.bool,))
        if scales:
            _check_scales(index, scales, (3 if max_exp_avg_sqs else 2, -(-param.numel() // moments.BLOCK)))


def _check_numbers(below: float = 1.0, **numbers: float) -> None:
    expected = "a number in [0, 1)" if below == 1 else "a finite number, at least 0"
    for name, number in numbers.items():
        torch._check(
            number >= 0 and number < below,
            lambda name=name, number=number: f"adam_step: {name} is {number}, expected {expected}",
        )


def _check_dtype(name: str, index: int, tensors: Tensors, allowed: tuple[torch.dtype, ...], why: str = "") -> None:
    words = [dtype_name(dtype) for dtype in allowed]
    expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    torch._check(
        tensors[index].dtype in allowed,
        lambda: f"adam_step: {name}[{index}] is {dtype_name(tensors[index].dtype)}, expected {expected}{why}",
    )


def _check_formats(
    params: Tensors, firsts: Tensors, seconds: Tensors, greatest: Tensors, scales: Tensors, masters: Tensors
) -> None:
    """One dtype for all moments, and for all masters; scales if the moments are codes."""
    for index in range(len(params)):
        _check_dtype("exp_avgs", index, firsts, (torch.float32, torch.bfloat16, torch.int8))
        _check_dtype("exp_avgs", index, firsts, (firsts[0].dtype,), " as the others are")
        second = torch.uint8 if firsts[0].dtype == torch.int8 else firsts[0].dtype
        for name, tensors in (("exp_avg_sqs", seconds), ("max_exp_avg_sqs", greatest)):
            if tensors:
                _check_dtype(name, index, tensors, (second,), f", since exp_avgs are {dtype_name(firsts[0].dtype)}")
        if masters:
            _check_dtype("masters", index, masters, (torch.float32, torch.uint8))
            _check_dtype("masters", index, masters, (masters[0].dtype,), " as the others are")
            if params[index].dtype == torch.float32:
                _check_dtype("masters", index, masters, (torch.float32,), f", since params[{index}] is fp32")
    expected = len(params) if firsts[0].dtype == torch.int8 else 0
    torch._check(
        len(scales) == expected,
        lambda: (
            f"adam_step: scales has {len(scales)} tensors, expected {expected}, "
            f"since exp_avgs are {dtype_name(firsts[0].dtype)}"
        ),
    )


def _check_param(index: int, param: torch.Tensor) -> None:
    check_floating("adam_step", **{f"params[{index}]": param})
    if param.is_contiguous():
        return
    laid = sorted((stride, size) for size, stride in zip(param.shape, param.stride(), strict=True) if size != 1)
    gapless = laid[0][0] == 1 and all(wide == narrow * size for (narrow, size), (wide, _) in pairwise(laid))
    torch._check(
        gapless,
        lambda: (
            f"adam_step: params[{index}] has gaps or overlaps in memory, "
            "expected it contiguous, in any order of dimensions"
        ),
    )


def _check_alike(name: str, tensor: torch.Tensor, index: int, param: torch.Tensor) -> None:
    check_devices("adam_step", param, **{name: tensor})
    torch._check(
        tensor.shape == param.shape,
        lambda: (
            f"adam_step: {name} has shape {tuple(tensor.shape)}, expected {tuple(param.shape)}, that of params[{index}]"
        ),
    )
    pairs = zip(param.shape, param.stride(), tensor.stride(), strict=True)
    torch._check(
        param.numel() == 0 or all(size <= 1 or wanted == given for size, wanted, given in pairs),
        lambda: (
            f"adam_step: {name} has other strides than params[{index}], expected both contiguous or in the same order"
        ),
    )


def _check_scales(index: int, scales: Tensors, shape: tuple[int, int]) -> None:
    torch._check(
        scales[index].dtype == torch.float32 and scales[index].is_contiguous(),
        lambda: f"adam_step: scales[{index}] is {dtype_name(scales[index].dtype)}, expected fp32, contiguous",
    )
    torch._check(
        tuple(scales[index].shape) == shape,
        lambda: f"adam_step: scales[{index}] has shape {tuple(scales[index].shape)}, expected {shape}",
    )


SPEC = register(
    OpSpec(
        name="adam_step",
        schema=(
            "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] steps, Tensor(c!)[] exp_avgs, "
            "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] scales, Tensor(g!)[] masters, "
            "Tensor(h!)[] emas, Tensor[] masks, Tensor lr, float beta1, float beta2, float eps, float weight_decay, "
            "bool decoupled, bool maximize, float ema_decay, float max_grad_norm, Tensor? grad_norm, "
            "Tensor? grad_scale, Tensor? found_inf, int? seed) -> ()"
        ),
        reference=reference,
        fake=fake,
        autograd=None,
        impls=(),
        cases=CASES,
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    max_exp_avg_sqs: Sequence[torch.Tensor] = (),
    scales: Sequence[torch.Tensor] = (),
    masters: Sequence[torch.Tensor] = (),
    emas: Sequence[torch.Tensor] = (),
    masks: Sequence[torch.Tensor] = (),
    *,
    lr: torch.Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    ema_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    grad_norm: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    seed: int | None = None,
) -> None:
    """Step ``params`` in place, with everything that belongs to them; see the module for what each argument is.

    Autograd learns of the change as of any in-place operation. Raises RuntimeError for a dtype, shape, layout, length
    or number outside of what the module says; then nothing has changed.
    """
    written = [list(one) for one in (steps, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, scales, masters, emas)]
    stepped = list(params)
    args = (
        stepped, list(grads), *written, list(masks), lr, beta1, beta2, eps, weight_decay, decoupled, maximize,
        ema_decay, max_grad_norm, grad_norm, grad_scale, found_inf, seed,
    )  # fmt: skip
    if dispatch.overrides:
        dispatch.call(SPEC, args, needs_grad=False)
    else:
        _op(*args)
    torch.autograd.graph.increment_version([tensor for one in (stepped, *written) for tensor in one])


_op = SPEC.entry
