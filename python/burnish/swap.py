"""Swap layers of a model for faster ones, in place, with a report and a way back.

    report = burnish.swap_(model, burnish.Int8())
    report = burnish.swap_(model, {"*.attention.*": burnish.Int8(), "lm_head": burnish.Keep()})
    report = burnish.swap_(model, burnish.Int8(), filter_fn=lambda module, fqn: module.in_features >= 256)
    report = burnish.swap_(model, burnish.Int8(), measure=(example_input,))
    report = burnish.swap_(model, burnish.LowRank(energy=0.95, method="activation"), calibration=calibration)

A swap happens as a whole or not at all: everything is decided and built before the first module is exchanged, and an
error leaves the model as it was. Layers that share a weight go together and share it afterwards. A layer stays what it
was, and the report says why, where a rule or ``filter_fn`` wants that, where something reads or computes its weight
directly, and, with ``measure``, where the new layer would not be faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from burnish import fuse, kinds
from burnish import measure as timing
from burnish import rules as patterns
from burnish.calibration import Calibration, Inputs
from burnish.configs import Config, Keep
from burnish.errors import SwapError
from burnish.kinds import Kept, Kind, Request
from burnish.nn import Fused
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
    shape: tuple[int, ...] | None = None
    made: torch.nn.Module | None = None
    tied: str | None = None
    times: timing.Times | None = None
    #: the layer it is a part of, which is swapped as a whole
    whole: _Layer | None = None

    @property
    def fqn(self) -> str:
        return self.fqns[0]

    @property
    def going(self) -> bool:
        """Whether it is to be swapped, as far as is known yet."""
        return self.kind is not None and self.reason is None

    @property
    def kind(self) -> Kind | None:
        return kinds.of(self.config)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its own, and its parts' where it is swapped as a whole."""
        if self.going or kinds.made_by(self.module):
            return [*self.module.parameters(), *self.module.buffers()]
        own = (*self.module._parameters.values(), *self.module._buffers.values())
        return [tensor for tensor in own if tensor is not None]


def swap_(
    model: torch.nn.Module,
    rules: Config | Mapping[str, Config],
    *,
    filter_fn: FilterFn | None = None,
    measure: int | torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Exchange layers of ``model``, in place, for what the rules say; see the module for the ways to call it.

    Args:
        model: any nn.Module with linear layers inside.
        rules: a configuration for every layer, or an ordered mapping from patterns over fqns (globs, or regular
            expressions after ``re:``) to configurations. The first match decides; :class:`burnish.Keep` keeps.
        filter_fn: asked ``(module, fqn)`` for each layer that the rules would swap; false keeps it.
        measure: time each layer against its new form on this machine and keep it where it wins. Either the number of
            rows (batch times tokens) that linear layers see, or the model's arguments (a tensor, a tuple, or a mapping
            for keywords) for one forward pass that shows the input of each.
        calibration: what :func:`burnish.calibrate` found on this model, for configurations that look at inputs.

    Returns:
        The :class:`burnish.Report`. It holds the original modules for ``revert()`` until ``release()`` or its end.

    Raises:
        SwapError: a rule that decides nothing, a weight that cannot be converted, a model that is itself a layer to
            swap or is wrapped for distributed training. The model is unchanged.
        TypeError: an argument of the wrong type.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap_: model is a {type(model).__name__}, expected an nn.Module")
    if not isinstance(calibration, Calibration | None):
        raise TypeError(
            f"swap_: calibration is a {type(calibration).__name__}, expected the result of burnish.calibrate"
        )
    compiled = patterns.parse(rules)
    layers = _survey(model)
    _refuse_root(model, compiled)
    _decide(layers, compiled, filter_fn)
    _keep_ties(layers)
    _find_fusions(layers)
    if measure is not None:
        _look(model, layers, _checked_measure(measure))
    before = model_bytes(model)
    with _trainable_again(model) as frozen:
        _convert(layers, calibration or {})
        _keep_ties(layers)
        if measure is not None:
            _measure(layers)
            _keep_ties(layers)
        rows = _rows(layers)
        slots = _exchange(layers)
    return Report(rows, slots, before, model_bytes(model), frozen)


