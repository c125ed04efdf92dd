"""LowRankConv2d: at full rank each scheme is the dense convolution, however it walks; below, it is close to it."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from burnish import LowRank, schemes
from burnish.nn import LowRankConv2d
from torch import nn

SCHEMES = schemes.SCHEMES
WALKS = {
    "plain": {},
    "valid": {"padding": "valid"},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "grouped": {"groups": 2, "padding": 1, "stride": 2},
    "depthwise": {"groups": 8, "padding": 1},
    "same": {"padding": "same", "dilation": (2, 1)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 3},
    "circular": {"padding": "same", "padding_mode": "circular", "groups": 4},
    "no bias": {"bias": False, "padding": 1},
}
KERNELS = [(3, 3), (1, 1), (2, 5)]
ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode",
)  # fmt: skip


def pair(scheme: str, walk: str = "plain", kernel: tuple = (3, 3), rank: int | None = None, dtype=torch.float32):
    torch.manual_seed(len(walk))
    conv = nn.Conv2d(8, 16, kernel, dtype=dtype, **WALKS[walk])
    rank = rank or schemes.limit(scheme, conv.weight.shape, conv.groups)
    return conv, LowRankConv2d.from_float(conv, LowRank(rank=rank, conv=scheme))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_the_dense_convolution(scheme: str, walk: str, kernel: tuple) -> None:
    conv, layer = pair(scheme, walk, kernel)
    for name in ATTRIBUTES:
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.bias is conv.bias
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 11, 9).to(memory_format=memory_format)
        y, expected = layer(x), conv(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()
    if walk != "circular":  # which nn.Conv2d itself cannot do without a batch
        torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=1e-5, atol=1e-5)
    dense = layer.to_float()
    torch.testing.assert_close(dense.weight, conv.weight, rtol=0, atol=1e-6)
    assert repr(dense) == repr(conv)
    torch.testing.assert_close(dense(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_below_full_rank_it_is_the_convolution_with_its_dense_weight(scheme: str) -> None:
    for rank in (1, 3):
        conv, layer = pair(scheme, "grouped", rank=rank)
        x = torch.randn(2, 8, 11, 9)
        torch.testing.assert_close(layer(x), layer.to_float()(x), rtol=1e-4, atol=1e-5)
        assert (layer.to_float().weight - conv.weight).norm() < conv.weight.norm()
        assert sum(p.numel() for p in layer.parameters()) < sum(p.numel() for p in conv.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_fall_with_the_rank_and_are_those_of_the_weight(scheme: str) -> None:
    conv = nn.Conv2d(8, 16, (3, 2), groups=2)
    terms = schemes.decompose(scheme, conv.weight, 2, who="test")
    missed = []
    for rank in range(1, terms.limit + 1):
        layer = LowRankConv2d.from_float(conv, LowRank(rank=rank, conv=scheme))
        missed.append(float((layer.to_float().weight - conv.weight).detach().norm() / conv.weight.detach().norm()))
        assert math.isclose(missed[-1], terms.error(rank), abs_tol=1e-5)
    assert missed == sorted(missed, reverse=True)
    assert missed[-1] < 1e-6


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_stages_in_float64(scheme: str, kernel: tuple) -> None:
    _, layer = pair(scheme, "strided" if kernel == (3, 3) else "plain", kernel, rank=3)
    x = torch.randn(2, 8, 7, 6).to(memory_format=torch.channels_last)
    layer(given := x.clone().requires_grad_()).square().sum().backward()
    exact = copy.deepcopy(layer).double()
    dense = schemes.compose(scheme, 1, exact.A, exact.core, exact.B)
    wide = x.double().requires_grad_()
    y = nn.functional.conv2d(wide, dense, exact.bias, layer.stride, layer.padding, layer.dilation)
    exact.zero_grad()
    y.square().sum().backward()
    torch.testing.assert_close(given.grad, wide.grad.float(), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=1e-4, atol=1e-4)


def test_pointwise_of_channels_last_images_is_one_fused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = schemes.lowrank_linear
    monkeypatch.setattr(schemes, "lowrank_linear", lambda *args: calls.append(args[0].shape) or fused(*args))
    for scheme, kernel, memory_format in itertools.product(
        SCHEMES, KERNELS, (torch.contiguous_format, torch.channels_last)
    ):
        calls.clear()
        pair(scheme, "plain", kernel, rank=2)[1](torch.randn(2, 8, 6, 5).to(memory_format=memory_format))
        expected = scheme != "tucker2" and kernel == (1, 1) and memory_format == torch.channels_last
        assert calls == ([(2, 6, 5, 8)] if expected else [])


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 8, 1, 1), (0, 8, 3, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_images_that_lie_in_both_formats(scheme: str, shape: tuple) -> None:
    conv = nn.Conv2d(shape[1], 4, 1)
    layer = LowRankConv2d.from_float(conv, LowRank(rank=min(4, shape[1]), conv=scheme))
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-6)
    assert layer(x).is_contiguous()
    assert layer(x).stride() == conv(x).stride()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_gives_the_dtype_that_conv2d_gives(scheme: str, kernel: tuple) -> None:
    conv, layer = pair(scheme, kernel=kernel)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_state_and_meta(scheme: str, dtype: torch.dtype) -> None:
    conv, layer = pair(scheme, "grouped", rank=2, dtype=dtype)
    x = torch.randn(2, 8, 6, 5, dtype=dtype)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert layer.dtype == dtype
    state = layer.state_dict()
    assert list(state) == (["core"] if scheme == "tucker2" else []) + ["A", "B", "bias"]
    empty = LowRankConv2d(8, 16, 3, 2, 1, 1, 2, True, "zeros", "meta", dtype, rank=2, scheme=scheme)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {k: v.shape for k, v in state.items()}
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))
    blank = LowRankConv2d.from_float(conv.to("meta"), LowRank(rank=2, conv=scheme))
    assert [p.shape for p in blank.parameters()] == [p.shape for p in layer.parameters()]
    assert f"rank=2, scheme={scheme}, {layer.nbytes} bytes" in repr(layer)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_new_layer_has_the_variance_of_conv2d(scheme: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, groups=2)
    layer = LowRankConv2d(64, 64, 3, groups=2, rank=16, scheme=scheme)
    assert abs(layer.to_float().weight.std() / conv.weight.std() - 1) < 0.1
    assert layer.bias.abs().max() <= conv.weight[0].numel() ** -0.5


def test_memory_format_of_the_weight_is_kept() -> None:
    conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    layer = LowRankConv2d.from_float(conv, LowRank(rank=4))
    assert layer.A.is_contiguous(memory_format=torch.channels_last)
    assert layer.to_float().weight.stride() == conv.weight.stride()
    x = torch.randn(2, 8, 6, 6)
    assert layer(x).stride() == conv(x).stride()


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (1, 4), (3, 1), (3, 8), ((1, 3), 8)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_memory_format_of_the_result_is_conv2ds(scheme: str, kernel: int | tuple, groups: int, mode: str) -> None:
    for weight_format, memory_format in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        conv = nn.Conv2d(8, 16, kernel, padding=1, groups=groups, padding_mode=mode).to(memory_format=weight_format)
        layer = LowRankConv2d.from_float(conv, LowRank(rank=1, conv=scheme))
        x = torch.randn(2, 8, 6, 5).to(memory_format=memory_format)
        assert layer(x).stride() == conv(x).stride()
        assert layer.to_float().weight.stride() == conv.weight.stride()


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_compiles_whole_and_exports(kernel: tuple) -> None:
    torch._dynamo.reset()
    _, layer = pair("channel", kernel=kernel, rank=3)
    x = torch.randn(3, 8, 7, 6).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = list(layer.parameters())
    mine, theirs = (torch.autograd.grad(net(x).square().sum(), wanted) for net in (compiled, layer))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_activation_whitens_patches() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    images = torch.randn(4, 8, 1, 1) * torch.linspace(0.01, 3, 8)[:, None, None] + 0.1 * torch.randn(4, 8, 9, 9)
    unfolded = nn.functional.unfold(images, 3, padding=1).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    moment = unfolded.mT @ unfolded / unfolded.shape[1]
    plain = LowRankConv2d.from_float(conv, LowRank(rank=2))
    aware = LowRankConv2d.from_float(conv, LowRank(rank=2, method="activation"), moment=moment)
    missed = [float((layer(images) - conv(images)).detach().norm()) for layer in (plain, aware)]
    assert missed[1] < 0.6 * missed[0]
    terms = schemes.decompose("channel", conv.weight, 2, moment, who="test")
    centred = conv(images) - conv.bias[:, None, None]
    assert math.isclose(missed[1] / float(centred.detach().norm()), terms.error(2), rel_tol=1e-3)
