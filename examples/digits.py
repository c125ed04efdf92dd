"""Prune small networks while they train on real digits, finalize them, and put int8 on top: what is gained and lost?

    python examples/digits.py
    python examples/digits.py --pattern unstructured --models mlp
    python examples/digits.py --precision fp32
    python examples/digits.py --quick

The data: scikit-learn's 1797 scanned digits, 8 x 8 pixels (nothing is downloaded), a fifth of them to test with. The
networks: an MLP (64 - 1024 - 1024 - 10) and a CNN (two convolutions 3 x 3 x 32, pooling, dense 512 - 512 - 10). The
stages, for each of several seeds:

==========  =========================================================================================================
dense       trained by burnish's AdamW, products in bf16 (or in ``--precision``)
N %         the dense network, pruned gradually to N % zeros by magnitude in blocks of 4 x 16 (or by ``--pattern``)
            over the first half of as many epochs again, retrained over the second; the last layer stays dense
            (2:4, which has one sparsity, goes at once)
finalized   ``burnish.prune.finalize_``: masked layers become sparse ones where those are faster, as measured here
int8        the same with int8 values, and the layers that stayed dense by ``burnish.Int8``
==========  =========================================================================================================

Accuracy is of the test digits, the mean over the seeds. Latency is of the first seed's networks, all stages in turns.
Needs ``pip install burnish[demo]``. Results: a table here; ``digits.json`` and ``digits.png`` in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import burnish
import digits_report
import torch
import torch.nn.functional as F
from burnish import prune
from burnish.bench import machine
from burnish.optim import AdamW
from precision import PRECISIONS, Mixed, check
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SPARSITIES = (0.5, 0.8, 0.9)
BATCH, RATE = 64, 2e-3
BATCHES = (1, 256)  # digits at once, when latency is measured
PATTERNS: dict[str, prune.Pattern] = {
    "block": prune.Block((4, 16)),
    "unstructured": prune.Unstructured(),
    "2:4": prune.TwoFour(),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Sequential]
    pruned: str  # which layers, by fqn
    epochs: int


NETWORKS = {"mlp": Network(mlp, "re:1|3", 20), "cnn": Network(cnn, "re:2|6", 12)}


@dataclass
class Stage:
    """A network at one point of its way; ``accuracies`` are one a seed, the rest is of the first."""

    name: str
    sparsity: float
    accuracies: list[float] = field(default_factory=list)
    bytes: int = 0
    report: str = ""
    model: nn.Module | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)


class Digits:
    """The images ``[N, 1, 8, 8]`` in fp32, 0 to 1, and their labels."""

    def __init__(self) -> None:
        found = load_digits()
        split = train_test_split(found.images, found.target, test_size=0.2, random_state=0, stratify=found.target)
        images, labels = [torch.tensor(part) for part in split[:2]], [torch.tensor(part) for part in split[2:]]
        self.train, self.test = [image.float().unsqueeze(1) / 16 for image in images]
        self.train_labels, self.test_labels = labels

    def epoch(self, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """One epoch's batches."""
        order = torch.randperm(len(self.train), generator=generator).split(BATCH)
        return [(self.train[chosen], self.train_labels[chosen]) for chosen in order]

    @torch.inference_mode()
    def accuracy(self, model: nn.Module) -> float:
        return (model.eval()(self.test).argmax(1) == self.test_labels).double().mean().item()


def train(model: nn.Module, data: Digits, epochs: int, seed: int, mixed: Mixed,
          after_step: Callable[[], Any] = lambda: None) -> None:  # fmt: skip
    """AdamW along a cosine from ``RATE`` to 0; ``after_step`` is called after each step."""
    generator = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in data.epoch(generator)]
    optimizer = AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    model.train()
    for images, labels in batches:
        with mixed.autocast():
            loss = F.cross_entropy(model(images), labels)
        mixed.step(loss, optimizer)
        schedule.step()
        after_step()


