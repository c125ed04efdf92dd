"""A block-sparse convolution: patches of the images as rows, and :func:`burnish.ops.bsr_linear` over them.

A patch is laid out as the weight's rows are, input channels x kernel. It is gathered tap by tap from images whose
channels lie together: on the CPU a third (fp32) to a sixth (bf16) of the time of F.unfold and a transposition. Patches
of whole images exist at a time, at most 64 MiB in fp32 or those of one image; under torch.compile and torch.export,
whose graphs know no loop over a batch, all of them do, and for the gradient of the weight they are kept. A kernel of
1 x 1 needs no patches: the pixels are the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.ops.bsr_linear import bsr_linear
from burnish.schemes import Geometry, Pair

#: values of patches that are gathered at a time
_CHUNK = 1 << 24


def bsr_conv2d(
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    outputs: int,
    kernel: Pair,
    geometry: Geometry,
) -> Tensor:
    """The convolution of ``x [.., C, H, W]`` with a weight whose matrix ``[N, C kh kw]`` has these blocks; ``index`` is
    crow_indices, col_indices and transposed. The result has the memory format that nn.Conv2d gives it."""
    images = x if x.dim() == 4 else x.unsqueeze(0)
    walls = geometry.mode != "constant" or any(geometry.padding)
    padded = F.pad(images, geometry.padding, geometry.mode) if walls else images
    lasting = x.dim() == 4 and padded.is_contiguous(memory_format=torch.channels_last) and not padded.is_contiguous()
    size = _size(padded, kernel, geometry)
    pixels = padded.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # [B, H, W, C]
    y = torch.cat(
        [
            bsr_linear(_patches(part, kernel, geometry, size), values, *index, scale, bias, outputs)
            for part in _parts(pixels, size[0] * size[1] * kernel[0] * kernel[1])
        ]
    ).permute(0, 3, 1, 2)
    y = y if lasting else y.contiguous()
    return y if x.dim() == 4 else y.squeeze(0)


def _size(images: Tensor, kernel: Pair, geometry: Geometry) -> Pair:
    """Height and width of the result."""
    spans = [step * (taps - 1) + 1 for step, taps in zip(geometry.dilation, kernel, strict=True)]
    if spans[0] > images.shape[2] or spans[1] > images.shape[3]:
        raise RuntimeError(
            f"SparseConv2d: the padded images are {images.shape[2]} x {images.shape[3]}, expected at least the "
            f"kernel's extent of {spans[0]} x {spans[1]}"
        )
    high, wide = (
        (extent - span) // step + 1 for extent, span, step in zip(images.shape[2:], spans, geometry.stride, strict=True)
    )
    return high, wide


def _parts(pixels: Tensor, rows: int) -> tuple[Tensor, ...]:
    """The images, as many at a time as may have patches, ``rows`` values a channel and image."""
    if torch.compiler.is_compiling() or not pixels.shape[0]:
        return (pixels,)
    return pixels.split(max(1, _CHUNK // max(1, rows * pixels.shape[3])))


def _patches(pixels: Tensor, kernel: Pair, geometry: Geometry, size: Pair) -> Tensor:
    """The patches ``[B, Ho, Wo, C kh kw]``."""
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * geometry.dilation[0], j * geometry.dilation[1]
            down, right = geometry.stride
            taps.append(
                pixels[:, top : top + down * (size[0] - 1) + 1 : down, left : left + right * (size[1] - 1) + 1 : right]
            )
    return taps[0] if len(taps) == 1 else torch.stack(taps, -1).flatten(-2)
