"""A checkpoint of a masked model goes into one with masks on the same layers; into any other it is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import burnish
import pytest
import torch
from burnish import CheckpointError
from checkpoint_models import IDS, Net, bits, equal
from torch import nn
from torch.nn.utils import prune as torch_prune


def _pruned() -> nn.Module:
    model = Net()
    burnish.prune.mask_(model, {"mlp.0": torch.rand(40, 24) < 0.5, "mlp.2": torch.rand(24, 40) < 0.5})
    return model


def _pruned_by_torch() -> nn.Module:
    model = Net()
    torch_prune.l1_unstructured(model.mlp[0], "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "given", "match"),
    [
        (
            _pruned,
            Net,
            r"saved with masks on the weights of 'mlp.0', 'mlp.2', .* first \(burnish.prune.mask_\)",
        ),
        (
            _pruned_by_torch,
            Net,
            r"saved with masks on the weights of 'mlp.0', .* \(torch.nn.utils.prune.identity",
        ),
        (_pruned_by_torch, _pruned, r"saved with masks on the weights of 'mlp.0', the model has none there"),
        (Net, _pruned, r"the model has masks on the weights of 'mlp.0', 'mlp.2', .* first \(burnish.prune.remove_\)"),
        (Net, _pruned_by_torch, r"the model has masks on the weights of 'mlp.0', .* first \(burnish.prune.remove_\)"),
    ],
)
def test_masks_on_one_side_alone_are_refused(
    make: Callable[[], nn.Module], given: Callable[[], nn.Module], match: str, tmp_path: Path
) -> None:
    burnish.save(make(), tmp_path)
    model = given()
    before = bits(model)
    with pytest.raises(CheckpointError, match=match):
        burnish.load(model, tmp_path)
    assert equal(before, bits(model))


def test_masks_of_any_values_let_a_pruned_checkpoint_in(tmp_path: Path) -> None:
    pruned, by_torch = _pruned(), _pruned_by_torch()
    burnish.save(pruned, tmp_path / "ours")
    burnish.save(by_torch, tmp_path / "theirs")
    model = Net()
    burnish.prune.mask_(model, {fqn: torch.ones_like(mask) for fqn, mask in burnish.prune.masks(pruned).items()})
    assert torch.equal(burnish.load(model, tmp_path / "ours").mlp[2].weight, pruned.mlp[2].weight)
    model = Net().eval()
    torch_prune.identity(model.mlp[0], "weight")
    assert torch.equal(burnish.load(model, tmp_path / "theirs")(IDS), by_torch.eval()(IDS))
