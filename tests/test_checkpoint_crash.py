"""kill -9 during save, many writers, many readers: the folder always loads as something that was committed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import burnish
import nn_workers
import pytest
import torch
from torch import nn

KILLS = 25


def number_of(model: nn.Module) -> int:
    """The number a model was saved with, after checking that every tensor tells the same."""
    numbers = {int(value) for tensor in model.state_dict().values() for value in (tensor.min(), tensor.max())}
    assert len(numbers) == 1, f"tensors of several commits: {numbers}"
    return numbers.pop() - 1


class Server:
    """A process that forks workers; see ``nn_workers.serve``."""

    def __init__(self) -> None:
        command = [sys.executable, nn_workers.__file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *call: object) -> int:
        """Start a worker and give its id; without arguments, wait for one to end and give its exit status."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write((json.dumps([call[0], call[1:]]) if call else "") + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())[0]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def test_kill_9_at_any_moment_keeps_the_last_commit(tmp_path: Path, server: Server) -> None:
    draw = random.Random(0)
    folder, note = tmp_path / "model", tmp_path / "committed"
    burnish.save(nn_workers.numbered(0), folder)
    target = nn_workers.numbered(0)
    committed, interrupted = 0, 0
    for _ in range(KILLS):
        writer = server.ask("save_forever", str(tmp_path), committed + 1)
        deadline = time.monotonic() + 60
        while not (note.exists() and int(note.read_text()) > committed) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        os.kill(writer, signal.SIGKILL)
        assert server.ask() == -signal.SIGKILL
        told = int(note.read_text())
        assert told > committed
        assert number_of(burnish.load(target, folder)) in (told % 100, (told + 1) % 100)
        interrupted += any(path.name.startswith(".burnish-") for path in folder.iterdir())
        committed = told
    assert interrupted >= 3, f"only {interrupted} of {KILLS} kills hit a save in the middle"
    burnish.save(nn_workers.numbered(7), folder)
    assert len(list(folder.iterdir())) == 2


def test_writers_and_readers_take_turns(tmp_path: Path, server: Server) -> None:
    burnish.save(nn_workers.numbered(0), tmp_path)
    writers = [server.ask("save_many", str(tmp_path), number, 15) for number in (1, 2, 3)]
    seen = set()
    target = nn_workers.numbered(0)
    while not {1, 2, 3} & seen:
        seen.add(number_of(burnish.load(target, tmp_path)))
    for _ in range(30):
        seen.add(number_of(burnish.load(target, tmp_path)))
    assert [server.ask() for _ in writers] == [0, 0, 0]
    assert seen <= {0, 1, 2, 3}
    assert number_of(burnish.load(target, tmp_path)) in (1, 2, 3)
    assert len(list(tmp_path.iterdir())) == 2
    assert target(torch.ones(1, 256)).isfinite().all()
