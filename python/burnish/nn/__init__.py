"""Layers that hold state and call one function of :mod:`burnish.ops`."""

from burnish.nn.fused import Fused
from burnish.nn.int8_linear import Int8Linear
from burnish.nn.lora_linear import LoRALinear

__all__ = ["Fused", "Int8Linear", "LoRALinear"]