@contextmanager
def _trainable_again(model: torch.nn.Module) -> Iterator[list[torch.nn.Parameter]]:
    """Gives the parameters that were frozen inside, once it is over; they are trainable again where it fails."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen: list[torch.nn.Parameter] = []
    try:
        yield frozen
    except BaseException:
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    frozen += [parameter for parameter in trainable if not parameter.requires_grad]


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
    layers[id(model)].places.clear()
    return list(layers.values())


def _refuse_root(model: torch.nn.Module, compiled: Sequence[patterns.Rule]) -> None:
    for kind in (kinds.of(rule.config) for rule in compiled):
        if kind is not None and kind.config in kinds.takers(model):
            raise SwapError(
                f"swap_: the model itself is a {type(model).__name__}, which cannot be exchanged in place: use "
                f"burnish.nn.{kind.made[0].__name__}.from_float(model)"
            )


def _decide(layers: Sequence[_Layer], compiled: Sequence[patterns.Rule], filter_fn: FilterFn | None) -> None:
    """Give each layer its configuration, or the reason to keep it."""
    targets = [
        patterns.Target(tuple(layer.fqns), type(layer.module).__name__, kinds.takers(layer.module)) for layer in layers
    ]
    decided = patterns.decide(compiled, targets)
    asked = accepted = 0
    for layer, target, rule in zip(layers, targets, decided, strict=True):
        layer.config = rule.config if rule else None
        layer.reason = _reason(layer, target, rule)
        if layer.reason is None and filter_fn is not None:
            asked += 1
            accepted += (wanted := bool(filter_fn(layer.module, layer.fqn)))
            layer.reason = None if wanted else "filter_fn said no"
    if asked and not accepted:
        raise SwapError(f"swap_: filter_fn accepts none of the {asked} layers that could be swapped")
    _join_parts(layers)


def _reason(layer: _Layer, target: patterns.Target, rule: patterns.Rule | None) -> str | None:
    """Why the rule does not swap the layer; None if it does."""
    if rule is None:
        return "no rule matches it"
    if layer.kind is None:
        return f"kept by rule {rule.pattern!r}"
    if layer.kind.config not in target.takers:
        return f"no {layer.kind.noun} form"
    if not layer.kind.candidate(layer.module):
        return "already swapped"
    return layer.kind.objection(layer.module, [parent for parent, _, _ in layer.places])


def _join_parts(layers: Sequence[_Layer]) -> None:
    """Let the modules inside a layer that goes go with it, or stay with one that was swapped before."""
    by_module = {id(layer.module): layer for layer in layers}
    for layer in layers:
        if layer.whole is None and (layer.going or kinds.made_by(layer.module)):
            for part in layer.module.modules():
                if part is not layer.module and not by_module[id(part)].whole:
                    by_module[id(part)].whole = layer
                    by_module[id(part)].reason = f"part of {layer.fqn!r}"


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
            if layer.kind is None or not layer.going or not layer.kind.weights:
                continue
            for other in owners[id(layer.module._parameters["weight"])]:
                obstacle = _obstacle(layer, other)
                if obstacle is not None:
                    layer.reason = (
                        f"its weight is tied to {type(other.module).__name__} {other.fqn!r}, which {obstacle}"
                    )
                    changed = True
                    break


def _obstacle(layer: _Layer, other: _Layer) -> str | None:
    """What ``other`` does with a weight of both that keeps ``layer`` from giving it up."""
    if other is layer:
        return None
    if not other.going:
        return "is kept"
    if other.config != layer.config:
        return "becomes something else"
    if getattr(other.module, "groups", 1) != getattr(layer.module, "groups", 1):
        return "splits it into other groups"
    transposed = isinstance(other.module, torch.nn.Linear) != isinstance(layer.module, torch.nn.Linear)
    return "holds it transposed" if transposed else None


def _find_fusions(layers: Sequence[_Layer]) -> None:
    kept = {id(layer.module) for layer in layers if isinstance(layer.config, Keep)}
    for layer in layers:
        if layer.going and getattr(layer.config, "fuse_activation", False) and len(layer.places) == 1:
            parent, parent_fqn, child = layer.places[0]
            fusion = fuse.find(parent, child, parent_fqn)
            if fusion and id(parent._modules[fusion.child]) not in kept:
                layer.fusion = fusion


def _convert(layers: Sequence[_Layer], calibration: Mapping[str, Inputs]) -> None:
    """Build the new layers; those that share a weight share what stands for it."""
    first: dict[int, _Layer] = {}
    for layer in layers:
        if layer.kind is None or not layer.going:
            continue
        assert layer.config is not None
        activation = layer.fusion.activation if layer.fusion else "none"
        inputs = calibration.get(layer.fqn)
        moment = None if inputs is None else inputs.moment
        request = Request(layer.module, layer.config, layer.fqn, activation, moment, layer.shape)
        try:
            made = layer.kind.convert(request)
        except Kept as kept:
            layer.reason = str(kept)
            continue
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{layer.kind.made[0].__name__}.from_float: ")
            raise SwapError(f"swap_: layer {layer.fqn!r}: {reason}") from error
        if layer.kind.weights:
            holder = first.setdefault(id(layer.module._parameters["weight"]), layer)
            if holder is not layer:
                assert holder.made is not None
                _share(made, holder.made, layer.kind.weights)
                layer.tied = holder.fqn
        adopt(made, layer.module)
        layer.made = made


def _share(made: torch.nn.Module, holder: torch.nn.Module, weights: Sequence[str]) -> None:
    for name in weights:
        if name in holder._buffers:
            made._buffers[name] = holder._buffers[name]
        elif name in holder._parameters:
            made._parameters[name] = holder._parameters[name]


def adopt(made: torch.nn.Module, original: torch.nn.Module) -> None:
    """Give the new module the hooks of the old one (the same dictionaries, so that handles keep working) and the
    attributes that others may have put on it."""
    for name in _HOOKS:
        vars(made)[name] = vars(original)[name]
    for name, value in vars(original).items():
        vars(made).setdefault(name, value)


def _look(model: torch.nn.Module, layers: Sequence[_Layer], value: int | tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Learn the shapes of the layers' inputs."""
    going = [layer for layer in layers if layer.going]
    if isinstance(value, int):
        for layer in going:
            if isinstance(layer.module, torch.nn.modules.conv._ConvNd):
                raise SwapError(
                    f"swap_: measure is a number of rows and layer {layer.fqn!r} is a convolution: pass the model's "
                    "arguments instead"
                )
    shapes = timing.shapes_of(model, [layer.module for layer in going], value)
    for layer in going:
        layer.shape = shapes.get(id(layer.module))