def pruned(dense: nn.Module, network: Network, sparsity: float, pattern: prune.Pattern, data: Digits, epochs: int,
           seed: int, mixed: Mixed) -> nn.Module:  # fmt: skip
    """The dense network with masks, pruned and retrained."""
    model = copy.deepcopy(dense)
    steps = epochs * -(-len(data.train) // BATCH)
    frequency = max(1, steps // 20)
    gradual = prune.Gradual(0, max(1, steps // 2 // frequency) * frequency, frequency)
    schedule = prune.OneShot() if pattern.fixed else gradual
    goal = {network.pruned: sparsity}
    pruner = prune.Pruner(model, prune.Magnitude(), pattern, goal, schedule=schedule)
    train(model, data, epochs, seed, mixed, pruner.step)
    return model


class Run:
    """The stages of every network; each leaves its results here."""

    def __init__(self, options: argparse.Namespace, data: Digits, progress: Progress) -> None:
        self.options, self.data, self.progress = options, data, progress
        self.pattern, self.mixed = PATTERNS[options.pattern], Mixed(options.precision)
        self.stages: dict[str, list[Stage]] = {}

    def train_all(self) -> None:
        sparsities = (0.5,) if self.options.pattern == "2:4" else SPARSITIES
        for name in self.options.models:
            names = [("dense", 0.0)]
            for sparsity in sparsities:
                names += [(label, sparsity) for label in ("pruned", "finalized", "int8")]
            self.stages[name] = [Stage(label, sparsity) for label, sparsity in names]
            work = self.options.seeds * (1 + len(sparsities))
            task = self.progress.add_task(f"{name}: train, prune, retrain", total=work)
            for seed in range(self.options.seeds):
                self._seed(name, seed, lambda task=task: self.progress.advance(task))

    def _seed(self, name: str, seed: int, tick: Callable[[], None]) -> None:
        network, stages = NETWORKS[name], self.stages[name]
        epochs = 2 if self.options.quick else network.epochs
        torch.manual_seed(seed)
        dense = network.build()
        train(dense, self.data, epochs, seed, self.mixed)
        self._keep(stages[0], dense, seed)
        tick()
        for first in range(1, len(stages), 3):
            masked = pruned(
                dense, network, stages[first].sparsity, self.pattern, self.data, epochs, seed + 1000, self.mixed
            )
            self._keep(stages[first], prune.remove_(copy.deepcopy(masked)), seed)
            self._finalize(stages[first + 1], masked, seed, "float")
            self._finalize(stages[first + 2], masked, seed, "int8")
            tick()

    def _finalize(self, stage: Stage, masked: nn.Module, seed: int, values: str) -> None:
        model = copy.deepcopy(masked).eval()
        batch = self.data.test[: max(BATCHES)]
        report = prune.finalize_(model, values=values, measure=batch)
        stage.report = str(report)
        report.release()
        if values == "int8":
            dense = burnish.swap_(model, burnish.Int8(), measure=batch)
            stage.report += f"\n{dense}"
            dense.release()
        self._keep(stage, model, seed)

    def _keep(self, stage: Stage, model: nn.Module, seed: int) -> None:
        stage.accuracies.append(self.data.accuracy(model))
        if seed == 0:
            stage.model = model.eval()
            tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
            stage.bytes = sum(tensor.nbytes for tensor in tensors.values())

    @torch.inference_mode()
    def time_all(self) -> None:
        """All stages of a network in turns, in an order that is drawn anew each round."""
        rounds = 20 if self.options.quick else 200
        for name, stages in self.stages.items():
            task = self.progress.add_task(f"{name}: latency", total=rounds * len(BATCHES))
            for size in BATCHES:
                batch = self.data.train[:size]
                for number in range(rounds + 3):
                    for stage in random.Random(number).sample(stages, len(stages)):
                        assert stage.model is not None
                        stage.model(batch)
                        start = time.perf_counter()
                        stage.model(batch)
                        if number >= 3:
                            stage.seconds.setdefault(size, []).append(time.perf_counter() - start)
                    if number >= 3:
                        self.progress.advance(task)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "model": name,
                "stage": stage.name,
                "sparsity": stage.sparsity,
                "accuracy": [round(value, 4) for value in stage.accuracies],
                "bytes": stage.bytes,
                "median_us": {str(n): round(1e6 * statistics.median(stage.seconds[n]), 2) for n in BATCHES},
                "report": stage.report,
            }
            for name, stages in self.stages.items()
            for stage in stages
        ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", choices=PATTERNS, default="block", help="what is pruned together")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which networks")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of products in training")
    parser.add_argument("--seeds", type=int, help="networks of each kind (default: 3)")
    parser.add_argument("--reports", action="store_true", help="also print what became of each layer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, few epochs")
    options = parser.parse_args(arguments)
    check(parser, options.precision)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.seeds < 1:
        parser.error("at least one of --seeds")
    return options


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else digits_report.WIDE)
    columns = (TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    # no refreshing thread beside what is timed
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as progress:
        run = Run(options, Digits(), progress)
        run.train_all()
        run.time_all()
    result = {
        "machine": machine.describe("cpu", " ".join(["python", *sys.argv])),
        "settings": {name: getattr(options, name) for name in ("pattern", "precision", "seeds", "quick")},
        "test_digits": len(run.data.test),
        "rows": run.rows(),
    }
    (options.out / "digits.json").write_text(json.dumps(result, indent=1) + "\n")
    digits_report.show(result, console, reports=options.reports)
    digits_report.chart(result, options.out / "digits.png")
    console.print(f"wrote {options.out / 'digits.json'} and {options.out / 'digits.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
