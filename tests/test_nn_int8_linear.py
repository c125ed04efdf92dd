"""Int8Linear keeps a layer's promises: nn.Linear's interface, canonical state, one copy, every torch feature."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import burnish
import pytest
import torch
from burnish.nn import Int8Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = [(64, 64), (70, 33), (1, 1), (5, 200), (130, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
    "silu": nn.functional.silu,
}


def pair(inputs: int = 70, outputs: int = 33, dtype: torch.dtype = torch.float32, **options) -> tuple:
    torch.manual_seed(inputs * 1000 + outputs)
    linear = nn.Linear(inputs, outputs, bias=options.pop("bias", True), dtype=dtype)
    return linear, Int8Linear.from_float(linear, **options), torch.randn(6, inputs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_from_float_is_the_quantised_layer(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    linear, layer, x = pair(inputs, outputs, dtype, bias=bias)
    q, scale = burnish.ops.int8_quantize_rows(linear.weight.detach())
    assert torch.equal(layer.weight, q)
    assert torch.equal(layer.weight_scale, scale)
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (inputs, outputs)
    expected = burnish.ops.int8_linear(x, burnish.ops.int8_linear_pack(q), scale, linear.bias)
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == dtype
    assert layer(x[:0]).shape == (0, outputs)
    assert layer(x.expand(2, 3, 6, inputs)).shape == (2, 3, 6, outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_that_of_the_float_layer(activation: str) -> None:
    _, layer, x = pair(activation=activation)
    plain = pair()[1]
    torch.testing.assert_close(layer(x), ACTIVATIONS[activation](plain(x)), rtol=1e-5, atol=1e-6)
    assert (f"activation={activation}" in repr(layer)) == (activation != "none")


def test_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(33, 70)
    layer = Int8Linear.from_float(conv)
    linear = nn.Linear(70, 33)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    x = torch.randn(6, 70)
    assert torch.equal(layer(x), Int8Linear.from_float(linear)(x))
    torch.testing.assert_close(layer.to_float()(x), conv(x), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_to_float_is_the_dequantised_layer(dtype: torch.dtype, activation: str) -> None:
    linear, layer, x = pair(dtype=dtype, activation=activation, bias=False)
    back = layer.to_float()
    inner = back if activation == "none" else back[0]
    assert type(inner) is nn.Linear
    assert inner.weight.dtype == dtype
    assert torch.equal(inner.weight, (layer.weight * layer.weight_scale[:, None]).to(dtype))
    assert (inner.weight - linear.weight).abs().max() <= layer.weight_scale.max() * 0.51 + 2e-3
    torch.testing.assert_close(back(x), ACTIVATIONS[activation](inner(x)))
    again = Int8Linear.from_float(inner, activation=activation)
    if dtype == torch.float32:
        assert torch.equal(again.weight, layer.weight)


def test_a_new_layer_draws_what_linear_draws() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(70, 33)
    torch.manual_seed(3)
    layer = Int8Linear(70, 33)
    assert torch.equal(layer.weight, Int8Linear.from_float(linear).weight)
    assert torch.equal(layer.bias, linear.bias)
    positional = Int8Linear(70, 33, False, "meta", torch.bfloat16)
    assert positional.bias is None
    assert positional.weight_packed.is_meta


def test_state_dict_is_canonical_and_makes_an_exact_round_trip() -> None:
    _, layer, x = pair()
    state = layer.state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "weight": (torch.int8, (33, 70)),
        "weight_scale": (torch.float32, (33,)),
        "bias": (torch.float32, (33,)),
    }
    other = Int8Linear(70, 33)
    packed = other.weight_packed
    assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert other.weight_packed is packed
    assert torch.equal(other(x), layer(x))
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    nested = nn.Sequential(nn.Sequential(Int8Linear(70, 33)))
    nested.load_state_dict({f"0.0.{key}": value for key, value in state.items()})
    assert torch.equal(nested(x), layer(x))


def test_meta_layer_takes_values_by_assignment_and_by_to_empty() -> None:
    _, layer, x = pair()
    meta = Int8Linear(70, 33, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))
    assert isinstance(meta.bias, nn.Parameter)
    empty = Int8Linear(70, 33, device="meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert torch.nn.utils.skip_init(Int8Linear, 70, 33).weight_packed.device.type == "cpu"
    on_meta = Int8Linear.from_float(nn.Linear(70, 33, device="meta"))
    assert on_meta.weight_packed.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        Int8Linear(70, 33, device="meta").to("cpu")


def test_one_copy_of_the_weight_in_memory() -> None:
    linear = nn.Linear(512, 512)
    layer = Int8Linear.from_float(linear)
    assert layer.nbytes == 512 * 512 + 4 * 512 + 4 * 512
    assert layer.nbytes <= 0.27 * sum(p.nbytes for p in linear.parameters())
    assert f"{layer.nbytes} bytes" in repr(layer)
    assert "int8 per channel (vnni)" in repr(layer)
    held = {"weight_packed": layer.weight_packed, "weight_scale": layer.weight_scale}
    assert dict(layer.named_buffers()).keys() == held.keys()
    layer(torch.randn(3, 512))
    layer.state_dict()
    gc.collect()
    mine = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert not mine


@pytest.mark.parametrize("convert", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.type(torch.bfloat16),
    lambda m: m.to("cpu", torch.bfloat16), lambda m: m.bfloat16().float(),
])  # fmt: skip
def test_conversions_reach_the_bias_alone(convert) -> None:
    _, layer, x = pair()
    reference = nn.Linear(70, 33)
    packed, scale, before = layer.weight_packed, layer.weight_scale, layer.weight
    convert(layer)
    convert(reference)
    assert layer.weight_packed is packed
    assert layer.weight_scale is scale
    assert torch.equal(layer.weight, before)
    assert layer.bias.dtype == reference.bias.dtype == layer.dtype
    assert layer(x.to(layer.dtype)).dtype == layer.dtype
    assert layer.to_float().weight.dtype == reference.weight.dtype


@pytest.mark.parametrize("clone", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _torch_saved(m),
])  # fmt: skip
def test_copies_are_equal_and_independent(clone) -> None:
    _, layer, x = pair(activation="gelu")
    layer.eval()
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    assert not other.training
    assert other.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    assert (other.config, other.activation, other.dtype) == (layer.config, layer.activation, layer.dtype)


def _torch_saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_unpickling_on_a_device_of_another_layout_packs_for_it() -> None:
    _, layer, x = pair()
    expected = layer(x)
    layer._buffers["weight_packed"] = burnish.ops.int8_linear_pack(layer.weight, "rows")
    assert layer.layout == "rows"
    moved = pickle.loads(pickle.dumps(layer))
    assert moved.layout == "vnni"
    assert torch.equal(moved(x), expected)
    layer.to("cpu")
    assert layer.layout == "vnni"
    assert torch.equal(layer(x), expected)


def test_autocast_gives_what_linear_gives() -> None:
    linear, layer, x = pair()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert layer(x).dtype == linear(x).dtype == dtype
            assert torch.equal(layer(x), layer(x.clone()))
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32
        expected = burnish.ops.int8_linear(x, layer.weight_packed, layer.weight_scale, layer.bias, out_dtype=dtype)
        with torch.autocast("cpu", dtype):
            assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        meta = Int8Linear(70, 33, device="meta")(x.to("meta"))
    assert (meta.shape, meta.dtype) == ((6, 33), nn.Linear(70, 33, device="meta")(x.to("meta")).dtype)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_reach_input_and_bias(activation: str) -> None:
    _, layer, x = pair(activation=activation)
    dense = layer.to_float()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    gradients = []
    for module, given in zip((layer, dense), inputs, strict=True):
        layer.bias.grad = None
        module(given).square().sum().backward()
        gradients.append((given.grad, layer.bias.grad.clone()))
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_requires_grad_of_the_bias_is_kept_and_followed() -> None:
    linear = nn.Linear(70, 33).requires_grad_(False)
    layer = Int8Linear.from_float(linear)
    x = torch.randn(2, 70)
    assert not layer(x).requires_grad
    layer.requires_grad_()
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), layer.requires_grad_(False)(x))


def test_hooks_run() -> None:
    _, layer, x = pair()
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("post"))
    layer.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    layer(x.requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    _, layer, x = pair(activation="gelu")
    grads = []
    for run in (layer, lambda given: checkpoint(layer, given, use_reentrant=reentrant)):
        given = x.clone().requires_grad_()
        layer.bias.grad = None
        run(given).square().sum().backward()
        grads.append((given.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("train", [False, True])
def test_compiles_whole_with_one_recompile_over_ten_batch_sizes(activation: str, train: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    _, layer, _ = pair(activation=activation)
    layer.requires_grad_(train)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
        x = torch.randn(rows, 70, requires_grad=train)
        y = compiled(x)
        assert torch.equal(y, layer(x))
        if train:
            mine = torch.autograd.grad(y.square().sum(), (x, layer.bias))
            theirs = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(mine, theirs, strict=True))
    assert counter.frame_count <= 2
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


def test_exports_and_reloads() -> None:
    _, layer, x = pair(activation="silu")
    layer.requires_grad_(False)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "burnish.int8_linear" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again(x[:3]), layer(x[:3]))


def test_functional_call_and_share_memory() -> None:
    _, layer, x = pair()
    expected = layer(x)
    replaced = torch.func.functional_call(layer, {"bias": torch.zeros(33)}, (x,))
    torch.testing.assert_close(replaced + layer.bias, expected)
    layer.share_memory()
    assert layer.weight_packed.is_shared()
    assert layer.weight_scale.is_shared()
    assert torch.equal(layer(x), expected)


def test_eight_threads_on_one_module_agree_bit_for_bit() -> None:
    _, layer, _ = pair(activation="gelu")
    layer.requires_grad_(False)
    inputs = [torch.randn(rows, 70) for rows in (1, 3, 16, 33, 64, 100, 128, 7)]
    expected = [layer(x) for x in inputs]

    def work(thread: int) -> bool:
        order = inputs[thread:] + inputs[:thread]
        wanted = expected[thread:] + expected[:thread]
        return all(torch.equal(layer(x), y) for _ in range(20) for x, y in zip(order, wanted, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8


def test_layers_that_share_a_weight_share_it_through_every_conversion() -> None:
    _, first, x = pair()
    second = copy.deepcopy(first)
    second._buffers.update(first._buffers)
    model = nn.ModuleList([first, second])

    def tied(pair_of: nn.ModuleList) -> bool:
        return pair_of[0].weight_packed is pair_of[1].weight_packed

    assert tied(model)
    assert tied(copy.deepcopy(model))
    assert tied(pickle.loads(pickle.dumps(model)))
    assert tied(model.half().float())
    state = model.state_dict()
    assert state["0.weight"] is state["1.weight"]
    empty = nn.ModuleList([Int8Linear(70, 33, device="meta") for _ in range(2)])
    empty.load_state_dict(state, assign=True)
    assert tied(empty)
    assert torch.equal(empty[1](x), first(x))
    assert tied(copy.deepcopy(model).to("meta"))
    assert tied(copy.deepcopy(model).to("meta").to_empty(device="cpu"))
    with torch.no_grad():
        first.weight_packed.fill_(128)
    assert not model.state_dict()["0.weight"].any()
