"""Dropout without a stored mask: the generator's published answers, one mask in C++ and Python, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from burnish import dropout

PROBABILITIES = (0.0, 2.0**-17, 2.0**-16, 0.1, 0.5, 0.9, 1 - 2.0**-16, 1.0)
#: rounds, counter, key, words: Random123's known answers for philox4x32
ANSWERS = (
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), ANSWERS)
def test_the_generator_gives_the_published_words(
    rounds: int, counter: tuple[int, ...], key: tuple[int, int], words: tuple
) -> None:
    math_ = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")
    tensors = [torch.tensor(word) for word in (*counter, *key)]
    assert tuple(int(word) for word in dropout.philox(tuple(tensors[:4]), tuple(tensors[4:]), rounds)) == words
    if rounds == 10:
        assert math_.philox(*counter, key[1] << 32 | key[0]) == words


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_mask_is_the_same_in_python_and_in_cpp(p: float) -> None:
    math_ = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")
    for seed in (0, 1, -1, 2**62 + 12345):
        mask = dropout.keep(torch.tensor([seed]), 5, 83, p)
        bits = [[math_.kept_bits(seed % 2**64, row, k // 8, p) >> k % 8 & 1 for k in range(83)] for row in range(5)]
        assert torch.equal(mask, torch.tensor(bits, dtype=torch.bool))


def test_rows_beyond_32_bits_have_words_of_their_own() -> None:
    math_ = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")
    assert math_.kept_bits(7, 3, 0, 0.5) != math_.kept_bits(7, 3 + 2**32, 0, 0.5)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_the_factor_belongs_to_the_probability_that_is_used(p: float) -> None:
    math_ = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")
    assert math_.dropout_factor(p) == dropout.factor(p)
    kept = 1 - dropout.threshold(p) / 65536
    assert dropout.factor(p) * kept == (1.0 if kept else 0.0)
    assert abs((1 - kept) - p) <= 2.0**-17


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_as_often_as_asked_and_independently(p: float) -> None:
    rows, width = 1000, 1000
    mask = dropout.keep(torch.tensor([11]), rows, width, p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) < 4 * sigma / math.sqrt(mask.numel())
    for dim in (0, 1):
        assert (mask.mean(dim) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(rows)
    centred = (mask - mask.mean()) / sigma
    for neighbour in (centred.roll(1, 1), centred.roll(1, 0), centred.roll(8, 1)):
        assert abs((centred * neighbour).mean()) < 4 / math.sqrt(mask.numel())
    other = dropout.keep(torch.tensor([12]), rows, width, p).double()
    assert abs((centred * (other - other.mean()) / sigma).mean()) < 4 / math.sqrt(mask.numel())


def test_the_first_rows_and_columns_do_not_depend_on_the_size() -> None:
    seed = torch.tensor([5])
    large = dropout.keep(seed, 20, 100, 0.3)
    assert torch.equal(dropout.keep(seed, 7, 33, 0.3), large[:7, :33])
    assert dropout.keep(seed, 0, 8, 0.3).shape == (0, 8)
    assert dropout.keep(seed, 8, 0, 0.3).shape == (8, 0)
