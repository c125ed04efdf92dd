"""Which weights go: each pattern, criterion, scope and schedule against a brute-force one."""

from __future__ import annotations

import math

import burnish
import numpy as np
import pytest
import torch
from burnish import prune
from burnish.calibration import Inputs
from burnish.prune.patterns import FORMATS, found
from hypothesis import given, settings
from hypothesis import strategies as st
from swap_models import IDS, Model
from torch import nn

PATTERNS = (
    prune.Unstructured(), prune.TwoFour(), prune.Block(3), prune.Block((1, 4)), prune.Block((4, 2)),
)  # fmt: skip


def inputs(rows: int, width: int, seed: int = 0) -> Inputs:
    """The moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return Inputs(x.T @ x / rows, rows)


def lowest_first(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count])


def expected_mask(pattern: prune.Pattern, scores: np.ndarray, sparsity: float) -> np.ndarray:
    """What a pattern is to do, one unit at a time."""
    N, K = scores.shape
    kept = np.ones((N, K), dtype=bool)
    if isinstance(pattern, prune.TwoFour):
        for n in range(N):
            for k in range(0, K, 4):
                group = scores[n, k : k + 4].tolist()
                for index in lowest_first(group, max(0, len(group) - 2)):
                    kept[n, k + index] = False
        return kept
    high, wide = pattern.sides if isinstance(pattern, prune.Block) else (1, 1)
    blocks = [(slice(n, n + high), slice(k, k + wide)) for n in range(0, N, high) for k in range(0, K, wide)]
    count = min(round(sparsity * len(blocks)), len(blocks) - 1)
    for index in lowest_first([float(scores[block].mean()) for block in blocks], count):
        kept[blocks[index]] = False
    return kept


@given(
    st.sampled_from(PATTERNS), st.integers(1, 13), st.integers(1, 17), st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_masks_keep_the_highest_scores(pattern, N, K, sparsity, seed, ties) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(N, K, generator=generator, dtype=torch.float64)
    if ties:
        scores = (scores * 4).round()
    mask = pattern.mask(scores, sparsity)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), expected_mask(pattern, scores.numpy(), sparsity))
    assert pattern.violation(mask) is None
    assert torch.equal(mask, pattern.mask(scores.clone(), sparsity))


def test_violations_are_found_and_named() -> None:
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[2, 4:7] = True
    assert prune.TwoFour().violation(mask) == "row 2 keeps 3 of columns 4 to 7, 2:4 allows 2"
    assert prune.Block((1, 4)).violation(mask) == (
        "the block of 1 x 4 at row 2, column 4 keeps 3 of 4 weights, expected all or none"
    )
    assert prune.Unstructured().violation(mask) is None
    mask[2, 6] = False
    assert prune.TwoFour().violation(mask) is None
    mask[:, 8:] = True  # the last group has two columns, the last block of 3 one
    assert prune.TwoFour().violation(mask) is None
    weight = torch.zeros(4, 2, 1, 5)
    weight[3, 1, 0, 4] = math.nan
    assert "row 3, column 8 keeps 1 of 2" in prune.Block((1, 4)).violation(weight)


@pytest.mark.parametrize("pattern", FORMATS, ids=str)
def test_the_format_of_a_mask_is_found(pattern) -> None:
    scores = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    assert found(pattern.mask(scores, 0.5)) == pattern


@pytest.mark.parametrize(("in_four", "pattern"), [(2, prune.TwoFour()), (1, prune.TwoFour()), (0.5, FORMATS[-1])])
def test_few_weights_that_are_two_of_four_by_chance_are_any(in_four: float, pattern) -> None:
    kept = torch.zeros(64, 64, dtype=torch.bool)
    kept[:: int(max(1, 1 / in_four)), ::4] = True
    kept[:, 1::4] = in_four == 2
    assert prune.TwoFour().violation(kept) is None
    assert found(kept) == pattern


def decided(criterion, weight, taken, pattern, sparsity):
    return criterion.decide(weight, taken, pattern, sparsity, None)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("p", [1, 2])
def test_magnitudes_are_those_of_the_weights(pattern, p: int) -> None:
    weight = torch.randn(11, 14, generator=torch.Generator().manual_seed(p)).to(torch.bfloat16)
    mask, values = decided(prune.Magnitude(p), weight, None, pattern, 0.4)
    assert values is None
    assert np.array_equal(mask.numpy(), expected_mask(pattern, np.abs(weight.double().numpy()) ** p, 0.4))


def test_the_power_decides_between_a_peak_and_a_plain() -> None:
    weight = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    assert decided(prune.Magnitude(1), weight, None, prune.Block((1, 2)), 0.5)[0].tolist() == [[False] * 2 + [True] * 2]
    assert decided(prune.Magnitude(2), weight, None, prune.Block((1, 2)), 0.5)[0].tolist() == [[True] * 2 + [False] * 2]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wanda_is_its_formula(pattern) -> None:
    weight, taken = torch.randn(9, 14, generator=torch.Generator().manual_seed(3)), inputs(100, 14)
    mask, values = decided(prune.Wanda(), weight, taken, pattern, 0.6)
    scores = np.abs(weight.double().numpy()) * np.sqrt(taken.moment.diagonal().double().numpy())
    if isinstance(pattern, prune.Unstructured):  # row by row, as the paper compares
        expected = np.concatenate([expected_mask(pattern, row[None], 0.6) for row in scores])
        assert (mask.sum(1) == 14 - round(0.6 * 14)).all()
    else:
        expected = expected_mask(pattern, scores, 0.6)
    assert values is None
    assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("criterion", [prune.Wanda(), prune.SecondOrder()], ids=lambda c: type(c).__name__)
def test_groups_of_a_convolution_have_inputs_of_their_own(criterion) -> None:
    conv = nn.Conv2d(6, 8, (3, 2), groups=2)
    x = torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(6, 1, 1)
    taken = burnish.calibrate(nn.Sequential(conv), [x])["0"]
    weight = conv.weight.detach().flatten(1)
    mask, values = decided(criterion, weight, taken, prune.TwoFour(), 0.5)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        alone = decided(criterion, weight[rows], Inputs(taken.moment[group], taken.rows), prune.TwoFour(), 0.5)
        assert torch.equal(mask[rows], alone[0])
        if values is not None:
            torch.testing.assert_close(values[rows], alone[1], rtol=1e-6, atol=1e-7)


def test_global_is_one_threshold_and_local_is_one_a_layer() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Conv1d(12, 6, 3))
        with torch.no_grad():
            net[2].weight.mul_(9)
        return net

    for pattern in (prune.Unstructured(), prune.Block((2, 4))):
        net = model()
        prune.Pruner(net, prune.Magnitude(), pattern, 0.5, scope="global").step()
        sizes = [pattern.units(layer.weight.detach().abs().flatten(1)) for layer in (model()[0], model()[2])]
        together = torch.cat([each.flatten() for each in sizes])
        edge = together.sort().values[round(0.5 * len(together))]
        for layer, units in zip((net[0], net[2]), sizes, strict=True):
            shape = layer.weight.flatten(1).shape
            assert torch.equal(layer.weight.detach().flatten(1) != 0, pattern.spread(units >= edge, shape))
        report = prune.report(net)
        assert report.rows[0].sparsity > 0.6 > 0.3 > report.rows[1].sparsity
        net = model()
        prune.Pruner(net, prune.Magnitude(), pattern, 0.5).step()
        assert [row.sparsity for row in prune.report(net).rows] == [0.5, pytest.approx(0.5, abs=0.06)]


def test_shares_by_pattern_over_names_and_filter() -> None:
    model = Model()
    pruner = prune.Pruner(
        model, prune.Magnitude(), prune.Unstructured(), {"re:blocks\\.0\\..*": 0.25, "*.mlp.*": 0.5, "head": 0.75},
        filter_fn=lambda module, fqn: not fqn.endswith("k"),
    )  # fmt: skip
    assert not prune.masks(model)
    pruner.step()
    taken = {row.fqn: row.sparsity for row in prune.report(model).rows}
    assert taken == {
        "blocks.0.q": 0.25, "blocks.0.mlp.0": 0.25, "blocks.0.mlp.2": 0.25, "blocks.1.mlp.0": 0.5,
        "blocks.1.mlp.2": 0.5, "blocks.2.mlp.0": 0.5, "blocks.2.mlp.2": 0.5, "head": 0.75,
    }  # fmt: skip
    assert set(pruner.layers) == set(taken)


def test_the_cubic_is_the_papers() -> None:
    schedule = prune.Gradual(start=10, end=110, frequency=25, initial=0.2)
    assert [step for step in range(200) if schedule.due(step)] == [10, 35, 60, 85, 110]
    for step in (10, 35, 60, 85, 110):
        expected = 0.9 + (0.2 - 0.9) * (1 - (step - 10) / (4 * 25)) ** 3
        assert schedule.sparsity(step, 0.9) == pytest.approx(expected, abs=1e-12)
    assert [schedule.sparsity(step, 0.9) for step in (10, 110)] == pytest.approx([0.2, 0.9], abs=1e-15)
    assert [step for step in range(9) if prune.OneShot().due(step)] == [0]


@pytest.mark.parametrize("criterion", [prune.Magnitude(), prune.Wanda(), prune.SecondOrder(block_size=8)])
@pytest.mark.parametrize("pattern", [prune.Unstructured(), prune.Block((4, 2))], ids=str)
def test_gradual_zeros_are_never_given_back(criterion, pattern) -> None:
    model = Model()
    calibration = burnish.calibrate(model, [IDS])
    schedule = prune.Gradual(start=1, end=7, frequency=2)
    pruner = prune.Pruner(model, criterion, pattern, 0.75, schedule=schedule, calibration=calibration)
    seen, made = [], []
    for step in range(10):
        made.append(pruner.step())
        assert pruner.finished == (step >= 7)
        if made[-1]:
            seen.append(prune.masks(model))
            for fqn, mask in seen[-1].items():
                share = schedule.sparsity(step, 0.75)
                assert 1 - mask.float().mean().item() == pytest.approx(share, abs=0.02), fqn
                assert not (mask & ~seen[max(0, len(seen) - 2)][fqn]).any()
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    prune.masking.parameter_of(layer).normal_()  # whatever training does
    assert made == [False, True] * 4 + [False] * 2


@pytest.mark.parametrize("criterion", [prune.Magnitude(), prune.Wanda(), prune.SecondOrder()])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pruning_is_deterministic_and_independent_of_threads(criterion, pattern) -> None:
    calibration = burnish.calibrate(Model(), [IDS])
    taken = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            model = Model()
            share = None if pattern.fixed else 0.5
            prune.Pruner(model, criterion, pattern, share, calibration=calibration).step()
            taken.append(prune.masks(model))
    finally:
        torch.set_num_threads(threads)
    for fqn, mask in taken[0].items():
        assert all(torch.equal(mask, other[fqn]) for other in taken[1:])


def test_conv1d_is_pruned_along_its_inputs() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(6, 12)  # weight [K, N]
    linear = nn.Linear(12, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
    x = torch.randn(50, 12)
    for layer in (conv, linear):
        model = nn.Sequential(layer)
        calibration = burnish.calibrate(model, [x])
        prune.Pruner(model, prune.SecondOrder(), prune.TwoFour(), calibration=calibration).step()
    assert torch.equal(conv.weight.t(), linear.weight)
    assert prune.TwoFour().violation(prune.masks(linear)[""]) is None


def test_all_zero_weights_and_rows_are_legal() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[3].zero_()
    calibration = burnish.calibrate(model, [torch.zeros(4, 16)])
    for criterion in (prune.Magnitude(), prune.Wanda(), prune.SecondOrder()):
        prune.Pruner(model, criterion, prune.Unstructured(), 0.5, calibration=calibration).step()
        assert [row.sparsity for row in prune.report(model).rows] == [0.5, 0.5]
        assert not model[0].weight.any()
        assert torch.equal(model(torch.zeros(4, 16)), model[1](model[0].bias.expand(4, 8)))
        prune.remove_(model)
