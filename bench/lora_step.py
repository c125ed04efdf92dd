"""What a LoRA layer costs on top of the frozen layer it stands on: forward, and forward and backward, as users call it.

    python bench/lora_step.py                      # bf16, 4096 x 4096, r = 16
    python bench/lora_step.py --size 1024 --rank 8 --rows 64 256 --dtype fp32

In turns, in one run, with the weights of several layers so that they come from memory: the frozen ``nn.Linear`` alone;
``LoRALinear`` on it; the composition in plain torch (a linear layer, dropout, two more, a sum); peft's layer where peft
is installed. Backward gives the gradients of the input and of the adapter. Each figure is a median over the frozen
layer's of the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from burnish.bench.timing import Contestant, interleave, quartiles
from burnish.nn import LoRALinear
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS, ALPHA = 4, 32


class Composition(torch.nn.Module):
    """A LoRA layer of torch's parts, sharing the tensors of ``layer``."""

    def __init__(self, layer: LoRALinear) -> None:
        super().__init__()
        self.base, self.lora_A, self.lora_B, self.scaling = layer.base_layer, layer.lora_A, layer.lora_B, layer.scaling
        self.dropout = torch.nn.Dropout(layer.lora_dropout) if layer.lora_dropout else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = torch.nn.functional.linear(self.dropout(x), self.lora_A)
        return self.base(x) + torch.nn.functional.linear(s, self.lora_B) * self.scaling


def of_peft(layer: LoRALinear) -> torch.nn.Module | None:
    """peft's layer, sharing the tensors of ``layer``; None where peft is not installed."""
    try:
        from peft.tuners.lora import Linear, LoraConfig
    except ImportError:
        return None
    config = LoraConfig(r=layer.r, lora_alpha=ALPHA, lora_dropout=layer.lora_dropout)
    made = Linear(layer.base_layer, "default", config, r=layer.r, lora_alpha=ALPHA)
    made.lora_A["default"].weight, made.lora_B["default"].weight = layer.lora_A, layer.lora_B
    return made.train()


def forward(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    return lambda: module(x)


def step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], object]:
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]

    def run() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(module(x), wanted, dy)

    return run


def contest(
    call: Callable[..., Callable[[], object]], rows: int, dropout: float, size: int, rank: int, dtype: torch.dtype
) -> list[Contestant]:
    calls: dict[str, list[Callable[[], object]]] = {}
    for _ in range(LAYERS):
        base = torch.nn.Linear(size, size, bias=False, dtype=dtype)
        layer = LoRALinear(base, rank, ALPHA, dropout)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
        x = torch.randn(rows, size).to(dtype).requires_grad_()
        dy = torch.randn(rows, size).to(dtype)
        modules = {"frozen": base, "burnish": layer, "composition": Composition(layer), "peft": of_peft(layer)}
        for name, module in modules.items():
            if module is not None:
                calls.setdefault(name, []).append(call(module.train(), x, dy))
    return [Contestant(name, made) for name, made in calls.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=21)
    given = parser.parse_args()
    torch.manual_seed(0)
    runs = [(name, rows, p) for name in ("forward", "step") for rows in given.rows for p in given.dropout]
    title = f"{given.size} x {given.size}, r = {given.rank}, {given.dtype}, {torch.get_num_threads()} threads"
    table = Table("", "rows", "dropout", "frozen us", "burnish", "composition", "peft", title=title)
    with Progress(transient=True) as progress:
        task = progress.add_task("layers", total=len(runs) * given.rounds)
        for name, rows, p in runs:
            call = {"forward": forward, "step": step}[name]
            entrants = contest(call, rows, p, given.size, given.rank, DTYPES[given.dtype])
            interleave(entrants, {}, device="cpu", rounds=given.rounds, min_ms=2.0, tick=lambda: progress.advance(task))
            middle = {one.name: quartiles(one.seconds)[1] for one in entrants}
            others = [
                f"{100 * middle[other] / middle['frozen'] - 100:+.1f} %" if other in middle else "not installed"
                for other in ("burnish", "composition", "peft")
            ]
            table.add_row(name, str(rows), f"{p:g}", f"{1e6 * middle['frozen']:.0f}", *others)
    Console().print(table)


if __name__ == "__main__":
    main()
