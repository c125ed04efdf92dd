"""TorchScript: layers are refused in words by torch.jit.script, and traced as they compute."""

from __future__ import annotations

import io

import burnish
import pytest
import torch
from torch import nn

CONFIGS = [
    burnish.Int8(), burnish.LowRank(rank=4), burnish.LoRA(r=4), burnish.BlockSparse(16), burnish.Sparse24(),
    burnish.Sparse(),
]  # fmt: skip


def swapped(config: burnish.configs.Config) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Sequential(nn.Linear(48, 32)))
    with torch.no_grad():
        for linear in (model[0], model[2][0]):
            linear.weight.view(-1, 4)[:, 2:] = 0
            linear.weight[:16] = 0
    assert len(burnish.swap_(model, config).swapped) == 2
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_script_is_refused(config: burnish.configs.Config) -> None:
    model = swapped(config)
    name = type(model[0]).__name__
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile {name}: use torch.jit.trace in eval mode"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_trace_computes_what_the_model_does_at_any_number_of_rows(config: burnish.configs.Config) -> None:
    model = swapped(config)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(4, 32))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for rows in (0, 1, 9):
            x = torch.randn(rows, 32)
            assert torch.equal(loaded(x), model(x))
