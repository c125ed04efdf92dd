"""Layers that hold state and call one function of :mod:`burnish.ops`, or of :mod:`burnish.schemes`."""

from burnish.nn.block_sparse_linear import BlockSparseLinear
from burnish.nn.fused import Fused
from burnish.nn.int8_linear import Int8Linear
from burnish.nn.lora_linear import LoRALinear
from burnish.nn.lowrank_conv2d import LowRankConv2d
from burnish.nn.lowrank_linear import LowRankLinear
from burnish.nn.sparse24_linear import Sparse24Linear
from burnish.nn.sparse_conv2d import SparseConv2d
from burnish.nn.sparse_linear import SparseLinear

__all__ = [
    "BlockSparseLinear",
    "Fused",
    "Int8Linear",
    "LoRALinear",
    "LowRankConv2d",
    "LowRankLinear",
    "Sparse24Linear",
    "SparseConv2d",
    "SparseLinear",
]
