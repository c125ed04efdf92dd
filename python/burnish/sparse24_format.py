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
