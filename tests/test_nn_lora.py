"""LoRALinear keeps a layer's promises: the adapter's function and gradients, its mask, merging, torch's features."""

from __future__ import annotations

import copy
import io
import pickle

import burnish
import pytest
import torch
from burnish.nn import Int8Linear, LoRALinear
from lora_models import adapted, base_of, composed, gradients, next_seed
from torch import nn
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BASES = ["linear", "conv1d", "int8"]


def close(mine: list[torch.Tensor], theirs: list[torch.Tensor], bound: float = 2e-6) -> bool:
    return all((a - b).norm() <= bound * b.norm() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_is_the_composition_with_its_mask_spelled_out(kind: str, p: float) -> None:
    layer, x = adapted(kind, lora_dropout=p)
    seed = next_seed() if p else None
    mine = gradients(layer, layer, x)
    assert close(mine, gradients(layer, lambda x: composed(layer, x, seed), x))
    if p:
        assert not close(mine, gradients(layer, lambda x: composed(layer, x), x), 0.01)
    layer.eval()
    assert close(gradients(layer, layer, x), gradients(layer, lambda x: composed(layer, x), x))
    assert layer(x[:0]).shape == (0, 24)
    assert layer(x.expand(2, 3, 9, 40)).shape == (2, 3, 9, 24)


def test_gradients_are_the_derivatives_under_a_fixed_mask() -> None:
    layer, x = adapted(lora_dropout=0.4)
    state = torch.get_rng_state()

    def loss(*changed: torch.Tensor) -> torch.Tensor:
        torch.set_rng_state(state)
        named = dict(zip(("lora_A", "lora_B"), changed[1:], strict=True))
        return torch.func.functional_call(layer, named, (changed[0],)).double().sin().sum()

    point = [t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    slopes = torch.autograd.grad(loss(*point), point)
    for index, slope in enumerate(slopes):
        step = torch.randn_like(slope) * 3e-3
        ends = [
            [t.detach() + sign * step if i == index else t.detach() for i, t in enumerate(point)] for sign in (1, -1)
        ]
        numeric = float(loss(*ends[0]) - loss(*ends[1])) / 2
        assert numeric == pytest.approx(float((slope * step).sum()), rel=2e-2, abs=2e-4)


def test_everything_dropped_leaves_the_base_alone() -> None:
    layer, x = adapted(lora_dropout=1.0)
    y, dx, dA, dB = gradients(layer, layer, x)
    expected, dx_base = gradients(
        layer, lambda x: layer.base_layer(x) + 0 * (layer.lora_A.sum() + layer.lora_B.sum()), x
    )[:2]
    assert torch.equal(y, burnish.ops.lora_linear(x, *_frozen(layer)))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, dx_base, rtol=1e-6, atol=1e-6)
    assert not dA.any()
    assert not dB.any()


def _frozen(layer: LoRALinear) -> tuple:
    """The op's arguments for the base with an adapter of zero."""
    zeros = torch.zeros_like(layer.lora_A), torch.zeros_like(layer.lora_B)
    return layer.weight, *zeros, layer.bias


def test_seeds_come_from_torchs_generator_and_only_where_they_are_needed() -> None:
    layer, x = adapted(lora_dropout=0.5)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer(x), second)
    state = torch.get_rng_state()
    layer.eval()(x)
    adapted(lora_dropout=0.5)[0].eval()
    torch.set_rng_state(state)
    plain, x = adapted(lora_dropout=0.0)
    state = torch.get_rng_state()
    plain(x)
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_adapters_of_any_dtype_sit_on_bases_of_any_dtype(kind: str, base_dtype: torch.dtype, dtype) -> None:
    layer, x = adapted(kind, base_dtype, dtype=dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == (dtype or base_dtype)
    assert layer.dtype == base_dtype
    mine = gradients(layer, layer, x)
    assert [t.dtype for t in mine] == [base_dtype, base_dtype, layer.lora_A.dtype, layer.lora_A.dtype]
    wide = copy.deepcopy(layer).float()
    exact = gradients(wide, wide, x.float())
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[base_dtype]
    assert close([t.float() for t in mine], exact, bound)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(kind: str, base_dtype: torch.dtype, autocast: torch.dtype) -> None:
    layer, x = adapted(kind, base_dtype, dtype=torch.float32, lora_dropout=0.5)
    for given in (x, x.float(), x.half()):
        given = given.clone().requires_grad_()
        with torch.autocast("cpu", autocast):
            torch.manual_seed(2)
            y = layer(given)
            assert y.dtype == layer.base_layer(given).dtype == autocast
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == base_dtype
        torch.manual_seed(2)
        low = copy.deepcopy(layer)
        if kind != "int8":
            low.to(autocast).bias.data = layer.bias.data  # which the kernel reads as it is
        assert torch.equal(y, low(given.to(autocast)))
        y.sum().backward()
        assert given.grad.dtype == given.dtype
        assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_rounds_once_and_unmerge_brings_the_bits_back(kind: str, dtype: torch.dtype) -> None:
    layer, x = adapted(kind, dtype, lora_dropout=0.5)
    base, weight, bits = layer.base_layer, layer.base_layer.weight, layer.base_layer.weight.detach().clone()
    delta = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    exact = (bits.double() + (delta if kind == "linear" else delta.T)).detach()
    outside = layer.eval()(x)
    layer.merge()
    assert layer.merged
    assert "merged" in repr(layer)
    off = (layer.weight.double() - exact).abs()
    assert (off <= torch.finfo(dtype).eps * 0.51 * exact.abs() + 1e-7).all()
    assert torch.equal(layer.train()(x), layer.base_layer(x))
    assert (layer(x) - outside).norm() <= {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[
        dtype
    ] * outside.norm()
    plain = layer.to_float()
    assert torch.equal(plain.weight, layer.weight if kind == "linear" else layer.weight.T)
    assert weight.equal(bits)  # what else holds the weight does not change
    layer.unmerge()
    assert layer.base_layer is base
    assert layer.base_layer.weight is weight
    assert weight.equal(bits)
    assert torch.equal(layer.eval()(x), outside)
    assert torch.equal(layer.to_float().weight, plain.weight)


def test_a_merged_layer_is_copied_moved_and_unmerged() -> None:
    layer, x = adapted()
    outside = layer(x)
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.merged
        assert torch.equal(other(x), layer(x))
        other.unmerge()
        assert torch.equal(other(x), outside)
    layer.bfloat16().eval()
    layer.unmerge()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert not layer.base_layer.training


@pytest.mark.parametrize("kind", BASES)
def test_to_float_is_the_plain_layer(kind: str) -> None:
    layer, x = adapted(kind)
    plain = layer.to_float()
    assert type(plain) is nn.Linear
    assert plain.bias is layer.bias
    assert not plain.weight.requires_grad
    assert (plain(x) - layer(x)).norm() <= (0.02 if kind == "int8" else 1e-6) * plain(x).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_starts_from_what_the_layer_computes(kind: str, dtype: torch.dtype) -> None:
    base = base_of(kind, dtype=dtype)
    x, before = torch.randn(9, 40, dtype=dtype), base.weight.detach().clone()
    expected = base(x)
    layer = LoRALinear(base, r=5, lora_alpha=7, init_lora_weights="pissa")
    eps = torch.finfo(dtype).eps
    assert (layer(x) - expected).norm() <= 8 * eps * expected.norm()
    assert torch.equal(base.weight, before)
    values = torch.linalg.svdvals(before.float())
    rest, part = torch.linalg.svdvals(layer.weight.float()), torch.linalg.svdvals(layer._delta())
    torch.testing.assert_close(part[:5], values[:5], rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(rest[:19], values[5:], rtol=1e-4, atol=40 * eps)
    assert (layer.lora_A.norm(dim=1) - layer.lora_B.norm(dim=0)).abs().max() <= 8 * eps * values[0]
    merged = layer.to_float()
    assert (merged(x) - expected).norm() <= 8 * eps * expected.norm()


def test_default_start_is_the_base() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(base_of("linear"), r=4)
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (4, 8, 2.0, 0.0)
    assert (layer.in_features, layer.out_features) == (40, 24)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-6, atol=1e-6)
    assert layer.lora_A.std() > 0.05
    assert not layer.lora_B.any()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert LoRALinear(base_of("linear"), r=4, use_rslora=True).scaling == 4.0
    text = repr(layer)
    held = sum(p.nbytes for p in layer.parameters())
    assert f"r=4, lora_alpha=8, scaling=2, lora_dropout=0, adapter=fp32, {held} bytes" in text


@pytest.mark.parametrize("kind", BASES)
def test_state_dict_copies_and_meta(kind: str) -> None:
    layer, x = adapted(kind, lora_dropout=0.5)
    expected = layer.eval()(x)
    state = layer.state_dict()
    assert {"lora_A", "lora_B", "base_layer.weight", "base_layer.bias"} <= state.keys()
    other, _ = adapted(kind)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert not twin.training
        assert twin.lora_A.data_ptr() != layer.lora_A.data_ptr()
        assert (twin.config, twin.scaling) == (layer.config, layer.scaling)
    empty = LoRALinear(copy.deepcopy(layer.base_layer).to("meta"), r=5, lora_alpha=7).eval()
    assert empty.lora_A.is_meta
    assert empty(x.to("meta")).shape == expected.shape
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), expected)
    assert empty.lora_A.requires_grad
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.lora_A.dtype == half.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_with_the_same_mask(reentrant: bool) -> None:
    first, x = adapted(lora_dropout=0.5)
    second = LoRALinear(nn.Linear(24, 40), r=3, lora_dropout=0.3)
    nn.init.normal_(second.lora_B)
    net = nn.Sequential(first, nn.Tanh(), second)
    parameters = [p for p in net.parameters() if p.requires_grad]
    results = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        given = x.clone().requires_grad_()
        loss = run(given).square().sum()
        loss.backward()
        results.append([loss.detach(), given.grad, *(p.grad for p in parameters)])
        net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _transparent(p: float) -> LoRALinear:
    """y = 2 * mask * x for p = 1/2, so that output and gradient show their masks."""
    layer = LoRALinear(nn.Linear(32, 32, bias=False), r=32, lora_alpha=32, lora_dropout=p)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(32))
        layer.lora_B.copy_(torch.eye(32))
    return layer


