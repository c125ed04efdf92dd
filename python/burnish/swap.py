"""Swap layers of a model for faster ones, in place, with a report and a way back.

    report = burnish.swap_(model, burnish.Int8())
    report = burnish.swap_(model, {"*.attention.*": burnish.Int8(), "lm_head": burnish.Keep()})
    report = burnish.swap_(model, burnish.Int8(), filter_fn=lambda module, fqn: module.in_features >= 256)
    report = burnish.swap_(model, burnish.Int8(), measure=(example_input,))

A swap happens as a whole or not at all: everything is decided and built before the first module is exchanged, and an
error leaves the model as it was. Layers that share a weight go together and share it afterwards. A layer stays what it
was, and the report says why, where a rule or ``filter_fn`` wants that, where something reads or computes its weight
directly, and, with ``measure``, where int8 would not be faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from burnish import eligible, fuse
from burnish import measure as timing
from burnish import rules as patterns
from burnish.configs import Config, Int8, Keep
from burnish.errors import SwapError
from burnish.nn import Fused, Int8Linear
from burnish.nn.int8_linear import float_weight
from burnish.registry import dtype_name
from burnish.report import Report, Row, Slot, model_bytes, tensor_bytes

FilterFn = Callable[[torch.nn.Module, str], bool]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass
class _Layer:
    """A module of the model on its way through the swap."""

    module: torch.nn.Module
    #: where it hangs: parent, the parent's fqn, name of the child
    places: list[tuple[torch.nn.Module, str, str]] = field(default_factory=list)
    fqns: list[str] = field(default_factory=list)
    config: Config | None = None
    reason: str | None = None
    fusion: fuse.Fusion | None = None
    made: Int8Linear | None = None
    tied: str | None = None
    times: timing.Times | None = None

    @property
    def fqn(self) -> str:
        return self.fqns[0]

    @property
    def going(self) -> bool:
        """Whether it is to be swapped, as far as is known yet."""
        return isinstance(self.config, Int8) and self.reason is None


def swap_(
    model: torch.nn.Module,
    rules: Config | Mapping[str, Config],
    *,
    filter_fn: FilterFn | None = None,
    measure: int | torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Report:
    """Exchange layers of ``model``, in place, for what the rules say; see the module for the ways to call it.

    Args:
        model: any nn.Module with linear layers inside.
        rules: a configuration for every layer, or an ordered mapping from patterns over fqns (globs, or regular
            expressions after ``re:``) to configurations. The first match decides; :class:`burnish.Keep` keeps.
        filter_fn: asked ``(module, fqn)`` for each layer that the rules would swap; false keeps it.
        measure: time each layer against its int8 form on this machine and keep it where it wins. Either the number of
            rows (batch times tokens) that layers see, or the model's arguments (a tensor, a tuple, or a mapping for
            keywords) for one forward pass that shows the rows of each.

    Returns:
        The :class:`burnish.Report`. It holds the original modules for ``revert()`` until ``release()`` or its end.

    Raises:
        SwapError: a rule that decides nothing, a weight that cannot be quantised, a model that is itself a linear
            layer or is wrapped for distributed training. The model is unchanged.
        TypeError: an argument of the wrong type.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap_: model is a {type(model).__name__}, expected an nn.Module")
    compiled = patterns.parse(rules)
    layers = _survey(model)
    _decide(layers, compiled, filter_fn)
    _keep_ties(layers)
    _find_fusions(layers)
    _convert(layers)
    if measure is not None:
        _measure(model, layers, _checked_measure(measure))
        _keep_ties(layers)
    before = model_bytes(model)
    rows = _rows(layers)
    slots = _exchange(layers)
    return Report(rows, slots, before, model_bytes(model))


def _checked_measure(value: Any) -> int | tuple[Any, ...] | Mapping[str, Any]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, tuple | Mapping) or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise TypeError(
        f"swap_: measure is {value!r}, expected a positive number of rows or the model's arguments (a tensor, a tuple "
        "or a mapping)"
    )


