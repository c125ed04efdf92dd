"""Triton kernels, one family a package: ``burnish.kernels.quant`` and so on.

Their sources lie in the repository's top-level ``kernels/`` folder and are mapped here by the build. A family is
imported when an op first picks its Triton implementation; importing this package needs nothing.
"""
