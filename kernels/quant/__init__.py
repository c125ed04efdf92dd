"""Quantised kernels: int8 row quantisation, weight packing and the int8 linear layer, forward and backward."""