def _survey(model: torch.nn.Module) -> list[_Layer]:
    """Every module once, with all its names and places."""
    layers: dict[int, _Layer] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        layer = layers.setdefault(id(module), _Layer(module))
        layer.fqns.append(fqn)
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) or "FullyShardedDataParallel" in [
            cls.__name__ for cls in type(module).__mro__
        ]:
            raise SwapError(f"swap_: {fqn or 'the model'} is wrapped in {type(module).__name__}: swap before wrapping")
    for layer in list(layers.values()):
        for name, child in layer.module._modules.items():
            if child is not None:
                layers[id(child)].places.append((layer.module, layer.fqn, name))
    root = layers[id(model)]
    if eligible.is_candidate(model):
        raise SwapError(
            f"swap_: the model itself is a {type(model).__name__}, which cannot be exchanged in place: use "
            "burnish.nn.Int8Linear.from_float(model)"
        )
    root.places.clear()
    return list(layers.values())


def _decide(layers: Sequence[_Layer], compiled: Sequence[patterns.Rule], filter_fn: FilterFn | None) -> None:
    """Give each layer its configuration, or the reason to keep it."""
    targets = [
        patterns.Target(tuple(layer.fqns), type(layer.module).__name__, eligible.is_candidate(layer.module))
        for layer in layers
    ]
    decided = patterns.decide(compiled, targets)
    asked = accepted = 0
    for layer, target, rule in zip(layers, targets, decided, strict=True):
        layer.config = rule.config if rule else None
        if isinstance(layer.config, Keep):
            assert rule is not None
            layer.reason = f"kept by rule {rule.pattern!r}"
        elif not target.swappable:
            layer.reason = "no int8 form"
        elif rule is None:
            layer.reason = "no rule matches it"
        else:
            layer.reason = eligible.objection(layer.module, [parent for parent, _, _ in layer.places])
            if layer.reason is None and filter_fn is not None:
                asked += 1
                accepted += (wanted := bool(filter_fn(layer.module, layer.fqn)))
                layer.reason = None if wanted else "filter_fn said no"
    if asked and not accepted:
        raise SwapError(f"swap_: filter_fn accepts none of the {asked} layers that could be swapped")


def _keep_ties(layers: Sequence[_Layer]) -> None:
    """Keep every layer that shares its weight with one that is kept."""
    owners: dict[int, list[_Layer]] = defaultdict(list)
    for layer in layers:
        for parameter in layer.module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(layer)
    changed = True
    while changed:
        changed = False
        for layer in layers:
            if not layer.going:
                continue
            for other in owners[id(layer.module._parameters["weight"])]:
                if other is not layer and (not other.going or _kind(other) != _kind(layer)):
                    what = "is kept" if not other.going else "holds it transposed"
                    layer.reason = f"its weight is tied to {type(other.module).__name__} {other.fqn!r}, which {what}"
                    changed = True
                    break


def _kind(layer: _Layer) -> bool:
    return isinstance(layer.module, torch.nn.Linear)


def _find_fusions(layers: Sequence[_Layer]) -> None:
    kept = {id(layer.module) for layer in layers if isinstance(layer.config, Keep)}
    for layer in layers:
        if layer.going and layer.config.fuse_activation and len(layer.places) == 1:  # type: ignore[union-attr]
            parent, parent_fqn, child = layer.places[0]
            fusion = fuse.find(parent, child, parent_fqn)
            if fusion and id(parent._modules[fusion.child]) not in kept:
                layer.fusion = fusion


def _convert(layers: Sequence[_Layer]) -> None:
    """Build the int8 layers; those that share a weight share the packed one."""
    first: dict[int, _Layer] = {}
    for layer in layers:
        if not layer.going:
            continue
        activation = layer.fusion.activation if layer.fusion else "none"
        try:
            made = Int8Linear.from_float(layer.module, layer.config, activation=activation)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix("Int8Linear.from_float: ")
            raise SwapError(f"swap_: layer {layer.fqn!r}: {reason}") from error
        holder = first.setdefault(id(layer.module._parameters["weight"]), layer)
        if holder is not layer:
            assert holder.made is not None
            made._buffers.update(holder.made._buffers)
            layer.tied = holder.fqn
        adopt(made, layer.module)
        layer.made = made


def adopt(made: torch.nn.Module, original: torch.nn.Module) -> None:
    """Give the new module the hooks of the old one (the same dictionaries, so that handles keep working) and the
    attributes that others may have put on it."""
    for name in _HOOKS:
        vars(made)[name] = vars(original)[name]
    for name, value in vars(original).items():
        vars(made).setdefault(name, value)


