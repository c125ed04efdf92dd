"""The 2:4 form of a weight: of each four elements along K at most two, as values and their positions.

=========  ====================  ==============================================================================
values     [N, Kp / 2]           the two stored weights of each group of four, by position
metadata   uint8 [N, Kp / 8]     a group is 4 bits, first position in the low two; two groups a byte, first low
=========  ====================  ==============================================================================

Kp is K rounded up to a multiple of 8. The first position of a group is below the second, always: a group with fewer
weights names its lowest free positions, with zeros. :func:`expand` is the exact inverse of :func:`compress`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.checks import check_devices, check_floating
from burnish.registry import dtype_name
from burnish.sparse_formats import kept_weights, spread

GROUP, KEPT = 4, 2
#: elements of a row that a byte of metadata describes
STEP = 8
#: integers by their size
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def padded(K: int) -> int:
    """Kp: K rounded up to whole bytes of metadata."""
    return (K + STEP - 1) // STEP * STEP


def compress(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``values`` and ``metadata`` of a dense weight ``[N, K]`` of any dtype; ``mask``: what is kept, by default what is
    not zero.

    Raises:
        ValueError: a group keeps more than two, or the mask does not fit.
    """
    kept = kept_weights("sparse24_linear", weight, mask)
    N, K = weight.shape
    fill = (0, padded(K) - K)
    groups = F.pad(kept, fill).view(N, -1, GROUP)
    crowded = groups.sum(-1) > KEPT
    if bool(crowded.any()):
        row, group = crowded.nonzero()[0].tolist()
        raise ValueError(
            f"sparse24_linear: weight keeps {int(groups[row, group].sum())} of columns {GROUP * group} to "
            f"{GROUP * group + GROUP - 1} in row {row}, expected at most {KEPT} of each {GROUP}"
        )
    # kept ones first, then free ones, each in order
    chosen = (~groups).to(torch.int8).argsort(dim=-1, stable=True)[..., :KEPT].sort(-1).values
    words = weight.detach().contiguous().view(WORDS[weight.itemsize])  # torch.where may change the bits of a NaN
    stored = F.pad(words.where(kept, 0), fill).view(N, -1, GROUP)
    nibbles = (chosen[..., 0] | chosen[..., 1] << 2).view(N, -1, 2)
    metadata = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)
    return stored.gather(-1, chosen).view(N, -1).view(weight.dtype), metadata


def positions(metadata: Tensor) -> Tensor:
    """The column of each stored weight, ``[N, Kp / 2]``."""
    shifts = torch.arange(0, STEP, 2, device=metadata.device)
    within = metadata.long().unsqueeze(-1) >> shifts & 3  # [N, Kp / 8, 4]
    first = torch.arange(0, metadata.shape[1] * STEP, STEP, device=metadata.device).unsqueeze(-1)
    return (first + torch.tensor([0, 0, GROUP, GROUP], device=metadata.device) + within).flatten(1)


def expand(values: Tensor, metadata: Tensor, N: int, K: int) -> Tensor:
    """The dense weight ``[N, K]``; the inverse of :func:`compress`."""
    width = padded(K)
    index = torch.full((N, width), values.numel(), device=values.device)
    index.scatter_(1, positions(metadata), torch.arange(values.numel(), device=values.device).view(N, width // KEPT))
    return spread(values, index)[:, :K].contiguous()


def check_weight(op: str, x: Tensor, values: Tensor, metadata: Tensor, scale: Tensor | None) -> None:
    """What an op asks of x and of a weight in this form.

    Raises:
        RuntimeError: a shape, dtype, device or layout that does not fit; the message names the argument.
    """
    check_floating(op, x=x)
    torch._check(x.dim() >= 1, lambda: f"{op}: x is a scalar, expected at least one dimension")
    check_devices(op, x, values=values, metadata=metadata, scale=scale)
    wanted = torch.int8 if scale is not None else x.dtype
    torch._check(
        values.dtype == wanted,
        lambda: (
            f"{op}: values are {dtype_name(values.dtype)}, expected {dtype_name(wanted)} "
            f"{'with a scale' if scale is not None else 'as x is, or int8 with a scale'}"
        ),
    )
    torch._check(
        metadata.dtype == torch.uint8, lambda: f"{op}: metadata is {dtype_name(metadata.dtype)}, expected uint8"
    )
    width = padded(x.shape[-1])
    torch._check(
        metadata.dim() == 2 and metadata.shape[0] >= 1 and metadata.shape[1] == width // STEP,
        lambda: (
            f"{op}: metadata has shape {tuple(metadata.shape)}, expected [N, {width // STEP}] with N >= 1 "
            f"for K={x.shape[-1]}"
        ),
    )
    N = metadata.shape[0]
    torch._check(
        values.dim() == 2 and values.shape[0] == N and values.shape[1] == width // KEPT,
        lambda: f"{op}: values have shape {tuple(values.shape)}, expected {(N, width // KEPT)} as metadata has",
    )
    for name, tensor in (("values are", values), ("metadata is", metadata)):
        torch._check(
            tensor.is_contiguous(), lambda name=name: f"{op}: {name} not contiguous, expected compress's result"
        )
    if scale is None:
        return
    torch._check(scale.dtype == torch.float32, lambda: f"{op}: scale is {dtype_name(scale.dtype)}, expected fp32")
    torch._check(
        scale.dim() == 1 and scale.shape[0] == N, lambda: f"{op}: scale has shape {tuple(scale.shape)}, expected [{N}]"
    )
