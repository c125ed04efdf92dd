"""What an optimizer keeps of each parameter: its tensors, their making, and their way in and out of state dicts.

    step                                     fp32 []                   steps done, as torch.optim's fused ones keep it
    exp_avg, exp_avg_sq, ... (moments)       the parameter's shape     fp32, bf16, or codes of one byte (int8)
    scales                                   fp32 [moments, blocks]    with int8: one for each 256 elements
    master                                   the parameter's shape     fp32, or uint8 with "split"; 16-bit parameters
    ema                                      the parameter's shape     fp32

What has the parameter's shape is a DTensor where the parameter is one, with its placements, so that
torch.distributed.checkpoint cuts it anew for another number of processes. ``scales`` then are a DTensor ``[shards *
moments * blocks]``, in which every shard has the room of the largest: blocks are of a shard and in the order of memory,
so int8 moments load into the same number of shards and the same memory format alone.

What an option that is switched off between steps leaves behind (``max_exp_avg_sq``, a momentum buffer) stays, is saved
and loads, and is taken up again where the option is on, as torch.optim does; but a step without masters drops them.

A state dict of torch.optim loads: its moments, which have the parameter's dtype, become fp32 or bf16, and what it lacks
(masters, averages) starts at the next step from the parameter. Our own loads as it was saved, dtypes included: torch's
``load_state_dict`` would round the fp32 moments of a bf16 parameter. As torch.optim, it copies nothing where dtype and
device fit. torch.optim takes a state dict of fp32 or bf16 moments; int8 codes it takes for the moments themselves.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from burnish.moments import BLOCK, encode
from burnish.optim import options
from burnish.optim.tensors import is_sharded, largest_shard, local, name_of, same_order, shard_dims, shards
from burnish.registry import dtype_name

_shape = attrgetter("shape")
_MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Moment:
    """One that an optimizer keeps: its key in the state, the dtype of its codes with int8, and the value of each
    element before the first step, which is not 0 of an only moment at most."""

    name: str
    codes: torch.dtype
    initial: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A tensor of a parameter's state: ``like`` says whether it has the parameter's shape and shards, ``initial`` what
    its elements are at first, ``coded`` whether those are codes, in blocks as they lie in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    like: bool
    initial: float = 0.0
    coded: bool = False


def entries(parameter: Tensor, group: Mapping[str, Any], moments: Sequence[Moment]) -> dict[str, Entry]:
    """Every tensor that the state of ``parameter`` has under the options of ``group``."""
    shape = tuple(parameter.shape)
    found = {"step": Entry(torch.float32, (), False)}
    coded = group["state_dtype"] == "int8"
    for moment in moments:
        dtype = moment.codes if coded else _MOMENT_DTYPES[group["state_dtype"]]
        found[moment.name] = Entry(dtype, shape, True, _code(moment) if coded else moment.initial, coded)
    if coded and moments:
        scale = max(_scale(moment) for moment in moments)
        found["scales"] = Entry(torch.float32, _scales_shape(parameter, len(moments)), False, scale)
    if group["master_weights"] is not None and parameter.dtype is not torch.float32:
        dtype = torch.float32 if group["master_weights"] == "fp32" else torch.uint8
        found["master"] = Entry(dtype, shape, True)
    if group["ema_decay"] is not None:
        found["ema"] = Entry(torch.float32, shape, True)
    return found


def _code(moment: Moment) -> float:
    """The code of a moment's first value."""
    return torch.iinfo(moment.codes).max if moment.initial else 0


def _scale(moment: Moment) -> float:
    if not moment.initial:
        return 0.0
    _, scale = encode(torch.full((1,), moment.initial), signed=moment.codes is torch.int8)
    return float(scale)


