"""Layers under DDP and FSDP2, two gloo processes: the same training as in one process, the same state dict."""

from __future__ import annotations

from pathlib import Path

import nn_workers
import pair
import pytest
import torch


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path) -> None:
    pair.run(nn_workers.distributed, kind, str(tmp_path))
    for name, make in nn_workers.MODELS.items():
        alone = make()
        nn_workers.train(alone)
        expected, initial = alone.state_dict(), make().state_dict()
        trainable = {key for key, _ in alone.named_parameters()}
        state = torch.load(tmp_path / f"{name}-state.pt", weights_only=True)
        again = torch.load(tmp_path / f"{name}-again.pt", weights_only=True)
        assert state.keys() == again.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype
            assert torch.equal(again[key], state[key])
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
            assert torch.equal(state[key], initial[key]) != (key in trainable and value.numel() > 0), key
