"""Bad calls, configurations and states of sparse layers: one exception that says what came and what was meant."""

from __future__ import annotations

import json
import math

import pytest
import torch
from burnish import BlockSparse, Int8, LowRank, PatternError, Sparse, Sparse24
from burnish.nn import BlockSparseLinear, Int8Linear, Sparse24Linear, SparseConv2d, SparseLinear
from sparse_models import KINDS, fresh, pair, pruned
from torch import nn


def spoiled(value: float = math.nan) -> nn.Linear:
    module = nn.Linear(8, 4)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[2, 5] = value
    return module


def masked(*kept: tuple[int, int]) -> nn.Linear:
    mask = torch.zeros(32, 32)
    for place in kept:
        mask[place] = 1
    return nn.utils.prune.custom_from_mask(nn.Linear(32, 32), "weight", mask)


BLOCK, TWO_FOUR, ANY = BlockSparseLinear.from_float, Sparse24Linear.from_float, SparseLinear.from_float
CONV = SparseConv2d.from_float

BAD_CALLS = {
    "in_features": (lambda: Sparse24Linear(0, 4), ValueError, "Sparse24Linear: in_features is 0, expected an int"),
    "out_features": (lambda: SparseLinear(4, 2.0, density=1), ValueError, "out_features is 2.0, expected an integer"),
    "bool": (lambda: SparseLinear(True, 2, density=1), ValueError, "in_features is True, expected an integer"),
    "density missing": (lambda: BlockSparseLinear(4, 4), TypeError, "density"),
    "density zero": (lambda: SparseLinear(8, 4, density=0), ValueError, "density is 0, expected 0 < density <= 1"),
    "density above": (lambda: BlockSparseLinear(8, 4, density=1.1), ValueError, "density is 1.1, expected 0 < density"),
    "density text": (lambda: SparseLinear(8, 4, density="half"), TypeError, "density is 'half', expected a number"),
    "density NaN": (lambda: SparseLinear(8, 4, density=math.nan), ValueError, "density is nan, expected 0 < density"),
    "block": (lambda: BlockSparseLinear(8, 4, density=1, block=8), ValueError, "block is 8, expected 16, 32, 64, 128,"),
    "values": (lambda: Sparse24Linear(8, 4, values="int4"), ValueError, "values is 'int4', expected one of: float, in"),
    "dtype": (lambda: Sparse24Linear(8, 4, dtype=torch.double), TypeError, "dtype is fp64, expected fp32, bf16 or"),
    "module": (lambda: TWO_FOUR(nn.Conv2d(8, 8, 1)), TypeError, "the module is Conv2d, expected nn.Linear or trans"),
    "twice": (lambda: ANY(SparseLinear(8, 4, density=0.5)), TypeError, "the module is SparseLinear, expected nn.Lin"),
    "config": (lambda: BLOCK(nn.Linear(8, 4), 32), TypeError, "config is 32, expected a burnish.BlockSparse"),
    "other config": (lambda: ANY(nn.Linear(8, 4), Int8()), TypeError, r"config is Int8\(.*expected a burnish.Sparse"),
    "double": (lambda: ANY(nn.Linear(8, 4).double()), TypeError, "from_float: dtype is fp64, expected fp32, bf16"),
    "meta": (lambda: ANY(nn.Linear(8, 4, device="meta")), ValueError, "the weight is on the meta device and has"),
    "NaN": (lambda: ANY(spoiled()), ValueError, "NaN or Inf in 1 of 32 places, first in row 2, column 5: whether to"),
    "Inf": (lambda: BLOCK(spoiled(math.inf)), ValueError, "NaN or Inf in 1 of 32 places, first in row 2, column 5"),
    "not 2:4": (
        lambda: TWO_FOUR(nn.Linear(16, 4)), PatternError,
        "not 2:4 along K: row 0, group 0 has 4 non-zeros, 16 of 16 groups have more than two; prune it first with burn",
    ),
    "mask not 2:4": (
        lambda: TWO_FOUR(masked((3, 28), (3, 29), (3, 31))), PatternError, "row 3, group 7 has 3 kept weights, 1 of",
    ),
    "mask not of blocks": (
        lambda: BLOCK(masked((3, 28)), BlockSparse(16)), PatternError,
        "its mask is not one of 16x16 blocks: it leaves out row 0, column 16 of a block that it keeps",
    ),
    "dense for a density": (
        lambda: BLOCK(nn.Linear(64, 64), BlockSparse(16, density=0.5)), PatternError,
        "100 % of its blocks have non-zeros, more than the density of 50 %; prune it further",
    ),
    "weights for a density": (
        lambda: ANY(pruned(Sparse()), Sparse(density=0.1)), PatternError, r"\d % of its weights have non-zeros, more",
    ),
    "x width": (lambda: fresh("block")(torch.zeros(2, 71)), RuntimeError, r"x has shape \(2, 71\), expected \[..., 7"),
    "x scalar": (lambda: fresh("any")(torch.zeros(())), RuntimeError, r"x has shape \(\), expected \[..., 70\]"),
    "x dtype": (lambda: fresh("2:4")(torch.zeros(2, 70).half()), RuntimeError, "expected fp16 as x is"),
    "x int": (lambda: fresh("2:4 int8")(torch.zeros(2, 70).int()), RuntimeError, "x is int32, expected fp32"),
    "conv groups": (lambda: SparseConv2d(8, 8, 3, groups=2, density=1), ValueError, "groups is 2, expected 1"),
    "conv from groups": (lambda: CONV(nn.Conv2d(8, 8, 3, groups=2)), ValueError, "the module has 2 groups, expected 1"),
    "conv module": (lambda: CONV(nn.Linear(8, 4)), TypeError, "the module is Linear, expected nn.Conv2d"),
    "conv arguments": (lambda: SparseConv2d(8, 8, 3, padding="full", density=1), ValueError, "Invalid padding string"),
}  # fmt: skip


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_are_refused(label: str) -> None:
    call, kind, match = BAD_CALLS[label]
    with pytest.raises(kind, match=match):
        call()


