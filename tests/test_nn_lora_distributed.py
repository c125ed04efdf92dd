"""LoRALinear under DDP and FSDP2, two gloo processes: adapted before or after sharding, the same training as in one."""

from __future__ import annotations

from pathlib import Path

import burnish
import lora_workers
import pair
import torch

REFUSED = {
    "merge": "RuntimeError: LoRALinear.merge: the weights are sharded, expected whole ones",
    "to_float": "RuntimeError: LoRALinear.to_float: the weights are sharded, expected whole ones",
    "pissa": "SwapError: swap_: layer '0': LoRALinear: init_lora_weights is 'pissa' and base_layer is sharded",
    "base alone": "RuntimeError: LoRALinear: the weight of base_layer is still sharded, expected it whole",
    "save": "CheckpointError: save_adapter: lora_A of '0' is a DTensor, expected a plain tensor: gather shards",
}


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    alone = lora_workers.model()
    lora_workers.adapt(alone)
    start = lora_workers.whole(alone)
    lora_workers.train(alone)
    expected = lora_workers.whole(alone)
    assert all(torch.equal(value, start[key]) != ("lora_" in key) for key, value in expected.items())
    (tmp_path / "other1").mkdir()
    pair.run(lora_workers.distributed, str(tmp_path))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert list(results) == list(lora_workers.WAYS)
    for way, found in results.items():
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-6, (way, key)

    # what each process holds whole is the same bits, and can be saved
    one, other = (torch.load(tmp_path / f"adapters{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(one) == 14
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    net = lora_workers.model()
    burnish.load_adapter(net, tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(burnish.adapter_state_dict(net).values(), one, strict=True))

    messages = torch.load(tmp_path / "refused.pt", weights_only=True)
    for name, match in REFUSED.items():
        assert messages[name].startswith(match), messages[name]
