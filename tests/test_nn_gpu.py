"""The layers on a GPU: made there or moved there, they give what they give on the CPU, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import burnish
import pytest
import torch
from burnish import Int8, LoRA, LowRank
from burnish.nn import Int8Linear, LoRALinear, LowRankConv2d, LowRankLinear
from sparse_models import KINDS, conv, pruned
from swap_models import IDS, Model
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(70, 37)


def adapted(layer: nn.Module) -> nn.Module:
    """A LoRA layer starts as its base: B is zero until it is trained."""
    if isinstance(layer, LoRALinear):
        nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    return layer


MAKERS: dict[str, Callable[[], tuple[type, object, nn.Module]]] = {
    "int8": lambda: (Int8Linear, Int8(), linear()),
    "lowrank": lambda: (LowRankLinear, LowRank(rank=8), linear()),
    "lora": lambda: (LoRALinear, LoRA(r=4), linear()),
    "lora on int8": lambda: (LoRALinear, LoRA(r=4), Int8Linear.from_float(linear())),
    "lowrank conv": lambda: (LowRankConv2d, LowRank(rank=8), pruned(KINDS["conv"][1], conv)),
} | {
    name: lambda cls=cls, config=config: (cls, config, pruned(config, conv if "Conv" in cls.__name__ else linear))
    for name, (cls, config) in KINDS.items()
}


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    (layer(x).float() * torch.linspace(-1, 1, 37, device=x.device).view(-1, *[1] * (x.dim() - 2))).sum().backward()
    # copies: what moves a layer moves its gradients
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}


def assert_near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Both have rounded: within a few ulp of the largest value."""
    limit = 8 * torch.finfo(dtype).eps * float(wanted.detach().abs().max().clamp_min(1e-30))
    assert got.dtype == wanted.dtype
    assert float((got.detach().cpu().float() - wanted.detach().float()).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_a_layer_gives_the_same_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    cls, config, module = MAKERS[name]()
    layer = adapted(cls.from_float(module, config)).to(dtype)
    x = torch.randn((4, 8, 9, 9) if "conv" in name else (5, 70)).to(dtype)
    expected, slopes = layer(x), gradients(layer, x)
    layer = layer.to("cuda")
    assert_near(layer(x.cuda()), expected, dtype)
    on_gpu = gradients(layer, x.cuda())
    assert on_gpu.keys() == slopes.keys()
    for key, slope in slopes.items():
        assert_near(on_gpu[key], slope, dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_a_layer_made_on_a_gpu_is_the_one_made_before_and_moved(name: str) -> None:
    cls, config, module = MAKERS[name]()
    moved = cls.from_float(module, config).to("cuda")
    made = cls.from_float(module.to("cuda"), config)
    x = torch.randn((4, 8, 9, 9) if "conv" in name else (5, 70), device="cuda")
    assert all(value.is_cuda for value in made.state_dict().values())
    assert_near(made(x), moved(x).cpu(), torch.float32)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [Int8(), LowRank(rank=4), LoRA(r=4)], ids=lambda config: type(config).__name__)
def test_a_model_on_a_gpu_is_swapped_saved_and_loaded(config: object, autocast: torch.dtype | None, tmp_path) -> None:
    model = Model().cuda().eval()
    dense = model(IDS.cuda())
    burnish.swap_(model, config)
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(IDS.cuda())
    assert out.is_cuda
    if not isinstance(config, LowRank):
        assert float((out.float() - dense).norm() / dense.norm()) < 0.05
    burnish.save(model, tmp_path / "saved")
    again = burnish.load(Model().cuda().eval(), tmp_path / "saved")
    with torch.no_grad(), torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        assert torch.equal(again(IDS.cuda()), out)
