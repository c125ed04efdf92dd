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

An optimizer that was made before has the parameters of the original layers: make it after the swap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from burnish import fuse, kinds
from burnish import measure as timing
from burnish import rules as patterns
from burnish.calibration import Calibration, Inputs
from burnish.configs import Config, Keep
from burnish.errors import SwapError
from burnish.kinds import Kept, Request, peft
from burnish.layers import Layer, keep_ties, rows_of, survey
from burnish.nn import Fused, masked
from burnish.report import Report, Slot, model_bytes

FilterFn = Callable[[torch.nn.Module, str], bool]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


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
    layers = survey(model)
    _refuse_root(model, compiled)
    _decide(layers, compiled, filter_fn, peft.shield(model))
    return carry_out(model, layers, measure, calibration)


@torch.inference_mode(False)  # whose tensors could neither be trained nor loaded into afterwards
@torch.no_grad()
def carry_out(
    model: torch.nn.Module,
    layers: Sequence[Layer],
    measure: Any,
    calibration: Calibration | None = None,
    *,
    unmask: bool = False,
) -> Report:
    """Do what was decided on the layers of ``model``, as a whole or not at all; arguments are :func:`swap_`'s. With
    ``unmask``, layers that are kept lose their masks and have zeros instead."""
    _join_parts(layers)
    keep_ties(layers)
    _find_fusions(layers)
    if measure is not None:
        _look(model, layers, _checked_measure(measure))
    before = model_bytes(model)
    with _trainable_again(model) as frozen:
        _convert(layers, calibration or {}, _mesh(model))
        keep_ties(layers)
        if measure is not None:
            _measure(layers)
            keep_ties(layers)
        if unmask:
            _unmask(layers)
        rows = rows_of(layers)
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
    got = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    raise TypeError(
        f"swap_: measure is {got}, expected a positive number of rows or the model's arguments (a tensor, a tuple "
        "or a mapping)"
    )


def _refuse_root(model: torch.nn.Module, compiled: Sequence[patterns.Rule]) -> None:
    for kind in (kinds.of(rule.config) for rule in compiled):
        if kind is not None and kind.config in kinds.takers(model):
            raise SwapError(
                f"swap_: the model itself is a {type(model).__name__}, which cannot be exchanged in place: use "
                f"burnish.nn.{kind.made[0].__name__}.from_float(model)"
            )


def _decide(
    layers: Sequence[Layer],
    compiled: Sequence[patterns.Rule],
    filter_fn: FilterFn | None,
    shield: Callable[[torch.nn.Module, Config | None], str | None],
) -> None:
    """Give each layer its configuration, or the reason to keep it."""
    targets = [
        patterns.Target(tuple(layer.fqns), type(layer.module).__name__, kinds.takers(layer.module)) for layer in layers
    ]
    decided = patterns.decide(compiled, targets)
    asked = accepted = 0
    for layer, target, rule in zip(layers, targets, decided, strict=True):
        layer.config = rule.config if rule else None
        layer.reason = shield(layer.module, layer.config) or _reason(layer, target, rule)
        if layer.reason is None and filter_fn is not None:
            asked += 1
            accepted += (wanted := bool(filter_fn(layer.module, layer.fqn)))
            layer.reason = None if wanted else "filter_fn said no"
    if asked and not accepted:
        raise SwapError(f"swap_: filter_fn accepts none of the {asked} layers that could be swapped")


def _reason(layer: Layer, target: patterns.Target, rule: patterns.Rule | None) -> str | None:
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


def _join_parts(layers: Sequence[Layer]) -> None:
    """Let the modules inside a layer that goes go with it, or stay with one that was swapped before or has a mask."""
    by_module = {id(layer.module): layer for layer in layers}
    for layer in layers:
        if layer.whole is None and (layer.going or layer.is_one):
            for part in layer.module.modules():
                if part is not layer.module and not by_module[id(part)].whole:
                    by_module[id(part)].whole = layer
                    by_module[id(part)].reason = f"part of {layer.fqn!r}"


def _find_fusions(layers: Sequence[Layer]) -> None:
    kept = {id(layer.module) for layer in layers if isinstance(layer.config, Keep)}
    places = {id(layer.module): layer.places for layer in layers}
    for layer in layers:
        if layer.going and getattr(layer.config, "fuse_activation", False) and len(layer.places) == 1:
            parent, parent_fqn, child = layer.places[0]
            fusion = fuse.find(parent, child, parent_fqn, lambda module: places[id(module)])
            if fusion and id(parent._modules[fusion.child]) not in kept:
                layer.fusion = fusion


