"""Stochastic rounding to 16-bit floats, and floats kept as 16 + 8 bits; the words for csrc/math/rounding.h.

Element i of tensor number t draws 16 random bits, a function of these, of a seed and of what is rounded (``stream``, 1
to 4), so that every backend, thread count and replica rounds alike:

    words  = Philox4x32-7(counter = (i // 8, i // 8 >> 32, t, 1), key = (seed, seed >> 32))
    random = (words[(i % 8 // 2 + stream - 1) % 4] >> (16 if i % 2 else 0)) & 0xffff

Seven rounds are the fewest with which Philox passes BigCrush (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). One call serves four streams of eight elements. Bits of one element are independent, and so are those of one
stream; two streams share bits where their elements differ, and what an optimizer does to one element never meets
another.

A value goes to its upper neighbour with the probability of its distance from the lower one, in steps of 2**-16 for bf16
and subnormal fp16 and of 2**-13 for other fp16. Infinities stay and what lies beyond the largest number may join them.

A float of 24 bits is the nearest 16-bit float (ties away from zero), which is what a forward pass reads, and one byte,
in two's complement, of 256ths of its last place. A byte of zero adds nothing.
"""

from __future__ import annotations

import torch

from burnish.dropout import philox

_LOW = 0xFFFFFFFF
_INFINITY = 0x7F800000
GROUP = 8
ROUNDS = 7


def random_bits(seed: int, tensor: int, stream: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """16 bits for each of ``count`` elements: int32 ``[count]``, in [0, 65536)."""
    group = torch.arange((count + GROUP - 1) // GROUP, device=device)
    fixed = (torch.full_like(group, tensor), torch.ones_like(group))
    key = (torch.tensor(seed & _LOW), torch.tensor(seed >> 32 & _LOW))
    words = philox((group & _LOW, group >> 32, *fixed), key, ROUNDS)
    turned = [words[(place + stream - 1) % 4] for place in range(4)]
    halves = [half for word in turned for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).reshape(-1)[:count].to(torch.int32)


def round_random(value: torch.Tensor, dtype: torch.dtype, random: torch.Tensor) -> torch.Tensor:
    """fp32 ``value`` rounded to ``dtype`` by :func:`random_bits`."""
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = torch.where(magnitude > _INFINITY, bits | 0x400000, bits + random) >> 16
        return rounded.to(torch.int16).view(dtype)
    units = magnitude.clamp_max(0x38800000).view(torch.float32) * 2.0**24
    subnormal = units.floor().to(torch.int32) + ((units - units.floor()) * 65536 > random)
    rounded = torch.where(magnitude < 0x38800000, subnormal, (magnitude - 0x38000000 + (random & 0x1FFF)) >> 13)
    rounded = torch.where(magnitude >= 0x47800000, torch.where(magnitude > _INFINITY, 0x7E00, 0x7C00), rounded)
    return (rounded | (bits >> 16 & 0x8000)).to(torch.int16).view(dtype)


def split(value: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``value`` rounded to 24 bits, as ``dtype`` (bf16 or fp16) and uint8."""
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        whole = (magnitude.clamp_max(_INFINITY) + 0x7F + (magnitude >> 8 & 1)) >> 8
        whole = torch.where(magnitude > _INFINITY, 0x7FC000, whole)
    else:
        small = (magnitude.clamp_max(0x38800000).view(torch.float32) + 2.0**-9).view(torch.int32) - 0x3B000000
        whole = (magnitude.clamp_max(0x47800000) - 0x38000000 + 0xF + (magnitude >> 5 & 1)) >> 5
        whole = torch.where(magnitude < 0x38800000, small, whole)
        special = torch.where(magnitude > _INFINITY, 0x7E0000, 0x7C0000)
        whole = torch.where(magnitude >= 0x47800000, special, whole)
    high = (whole + 128) >> 8
    low = (whole - (high << 8)) & 0xFF
    return (high | (bits >> 16 & 0x8000)).to(torch.int16).view(dtype), low.to(torch.uint8)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The fp32 value of what :func:`split` made."""
    bits = high.view(torch.int16).to(torch.int32)
    sign = (bits & 0x8000) << 16
    whole = (((bits & 0x7FFF) << 8) + low.view(torch.int8).to(torch.int32)) & 0x7FFFFF
    if high.dtype == torch.bfloat16:
        return (whole << 8 | sign).view(torch.float32)
    magnitude = whole << 5
    finite = (magnitude.view(torch.float32) * 2.0**112).view(torch.int32)
    return (torch.where(magnitude >= 0x0F800000, magnitude | 0x70000000, finite) | sign).view(torch.float32)
