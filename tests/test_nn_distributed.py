"""Int8Linear under DDP and FSDP2, two gloo processes: the same training as in one process, the same state dict."""

from __future__ import annotations

from pathlib import Path

import nn_workers
import pytest
import torch
import torch.multiprocessing as mp


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path) -> None:
    alone = nn_workers.model()
    nn_workers.train(alone)
    expected = alone.state_dict()
    mp.spawn(nn_workers.distributed, args=(kind, str(tmp_path)), nprocs=2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert state.keys() == again.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(again[key], state[key])
        torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
    assert torch.equal(state["0.weight"], nn_workers.model()[0].weight)
    assert not torch.equal(state["0.bias"], nn_workers.model()[0].bias)
