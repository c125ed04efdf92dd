"""LowRankLinear keeps a layer's promises: two nn.Linear in one call, and every torch feature around it."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import burnish
import pytest
import torch
from burnish import LowRank
from burnish.nn import LowRankLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = [(64, 64, 16), (70, 33, 5), (1, 1, 1), (5, 200, 3), (130, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: twice what the product in two steps rounds, relative to the largest value
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def pair(inputs: int = 70, outputs: int = 33, rank: int = 9, dtype: torch.dtype = torch.float32, **options) -> tuple:
    """A layer, two nn.Linear with its tensors, and an input."""
    torch.manual_seed(inputs * 1000 + outputs)
    layer = LowRankLinear(inputs, outputs, rank=rank, dtype=dtype, **options)
    down, up = nn.Linear(inputs, rank, bias=False, dtype=dtype), nn.Linear(rank, outputs, dtype=dtype, **options)
    two = nn.Sequential(down, up)
    down.weight, up.weight, up.bias = (nn.Parameter(t.detach().clone()) for t in (layer.A, layer.B, up.bias))
    if layer.bias is not None:
        up.bias = nn.Parameter(layer.bias.detach().clone())
    return layer, two, torch.randn(6, inputs, dtype=dtype)


def near(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    assert mine.dtype == theirs.dtype
    return bool((mine - theirs).abs().max() <= ROUNDING[dtype] * theirs.abs().max().clamp(min=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "rank"), SIZES)
def test_forward_and_backward_are_those_of_two_linear_layers(inputs, outputs, rank, dtype) -> None:
    layer, two, x = pair(inputs, outputs, rank, dtype)
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = [net(each) for net, each in zip((layer, two), given, strict=True)]
    assert near(*results, dtype)
    seed = torch.randn_like(results[0])
    for result in results:
        result.backward(seed)
    down, up = two
    for mine, theirs in ((layer.A, down.weight), (layer.B, up.weight), (layer.bias, up.bias), given):
        assert near(mine.grad, theirs.grad, dtype)
    assert layer(x[:0]).shape == (0, outputs)
    assert layer(x.expand(2, 3, 6, inputs)).shape == (2, 3, 6, outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_from_float_is_the_best_layer_of_its_rank(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(70, 33, bias=bias, dtype=dtype).eval()
    layer = LowRankLinear.from_float(linear, LowRank(rank=9))
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features, layer.rank, layer.dtype) == (70, 33, 9, dtype)
    assert layer.config == LowRank(rank=9)
    assert not layer.training
    singular = torch.linalg.svdvals(linear.weight.double())
    missed = (layer.B.double() @ layer.A.double() - linear.weight.double()).norm()
    best = singular[9:].norm()
    assert best - 1e-6 <= missed <= best * (1 + ROUNDING[dtype])
    torch.testing.assert_close(layer.A.norm(dim=1), layer.B.norm(dim=0), rtol=1e-2, atol=0)
    x = torch.randn(6, 70, dtype=dtype)
    whole = LowRankLinear.from_float(linear, LowRank(rank=33))
    assert near(whole(x), linear(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_float_is_the_product(dtype: torch.dtype) -> None:
    layer, _, x = pair(dtype=dtype)
    dense = layer.to_float()
    assert type(dense) is nn.Linear
    assert dense.bias is layer.bias
    assert torch.equal(dense.weight, (layer.B.double() @ layer.A.double()).to(dtype))
    assert near(layer(x), dense(x), dtype)
    assert dense.weight.requires_grad
    assert not layer.requires_grad_(False).eval().to_float().weight.requires_grad


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(33, 70)
    layer = LowRankLinear.from_float(conv, LowRank(rank=33))
    x = torch.randn(6, 70)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    assert layer.bias is conv.bias


def test_frozen_weights_give_frozen_factors() -> None:
    linear = nn.Linear(8, 8).requires_grad_(False)
    linear.bias.requires_grad_(True)
    layer = LowRankLinear.from_float(linear, LowRank(rank=2))
    assert [parameter.requires_grad for parameter in (layer.A, layer.B, layer.bias)] == [False, False, True]


def test_a_new_layer_has_the_variance_of_linear() -> None:
    torch.manual_seed(3)
    layer, linear = LowRankLinear(512, 512, rank=64), nn.Linear(512, 512)
    assert abs(layer.to_float().weight.std() / linear.weight.std() - 1) < 0.05
    assert layer.bias.abs().max() <= 512**-0.5
    positional = LowRankLinear(70, 33, False, "meta", torch.bfloat16, rank=2)
    assert positional.bias is None
    assert positional.A.is_meta


def test_repr_and_bytes() -> None:
    layer = LowRankLinear(70, 33, rank=9)
    assert layer.nbytes == 4 * (9 * (70 + 33) + 33)
    assert repr(layer) == f"LowRankLinear(in_features=70, out_features=33, bias=True, rank=9, {layer.nbytes} bytes)"
    assert layer.summary == "LowRankLinear r=9"


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_makes_an_exact_round_trip(assign: bool) -> None:
    layer, _, x = pair()
    state = layer.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"A": (9, 70), "B": (33, 9), "bias": (33,)}
    other = LowRankLinear(70, 33, rank=9, device="meta" if assign else None)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), layer(x))
    empty = LowRankLinear(70, 33, rank=9, device="meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))


def test_meta_layers_are_shaped_like_real_ones() -> None:
    linear = nn.Linear(70, 33, device="meta", dtype=torch.bfloat16)
    layer = LowRankLinear.from_float(linear, LowRank(rank=4))
    assert (layer.A.shape, layer.B.shape) == ((4, 70), (33, 4))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer(torch.empty(5, 70, device="meta", dtype=torch.bfloat16)).shape == (5, 33)


@pytest.mark.parametrize("convert", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.bfloat16),
    lambda m: m.bfloat16().float(),
])  # fmt: skip
def test_conversions_reach_all_parameters(convert) -> None:
    layer, _, x = pair()
    expected = layer(x)
    convert(layer)
    assert {parameter.dtype for parameter in layer.parameters()} == {layer.dtype}
    y = layer(x.to(layer.dtype))
    assert y.dtype == layer.dtype
    assert (y.float() - expected).norm() <= 0.02 * expected.norm()


def _torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_saved])
def test_copies_are_equal_and_independent(clone) -> None:
    layer, _, x = pair()
    layer.eval()
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    assert not other.training
    assert other.A.data_ptr() != layer.A.data_ptr()
    assert (other.config, other.rank) == (layer.config, layer.rank)


@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_does_what_it_does_to_two_linear_layers(held, cast, given) -> None:
    layer, two, x = pair(dtype=held)
    inputs = [x.to(given).requires_grad_(), x.to(given).requires_grad_()]
    with torch.autocast("cpu", cast):
        mine, theirs = layer(inputs[0]), two(inputs[1])
        assert near(mine, theirs, cast)
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == held
    for result in (mine, theirs):
        result.float().square().sum().backward()
    down, up = two
    for one, other in ((layer.A, down.weight), (layer.B, up.weight), (layer.bias, up.bias), inputs):
        assert near(one.grad, other.grad, torch.bfloat16)


def test_hooks_run_and_inference_mode_agrees() -> None:
    layer, _, x = pair()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("post"))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    layer(x.requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]
    with torch.inference_mode():
        quick = layer(x)
    assert torch.equal(quick, layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    layer, _, x = pair()
    grads = []
    for run in (layer, lambda given: checkpoint(layer, given, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        run(given).square().sum().backward()
        grads.append((given.grad, *(parameter.grad for parameter in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_training_step_compiles_whole_with_one_recompile_over_ten_batch_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer, _, _ = pair()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
        x = torch.randn(rows, 70, requires_grad=True)
        wanted = (x, *layer.parameters())
        y = compiled(x)
        assert torch.equal(y, layer(x))
        mine = torch.autograd.grad(y.square().sum(), wanted)
        theirs = torch.autograd.grad(layer(x).square().sum(), wanted)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    assert counter.frame_count <= 2
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert near(y, layer(x), torch.bfloat16)


def test_inductor_trains_what_eager_trains() -> None:
    torch._dynamo.reset()
    layer, _, x = pair()
    compiled = torch.compile(layer, fullgraph=True)
    mine, theirs = (torch.autograd.grad(net(x).square().sum(), list(layer.parameters())) for net in (compiled, layer))
    assert all(near(a, b, torch.float32) for a, b in zip(mine, theirs, strict=True))


def test_exports_and_reloads() -> None:
    layer, _, x = pair()
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "burnish.lowrank_linear" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again(x[:3]), layer(x[:3]))


def test_functional_call_and_eight_threads() -> None:
    layer, _, x = pair()
    replaced = torch.func.functional_call(layer, {"bias": torch.zeros(33)}, (x,))
    torch.testing.assert_close(replaced + layer.bias, layer(x))
    layer.requires_grad_(False)
    expected = burnish.ops.lowrank_linear(x, layer.A, layer.B, layer.bias)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: layer(x), range(64)))
    assert all(torch.equal(result, expected) for result in results)
