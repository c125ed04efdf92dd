"""The same values in memory in other ways."""

from __future__ import annotations

from collections.abc import Callable

import torch


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The last two dimensions swapped in memory."""
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_second(t: torch.Tensor) -> torch.Tensor:
    """Every second element of a twice as large last dimension; the gaps hold garbage."""
    wide = _garbage((*t.shape[:-1], 2 * t.shape[-1]), t)
    wide[..., ::2] = t
    return wide[..., ::2]


def every_second_row(t: torch.Tensor) -> torch.Tensor:
    tall = _garbage((2 * t.shape[0], *t.shape[1:]), t)
    tall[::2] = t
    return tall[::2]


def sliced(t: torch.Tensor) -> torch.Tensor:
    """The middle columns of a wider matrix."""
    wide = _garbage((*t.shape[:-1], t.shape[-1] + 5), t)
    wide[..., 2:-3] = t
    return wide[..., 2:-3]


def offset(elements: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Contiguous, from element ``elements`` of its storage on: not aligned to a vector."""

    def shifted(t: torch.Tensor) -> torch.Tensor:
        flat = _garbage((t.numel() + elements,), t)
        flat[elements:] = t.reshape(-1)
        return flat[elements:].view(t.shape)

    return shifted


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first row, repeated by a stride of zero: other values than ``t``'s."""
    return t if t.shape[0] == 0 else t[:1].expand_as(t)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else transposed(t)


def _garbage(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """What no kernel should read: NaN, or the largest integer."""
    whole = torch.empty(shape, dtype=like.dtype, device=like.device)
    if like.dtype == torch.bool:
        return whole.fill_(True)
    return whole.fill_(float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed,
    "every_second": every_second,
    "every_second_row": every_second_row,
    "sliced": sliced,
    "offset1": offset(1),
    "offset3": offset(3),
    "expanded": expanded,
    "channels_last": channels_last,
}
