"""SecondOrder against the optimal brain surgeon done one weight and one inverse at a time, and what it is worth."""

from __future__ import annotations

import burnish
import numpy as np
import pytest
import torch
from burnish import prune
from burnish.calibration import Inputs
from test_prune import PATTERNS, inputs, lowest_first
from torch import nn

DAMPING = 0.05


def damped(taken: Inputs) -> np.ndarray:
    moment = taken.moment.double().numpy()
    return moment + DAMPING * moment.diagonal().mean() * np.eye(len(moment))


def brute_force(
    weight: np.ndarray, H: np.ndarray, pattern: prune.Pattern, sparsity: float, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns from left to right; each weight that goes is made up for by those to its right, by a linear system."""
    W, (N, K) = weight.copy(), weight.shape
    kept = np.ones((N, K), dtype=bool)
    high, wide = pattern.sides if isinstance(pattern, prune.Block) else (1, 1)
    for j in range(K):
        if j % width == 0:
            here = range(j, min(j + width, K), wide)
            blocks = [(n, k) for n in range(0, N, high) for k in here]
            loss = {block: cost(W, H, block, high, wide) for block in blocks}
            if isinstance(pattern, prune.TwoFour):
                for n in range(N):
                    group = [(n, k) for k in here]
                    for index in lowest_first([loss[block] for block in group], max(0, len(group) - 2)):
                        kept[group[index]] = False
            else:
                count = round(sparsity * len(blocks))
                for index in lowest_first([loss[block] for block in blocks], count):
                    n, k = blocks[index]
                    kept[n : n + high, k : k + wide] = False
        for n in range(N):
            if not kept[n, j]:
                change = -W[n, j]
                W[n, j] = 0
                W[n, j + 1 :] += np.linalg.solve(H[j + 1 :, j + 1 :], -H[j + 1 :, j] * change)
    return kept, W


def cost(W: np.ndarray, H: np.ndarray, block: tuple[int, int], high: int, wide: int) -> float:
    """The mean, over the weights of a block, of what the output's error grows by if its columns are zeroed and those
    to their right do what they can."""
    n, k = block
    rows = W[n : n + high, k : k + wide]
    inverse = np.linalg.inv(H[k:, k:])[: rows.shape[1], : rows.shape[1]]
    return float(np.einsum("nk,kl,nl->", rows, np.linalg.inv(inverse), rows) / rows.size)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_optimal_brain_surgeon(pattern, seed: int) -> None:
    N, K = 6, 12
    taken = inputs(40, K, seed)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    width = {prune.Unstructured: 4, prune.TwoFour: 4}.get(type(pattern), K)
    kept, values = brute_force(weight.numpy(), damped(taken), pattern, 0.5, width)
    mask, made = prune.SecondOrder(DAMPING, block_size=4).decide(weight, taken, pattern, 0.5, None)
    assert np.array_equal(mask.numpy(), kept)
    np.testing.assert_allclose(made.numpy(), values, rtol=1e-9, atol=1e-9)


def test_what_goes_first_is_made_up_for_in_full() -> None:
    """Where all that goes lies left of all that stays, the result is the least-squares solution."""
    K, taken = 10, inputs(60, 10, 5)
    H = damped(taken)
    weight = torch.randn(4, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, :4] *= 1e-3
    mask, made = prune.SecondOrder(DAMPING).decide(weight, taken, prune.Unstructured(), 0.4, None)
    assert mask.tolist() == [[False] * 4 + [True] * 6] * 4
    best = weight.numpy()[:, 4:] + np.linalg.solve(H[4:, 4:], H[4:, :4] @ weight.numpy()[:, :4].T).T
    np.testing.assert_allclose(made.numpy()[:, 4:], best, rtol=1e-9)


def output_error(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean())


@pytest.mark.parametrize("pattern", [
    prune.Unstructured(), prune.TwoFour(), prune.Block(8), prune.Block((1, 16)), prune.Block((4, 16)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_closer_than_with_magnitudes(pattern, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(800, 24, generator=generator) @ torch.randn(24, 96, generator=generator)).to(dtype)
    x += 0.3 * torch.randn(800, 96, generator=generator).to(dtype)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(96, 64)).to(dtype)
    calibration = burnish.calibrate(dense, [x[:600]])
    errors = []
    for criterion in (prune.Magnitude(), prune.Wanda(), prune.SecondOrder()):
        model = nn.Sequential(nn.Linear(96, 64)).to(dtype)
        model.load_state_dict(dense.state_dict())
        share = None if pattern.fixed else 0.5
        prune.Pruner(model, criterion, pattern, share, calibration=calibration).step()
        assert prune.report(model).sparsity == 0.5
        errors.append(output_error(model, dense, x[600:]))  # rows that the calibration has not seen
    assert errors[2] < 0.7 * min(errors[:2])


def test_inputs_that_were_always_zero_count_least_and_keep_what_stays() -> None:
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    x[:, 2:6] = 0
    model = nn.Sequential(nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight.add_(model[0].weight.sign())  # of like sizes
    weight = model[0].weight.detach().clone()
    calibration = burnish.calibrate(model, [x])
    prune.Pruner(model, prune.SecondOrder(), prune.Unstructured(), 0.2, calibration=calibration).step()
    mask = prune.masks(model)["0"]
    assert (~mask).sum() == 12
    assert mask[:, :2].all()
    assert mask[:, 6:].all()
    dead = weight[:, 2:6][~mask[:, 2:6]].abs()
    assert dead.max() < weight[:, 2:6][mask[:, 2:6]].abs().min()  # the smallest of them go
    torch.testing.assert_close(model[0].weight[mask], weight[mask])
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, model[0].bias))


def test_the_order_of_the_inputs_may_change_the_weights_but_little_what_is_lost() -> None:
    taken, weight = inputs(200, 48, 2), torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    turned = Inputs(taken.moment.flip(0, 1), taken.rows)
    lost = []
    for moment, rows in ((taken, weight), (turned, weight.flip(1))):
        _, made = prune.SecondOrder().decide(rows, moment, prune.Unstructured(), 0.5, None)
        wrong = made - rows
        lost.append(float(((wrong @ moment.moment) * wrong).sum()))
    assert max(lost) < 1.5 * min(lost)
