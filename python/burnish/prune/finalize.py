"""From masks to layers that are faster for them.

    report = prune.finalize_(model, measure=batch)
    print(report)            # per layer: from, to, bytes, time before and after; or why it is dense

==================================================  ==========================================================
the mask of                                         becomes
==================================================  ==========================================================
a linear layer, of blocks                           :class:`burnish.nn.BlockSparseLinear`
a 2-d convolution with one group, of blocks         :class:`burnish.nn.SparseConv2d`
a linear layer, 2:4 along its inputs                :class:`burnish.nn.Sparse24Linear`
a linear layer, any other                           :class:`burnish.nn.SparseLinear`
==================================================  ==========================================================

Of several patterns that a mask makes, the one that :func:`burnish.prune.patterns.found` names counts, which
:func:`burnish.prune.report` shows. What the masks keep is kept, zeros among it too. With ``measure`` each new layer
races the dense one, both timed in turn on inputs like those that the example shows; where the dense layer wins, or no
sparse layer fits, it stays dense, its mask's zeros in its weight. No masks are left either way.

Layers that share a weight and the mask on it share what comes of it too. Where only one has a mask, or their masks
differ, as those of ``torch.nn.utils.prune`` may, each masked one stays dense with a weight of its own, and the report
says so; such a checkpoint loads into a model that does not tie them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from burnish import kinds
from burnish.configs import BlockSparse, Config, Sparse, Sparse24
from burnish.errors import SwapError
from burnish.layers import Layer, survey
from burnish.nn import masked
from burnish.prune.masking import mask_of, parameter_of
from burnish.prune.patterns import Block, TwoFour, found
from burnish.report import Report
from burnish.swap import carry_out


def finalize_(
    model: torch.nn.Module,
    *,
    values: str = "float",
    measure: int | torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Report:
    """Exchange the masked layers of ``model``, in place, for sparse ones, as a whole or not at all.

    Make the optimizer after this: the weights are new parameters.

    Args:
        model: a model with masks of :mod:`burnish.prune` or ``torch.nn.utils.prune``.
        values: ``float``, or ``int8`` for frozen weights of a byte, where there are kernels: blocks and 2:4.
        measure: time each layer against the dense one and leave it dense where that is faster; as :func:`burnish.swap_`
            takes it: a number of rows, or the model's arguments for one forward pass. None makes all sparse that fit.

    Returns:
        The report; its ``revert()`` brings the masked layers back, as they were.

    Raises:
        SwapError: no masks; a weight with a NaN, on meta, sharded or under another parametrization; the model is itself
            a masked layer. The model is as it was.
        TypeError, ValueError: an argument of the wrong type or value.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"finalize_: model is a {type(model).__name__}, expected an nn.Module")
    if values not in ("float", "int8"):
        raise ValueError(f"finalize_: values is {values!r}, expected one of: float, int8")
    try:
        layers = survey(model)
        _decide(layers, values)
        return carry_out(model, layers, measure, unmask=True)
    except (SwapError, TypeError) as error:
        if not str(error).startswith("swap_:"):
            raise
        raise type(error)(str(error).replace("swap_:", "finalize_:", 1)) from error


def _decide(layers: list[Layer], values: str) -> None:
    """Give each masked layer its configuration, or the reason that it stays dense."""
    masks = 0
    for layer in layers:
        layer.reason = "it has no mask"
        mask = mask_of(layer.module)
        if mask is None:
            continue
        masks += 1
        _check(layer)
        layer.config = _config(layer.module, values)
        layer.reason = "its mask makes no pattern that a convolution has a sparse form for"
        if layer.kind is not None:
            layer.reason = "it has no sparse form"
            if layer.kind.candidate(layer.module):
                layer.reason = layer.kind.objection(layer.module, [parent for parent, _, _ in layer.places])
    if not masks:
        raise SwapError(
            "finalize_: the model has no masks, expected some of burnish.prune or torch.nn.utils.prune: prune it first"
        )


def _check(layer: Layer) -> None:
    """Raise SwapError for a mask that cannot be made permanent."""
    module = layer.module
    if not layer.places:
        raise SwapError("finalize_: the model itself is a masked layer, which cannot be exchanged in place: wrap it")
    reason = masked.refusal(module)
    if reason is not None:
        raise SwapError(f"finalize_: layer {layer.fqn!r} cannot lose its mask: {reason}")
    weight = parameter_of(module)
    if type(weight) is not torch.nn.Parameter:
        raise SwapError(
            f"finalize_: the weight of layer {layer.fqn!r} is a {type(weight).__name__}, expected a plain parameter: "
            "gather shards first"
        )


def _config(module: torch.nn.Module, values: str) -> Config | None:
    """The configuration that a layer's mask asks for; None for a convolution without blocks."""
    mask = masked.values_of(module)[1]
    assert mask is not None
    pattern = found(mask)
    if isinstance(pattern, Block):
        return BlockSparse(pattern.sides, values=values)
    if not kinds.linear.is_candidate(module):
        return None
    return Sparse24(values) if isinstance(pattern, TwoFour) else Sparse()
