"""Rule C6 for what must be contiguous: packed weights, results, inputs and what optimizers step, of more than 2**31
elements.

Inputs are mapped lazily and take no memory, what a step writes is folded. Strided views past 2**31 are in test_ops.py,
as the rule ``huge``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from burnish import moments, ops, registry, testing
from burnish.registry import Case, OpSpec

#: 32832 rows of 65536: 2**31 + 2**22 elements, 513 panels of 64
CHANNELS, WIDTH = 32832, 65536


packed_by_definition = registry.get("int8_linear_pack").reference


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def last_panel() -> torch.Tensor:
    return torch.randint(-127, 128, (64, WIDTH), dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def huge_weight(panel: torch.Tensor) -> torch.Tensor:
    """vnni [CHANNELS, WIDTH]: zero bytes, that is weights of -128, but for the last panel."""
    packed = testing.lazy((CHANNELS, WIDTH), torch.uint8)
    packed[-64:] = packed_by_definition(panel, "vnni")
    return packed


def test_a_weight_past_2_to_the_31() -> None:
    panel = last_panel()
    packed, x = huge_weight(panel), torch.randn(1, WIDTH)
    y = ops.int8_linear(x, packed, torch.ones(CHANNELS))
    assert torch.equal(y[:, -64:], ops.int8_linear(x, ops.int8_linear_pack(panel), torch.ones(64)))
    q, scale = ops.int8_quantize_rows(x)
    assert torch.equal(y[:, :-64], (-128 * q.sum()).float().mul(scale).expand(1, CHANNELS - 64))


def test_a_gradient_through_a_weight_past_2_to_the_31() -> None:
    panel = last_panel()
    packed, dy = huge_weight(panel), torch.zeros(1, CHANNELS)
    dy[:, -64:] = torch.randint(-8, 9, (1, 64)).float()
    dx, _ = torch.ops.burnish.int8_linear_backward(dy, None, packed, torch.ones(CHANNELS), None, WIDTH, 0, False)
    assert torch.equal(dx, dy[:, -64:] @ panel.float())


def test_unpacking_past_2_to_the_31() -> None:
    panel = last_panel()
    whole = ops.int8_linear_unpack(huge_weight(panel), CHANNELS, WIDTH)
    assert torch.equal(whole[-64:], panel)
    assert (whole[:64] == -128).all()


def test_packing_past_2_to_the_31() -> None:
    panel = last_panel()
    weight = testing.lazy((CHANNELS, WIDTH), torch.int8)
    weight[-64:] = panel
    packed = ops.int8_linear_pack(weight, "vnni")
    assert torch.equal(packed[-64:], packed_by_definition(panel, "vnni"))
    assert (packed[:64] == 128).all()


def test_quantising_past_2_to_the_31() -> None:
    x = testing.lazy((CHANNELS, WIDTH), torch.bfloat16)
    x[-1] = torch.randn(WIDTH).bfloat16()
    q, scale = ops.int8_quantize_rows(x)
    expected_q, expected_scale = ops.int8_quantize_rows(x[-1])
    assert torch.equal(q[-1], expected_q)
    assert torch.equal(scale[-1], expected_scale)
    assert not q[-2].any()


def test_a_result_past_2_to_the_31() -> None:
    rows, channels = 16400, 131072
    x = testing.lazy((rows, 4), torch.bfloat16)
    x[-1] = 1.0
    weight = torch.ones(channels, 4, dtype=torch.int8)
    y = ops.int8_linear(x, ops.int8_linear_pack(weight), torch.ones(channels))
    assert y.numel() > 2**31
    assert torch.equal(y[-1], torch.full((channels,), 4.0, dtype=torch.bfloat16))
    assert not y[-2].any()


#: of which the last ones alone are not 0: a block of codes and a ragged one
COUNT, TAIL = 2**31 + 300, 300
STEPS = {name: spec for name, spec in registry.all_ops().items() if spec.schema.startswith("(Tensor(a!)[] params")}
#: every op with codes, and one each of the other loops: bf16 alone, and what may belong to any parameter
STEPPED = [
    *(pytest.param(name, {"state": "int8"}, id=name) for name in STEPS),
    pytest.param("adam_step", {"state": "bf16"}, id="bf16"),
    pytest.param("sgd_step", {"momentum": False, "master": "split", "ema": True, "mask": True}, id="the-rest"),
]


def lengthened(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` behind zeros, so many that a parameter has COUNT elements; a count of steps as it is."""
    if tensor.numel() == TAIL:
        whole = testing.folded(COUNT, tensor.dtype)
        whole[-TAIL:] = tensor.view(-1)
        return whole
    if tensor.dim() == 2:
        return torch.nn.functional.pad(tensor, ((COUNT - TAIL) // moments.BLOCK, 0))
    return tensor.clone()


def both(spec: OpSpec, options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The arguments of an op on one parameter of TAIL elements, and on one of COUNT that ends with those."""
    case = Case({"N": TAIL}, torch.bfloat16, options={**spec.cases.test[0].options, **options})
    short = [arg[:1] if isinstance(arg, list) else arg for arg in spec.make(case, "cpu", 0)]
    return short, [list(map(lengthened, arg)) if isinstance(arg, list) else arg for arg in short]


@pytest.mark.parametrize(("name", "options"), STEPPED)
def test_a_step_past_2_to_the_31(name: str, options: dict[str, Any]) -> None:
    """The last elements end as they do alone, and the others, where all that moves them is 0, as they were."""
    short, long = both(STEPS[name], options)
    before = short[0][0].clone()
    for args in (short, long):
        STEPS[name].entry(*args)
    assert not torch.equal(short[0][0], before)
    for wanted, tensors in zip(short, long, strict=True):
        for end, tensor in zip(wanted, tensors, strict=True) if isinstance(wanted, list) else ():
            if end.numel() == TAIL:
                assert torch.equal(tensor[-TAIL:], end.view(-1))
                assert not tensor[-TAIL - 2**24 : -TAIL].any()  # and with it all that they are folded to
            else:
                assert torch.equal(tensor.view(len(end), -1)[:, -2:] if end.dim() else tensor, end)


@pytest.mark.parametrize(("name", "options"), [("grad_norm", {}), ("lamb_squares", {"state": "int8", "mask": True})])
def test_sums_past_2_to_the_31(name: str, options: dict[str, Any]) -> None:
    wanted, found = (registry.get(name).entry(*args) for args in both(registry.get(name), options))
    assert torch.equal(torch.stack(tuple(found)), torch.stack(tuple(wanted)))
