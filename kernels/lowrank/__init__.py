"""Low-rank kernels: the product with two thin matrices, and a frozen layer with a low-rank adapter, both ways."""
