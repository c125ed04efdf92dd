"""What the inputs of a model's layers look like: their second moments, gathered while the model runs on real data.

    calibration = burnish.calibrate(model, [batch, batch, ...])
    report = burnish.swap_(model, burnish.LowRank(rank=64, method="activation"), calibration=calibration)

    calibration["blocks.0.mlp.0"].moment      # E[x x^T], fp32 [K, K], on the layer's device
    calibration["blocks.0.mlp.0"].diagonal    # E[x^2], fp32 [K]
    calibration["blocks.0.mlp.0"].rows        # how many x that is the mean of

===============================  =============================  ==============================
layer                            a row x is                     moment
===============================  =============================  ==============================
nn.Linear, transformers' Conv1D  a token's features             [K, K]
nn.Conv2d                        a patch, as F.unfold makes it  [G, K, K], K = C / G kh kw
===============================  =============================  ==============================

Batches stream: nothing of them is kept. The memory is 4 K^2 bytes a layer (64 MiB for K = 4096), as much again for the
layer that runs, and for a convolution 64 MiB for unfolded patches; where that is too much, calibrate part of the layers
at a time with ``filter_fn``. Products and sums are fp32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.measure import call, eval_mode, input_of
from burnish.nn.int8_linear import is_conv1d
from burnish.ops.lowrank_linear import as_rows
from burnish.schemes import Geometry

#: values that are unfolded or converted to fp32 at a time
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Inputs:
    """What a layer's inputs were: the mean of x x^T over ``rows`` of them."""

    moment: Tensor
    rows: int

    @property
    def diagonal(self) -> Tensor:
        """The mean of x^2, ``[K]`` or ``[G, K]``."""
        return self.moment.diagonal(dim1=-2, dim2=-1)


class Calibration(Mapping[str, Inputs]):
    """The :class:`Inputs` of the layers that the batches reached, by fqn; made by :func:`calibrate`.

    A module with several fqns is there under each. Pickles, and so can be kept for another process.
    """

    def __init__(self, inputs: Mapping[str, Inputs]) -> None:
        self._inputs = dict(inputs)

    def __getitem__(self, fqn: str) -> Inputs:
        return self._inputs[fqn]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def to(self, device: torch.device | str) -> Calibration:
        """The same on another device, for a model that was moved since."""
        moved = {id(each): Inputs(each.moment.to(device), each.rows) for each in self._inputs.values()}
        return Calibration({fqn: moved[id(each)] for fqn, each in self._inputs.items()})

    def __repr__(self) -> str:
        size = sum({id(each): each.moment.nbytes for each in self._inputs.values()}.values())
        return f"Calibration({len(self)} layers, {size / 2**20:.1f} MiB)"


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
    progress: bool = False,
) -> Calibration:
    """Run ``model`` on ``batches``, in eval mode without gradients, and gather the second moments of the inputs of its
    linear layers and 2-d convolutions. The model is as it was afterwards, whatever happens.

    Args:
        model: any nn.Module.
        batches: each a tensor, a tuple or list of arguments, or a mapping of keywords; read once, one at a time. What
            is no argument of the model, such as a label, has to be left out: ``(x for x, label in loader)``.
        filter_fn: asked ``(module, fqn)`` for each layer; false leaves it out.
        progress: show a bar on the terminal, which needs rich.

    Raises:
        TypeError: not a module, not an iterable of batches, or a batch that the model does not take.
        ValueError: no batches or no layers, a batch on another device than the model, or a layer that was given a NaN
            or an infinity.
        ModuleNotFoundError: a bar without rich.
        Exception: whatever the model or the iterable raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"calibrate: model is a {type(model).__name__}, expected an nn.Module")
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibrate: batches is a {type(batches).__name__}, expected an iterable of batches, such as [batch]"
        )
    layers = _layers(model, filter_fn)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if torch.device("meta") in devices:
        raise ValueError("calibrate: the model is on the meta device and has no values")
    seen = {id(module): _Sums(isinstance(module, torch.nn.Conv2d)) for module in layers.values()}
    count = 0
    with ExitStack() as undo:
        for module in {id(module): module for module in layers.values()}.values():
            record = partial(_record, seen[id(module)])
            undo.callback(module.register_forward_pre_hook(record, with_kwargs=True).remove)
        undo.enter_context(eval_mode(model))
        undo.enter_context(torch.no_grad())
        for count, batch in enumerate(_shown(batches) if progress else batches, 1):
            _check_device(batch, devices, count)
            try:
                call(model, batch)
            except TypeError as error:
                raise TypeError(_not_taken(batch, count, error)) from error
    if not count:
        raise ValueError("calibrate: batches is empty, expected at least one batch")
    inputs = {key: sums.inputs() for key, sums in seen.items() if sums.rows}
    for fqn, module in layers.items():
        if id(module) in inputs and not bool(inputs[id(module)].moment.isfinite().all()):
            raise ValueError(f"calibrate: layer {fqn!r} was given a NaN, an infinity or values whose squares overflow")
    return Calibration({fqn: inputs[id(module)] for fqn, module in layers.items() if id(module) in inputs})


def _layers(
    model: torch.nn.Module, filter_fn: Callable[[torch.nn.Module, str], bool] | None
) -> dict[str, torch.nn.Module]:
    """The layers to watch, under all their names."""
    layers = {
        fqn: module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if (isinstance(module, torch.nn.Linear | torch.nn.Conv2d) or is_conv1d(module))
        and (filter_fn is None or filter_fn(module, fqn))
    }
    if not layers:
        refused = "" if filter_fn is None else " that filter_fn accepts"
        raise ValueError(f"calibrate: the model has no linear layer or 2-d convolution{refused}")
    return layers


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, with a bar that follows them."""
    try:
        from rich.progress import track
    except ImportError:
        raise ModuleNotFoundError("calibrate: progress=True needs rich: pip install rich") from None
    return track(batches, description="calibrating")


