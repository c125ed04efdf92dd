"""Sparse kernels: linear layers whose weight is kept in blocks, two of four, or element by element with a bitmap."""
