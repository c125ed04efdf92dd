"""Optimizers that do everything in one pass over memory: unscale, clip, step, average, round.

    optimizer = burnish.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

    optimizer = burnish.optim.AdamW(
        model.named_parameters(), state_dtype="int8", master_weights="split", ema_decay=0.999, masks=prune.masks(model)
    )
    with optimizer.swap_ema():
        evaluate(model)

The classes take the keywords of torch.optim, in its order and with its meaning, and are optimizers of torch: hooks,
schedulers, GradScaler, DDP, FSDP2 and torch.distributed.checkpoint work as with those, and a ``state_dict`` goes to and
from torch.optim, to it without int8 moments. What is burnish's own is by keyword: see
:class:`burnish.optim.options.Extras`.
:class:`burnish.optim.fused.FusedOptimizer` says what a step checks, does and leaves alone.
"""

from burnish.optim.adagrad import Adagrad
from burnish.optim.adam import Adam, AdamW
from burnish.optim.fused import FusedOptimizer
from burnish.optim.lamb import LAMB
from burnish.optim.lion import Lion
from burnish.optim.rmsprop import RMSprop
from burnish.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "FusedOptimizer", "Lion", "RMSprop"]
