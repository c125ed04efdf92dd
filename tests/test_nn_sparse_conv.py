"""SparseConv2d is the dense convolution without the zeros of its weight, however it walks and images lie."""

from __future__ import annotations

import copy

import pytest
import torch
from burnish import BlockSparse, sparse_conv
from burnish.nn import SparseConv2d
from sparse_models import pruned
from torch import nn

WALKS = {
    "plain": {},
    "valid": {"padding": "valid"},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same", "dilation": (2, 1)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 3},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "no bias": {"bias": False, "padding": 1},
}
KERNELS = [(3, 3), (1, 1), (2, 5)]
ATTRIBUTES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode",
)  # fmt: skip
FORMATS = (torch.contiguous_format, torch.channels_last)


def both(walk: str = "plain", kernel: tuple = (3, 3), dtype: torch.dtype = torch.float32, **options) -> tuple:
    config = BlockSparse(16, **options)
    dense = pruned(config, lambda: nn.Conv2d(8, 36, kernel, **WALKS[walk])).to(dtype)
    return dense, SparseConv2d.from_float(dense, config)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("walk", WALKS)
def test_it_is_the_dense_convolution(walk: str, kernel: tuple) -> None:
    dense, layer = both(walk, kernel)
    for name in ATTRIBUTES:
        assert getattr(layer, name) == getattr(dense, name), name
    assert 0 < layer.density < 1
    for memory_format in FORMATS:
        x = torch.randn(2, 8, 11, 9).to(memory_format=memory_format)
        y, expected = layer(x), dense(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.stride() == expected.stride()
    if walk != "circular":  # which nn.Conv2d itself cannot do without a batch
        torch.testing.assert_close(layer(x[0]), dense(x[0]), rtol=1e-5, atol=1e-5)
        assert layer(x[0]).stride() == dense(x[0]).stride()
    assert repr(layer.to_float()) == repr(dense)
    assert torch.equal(layer.to_float().weight, dense.weight)


@pytest.mark.parametrize("walk", ["strided", "dilated", "reflect"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_gradients_are_those_of_the_convolution_in_float64(walk: str, kernel: tuple) -> None:
    dense, layer = both(walk, kernel)
    x = torch.randn(2, 8, 11, 9)
    layer(given := x.clone().requires_grad_()).square().sum().backward()
    exact = copy.deepcopy(dense).double()
    exact(wide := x.double().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(given.grad, wide.grad.float(), rtol=1e-4, atol=1e-4)
    spread = copy.deepcopy(layer)
    with torch.no_grad():
        spread.values.copy_(layer.values.grad)
    kept = (dense.weight != 0).float()
    torch.testing.assert_close(spread.to_dense(), exact.weight.grad.float() * kept, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, exact.bias.grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("values", ["float", "int8"])
def test_images_are_taken_a_few_at_a_time(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layer = both("strided", values=values)
    x = torch.randn(5, 8, 11, 9)
    whole = layer(x)
    calls = []
    op = sparse_conv.bsr_linear
    monkeypatch.setattr(sparse_conv, "bsr_linear", lambda *args: calls.append(args[0].shape) or op(*args))
    monkeypatch.setattr(sparse_conv, "_CHUNK", 2 * 6 * 11 * 72)
    assert torch.equal(layer(x), whole)
    assert calls == [(2, 6, 11, 72), (2, 6, 11, 72), (1, 6, 11, 72)]
    monkeypatch.setattr(sparse_conv, "_CHUNK", 1)
    assert torch.equal(layer(x), whole)
    assert layer(x[:0]).shape == (0, *whole.shape[1:])


def test_pixels_are_rows_where_the_kernel_is_one() -> None:
    dense, layer = both("plain", (1, 1))
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    geometry = layer.geometry
    rows = sparse_conv._patches(x.permute(0, 2, 3, 1), (1, 1), geometry, (6, 5))
    assert rows.data_ptr() == x.data_ptr()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_compiles_whole_and_exports(kernel: tuple) -> None:
    torch._dynamo.reset()
    _, layer = both("strided", kernel)
    x = torch.randn(3, 8, 7, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = list(layer.parameters())
    mine, theirs = (torch.autograd.grad(net(x).square().sum(), wanted) for net in (compiled, layer))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("images", min=2, max=64)},))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(program.module()(x[:2]), layer(x[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images(dtype: torch.dtype) -> None:
    dense, layer = both("strided", dtype=dtype)
    x = torch.randn(2, 8, 11, 9, dtype=dtype)
    exact = copy.deepcopy(dense).double()(x.double())
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), exact, rtol=0.02, atol=0.02)


def test_images_that_do_not_fit_are_refused() -> None:
    _, layer = both()
    for shape, match in (
        ((2, 7, 6, 6), r"x has shape \(2, 7, 6, 6\), expected \[B, 8, H, W\]"),
        ((8, 6), r"x has shape \(8, 6\), expected"),
        ((2, 8, 2, 9), "the padded images are 2 x 9, expected at least the kernel's extent of 3 x 3"),
    ):
        with pytest.raises(RuntimeError, match=match):
            layer(torch.zeros(shape))
