"""What an optimizer needs to know of parameters and gradients as tensors: names, shards, memory."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from burnish.checks import FLOATING
from burnish.registry import dtype_name

_dtype, _device, _layout, _shape = map(attrgetter, ("dtype", "device", "layout", "shape"))


def named(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and what an error calls it: its name, or where it is."""
    for number, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            yield name_of(group, number, place), parameter


def name_of(group: Mapping[str, Any], number: int, place: int) -> str:
    """What an error calls a parameter."""
    if "param_names" in group:
        return f"parameter {group['param_names'][place]!r}"
    return f"parameter {place} of group {number}"


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor; looking does not import what DTensors need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The tensor whose elements this process holds."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def shard_dims(parameter: Any) -> tuple[int, ...]:
    """The dimensions of its mesh along which a DTensor is cut; the others hold replicas."""
    return tuple(dim for dim, placement in enumerate(parameter.placements) if placement.is_shard())


def shards(parameter: Any) -> int:
    """Into how many pieces a parameter is cut, 1 where it is whole."""
    if not is_sharded(parameter):
        return 1
    return math.prod(parameter.device_mesh.size(dim) for dim in shard_dims(parameter))


def shard_index(parameter: Any) -> int:
    """Which of them this process holds: the same for replicas."""
    index = 0
    if is_sharded(parameter):
        for dim in shard_dims(parameter):
            index = index * parameter.device_mesh.size(dim) + parameter.device_mesh.get_local_rank(dim)
    return index


def largest_shard(parameter: Any) -> int:
    """The number of elements in the largest piece."""
    sizes = list(parameter.shape)
    if is_sharded(parameter):
        for dim in shard_dims(parameter):
            cut = parameter.placements[dim].dim
            sizes[cut] = -(-sizes[cut] // parameter.device_mesh.size(dim))
    return math.prod(sizes)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether elements of tensors of one shape lie in the same order; a dimension of one element has no order."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(size == 1 or mine == theirs for size, mine, theirs in strides)


def in_order_of(tensor: Tensor, other: Tensor) -> Tensor:
    """``other`` with its elements in the order in which ``tensor``, of its shape, has its own: itself, or a copy."""
    if same_order(tensor, other):
        return other
    return torch.empty_like(tensor, dtype=other.dtype, requires_grad=False).copy_(other)


def dense(tensor: Tensor) -> bool:
    """Whether a strided tensor fills its memory without gaps and overlaps."""
    return same_order(tensor, torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format))


def objection(parameter: Tensor) -> str | None:
    """Why a parameter cannot be stepped, in words, or None."""
    if parameter.dtype not in FLOATING:
        return f"is {dtype_name(parameter.dtype)}, expected fp32, bf16 or fp16"
    if parameter.layout is not torch.strided:
        return f"has the layout {parameter.layout}, expected torch.strided"
    if not dense(local(parameter)):
        return f"has strides {tuple(parameter.stride())} with gaps or overlaps, expected dense memory"
    return None


def plain(params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether parameters are of one kind and gradients go with them, seen without a look at each; no is no answer."""
    return (
        {*map(type, params), *map(type, grads)} <= {torch.nn.Parameter, Tensor}
        and len(set(map(_dtype, params))) == 1
        and {params[0].dtype, *map(_dtype, grads)} <= set(FLOATING)
        and {*map(_layout, params), *map(_layout, grads)} == {torch.strided}
        and len({*map(_device, params), *map(_device, grads)}) == 1
        and list(map(_shape, params)) == list(map(_shape, grads))
        and (
            (all(map(Tensor.is_contiguous, params)) and all(map(Tensor.is_contiguous, grads)))
            or list(map(Tensor.stride, params)) == list(map(Tensor.stride, grads))
        )
    )


def refusal(parameter: Any, grad: Any, who: str) -> str | None:
    """Why a gradient does not go with its parameter, in words, or None."""
    if grad.layout is not torch.strided:
        if grad.is_sparse:
            return f"has a sparse gradient: {who} does not support sparse gradients, please consider SparseAdam instead"
        return f"has a gradient of layout {grad.layout}, expected torch.strided"
    if grad.dtype not in FLOATING:
        return f"has a gradient of {dtype_name(grad.dtype)}, expected fp32, bf16 or fp16"
    if grad.device != parameter.device:
        return f"has a gradient on {grad.device}, expected {parameter.device}"
    if grad.shape != parameter.shape:
        return f"has a gradient of shape {tuple(grad.shape)}, expected {tuple(parameter.shape)}"
    sharded = is_sharded(parameter)
    if is_sharded(grad) != sharded:
        return f"has a gradient that is a {type(grad).__name__}, expected a {type(parameter).__name__}"
    if sharded and (grad.device_mesh != parameter.device_mesh or grad.placements != parameter.placements):
        return f"has a gradient placed {grad.placements}, expected {parameter.placements} of the same mesh"
    return None


def overlapping(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of a parameter that shares memory with one of the others, or None."""
    spans = []
    for name, parameter in parameters:
        tensor = local(parameter)
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            first = tensor.data_ptr()
            spans.append((str(tensor.device), first, first + (last + 1) * tensor.element_size(), name, tensor))
    spans.sort(key=lambda span: span[:3])
    cluster: list[Any] = []
    for span in spans:
        if cluster and (span[0] != cluster[0][0] or span[1] >= max(end for _, _, end, _, _ in cluster)):
            cluster = []
        cluster.append(span)
        if len(cluster) > 1 and _meets(cluster):
            return str(span[3])
    return None


def _meets(cluster: list[Any]) -> bool:
    """Whether the last of tensors with intersecting spans has a byte of one of the others."""
    base = cluster[0][1]
    marks = torch.zeros(max(end for _, _, end, _, _ in cluster) - base, dtype=torch.bool)
    views = []
    for _, first, _, _, tensor in cluster:
        size = tensor.element_size()
        strides = [stride * size for stride in tensor.stride()]
        views.append(marks.as_strided((*tensor.shape, size), (*strides, 1), first - base))
    for view in views[:-1]:
        view.fill_(True)
    return bool(views[-1].any())


@contextlib.contextmanager
def stand_in(who: str, averages: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, parameters have the values of their ``averages``; after, those of before."""
    kept = {parameter: parameter.detach().clone() for parameter in averages}
    try:
        with torch.no_grad():
            for parameter, average in averages.items():
                parameter.copy_(average)
        yield
    finally:
        changed = 0
        with torch.no_grad():
            for parameter, values in kept.items():
                if parameter.shape == values.shape:
                    parameter.copy_(values)
                else:
                    changed += 1
        if changed:
            raise RuntimeError(
                f"{who}: {changed} of the parameters changed their shape inside swap_ema(), and are lost"
            )
