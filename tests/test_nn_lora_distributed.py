"""LoRALinear under DDP and FSDP2, two gloo processes: adapted before or after sharding, the same training as in one."""

from __future__ import annotations

from pathlib import Path

import burnish
import lora_workers
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    (folder / "other1").mkdir()
    mp.spawn(lora_workers.distributed, args=(str(folder),), nprocs=2)
    return folder


def alone(accumulate: int) -> nn.Module:
    net = lora_workers.model()
    lora_workers.adapt(net)
    lora_workers.train(net, accumulate)
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", lora_workers.WAYS)
def test_two_processes_train_what_one_trains(way: str, accumulate: int, folder: Path) -> None:
    results = torch.load(folder / "results.pt", weights_only=True)[way, accumulate]
    expected = lora_workers.whole(alone(accumulate))
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, rtol=0, atol=1e-6)
    start = lora_workers.model()
    lora_workers.adapt(start)
    first = lora_workers.whole(start)
    assert all(torch.equal(results[k], first[k]) != ("lora_" in k) for k in first)


def test_whole_adapters_are_the_same_bits_everywhere_and_are_saved(folder: Path) -> None:
    one, other = (torch.load(folder / f"adapters{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(one) == 14
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    net = lora_workers.model()
    burnish.load_adapter(net, folder / "whole")
    assert all(torch.equal(a, b) for a, b in zip(burnish.adapter_state_dict(net).values(), one, strict=True))


def test_sharded_weights_are_refused_in_words(folder: Path) -> None:
    messages = torch.load(folder / "refused.pt", weights_only=True)
    for name, match in (
        ("merge", "RuntimeError: LoRALinear.merge: the weights are sharded, expected whole ones"),
        ("to_float", "RuntimeError: LoRALinear.to_float: the weights are sharded, expected whole ones"),
        ("pissa", "SwapError: swap_: layer '0': LoRALinear: init_lora_weights is 'pissa' and base_layer is sharded"),
        ("base alone", "RuntimeError: LoRALinear: the weight of base_layer is still sharded, expected it whole"),
        ("save", "CheckpointError: save_adapter: lora_A of '0' is a DTensor, expected a plain tensor: gather shards"),
    ):
        assert messages[name].startswith(match), messages[name]