def _measure(layers: Sequence[_Layer]) -> None:
    timed = [layer for layer in layers if layer.kind and layer.going and layer.shape and layer.kind.races(layer.module)]
    for layer, times in zip(timed, timing.times([_contest(layer) for layer in timed]), strict=True):
        layer.times = times
        if times.after_us >= times.before_us:
            assert layer.kind is not None
            layer.reason = f"{layer.kind.noun} is not faster here"


def _contest(layer: _Layer) -> timing.Contest:
    assert layer.made is not None
    assert layer.shape is not None
    weight = next(layer.module.parameters())
    if weight.is_meta:
        raise SwapError(f"swap_: layer {layer.fqn!r} is on the meta device and cannot be measured")
    before: timing.Call = layer.module.forward
    if layer.fusion is not None:
        curve: Any = layer.fusion.parent._modules[layer.fusion.child]
        before = partial(_in_turn, before, curve)
    kind = (repr(layer.module), repr(layer.made))
    return timing.Contest(before, layer.made.forward, kind, layer.shape, weight.dtype, weight.device)


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
    counted_before: set[int] = set()
    counted_after: set[int] = set()
    for layer in layers:
        tensors = layer.tensors
        if layer.whole is not None or not (tensors or kinds.takers(layer.module)):
            continue
        made = layer.made if layer.going else None
        weight = layer.module._parameters.get("weight")
        rows.append(
            Row(
                fqn=layer.fqn,
                was=_described(layer.module),
                became=None if made is None else str(made.summary),
                reason=layer.reason,
                bytes_before=_bytes(tensors, counted_before),
                bytes_after=_bytes([*made.parameters(), *made.buffers()] if made else tensors, counted_after),
                fused=layer.fusion.fqn if made is not None and layer.fusion else None,
                tied=layer.tied if made is not None else None,
                frozen=made is not None and weight is not None and weight.requires_grad and not _trains(made),
                times=layer.times,
            )
        )
    return rows


def _trains(made: torch.nn.Module) -> bool:
    """Whether what stands for the weight can be trained."""
    return any(parameter.requires_grad for name, parameter in made.named_parameters() if name != "bias")


def _bytes(tensors: Sequence[torch.Tensor], counted: set[int]) -> int:
    """Their bytes, without those counted before."""
    new = {id(tensor): tensor for tensor in tensors if id(tensor) not in counted}
    counted.update(new)
    return sum(map(tensor_bytes, new.values()))


def _described(module: torch.nn.Module) -> str:
    """A layer in a few words: its class, sizes and dtype."""
    name = type(module).__name__
    if kinds.made_by(module) is not None:
        return f"{name} {module.in_features}->{module.out_features}" if hasattr(module, "in_features") else name
    weight = module._parameters.get("weight")
    if not kinds.takers(module) or weight is None or torch.nn.parameter.is_lazy(weight) or weight.dim() < 2:
        return name
    outputs, inputs, *kernel = weight.shape
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        inputs *= module.groups
    elif not isinstance(module, torch.nn.Linear):
        outputs, inputs = inputs, outputs  # transformers' Conv1D
    size = f" {'x'.join(map(str, kernel))}" if kernel else ""
    return f"{name} {inputs}->{outputs}{size} {dtype_name(weight.dtype)}"
