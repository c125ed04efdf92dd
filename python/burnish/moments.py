"""Eight-bit codes of an optimizer's moments, in blocks of 256 elements with an fp32 scale; the words for
csrc/math/moments.h.

    first moment     int8   sign(m) * rint(sqrt(|m|) / scale)     scale = the block's largest sqrt(|m|) / 127
    second moment    uint8  rint(v ** (1/4) / scale)              scale = the block's largest v ** (1/4) / 255

What is positive has a code of at least 1 in a second moment, which is divided by. A block that holds an infinity, a NaN
or a negative second moment has scale NaN. Chosen by the error of the sum of 300 updates, relative to fp32's, over
gradients whose magnitudes differ within a block by a factor exp(normal(0, s)):

=====================================  =======  =======  =======
first + second moment, linear in       s = 0    s = 0.5  s = 1.5
=====================================  =======  =======  =======
m + sqrt(v)                            0.8 %    2.7 %    51 %
m + v ** (1/4)                         1.2 %    2.3 %    48 %
sqrt(m) + sqrt(v)                      0.8 %    2.5 %    32 %
sqrt(m) + v ** (1/4), as here          1.2 %    2.1 %    15 %
=====================================  =======  =======  =======

Logarithmic codes (8-bit floats) of the second moment stand still, where a step of beta2 changes less than half a code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 256
FLOOR = 2.0**-100


def square_root(value: torch.Tensor) -> torch.Tensor:
    """The IEEE root; torch's own of fp32 may be another neighbour."""
    return value.double().sqrt().to(value.dtype)


def encode(moment: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``[n]`` to codes ``[n]`` and scales ``[ceil(n / 256)]``; ``signed`` for a first moment."""
    count = moment.numel()
    padded = F.pad(moment, (0, -count % BLOCK)).view(-1, BLOCK)
    root = square_root(padded.abs()) if signed else square_root(square_root(padded))
    largest = root.abs().amax(1, keepdim=True) if count else root[:, :1]
    good = largest.isfinite()
    limit = torch.full_like(largest, 127.0 if signed else 255.0)
    held = largest.clamp_min(FLOOR)
    code = torch.where(good, (root * (limit / held)).round(), 0.0)
    if signed:
        code = torch.where(padded.signbit(), -code, code)
    else:
        code = torch.where(good & (root > 0) & (code < 1), 1.0, code)
    scale = torch.where(good, held / limit, torch.nan)
    return code.view(-1)[:count].to(torch.int8 if signed else torch.uint8), scale.view(-1)


def decode(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 ``[n]`` of codes ``[n]`` and the scales of their blocks."""
    root = code.to(torch.float32) * scale.repeat_interleave(BLOCK)[: code.numel()]
    return root * root.abs() if code.dtype == torch.int8 else (root * root) * (root * root)
