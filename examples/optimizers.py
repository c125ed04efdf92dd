"""Train with optimizer state of a quarter of the bytes, and parameters of 16 bits: does the loss end where it did?

    python examples/optimizers.py
    python examples/optimizers.py --tasks digits --seeds 5
    python examples/optimizers.py --tasks encoder --seeds 1 --first-seed 2 --only torch int8 split
    python examples/optimizers.py --device cuda --precision fp16
    python examples/optimizers.py --quick

Two tasks: ``digits.py``'s CNN on scanned digits, trained whole, and the sentence encoder of ``finetune_lora.py``, of
which LoRA adapters and a head are trained. Both for 300 steps under autocast, by AdamW in these forms:

===========  ======================================================================================
torch        ``torch.optim.AdamW``, parameters and state in fp32: what the others are compared with
burnish      ``burnish.optim.AdamW``, the same
int8         the same with ``state_dtype="int8"``
split        parameters in 16 bits, ``master_weights="split"``: 8 bits below them, 24 in all
split-int8   both
random       parameters and state in bf16, ``stochastic_rounding=True``; no more bits anywhere
torch-bf16   ``torch.optim.AdamW``, parameters and state in bf16: what it costs not to have them
===========  ======================================================================================

With the same seed all start from the same values and see the same batches and dropout masks. A form ends within noise
where its mean over the seeds differs from torch's by no more than torch's own seeds do from each other (their standard
deviation): of the training loss, the mean of its last 30 steps, and of the loss of the test data.

Needs what ``finetune_lora.py`` needs; ``make optimizers`` sees to it. Results: a table here; ``optimizers.json`` and
``optimizers.png`` in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import digits
import finetune_lora
import optimizers_report
import torch
import torch.nn.functional as F
import transformers
from burnish import optim
from burnish.bench import machine
from precision import PRECISIONS, Mixed, check
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor]  # what the model takes, and labels


@dataclass(frozen=True)
class Variant:
    label: str
    optimizer: type[torch.optim.Optimizer] = optim.AdamW
    half: bool = False  # parameters of 16 bits
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "torch": Variant("torch fp32", torch.optim.AdamW),
    "burnish": Variant("burnish fp32"),
    "int8": Variant("int8 state", options={"state_dtype": "int8"}),
    "split": Variant("16 + 8 bits", half=True, options={"master_weights": "split"}),
    "split-int8": Variant("16 + 8 bits, int8 state", half=True,
                          options={"master_weights": "split", "state_dtype": "int8"}),
    "random": Variant("bf16, rounded at random", half=True,
                      options={"stochastic_rounding": True, "state_dtype": "bf16"}),
    "torch-bf16": Variant("torch bf16", torch.optim.AdamW, half=True),
}  # fmt: skip


class Task(Protocol):
    """A model and its data."""

    rate: float

    def model(self, seed: int) -> nn.Module: ...

    def batches(self, seed: int) -> list[Batch]: ...

    def tests(self) -> list[Batch]: ...


class Digits:
    """The CNN of ``digits.py``."""

    rate = digits.RATE

    def __init__(self, options: argparse.Namespace) -> None:
        self.steps, self.data = options.steps, digits.Digits()

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return digits.cnn()

    def batches(self, seed: int) -> list[Batch]:
        generator, found = torch.Generator().manual_seed(seed), []
        while len(found) < self.steps:
            found += [((images,), labels) for images, labels in self.data.epoch(generator)]
        return found[: self.steps]

    def tests(self) -> list[Batch]:
        return [((self.data.test,), self.data.test_labels)]


class Encoder:
    """The sentence encoder of ``finetune_lora.py`` with adapters on all linear layers, frozen in bf16 or fp16."""

    rate = 2e-3

    def __init__(self, options: argparse.Namespace) -> None:
        given = [
            "--steps",
            str(options.steps),
            "--batch",
            "8",
            "--tokens",
            "16",
            *(["--quick"] if options.quick else []),
        ]
        self.options = finetune_lora.parse(given)
        self.frozen = finetune_lora.Variant("", "burnish", PRECISIONS[options.precision])
        self.data = finetune_lora.Data(self.options)

    def model(self, seed: int) -> nn.Module:
        return finetune_lora.build(self.frozen, self.options, seed)

    def batches(self, seed: int) -> list[Batch]:
        return [((ids, mask), labels) for ids, mask, labels in self.data.batches(seed)]

    def tests(self) -> list[Batch]:
        return [((ids, mask), labels) for ids, mask, labels in self.data.tests()]


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {"digits": Digits, "encoder": Encoder}


def moved(batches: list[Batch], device: str) -> list[Batch]:
    return [(tuple(each.to(device) for each in inputs), labels.to(device)) for inputs, labels in batches]


def train(task: Task, variant: Variant, options: argparse.Namespace, seed: int, tick: Callable[[], None]) -> dict:
    """One run: its losses, the test loss and accuracy, and the bytes that a parameter takes with its state."""
    mixed = Mixed(options.precision, options.device)
    model = task.model(seed).to(options.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if variant.half:
        for parameter in trained:
            parameter.data = parameter.data.to(mixed.dtype)
    optimizer = variant.optimizer(trained, lr=task.rate, **variant.options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=options.steps)
    losses = []
    model.train()
    for number, (inputs, labels) in enumerate(moved(task.batches(seed), options.device)):
        torch.manual_seed(1000 * seed + number)
        with mixed.autocast():
            loss = F.cross_entropy(model(*inputs).float(), labels)
        mixed.step(loss, optimizer)
        schedule.step()
        losses.append(loss.item())
        tick()
    tensors = [*trained, *(value for state in optimizer.state.values() for value in state.values())]
    held = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    count = sum(parameter.numel() for parameter in trained)
    test_loss, accuracy = test(model, moved(task.tests(), options.device), mixed)
    return {
        "losses": [round(loss, 5) for loss in losses],
        "test_loss": round(test_loss, 5),
        "accuracy": round(accuracy, 4),
        "parameters": count,
        "bytes_each": round(held / count, 2),
    }


@torch.inference_mode()
def test(model: nn.Module, batches: list[Batch], mixed: Mixed) -> tuple[float, float]:
    """The mean loss and the share of right answers."""
    model.eval()
    loss = right = count = 0.0
    for inputs, labels in batches:
        with mixed.autocast():
            found = model(*inputs).float()
        loss += F.cross_entropy(found, labels, reduction="sum").item()
        right += (found.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, right / count


def run(options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """A row a task, seed and variant."""
    rows = []
    for name in options.tasks:
        task = TASKS[name](options)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            bar = progress.add_task(f"{name}, seed {seed}", total=options.steps * len(options.only))
            for variant in options.only:
                found = train(task, VARIANTS[variant], options, seed, lambda bar=bar: progress.advance(bar))
                rows.append({"task": name, "variant": variant, "label": VARIANTS[variant].label, "seed": seed} | found)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="forms of AdamW (default: all)")
    parser.add_argument("--steps", type=int, help="of each run (default: 300)")
    parser.add_argument("--seeds", type=int, help="runs of each form (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the seed of the first run; the others count on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="of products")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, few steps, three forms")
    options = parser.parse_args(arguments)
    check(parser, options.precision, options.device)
    quick = ["torch", "int8", "split"]
    options.only = [name for name in VARIANTS if name in (options.only or (quick if options.quick else VARIANTS))]
    if options.precision == "fp16":
        options.only = [name for name in options.only if name not in ("random", "torch-bf16")]
    options.steps = options.steps or (20 if options.quick else 300)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.steps < 8 or options.seeds < 1:
        parser.error("at least 8 --steps and 1 of --seeds")
    return options


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else optimizers_report.WIDE)
    columns = (TextColumn("{task.description:18}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        rows = run(options, progress)
    result = {
        "machine": machine.describe(options.device, " ".join(["python", *sys.argv])),
        "settings": {name: getattr(options, name) for name in ("steps", "precision", "device")},
        "rows": rows,
    }
    (options.out / "optimizers.json").write_text(json.dumps(result, indent=1) + "\n")
    optimizers_report.show(result, console)
    optimizers_report.chart(result, options.out / "optimizers.png")
    console.print(f"wrote {options.out / 'optimizers.json'} and {options.out / 'optimizers.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