def _scales_shape(parameter: Tensor, moments: int) -> tuple[int, ...]:
    blocks = -(-largest_shard(parameter) // BLOCK)
    return (shards(parameter) * moments * blocks,) if is_sharded(parameter) else (moments, blocks)


def local_scales(parameter: Tensor, scales: Tensor, moments: int, held: int) -> Tensor:
    """Those of the elements that this process holds and of the first ``moments`` of ``held``, ``[moments, blocks]``."""
    if not is_sharded(parameter):
        return scales[:moments] if moments < held == len(scales) else scales
    blocks = -(-local(parameter).numel() // BLOCK)
    return local(scales)[: moments * blocks].view(moments, blocks)


@torch.inference_mode(False)
def complete(state: dict[str, Tensor], parameter: Tensor, wanted: Mapping[str, Entry]) -> None:
    """Make what ``state`` lacks: moments as they begin, master and average from the parameter."""
    for name, entry in wanted.items():
        if name in state:
            if name == "scales" and _lacks_rows(state[name].shape, entry.shape):
                state[name] = _grown(state[name], parameter, entry)
            continue
        if entry.like and entry.dtype is torch.float32 and name in ("master", "ema"):
            state[name] = parameter.detach().to(torch.float32, copy=True)
        elif entry.like:
            state[name] = torch.full_like(parameter, entry.initial, dtype=entry.dtype, requires_grad=False)
        elif name == "scales" and is_sharded(parameter):
            state[name] = _sharded_scales(parameter, entry)
        else:
            state[name] = torch.full(entry.shape, entry.initial, dtype=entry.dtype, device=parameter.device)


def of_kind(state: Mapping[str, Any], wanted: Mapping[str, Entry]) -> bool:
    """Whether the entries of a state have the dtypes that the options ask for."""
    return all(getattr(state[name], "dtype", None) is entry.dtype for name, entry in wanted.items())


def fits(states: Sequence[Mapping[str, Any]], wanted: Mapping[str, Entry], parameters: Sequence[Tensor]) -> bool:
    """Whether states go with what parameters and options are since, by the dtypes of one and the layout of an entry."""
    if not of_kind(states[0], wanted):
        return False
    like = next((name for name, entry in wanted.items() if entry.like), None)
    if like is None:
        return True
    column = [state[like] for state in states]
    if list(map(_shape, column)) != list(map(_shape, parameters)):
        return False
    contiguous = all(map(Tensor.is_contiguous, column)) and all(map(Tensor.is_contiguous, parameters))
    return contiguous or list(map(Tensor.stride, column)) == list(map(Tensor.stride, parameters))


def refitted(
    who: str, parameter: Tensor, state: Mapping[str, Tensor], wanted: Mapping[str, Entry]
) -> dict[str, Tensor]:
    """A state laid out as its parameter is since.

    Raises:
        RuntimeError: it is of another dtype, shape or kind, or codes whose blocks were of the other layout.
    """
    like = {name: entry for name, entry in wanted.items() if entry.like or name == "step"}
    try:
        return {name: _value(f"{who}: {name}", parameter, state[name], entry, False) for name, entry in like.items()}
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def _lacks_rows(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return tuple(shape[1:]) == tuple(wanted[1:]) and shape[0] < wanted[0]


def _grown(scales: Tensor, parameter: Tensor, entry: Entry) -> Tensor:
    """Scales with room for more moments, which come after those that there are."""
    made: dict[str, Tensor] = {}
    complete(made, parameter, {"scales": entry})
    local(made["scales"]).view(-1)[: local(scales).numel()].copy_(local(scales).view(-1))
    return made["scales"]


def _sharded_scales(parameter: Any, entry: Entry) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    cut = shard_dims(parameter)
    shape = entry.shape
    mine = torch.full((shape[0] // shards(parameter),), entry.initial, dtype=entry.dtype, device=parameter.device)
    placements = [Shard(0) if dim in cut else Replicate() for dim in range(parameter.device_mesh.ndim)]
    return DTensor.from_local(
        mine, parameter.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=(1,)
    )


def loaded(
    who: str, groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any], optimizer: Any
) -> tuple[list[dict[str, Any]], defaultdict[Tensor, dict[str, Any]]]:
    """The groups and the state in ``state_dict`` for an optimizer with ``groups``; changes nothing.

    Args:
        who: what an error begins with.
        optimizer: has ``check_group(group)``, ``held_moments(group, state)``, ``adopted(values)`` and ``defaults``.

    Raises:
        ValueError: of another optimizer, a newer version, other groups, or with missing, unknown or wrong entries.
    """
    saved = _checked_groups(who, state_dict)
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(mine["params"]) != len(theirs["params"]) for mine, theirs in zip(groups, saved, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    new = [_group(who, number, *both, optimizer) for number, both in enumerate(zip(groups, saved, strict=True))]
    of_id: dict[Any, tuple[Tensor, dict[str, Any], str, bool]] = {}
    for number, (group, theirs) in enumerate(zip(new, saved, strict=True)):
        for place, (key, parameter) in enumerate(zip(theirs["params"], group["params"], strict=True)):
            of_id[key] = (parameter, group, name_of(group, number, place), "burnish_version" in theirs)
    if len(of_id) != len(list(chain.from_iterable(group["params"] for group in saved))):
        raise ValueError(f"{who}: the state dict names a parameter twice")
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for key, values in state_dict["state"].items():
        if key not in of_id:
            raise ValueError(f"{who}: the state dict has state of a parameter {key!r} that none of its groups lists")
        parameter, group, name, ours = of_id[key]
        if not isinstance(values, Mapping):
            raise ValueError(f"{who}: state of {name} is a {type(values).__name__}, expected a dict")
        values = values if ours else optimizer.adopted(values)
        if values:
            wanted = entries(parameter, _with_left(group, values), optimizer.held_moments(group, values))
            state[parameter] = _entries_of(f"{who}: state of {name}", parameter, values, wanted, ours)
    return new, state


def _checked_groups(who: str, state_dict: Any) -> list[Mapping[str, Any]]:
    """The groups of what is built like a state dict."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"{who}: expected a state dict with 'state' and 'param_groups'")
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(f"{who}: the state dict's state is a {type(state_dict['state']).__name__}, expected a dict")
    saved = state_dict["param_groups"]
    if not isinstance(saved, (list, tuple)):
        raise ValueError(f"{who}: the state dict's param_groups is a {type(saved).__name__}, expected a list")
    for number, group in enumerate(saved):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, (list, tuple)) or not all(isinstance(key, (int, str)) for key in keys):
            raise ValueError(f"{who}: group {number} of the state dict has no params, expected a list of their numbers")
    return list(saved)


def _group(who: str, number: int, mine: Mapping[str, Any], theirs: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A saved group with our parameters, and with our options where torch.optim saved it."""
    version = theirs.get("burnish_version")
    if version is not None and (type(version) is not int or not 1 <= version <= options.VERSION):
        newer = ", of a newer burnish" if type(version) is int and version > 0 else ""
        raise ValueError(
            f"{who}: the state dict is of format {version!r}{newer}; this one reads up to {options.VERSION}"
        )
    required = optimizer.defaults if version is not None else optimizer.required
    missing = [name for name in required if name not in theirs]
    if missing:
        raise ValueError(
            f"{who}: group {number} of the state dict has no {', '.join(missing)}: it is of another optimizer"
        )
    group = {name: mine[name] for name in optimizer.defaults} | copy.deepcopy(
        {name: value for name, value in theirs.items() if name != "params"}
    )
    group["params"] = mine["params"]
    if "param_names" in mine:
        group["param_names"] = mine["param_names"]
    group["burnish_version"] = options.VERSION
    optimizer.check_group(group)
    for name in optimizer.fixed:
        if group[name] != mine[name]:
            raise ValueError(
                f"{who}: group {number} of the state dict has {name}={group[name]}, expected {mine[name]}: "
                "it is of another optimizer"
            )
    return group


def _with_left(group: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``group``, and those that are off since but have left something in ``values``."""
    left: dict[str, Any] = {}
    if "ema" in values and group["ema_decay"] is None:
        left["ema_decay"] = 0.0
    if "master" in values and group["master_weights"] is None:
        left["master_weights"] = "split" if getattr(values["master"], "dtype", None) is torch.uint8 else "fp32"
    return {**group, **left}


def _entries_of(
    who: str, parameter: Tensor, values: Mapping[str, Any], wanted: Mapping[str, Entry], ours: bool
) -> dict[str, Any]:
    """The checked state of one parameter; ``ours`` says that burnish saved it."""
    late = set() if ours else {"master", "ema"}
    missing, unknown = [name for name in wanted if name not in values and name not in late], set(values) - set(wanted)
    if (missing, unknown) in (([], {"master"}), (["master"], set())):
        saved = "of 16 bits" if unknown else "in fp32"
        raise ValueError(
            f"{who} has {'a' if unknown else 'no'} master, as of a parameter {saved}, and this one is "
            f"{dtype_name(parameter.dtype)}: load it into parameters {saved} and convert the model afterwards"
        )
    if missing or unknown:
        has = f"has no {', '.join(missing)}" if missing else f"has {', '.join(map(str, sorted(unknown, key=str)))}"
        raise ValueError(f"{who} {has}, expected {', '.join(wanted)}")
    return {
        name: _value(f"{who}: {name}", parameter, values[name], wanted[name], name == "step" or not ours)
        for name in wanted
        if name in values
    }


def _value(who: str, parameter: Any, value: Any, entry: Entry, converts: bool) -> Tensor:
    if not isinstance(value, Tensor):
        if entry.shape != () or not isinstance(value, (int, float)):
            raise ValueError(f"{who} is a {type(value).__name__}, expected a tensor")
        value = torch.tensor(float(value))
    if value.layout is not torch.strided or value.is_meta != parameter.is_meta:
        raise ValueError(f"{who} is {value.layout} on {value.device}, expected torch.strided on {parameter.device}")
    if tuple(value.shape) != entry.shape:
        raise ValueError(f"{who} has the shape {tuple(value.shape)}, expected {entry.shape}{_count(parameter, entry)}")
    converts = converts and value.is_floating_point() and entry.dtype.is_floating_point
    if value.dtype is not entry.dtype and not converts:
        raise ValueError(f"{who} is {dtype_name(value.dtype)}, expected {dtype_name(entry.dtype)}")
    if entry.like or (is_sharded(parameter) and entry.shape != ()):
        if is_sharded(value) != is_sharded(parameter):
            words = "a DTensor" if is_sharded(parameter) else "a plain tensor"
            raise ValueError(f"{who} is a {type(value).__name__}, expected {words}, as the parameter is")
        if entry.like and is_sharded(value) and value.placements != parameter.placements:
            raise ValueError(f"{who} is placed {value.placements}, expected {parameter.placements}, as the parameter")
    if entry.shape == () and not entry.like and value.device.type == "cpu" and not 0 <= float(value) < math.inf:
        raise ValueError(f"{who} is {float(value)}, expected a count")
    value = value.detach().to(device=parameter.device, dtype=entry.dtype)
    if entry.like and not same_order(local(value), local(parameter)):
        if entry.coded:
            raise ValueError(
                f"{who} has strides {tuple(value.stride())}, expected {tuple(parameter.stride())}: the blocks of its "
                "codes are of the elements in the order of memory"
            )
        value = torch.empty_like(parameter, dtype=entry.dtype, requires_grad=False).copy_(value)
    return value


def _count(parameter: Tensor, entry: Entry) -> str:
    return f" of {shards(parameter)} shards" if is_sharded(parameter) and not entry.like and entry.shape else ""
