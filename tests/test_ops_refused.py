"""Bad calls of the public functions that no single record lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from burnish import ops, registry


@pytest.fixture
def linear() -> tuple[Any, ...]:
    """x, weight, scale, bias of a small layer."""
    spec = registry.get("int8_linear")
    return spec.make(spec.cases.test[0], "cpu", 0)[:4]


def test_unknown_activation() -> None:
    for word in ("swish", "GELU", None, 1, ["relu"]):
        with pytest.raises(ValueError, match=r"int8_linear: activation is .*, expected one of: none, relu, gelu, "):
            ops.int8_linear(torch.ones(1, 4), torch.ones(16, 4, dtype=torch.uint8), torch.ones(1), activation=word)


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_devices_are_not_mixed(linear: tuple[Any, ...], argument: int) -> None:
    args = list(linear)
    args[argument] = args[argument].to("meta")
    with pytest.raises(RuntimeError, match=r"int8_linear: \w+ is on (meta|cpu), expected (cpu|meta)"):
        ops.int8_linear(*args)


def test_devices_are_not_mixed_in_backward(linear: tuple[Any, ...]) -> None:
    x, weight, scale, _ = linear
    spec = registry.get("int8_linear_backward")
    dy = torch.ones(x.shape[0], scale.shape[0], device="meta")
    with pytest.raises(RuntimeError, match="int8_linear_backward: weight is on cpu, expected meta"):
        spec.entry(dy, None, weight, scale, None, x.shape[1], 0, False)


@pytest.mark.parametrize("kind", ["sparse", "nested", "list", "none", "numpy"])
def test_what_is_not_a_dense_tensor_is_refused(linear: tuple[Any, ...], kind: str) -> None:
    x, *rest = linear
    strange: Any = {
        "sparse": x.to_sparse(),
        "nested": torch.nested.as_nested_tensor([x, x]),
        "list": x.tolist(),
        "none": None,
        "numpy": "x",
    }[kind]
    with pytest.raises((RuntimeError, TypeError, AttributeError), match=r"int8_linear|requires_grad"):
        ops.int8_linear(strange, *rest)


def test_a_weight_for_the_gpu_is_refused_on_the_cpu(linear: tuple[Any, ...]) -> None:
    x, _, scale, bias = linear
    rows = ops.int8_linear_pack(torch.ones(scale.shape[0], x.shape[1], dtype=torch.int8), "rows")
    with pytest.raises(RuntimeError, match="int8_linear: weight is int8, expected uint8"):
        ops.int8_linear(x, rows, scale, bias)


def test_k_beyond_the_accumulators_is_refused() -> None:
    k = 131072 + 4
    x, weight = torch.zeros(1, k), torch.zeros(16, k, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"int8_linear: K is {k}, expected at most 131072"):
        ops.int8_linear(x, weight, torch.ones(16))
