"""What the kernel families share: :mod:`tiles` (tile tables, program order), :mod:`numerics` (device helpers, twins of
``csrc/math``), :mod:`philox` (dropout, likewise), :mod:`products` (matrix products of a tile), :mod:`epilogues` (what
follows them), :mod:`planes` (tiles expanded from a packed format), :mod:`operands` (how kernels take matrices),
:mod:`lists` (lists of tensors by their addresses), :mod:`steps`, :mod:`moments` and :mod:`rounding` (optimizers),
:mod:`target` (device properties, safe without a GPU) and :mod:`variants` (what is compiled ahead of time and checked).
"""
