"""50 + 50 = 100 steps, bit for bit and dtype for dtype: in one process, under DDP and FSDP2, from 2 processes to 1 and
back."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import optim_killed as killed
import optim_workers as workers
import pair
import pytest
import torch
from optimizers import OPTIMIZERS

VARIED = [variant for variant in workers.VARIANTS if variant != "plain"]
PLAIN = [(dtype, name, "plain") for dtype in workers.DTYPES for name in OPTIMIZERS]
CASES = PLAIN + [(dtype, name, variant) for dtype in workers.DTYPES for name in OPTIMIZERS for variant in VARIED]
#: a case takes two processes seconds
SHARED = PLAIN + [("bf16", "AdamW", variant) for variant in VARIED]


@pytest.mark.parametrize(("dtype", "name", "variant"), CASES, ids=map("-".join, CASES))
def test_one_process_resumes(dtype: str, name: str, variant: str) -> None:
    kind, half = workers.DTYPES[dtype], workers.HALF
    straight, scaler = workers.model(kind), workers.scaler_for(kind)
    optimizer = workers.make(straight, name, variant)
    skipped = workers.train(straight, optimizer, scaler, range(2 * half))
    assert 0 < skipped < half or kind is not torch.float16
    first, scaler = workers.model(kind), workers.scaler_for(kind)
    saved = workers.make(first, name, variant)
    workers.train(first, saved, scaler, range(half))
    states = copy.deepcopy((first.state_dict(), saved.state_dict(), scaler.state_dict()))
    second, scaler = workers.model(kind), workers.scaler_for(kind)
    again = workers.make(second, name, variant)
    for part, state in zip((second, again, scaler), states, strict=True):
        part.load_state_dict(state)
    assert not workers.differences(workers.whole(second, again), workers.whole(first, saved))
    workers.train(second, again, scaler, range(half, 2 * half))
    assert not workers.differences(workers.whole(second, again), workers.whole(straight, optimizer))
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_resume(kind: str, tmp_path: Path) -> None:
    pair.run(workers.distributed, kind, SHARED, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == {case: [] for case in SHARED}


def test_two_processes_become_one_and_one_becomes_two(tmp_path: Path) -> None:
    cases = [(dtype, "AdamW", variant) for dtype in workers.DTYPES for variant in workers.RESHARDED]
    cases += [(dtype, name, "plain") for dtype in workers.DTYPES for name in OPTIMIZERS if name != "AdamW"]
    paths = {case: str(tmp_path / "-".join(case)) for case in cases}
    for (dtype, name, variant), path in paths.items():
        workers.push_half(workers.model(workers.DTYPES[dtype]), name, variant, f"{path}-1")
    pair.run(workers.resharded, cases, str(tmp_path))
    for (dtype, name, variant), path in paths.items():
        straight, scaler = workers.model(workers.DTYPES[dtype]), workers.steady_scaler(workers.DTYPES[dtype])
        optimizer = workers.make(straight, name, variant)
        workers.push(straight, optimizer, scaler, range(2 * workers.HALF))
        assert {float(state["step"]) for state in optimizer.state.values()} == {90.0 if scaler.is_enabled() else 100.0}
        expected = workers.whole(straight, optimizer)
        assert not workers.differences(torch.load(f"{path}.pt"), expected)
        again = workers.push_rest(workers.model(workers.DTYPES[dtype]), name, variant, f"{path}-2")
        assert not workers.differences(workers.whole(*again), expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(kind: str, tmp_path: Path) -> None:
    pair.run(workers.parity, kind, str(tmp_path))
    net = workers.model()
    optimizer = workers.make(net, variant="clipped")
    workers.train(net, optimizer, workers.scaler_for(torch.float32), range(10))
    expected = workers.whole(net, optimizer)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == expected.keys()
    assert not workers.differences(*ranks)
    for key, value in expected.items():
        torch.testing.assert_close(ranks[0][key], value, rtol=0, atol=1e-6)


def test_shards_have_masks_averages_and_one_found_infinity(tmp_path: Path) -> None:
    pair.run(workers.masked, str(tmp_path))
    net = workers.model()
    averages, found = workers.mask_and_average(net)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert not workers.differences(ranks[0][0], averages)
    assert ranks[0][1] == ranks[1][1] == found == [False, True, False]
    refused = "AdamW: state of parameter 0 of group 0: exp_avg is a Tensor, expected a DTensor, as the parameter is"
    assert ranks[0][2] == ranks[1][2] == refused


def test_a_rank_killed_under_torchrun_resumes_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    """Killed between gradients and step, and then while the checkpoint after step 80 is being written."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    done = subprocess.run(
        [sys.executable, *command, killed.__file__, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lives = [(tmp_path / f"life-{life}").read_text().split() for life in range(3)]
    assert [int(life[0]) for life in lives] == [0, 50, 70]
    assert str(killed.KILLED_SAVE) in lives[2][1:]
    assert killed.complete(tmp_path) == list(range(killed.EVERY, killed.STEPS + 1, killed.EVERY))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [[], []]
