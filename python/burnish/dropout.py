"""Dropout without a stored mask: which elements stay is a function of a seed and of where an element is.

    word     = Philox4x32-10(counter = (k // 8, m, m >> 32, 0), key = (seed, seed >> 32))[k % 8 // 2]
    keep     = (word >> (16 if k % 2 else 0)) & 0xffff >= threshold(p)
    factor   = 1 / (1 - threshold(p) / 65536)

for element k of row m, so each 16 bits of a generator call decide one element, the same on every backend and again in
the backward pass. p has a resolution of 2**-16; the factor belongs to the probability that is really used, so the
expectation is exact.

Method: Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
#: elements that one call of the generator decides
GROUP = 8


def threshold(p: float) -> int:
    """The number in [0, 65536] below which a 16-bit word drops its element."""
    return int(p * 65536 + 0.5)


def factor(p: float) -> float:
    """What the elements kept are multiplied by; 0 where none is kept."""
    dropped = threshold(p)
    return 0.0 if dropped == 65536 else 65536 / (65536 - dropped)


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor], rounds: int = 10
) -> tuple[torch.Tensor, ...]:
    """Philox4x32: four counter words and two key words to four words, each an int64 tensor of 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2**64, as the shifts below need them
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep(seed: torch.Tensor, rows: int, width: int, p: float) -> torch.Tensor:
    """The mask ``[rows, width]``, bool, on ``seed``'s device.

    Args:
        seed: int64, one element.
        rows, width: of the matrix whose elements are dropped; leading dimensions count as rows.
        p: the probability of dropping an element, in [0, 1].
    """
    key = seed.reshape(()).to(torch.int64)
    groups = torch.arange((width + GROUP - 1) // GROUP, device=seed.device)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    zero = torch.zeros_like(row)
    words = philox((groups, row & _LOW, row >> 32, zero), (key & _LOW, (key >> 32) & _LOW))
    halves = [half.expand(rows, len(groups)) for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).reshape(rows, len(groups) * GROUP)[:, :width] >= threshold(p)