def _mesh(model: torch.nn.Module) -> Any:
    """The device mesh that FSDP2 has sharded the model over; None for a model that is whole."""
    return next((getattr(p, "device_mesh", None) for p in model.parameters() if type(p).__name__ == "DTensor"), None)


def _convert(layers: Sequence[Layer], calibration: Mapping[str, Inputs], mesh: Any) -> None:
    """Build the new layers; those that share a weight share what stands for it."""
    first: dict[int, Layer] = {}
    for layer in layers:
        if layer.kind is None or not layer.going:
            continue
        assert layer.config is not None
        activation = layer.fusion.activation if layer.fusion else "none"
        inputs = calibration.get(layer.fqn)
        moment = None if inputs is None else inputs.moment
        request = Request(layer.module, layer.config, layer.fqn, activation, moment, layer.shape, mesh)
        try:
            made = layer.kind.convert(request)
        except Kept as kept:
            layer.reason = str(kept)
            continue
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix(f"{layer.kind.made[0].__name__}.from_float: ")
            raise SwapError(f"swap_: layer {layer.fqn!r}: {reason}") from error
        if layer.kind.weights:
            holder = first.setdefault(id(masked.weight_of(layer.module)), layer)
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
    attributes that others may have put on it. A mask stays behind, and what ``original.compile()`` made of it."""
    original = masked.plain(original)
    for name in _HOOKS:
        vars(made)[name] = vars(original)[name]
    for name, value in vars(original).items():
        if name != "_compiled_call_impl":
            vars(made).setdefault(name, value)


def _look(model: torch.nn.Module, layers: Sequence[Layer], value: int | tuple[Any, ...] | Mapping[str, Any]) -> None:
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


def _measure(layers: Sequence[Layer]) -> None:
    timed = [layer for layer in layers if layer.kind and layer.going and layer.shape and layer.kind.races(layer.module)]
    for layer, times in zip(timed, timing.times([_contest(layer) for layer in timed]), strict=True):
        layer.times = times
        if times.after_us >= times.before_us:
            assert layer.kind is not None
            layer.reason = f"{layer.kind.noun} is not faster here"


def _contest(layer: Layer) -> timing.Contest:
    assert layer.made is not None
    assert layer.shape is not None
    weight = next(layer.module.parameters())
    if weight.is_meta:
        raise SwapError(f"swap_: layer {layer.fqn!r} is on the meta device and cannot be measured")
    before: timing.Call = masked.plain(layer.module).forward  # a mask's own time is none of the layer's
    if layer.fusion is not None:
        curve: Any = layer.fusion.parent._modules[layer.fusion.child]
        before = partial(_in_turn, before, curve)
    kind = (repr(layer.module), repr(layer.made))
    return timing.Contest(before, layer.made.forward, kind, layer.shape, weight.dtype, weight.device)


def _unmask(layers: Sequence[Layer]) -> None:
    """Make dense layers of the masked ones that stay; those of one weight and mask share one weight again."""
    owners: dict[int, list[Layer]] = {}
    for layer in layers:
        for parameter in layer.module._parameters.values():
            owners.setdefault(id(parameter), []).append(layer)
    for layer in layers:
        if layer.going or masked.mask_of(layer.module) is None:
            continue
        layer.unmasked = masked.plain(layer.module, zeros=True)
        layer.reason = f"{layer.reason}; its zeros are permanent now"
        holders = owners[id(masked.weight_of(layer.module))]
        others = [other for other in holders if other is not layer and other.whole is not layer]
        alike = [other.unmasked for other in others if masked.same_mask(layer.module, other.module)]
        if len(alike) < len(others):
            layer.reason = f"{layer.reason}, in a weight of its own"
        twin = next((unmasked for unmasked in alike if unmasked is not None), None)
        if twin is not None:
            layer.unmasked._parameters["weight"] = twin._parameters["weight"]


def _in_turn(linear: timing.Call, curve: timing.Call, x: torch.Tensor) -> Any:
    return curve(linear(x))


def _exchange(layers: Sequence[Layer]) -> list[Slot]:
    """Put the new modules into the model; on any interruption, the old ones back."""
    slots = []
    for layer in layers:
        after = layer.successor
        if after is None:
            continue
        for parent, parent_fqn, child in layer.places:
            fqn = f"{parent_fqn}.{child}" if parent_fqn else child
            slots.append(Slot(parent, child, fqn, layer.module, after))
        if layer.going and layer.fusion is not None:
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