def _measure(
    model: torch.nn.Module, layers: Sequence[_Layer], value: int | tuple[Any, ...] | Mapping[str, Any]
) -> None:
    going = [layer for layer in layers if layer.going]
    rows = timing.rows_of(model, [layer.module for layer in going], value)
    timed = [layer for layer in going if rows.get(id(layer.module))]
    for layer, times in zip(timed, timing.times([_contest(layer, rows) for layer in timed]), strict=True):
        layer.times = times
        if times.after_us >= times.before_us:
            layer.reason = "int8 is not faster here"


def _contest(layer: _Layer, rows: Mapping[int, int]) -> timing.Contest:
    weight = float_weight(layer.module)
    assert weight is not None
    assert layer.made is not None
    if weight.is_meta:
        raise SwapError(f"swap_: layer {layer.fqn!r} is on the meta device and cannot be measured")
    before: timing.Call = layer.module.forward
    if layer.fusion is not None:
        curve: Any = layer.fusion.parent._modules[layer.fusion.child]
        before = partial(_in_turn, before, curve)
    made = layer.made
    shape = (*weight.shape, made.bias is not None, made.activation, type(layer.module).__name__)
    return timing.Contest(
        before, made.forward, shape, rows[id(layer.module)], weight.shape[1], weight.dtype, weight.device
    )


def _in_turn(linear: timing.Call, curve: timing.Call, x: torch.Tensor) -> Any:
    return curve(linear(x))


def _exchange(layers: Sequence[_Layer]) -> list[Slot]:
    """Put the new modules into the model; on any interruption, the old ones back."""
    slots = []
    for layer in layers:
        if not layer.going:
            continue
        assert layer.made is not None
        for parent, parent_fqn, child in layer.places:
            fqn = f"{parent_fqn}.{child}" if parent_fqn else child
            slots.append(Slot(parent, child, fqn, layer.module, layer.made))
        if layer.fusion is not None:
            place = layer.fusion
            curve = place.parent._modules[place.child]
            assert curve is not None
            stand_in = Fused(place.activation, layer.fqn).train(curve.training)
            slots.append(Slot(place.parent, place.child, place.fqn, curve, stand_in))
    try:
        for slot in slots:
            slot.put(slot.after)
    except BaseException:
        for slot in slots:
            slot.put(slot.before)
        raise
    return slots


def _rows(layers: Sequence[_Layer]) -> list[Row]:
    rows = []
    counted: set[int] = set()
    for layer in layers:
        module = layer.module
        own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        if not own and not eligible.is_candidate(module):
            continue
        before = _bytes(own, counted)
        weight = module._parameters.get("weight")
        made = layer.made if layer.going else None
        after = before
        if made is not None:
            after = _bytes([tensor for tensor in (*made._buffers.values(), made.bias) if tensor is not None], counted)
            after += made.bias.nbytes if made.bias is not None and before else 0
        rows.append(
            Row(
                fqn=layer.fqn,
                was=_described(module),
                became=_became(made),
                reason=layer.reason,
                bytes_before=before,
                bytes_after=after,
                fused=layer.fusion.fqn if made is not None and layer.fusion else None,
                tied=layer.tied if made is not None else None,
                frozen=made is not None and weight is not None and weight.requires_grad,
                times=layer.times,
            )
        )
    return rows


def _bytes(tensors: Sequence[torch.Tensor], counted: set[int]) -> int:
    """Their bytes, without those counted before."""
    new = {id(tensor): tensor for tensor in tensors if id(tensor) not in counted}
    counted.update(new)
    return sum(map(tensor_bytes, new.values()))


def _described(module: torch.nn.Module) -> str:
    name = type(module).__name__
    weight = module._parameters.get("weight")
    if isinstance(module, Int8Linear):
        return f"{name} {module.in_features}->{module.out_features}"
    if not eligible.is_candidate(module) or weight is None or torch.nn.parameter.is_lazy(weight) or weight.dim() != 2:
        return name
    outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
    return f"{name} {inputs}->{outputs} {dtype_name(weight.dtype)}"


def _became(made: Int8Linear | None) -> str | None:
    if made is None:
        return None
    return "Int8Linear" if made.activation == "none" else f"Int8Linear + {made.activation}"
