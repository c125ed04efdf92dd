"""Structured pruning: whole channels go, and the layers become smaller ordinary ones, which every backend is fast for.

    report = burnish.prune.channels_(model, example_inputs, 0.5)

What goes together (a convolution's output, the batch norm behind it, the next layer's input, all that is added to it)
is found by the torch-pruning package: ``pip install burnish[prune]``. Channels that leave the model as its output stay,
and those of layers that ``filter_fn`` refuses. The parameters are new ones: make optimizers afterwards.

Source: DepGraph, Fang et al. 2023 (arXiv 2301.12900).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from burnish import kinds
from burnish.measure import call, eval_mode
from burnish.prune.criteria import Magnitude
from burnish.prune.layers import absence, candidates, check_finite
from burnish.prune.masking import mask_of, parameter_of
from burnish.prune.schedules import check_sparsity
from burnish.report import aligned, plural

FilterFn = Callable[[torch.nn.Module, str], bool]


@dataclass(frozen=True)
class ChannelRow:
    """A layer that became smaller, and its weight's shapes."""

    fqn: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ChannelReport:
    """The result of :func:`channels_`: the layers that changed, and the model's parameters before and after."""

    rows: tuple[ChannelRow, ...]
    parameters_before: int
    parameters_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        cells = [("layer", "weight"), *((row.fqn, f"{_shape(row.before)} -> {_shape(row.after)}") for row in self.rows)]
        share = self.parameters_after / self.parameters_before
        total = f"{self.parameters_before} -> {self.parameters_after} parameters ({share:.1%})"
        return "\n".join((*aligned(cells), f"{plural(len(self.rows), 'layer')} smaller: {total}"))

    __repr__ = __str__


def channels_(
    model: torch.nn.Module,
    example_inputs: Any,
    sparsity: float,
    *,
    criterion: Magnitude | None = None,
    scope: str = "local",
    round_to: int = 1,
    filter_fn: FilterFn | None = None,
) -> ChannelReport:
    """Take the least channels out of a model's linear layers and convolutions, in place; all or nothing.

    Args:
        model: any nn.Module that torch-pruning can trace.
        example_inputs: the model's arguments for one forward pass: a tensor, a tuple, or a mapping of keywords.
        sparsity: the share of channels to take, in [0, 1).
        criterion: ``Magnitude``, of all that a channel takes with it; p is 2 by default.
        scope: ``local``, that share of each group of layers that go together, or ``global``, of all.
        round_to: leave a multiple of so many channels.
        filter_fn: asked ``(module, fqn)`` for each layer; false keeps its output channels.

    Raises:
        ModuleNotFoundError: torch-pruning is missing.
        TypeError: an argument of the wrong type.
        ValueError: a share or scope that there is not, a model with masks, swapped layers, NaN or infinite weights or
            on meta, one that torch-pruning cannot take apart, or nothing to take. The model is as it was.
    """
    criterion = Magnitude(p=2) if criterion is None else criterion
    _check(model, sparsity, criterion, scope, round_to)
    _package()
    layers = candidates(model)
    wanted = [fqn for fqn, module in layers.items() if filter_fn is None or filter_fn(module, fqn)]
    if not wanted:
        raise ValueError(f"channels_: filter_fn accepts none of {len(layers)} layers")
    settings = {"p": criterion.p, "sparsity": sparsity, "everywhere": scope == "global", "round_to": round_to}
    kept = [fqn for fqn in layers if fqn not in wanted]
    trial = copy.deepcopy(model)
    try:
        _shrink(trial, example_inputs, kept, settings)
        shapes = [_shapes(each, example_inputs) for each in (model, trial)]
    except Exception as error:
        raise ValueError(f"channels_: torch-pruning cannot take this model apart: {error}") from error
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"channels_: the model's output would become {shapes[1]} from {shapes[0]}: leave out the layers that make "
            "it with filter_fn"
        )
    before = _weights(model)
    if before == _weights(trial):
        raise ValueError(f"channels_: no layer has channels to take at sparsity {sparsity} and round_to {round_to}")
    total = _parameters(model)
    _shrink(model, example_inputs, kept, settings)
    after = _weights(model)
    rows = tuple(ChannelRow(fqn, before[fqn], after[fqn]) for fqn in layers if before[fqn] != after[fqn])
    return ChannelReport(rows, total, _parameters(model))


def _check(model: Any, sparsity: Any, criterion: Any, scope: Any, round_to: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"channels_: model is a {type(model).__name__}, expected an nn.Module")
    if not isinstance(criterion, Magnitude):
        raise TypeError(f"channels_: criterion is {criterion!r}, expected Magnitude()")
    check_sparsity("channels_", "sparsity", sparsity)
    if scope not in ("local", "global"):
        raise ValueError(f"channels_: scope is {scope!r}, expected 'local' or 'global'")
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"channels_: round_to is {round_to!r}, expected a whole number of at least 1")
    if not candidates(model):
        raise ValueError(f"channels_: {absence(model)}")
    for fqn, module in model.named_modules():
        if mask_of(module) is not None:
            raise ValueError(f"channels_: layer {fqn!r} has a mask: call burnish.prune.remove_(model) first")
        if kinds.made_by(module):
            raise ValueError(f"channels_: layer {fqn!r} is a {type(module).__name__}: take channels before swapping")
        for parameter in module.parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"channels_: layer {fqn!r} is on the meta device and has no values")
            check_finite("channels_", fqn, parameter)


def _package() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ModuleNotFoundError("channels_ needs torch-pruning: pip install torch-pruning") from None
    return torch_pruning


def _shrink(model: torch.nn.Module, example_inputs: Any, kept: list[str], settings: Mapping[str, Any]) -> None:
    """Let torch-pruning take channels, but none of the layers ``kept`` and none that leave the model."""
    package = _package()
    inputs = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    with eval_mode(model), torch.enable_grad(), _all_trainable(model):  # it follows gradients
        pruner = package.pruner.BasePruner(
            model,
            inputs,
            importance=package.importance.GroupMagnitudeImportance(p=settings["p"]),
            global_pruning=settings["everywhere"],
            pruning_ratio=settings["sparsity"],
            round_to=settings["round_to"],
            ignored_layers=[model.get_submodule(fqn) for fqn in kept],
            # its defaults are dictionaries that all pruners of a process share
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.ignored_layers += _leaving(pruner)
        pruner.step()


@contextmanager
def _all_trainable(model: torch.nn.Module) -> Iterator[None]:
    """Every parameter requires gradients; those of the same names are frozen again afterwards."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)


def _leaving(pruner: Any) -> list[torch.nn.Module]:
    """The layers whose channels leave the model as its output."""
    graph = pruner.DG
    leaving = []
    for group in graph.get_all_groups(root_module_types=pruner.root_module_types):
        out = [dep.target for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        if any(not target.outputs for target in out):
            leaving += [target.module for target in out]
    return leaving


def _shapes(model: torch.nn.Module, example_inputs: Any) -> list[tuple[int, ...]]:
    """The shapes of the tensors that the model gives."""
    with eval_mode(model), torch.no_grad():
        leaves = pytree.tree_leaves(call(model, example_inputs))
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _weights(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers' weights."""
    return {fqn: tuple(parameter_of(module).shape) for fqn, module in candidates(model).items()}


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