@pytest.mark.parametrize("saved", [True, False])
def test_a_compiled_training_step_has_one_graph_and_one_mask(saved: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = _transparent(0.5)
    counter = CompileCounterWithBackend("inductor")

    def step(x: torch.Tensor) -> torch.Tensor:
        return layer(x) if saved else checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(burnish.trainable_only(layer), lr=0.0)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x = torch.ones(64, 32, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        optimizer.step()
        assert torch.equal(y, x.grad)
        assert torch.equal(y.detach().sum(0).unsqueeze(1).expand(32, 32), layer.lora_B.grad.T.contiguous())
        assert 0.4 < float((y == 2).float().mean()) < 0.6
        assert set(y.unique().tolist()) == {0.0, 2.0}
        optimizer.zero_grad()
        masks.append(y.detach())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", BASES)
def test_compiles_in_eval_and_exports(kind: str) -> None:
    torch._dynamo.reset()
    layer, x = adapted(kind, lora_dropout=0.5)
    layer.eval().requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:4]), layer(x[:4]))
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "burnish.lora_linear" in str(program.graph)
    assert torch.equal(program.module()(x[:5]), layer(x[:5]))


def test_int8_base_is_the_very_layer() -> None:
    base = base_of("int8")
    packed = base.weight_packed
    layer = LoRALinear.from_float(base.eval(), burnish.LoRA(r=3))
    assert layer.base_layer is base
    assert not layer.training
    assert isinstance(layer.base_layer, Int8Linear)
    assert layer.base_layer.weight_packed is packed
    assert not base.bias.requires_grad
    assert layer.summary == "LoRALinear r=3 on Int8Linear"
