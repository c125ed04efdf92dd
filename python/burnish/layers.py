"""The layers of a model on their way through a swap: where they hang, what is to become of them, what a report says.

Every module is looked at once, with all its names; decisions are made in :mod:`burnish.swap`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from burnish import fuse, kinds
from burnish import measure as timing
from burnish.configs import Config
from burnish.errors import SwapError
from burnish.kinds import Kind
from burnish.nn import masked
from burnish.registry import dtype_name
from burnish.report import Row, tensor_bytes


@dataclass
class Layer:
    """A module of the model on its way through the swap."""

    module: torch.nn.Module
    places: list[fuse.Place] = field(default_factory=list)
    fqns: list[str] = field(default_factory=list)
    config: Config | None = None
    reason: str | None = None
    fusion: fuse.Fusion | None = None
    shape: tuple[int, ...] | None = None
    made: torch.nn.Module | None = None
    tied: str | None = None
    times: timing.Times | None = None
    #: the layer it is a part of, which is swapped as a whole
    whole: Layer | None = None
    #: what takes its place although it is kept: the same without its mask
    unmasked: torch.nn.Module | None = None

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
    def successor(self) -> torch.nn.Module | None:
        """What is to take its place."""
        return self.made if self.going else self.unmasked

    @property
    def is_one(self) -> bool:
        """Whether what is inside it is no layer of its own."""
        return kinds.made_by(self.module) is not None or masked.mask_of(self.module) is not None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its own, and its parts' where it is swapped as a whole."""
        if self.going or self.is_one:
            return [*self.module.parameters(), *self.module.buffers()]
        own = (*self.module._parameters.values(), *self.module._buffers.values())
        return [tensor for tensor in own if tensor is not None]


def survey(model: torch.nn.Module) -> list[Layer]:
    """Every module once, with all its names and places."""
    layers: dict[int, Layer] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        layer = layers.setdefault(id(module), Layer(module))
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


def keep_ties(layers: Sequence[Layer]) -> None:
    """Keep every layer that shares its weight with one that is kept."""
    owners: dict[int, list[Layer]] = defaultdict(list)
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
            for other in owners[id(masked.weight_of(layer.module))]:
                obstacle = _obstacle(layer, other)
                if obstacle is not None:
                    layer.reason = (
                        f"its weight is tied to {type(other.module).__name__} {other.fqn!r}, which {obstacle}"
                    )
                    changed = True
                    break


def _obstacle(layer: Layer, other: Layer) -> str | None:
    """What ``other`` does with a weight of both that keeps ``layer`` from giving it up."""
    if other is layer or other.whole is layer:
        return None
    if not other.going:
        return "is kept"
    if other.config != layer.config:
        return "becomes something else"
    if getattr(other.module, "groups", 1) != getattr(layer.module, "groups", 1):
        return "splits it into other groups"
    if isinstance(other.module, torch.nn.Linear) != isinstance(layer.module, torch.nn.Linear):
        return "holds it transposed"
    return None if masked.same_mask(layer.module, other.module) else "has another mask"


def rows_of(layers: Sequence[Layer]) -> list[Row]:
    rows = []
    counted_before: set[int] = set()
    counted_after: set[int] = set()
    for layer in layers:
        tensors = layer.tensors
        if layer.whole is not None or not (tensors or kinds.takers(layer.module)):
            continue
        made = layer.made if layer.going else None
        after = layer.successor
        rows.append(
            Row(
                fqn=layer.fqn,
                was=_described(layer.module),
                became=None if made is None else str(made.summary),
                reason=layer.reason,
                bytes_before=_bytes(tensors, counted_before),
                bytes_after=_bytes([*after.parameters(), *after.buffers()] if after else tensors, counted_after),
                fused=layer.fusion.fqn if made is not None and layer.fusion else None,
                tied=layer.tied if made is not None else None,
                frozen=made is not None and _trained(layer) and not _trains(made),
                times=layer.times,
            )
        )
    return rows


def _trained(layer: Layer) -> bool:
    """Whether the weight that the layer is to give up could be trained."""
    held = layer.kind is not None and layer.kind.weights
    weight = masked.weight_of(layer.module) if held else layer.module._parameters.get("weight")
    return weight is not None and weight.requires_grad


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
    bare = masked.plain(module)
    if bare is not module:
        return f"{_described(bare)}, masked"
    name = type(module).__name__
    if kinds.made_by(module) is not None:
        return f"{name} {module.in_features}->{module.out_features}" if hasattr(module, "in_features") else name
    weight = module._parameters.get("weight")
    if not kinds.takers(module) or weight is None or torch.nn.parameter.is_lazy(weight) or weight.dim() < 2:
        return name
    return described(name, module, weight)


def described(name: str, module: torch.nn.Module, weight: torch.Tensor) -> str:
    """A linear or convolution layer by that name, with the sizes and dtype that its weight has."""
    outputs, inputs, *kernel = weight.shape
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        inputs *= module.groups
    elif not isinstance(module, torch.nn.Linear):
        outputs, inputs = inputs, outputs  # transformers' Conv1D
    size = f" {'x'.join(map(str, kernel))}" if kernel else ""
    return f"{name} {inputs}->{outputs}{size} {dtype_name(weight.dtype)}"