def _not_taken(batch: Any, number: int, error: TypeError) -> str:
    """What to say of a TypeError of the model's."""
    said = f"calibrate: the model raised TypeError at batch {number}: {error}"
    if isinstance(batch, Mapping):
        names = ", ".join(map(str, batch))
        return f"{said}. The batch is a mapping, and its keys ({names}) are the model's keywords: leave the others out"
    if not isinstance(batch, tuple | list):
        return said
    return (
        f"{said}. The batch is a {type(batch).__name__} of {len(batch)}, and its items are the model's arguments: "
        "leave out what is none, as in calibrate(model, (x for x, label in loader))"
    )


def _check_device(batch: Any, devices: set[torch.device], number: int) -> None:
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    for tensor in parts:
        if isinstance(tensor, Tensor) and devices and tensor.device not in devices:
            raise ValueError(
                f"calibrate: batch {number} has a tensor on {tensor.device}, expected {_named(devices)} as the model is"
            )


def _named(devices: set[torch.device]) -> str:
    return " or ".join(sorted(map(str, devices)))


class _Sums:
    """The sum of x x^T so far, ``[G, K, K]``; of a layer that knows no groups, ``[K, K]`` in the end."""

    def __init__(self, grouped: bool) -> None:
        self.grouped = grouped
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, groups: Tensor) -> None:
        """Add the rows ``[G, rows, K]``."""
        x = groups.float()
        if self.total is None:
            self.total = x.new_zeros(x.shape[0], x.shape[2], x.shape[2])
        self.total.baddbmm_(x.mT, x)  # in place, which autocast leaves in fp32
        self.rows += x.shape[1]

    def inputs(self) -> Inputs:
        assert self.total is not None
        mean = self.total.div_(self.rows)
        return Inputs(mean if self.grouped else mean[0], self.rows)


def _record(sums: _Sums, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: add the rows of the layer's input."""
    x = input_of(args, kwargs)
    if isinstance(module, torch.nn.Conv2d):
        for patches in _patches(module, x):
            sums.add(patches)
    else:
        for part in as_rows(x).split(max(1, _CHUNK // max(1, x.shape[-1]))):
            sums.add(part.unsqueeze(0))


def _patches(conv: torch.nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """The patches ``[G, rows, K]`` that a convolution sees, a few images at a time."""
    geometry = Geometry.of(conv)
    images = F.pad(x if x.dim() == 4 else x.unsqueeze(0), geometry.padding, geometry.mode)
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    for part in images.split(max(1, _CHUNK // max(1, images.shape[1:].numel() * taps))):
        unfolded = F.unfold(part.float(), conv.kernel_size, geometry.dilation, 0, geometry.stride)  # [b, C taps, L]
        yield unfolded.unflatten(1, (conv.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
