"""The sparse layers keep a layer's promises: the dense layer without its zeros, and every torch feature around it."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from burnish import BlockSparse, Sparse, Sparse24
from burnish.nn import BlockSparseLinear, Int8Linear, Sparse24Linear, SparseLinear
from burnish.ops.int8_quantize_rows import int8_quantize_rows
from sparse_models import FLOAT, INT8, KINDS, fresh, mask_for, pair, pruned
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: what rounding a sum may cost, relative to the largest value
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPS = {"block": "bsr", "flat block": "bsr", "conv": "bsr", "2:4": "sparse24", "any": "sparse"}


def near(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    assert mine.dtype == theirs.dtype
    return bool((mine - theirs).abs().max() <= ROUNDING[dtype] * theirs.abs().max().clamp(min=1))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLOAT)
def test_forward_and_backward_are_those_of_the_dense_layer(name: str, dtype: torch.dtype) -> None:
    dense, layer, x = pair(name, dtype)
    assert same_bits(layer.to_dense(), dense.weight)
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    results = [net(each) for net, each in zip((layer, dense), given, strict=True)]
    assert near(*results, dtype)
    assert layer.bias is dense.bias
    seed = torch.randn_like(results[0])
    (mine,) = torch.autograd.grad(results[0], layer.bias, seed, retain_graph=True)
    for result in results:
        result.backward(seed)
    assert near(given[0].grad, given[1].grad, dtype)
    assert near(2 * mine, dense.bias.grad, dtype)
    spread = copy.deepcopy(layer)
    with torch.no_grad():
        spread.values.copy_(layer.values.grad)
    if name == "2:4":  # kept, though the weight is zero there
        assert near(spread.to_dense(), dense.weight.grad * (spread.to_dense() != 0), dtype)
    else:
        assert near(spread.to_dense(), dense.weight.grad * (dense.weight != 0), dtype)
    assert layer(x[:0]).shape == (0, *results[0].shape[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INT8)
def test_int8_values_are_those_of_the_dense_int8_layer(name: str, dtype: torch.dtype) -> None:
    dense, layer, x = pair(name, dtype)
    assert [key for key, _ in layer.named_parameters()] == ["bias"]
    q, scale = int8_quantize_rows(dense.weight.detach().flatten(1))
    assert torch.equal(layer.scale, scale)
    weight = (q * scale.unsqueeze(1)).to(dtype).view_as(dense.weight)
    assert torch.equal(layer.to_dense(), weight)
    assert torch.equal(layer.to_float().weight, weight)
    if name != "conv int8":
        linear = Int8Linear.from_float(dense)
        assert torch.equal(layer(x), linear(x))
    given = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    seed = torch.randn_like(layer(x))
    layer(given[0]).backward(seed)
    straight = layer.to_float()
    straight(given[1]).backward(seed)
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0.02, atol=0.02)


def test_constructor_order_is_the_linear_layers() -> None:
    for make in (
        lambda *args: BlockSparseLinear(*args, density=0.5),
        lambda *args: SparseLinear(*args, density=0.5),
        Sparse24Linear,
    ):
        layer = make(70, 33, False, "cpu", torch.bfloat16)
        assert (layer.in_features, layer.out_features, layer.bias, layer.dtype) == (70, 33, None, torch.bfloat16)
        assert layer(torch.randn(2, 3, 70, dtype=torch.bfloat16)).shape == (2, 3, 33)


@pytest.mark.parametrize("name", KINDS)
def test_a_new_layer_keeps_the_share_and_has_the_variance_of_linear(name: str) -> None:
    torch.manual_seed(0)
    layer = fresh(name)
    dense = layer.to_dense()
    kept = float((dense != 0).float().mean())
    assert abs(kept - layer.density) < 0.12  # partial blocks at the edges
    bound = (layer.matrix[1] * layer.density) ** -0.5
    assert 0.9 * bound < float(dense.abs().max()) <= bound * 1.01
    before = layer.state_dict()
    values = layer.values
    again = {key: value.clone() for key, value in before.items()}
    layer.reset_parameters()
    assert layer.values is values
    assert any(not torch.equal(value, again[key]) for key, value in layer.state_dict().items())
    layer.load_state_dict(again)
    assert torch.equal(layer.to_dense(), dense)


@pytest.mark.parametrize("name", FLOAT)
def test_what_a_mask_keeps_is_kept_zeros_and_their_signs_too(name: str) -> None:
    cls, config = KINDS[name]
    dense = pruned(config, (lambda: nn.Conv2d(8, 37, 3)) if name == "conv" else (lambda: nn.Linear(70, 37)))
    mask = mask_for(config, 37, dense.weight[0].numel()).view_as(dense.weight)
    with torch.no_grad():
        dense.weight.uniform_(-1, 1)
        dense.weight.flatten()[mask.flatten().nonzero()[3]] = -0.0
    expected = torch.where(mask, dense.weight, 0)
    nn.utils.prune.custom_from_mask(dense, "weight", mask)
    layer = cls.from_float(dense, config)
    assert same_bits(layer.to_dense(), expected)
    assert layer.values.numel() >= mask.sum()
    assert layer.bias is dense.bias
    plain = cls.from_float(nn.utils.prune.remove(dense, "weight"), config)
    assert plain.values.numel() <= layer.values.numel()


@pytest.mark.parametrize("name", FLOAT)
def test_zeros_stay_zero_through_a_hundred_steps(name: str) -> None:
    dense, layer, x = pair(name)
    there = layer.to_dense() != 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    trained = layer.to_dense()
    if name == "2:4":
        assert SparseLinear.from_float(layer.to_float(), Sparse()).density <= 0.53
        there = layer.to_dense() != 0
    assert not trained[~there].any()
    assert (trained[there] != dense.weight[there]).all()
    assert not layer._fault({key: layer._buffers[key] for key in layer.INDEX}, layer.values.detach())


@pytest.mark.parametrize("name", FLOAT)
def test_layers_of_zeros_and_full_ones(name: str) -> None:
    cls, config = KINDS[name]
    dense, _, x = pair(name)
    with torch.no_grad():
        dense.weight.zero_()
    layer = cls.from_float(dense, config)
    y = layer(x.requires_grad_())
    assert torch.equal(y, dense(x))
    y.sum().backward()
    assert not x.grad.any()
    assert same_bits(layer.to_dense(), dense.weight)
    if name != "2:4":
        assert layer.density == 0
        with torch.no_grad():
            dense.weight.fill_(0.5)
        full = cls.from_float(dense, config)
        assert full.density == 1
        assert near(full(x), dense(x), torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_state_is_canonical_and_loads_anywhere(name: str) -> None:
    _, layer, x = pair(name)
    state = layer.state_dict()
    index = list(KINDS[name][0].INDEX)
    assert set(state) == {"values", "bias", *index} | ({"scale"} if "int8" in name else set())
    assert all(type(value) is torch.Tensor for value in state.values())
    other = KINDS[name][0].like(layer.to_float(), layer.config, layer.nnz)
    assert other.values.is_meta
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), layer(x))
    if layer.values.requires_grad:
        other.to_empty(device="cpu").load_state_dict(state)
        y = other(x)
        y.square().sum().backward()
        layer(x).square().sum().backward()
        assert torch.equal(other.values.grad, layer.values.grad)
    empty = fresh(name, device="meta", bias=False)
    assert empty.values.is_meta
    assert list(empty.state_dict()) == [key for key in fresh(name, bias=False).state_dict()]


@pytest.mark.parametrize("name", KINDS)
def test_converting_changes_float_values_alone(name: str) -> None:
    _, layer, x = pair(name)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.bfloat16()
    assert layer.dtype == torch.bfloat16
    for key, value in layer.state_dict().items():
        wanted = torch.bfloat16 if key == "bias" or (key == "values" and "int8" not in name) else before[key].dtype
        assert value.dtype == wanted, key
        assert torch.equal(value, before[key].to(wanted)), key
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to_float().weight.dtype == torch.bfloat16


def _torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_saved])
@pytest.mark.parametrize("name", KINDS)
def test_copies_are_equal_and_independent(name: str, clone) -> None:
    _, layer, x = pair(name)
    layer.eval()
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    assert not other.training
    assert other.values.data_ptr() != layer.values.data_ptr()
    assert (other.config, other.nnz) == (layer.config, layer.nnz)


@pytest.mark.parametrize("name", KINDS)
def test_described(name: str) -> None:
    _, layer, _ = pair(name)
    values = "int8" if "int8" in name else "fp32"
    assert f"pattern={layer.pattern}, density={layer.density:.4g}, values={values}, {layer.nbytes} bytes" in repr(layer)
    assert layer.nbytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert layer.pattern in layer.summary


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_autocast_gives_what_it_gives_the_dense_layer(name: str, cast: torch.dtype) -> None:
    _, layer, x = pair(name)
    dense = layer.to_float()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with torch.autocast("cpu", cast):
        mine, theirs = layer(inputs[0]), dense(inputs[1])
        assert mine.dtype == theirs.dtype == cast
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.05)
    for result in (mine, theirs):
        result.float().square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("name", ["block", "2:4 int8", "any", "conv"])
def test_hooks_run_and_activation_checkpointing_agrees(name: str) -> None:
    _, layer, x = pair(name)
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        layer.register_forward_hook(lambda module, args, output: seen.append("post")),
        layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward")),
    ]
    layer(x.clone().requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]
    for handle in handles:
        handle.remove()
    with torch.inference_mode():
        quick = layer(x)
    assert torch.equal(quick, layer(x))
    grads = []
    for run in (layer, lambda given: checkpoint(layer, given, use_reentrant=False)):
        given = x.clone().requires_grad_()
        layer.zero_grad()
        run(given).square().sum().backward()
        grads.append((given.grad, *(parameter.grad for parameter in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ["block", "2:4", "any", "block int8"])
def test_a_training_step_compiles_whole_with_one_recompile_over_ten_batch_sizes(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    _, layer, _ = pair(name)
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


@pytest.mark.parametrize("name", ["block", "2:4", "any"])
def test_exports_and_reloads(name: str) -> None:
    _, layer, x = pair(name)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert f"burnish.{OPS[name]}_linear" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again(x[:3]), layer(x[:3]))


@pytest.mark.parametrize("name", ["block", "2:4", "any"])
def test_eight_threads_give_one_result(name: str) -> None:
    _, layer, x = pair(name)
    layer.requires_grad_(False)
    expected = layer(x)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: layer(x), range(64)))
    assert all(torch.equal(result, expected) for result in results)


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(37, 70)
    for config, cls in ((BlockSparse(16), BlockSparseLinear), (Sparse24(), Sparse24Linear), (Sparse(), SparseLinear)):
        with torch.no_grad():
            conv.weight.copy_(torch.randn(70, 37) * mask_for(config, 37, 70).t())
        layer = cls.from_float(conv, config)
        assert torch.equal(layer.to_dense(), conv.weight.t())
        x = torch.randn(6, 70)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_frozen_weights_give_frozen_values() -> None:
    for name in FLOAT:
        dense, _, _ = pair(name)
        dense.weight.requires_grad_(False)
        layer = KINDS[name][0].from_float(dense, KINDS[name][1])
        assert not layer.values.requires_grad
        assert not layer.to_float().weight.requires_grad
        assert layer.bias.requires_grad
