"""Layers that hold state and call one function of :mod:`burnish.ops`, or of :mod:`burnish.schemes`."""

from burnish.nn.fused import Fused
from burnish.nn.int8_linear import Int8Linear
from burnish.nn.lora_linear import LoRALinear
from burnish.nn.lowrank_conv2d import LowRankConv2d
from burnish.nn.lowrank_linear import LowRankLinear

__all__ = ["Fused", "Int8Linear", "LoRALinear", "LowRankConv2d", "LowRankLinear"]
