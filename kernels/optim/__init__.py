"""The optimizers' steps and the norm of their gradients, over lists of tensors."""