BAD_CONFIGS = {
    "block size": (lambda: BlockSparse(48), ValueError, "BlockSparse: block is 48, expected 16, 32, 64, 128"),
    "block pair": (lambda: BlockSparse((16, 1)), ValueError, r"block is \(16, 1\), expected"),
    "block float": (lambda: BlockSparse(32.5), ValueError, "block is 32.5, expected"),
    "block text": (lambda: BlockSparse("32"), ValueError, "block is '32', expected"),
    "density zero": (
        lambda: BlockSparse(density=0),
        ValueError,
        "BlockSparse: density is 0, expected 0 < density <= 1",
    ),
    "density above": (lambda: Sparse(1.5), ValueError, "Sparse: density is 1.5, expected 0 < density <= 1, the share"),
    "density percent": (lambda: Sparse(density=50), ValueError, "density is 50, expected 0 < density <= 1"),
    "density bool": (lambda: Sparse(density=True), TypeError, "density is True, expected a number"),
    "values": (lambda: BlockSparse(values="fp8"), ValueError, "values is 'fp8', expected one of: float, int8"),
    "2:4 values": (lambda: Sparse24(values=8), ValueError, "Sparse24: values is 8, expected one of: float, int8"),
}


@pytest.mark.parametrize("label", BAD_CONFIGS)
def test_bad_configurations_are_refused(label: str) -> None:
    call, kind, match = BAD_CONFIGS[label]
    with pytest.raises(kind, match=match):
        call()


def test_configurations_are_values() -> None:
    for config in (BlockSparse(), BlockSparse((4, 16), 0.5, "int8"), Sparse24("int8"), Sparse(), Sparse(density=0.1)):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(type(config).from_dict(json.loads(json.dumps(config.to_dict()))))
    assert BlockSparse((32, 32)) == BlockSparse(32)
    assert BlockSparse(32).sides == (32, 32)
    with pytest.raises(ValueError, match="unknown options: ratio"):
        Sparse.from_dict({**Sparse().to_dict(), "ratio": 2})


#: name of the layer, what is done to its state, what is said
BAD_STATES = {
    "another nnz": (
        "block",
        lambda s: s.update(values=s["values"][:-1]),
        "values has shape .*, expected .*burnish.load",
    ),
    "columns": ("block", lambda s: s["col_indices"].__setitem__(0, 99), "to 99, expected 0 to 4"),
    "columns below": ("conv", lambda s: s["col_indices"].__setitem__(0, -1), "col_indices are -1 to"),
    "columns fall": ("block", lambda s: s["col_indices"].fill_(1), "col_indices of row of blocks .* must ascend"),
    "rows": ("block", lambda s: s["crow_indices"].__setitem__(0, 1), "crow_indices must run from 0 to"),
    "rows fall": ("block", lambda s: s["crow_indices"].__setitem__(1, 99), "crow_indices must run from 0 to"),
    "padding": ("block", lambda s: s["values"].fill_(1), "values has something beyond the weight of 37 x 70"),
    "index dtype": ("block", lambda s: s.update(crow_indices=s["crow_indices"].long()), "is int64, expected int32"),
    "float for int8": ("block int8", lambda s: s.update(values=s["values"].float()), "values is fp32, expected int8"),
    "int8 for float": ("2:4", lambda s: s.update(values=s["values"].to(torch.int8)), "int8, expected floating-point"),
    "positions": (
        "2:4",
        lambda s: s["metadata"].__setitem__((3, 2), 0x45),
        "metadata is 69 at row 3, byte 2, expected",
    ),
    "positions high": ("2:4 int8", lambda s: s["metadata"].__setitem__((3, 2), 0x54), "metadata is 84 at row 3, byte"),
    "bits beyond": ("any", lambda s: s["bitmap"].__setitem__((2, 15), 128), "bitmap has bits beyond the 70 inputs"),
    "bits": (
        "any",
        lambda s: s["bitmap"].__setitem__((0, 1), 3),
        "row_starts has 0 and 0 for row 0, whose bitmap keeps 2",
    ),
    "starts": ("any", lambda s: s["row_starts"].add_(1), "row_starts has 1 and 1 for row 0"),
    "bitmap dtype": ("any", lambda s: s.update(bitmap=s["bitmap"].int()), "bitmap is int32, expected uint8"),
    "newer": ("2:4", lambda s: s._metadata[""].update(version=2), "state of version 2, this burnish reads up to 1"),
}


@pytest.mark.parametrize("label", BAD_STATES)
def test_bad_states_are_refused_and_load_nothing(label: str) -> None:
    name, spoil, match = BAD_STATES[label]
    _, layer, x = pair(name)
    before = layer(x)
    state = layer.state_dict()
    state.update({key: value.clone() for key, value in state.items()})
    spoil(state)
    with pytest.raises(RuntimeError, match=match):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("inputs", [65, 66, 68])
def test_values_beyond_the_inputs_are_refused(inputs: int) -> None:
    layer = Sparse24Linear(inputs, 3)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.equal(layer.to_dense(), Sparse24Linear.from_float(layer.to_float()).to_dense())
    state["metadata"][:, -1] = 0xEE  # the last two of each group
    state["values"][1] = 1
    with pytest.raises(RuntimeError, match=f"values has something beyond the {inputs} inputs, expected zeros"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("name", KINDS)
def test_a_float_state_is_refused(name: str) -> None:
    dense, layer, _ = pair(name)
    with pytest.raises(RuntimeError, match=r'Missing key.*"values"(.|\n)*Unexpected key.*"weight"'):
        layer.load_state_dict(dense.state_dict())


def test_other_layers_do_not_take_these_configurations() -> None:
    for call, match in (
        (lambda: Int8Linear.from_float(fresh("2:4")), "the module is Sparse24Linear"),
        (lambda: BLOCK(fresh("2:4")), "the module is Sparse24Linear"),
        (lambda: ANY(nn.Linear(8, 4), LowRank(rank=2)), "config is LowRank"),
    ):
        with pytest.raises(TypeError, match=match):
            call()
