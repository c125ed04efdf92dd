"""Pruning: masks that make weights zero, in patterns that sparse layers are fast for, and stay through training.

    from burnish import prune

    calibration = burnish.calibrate(model, batches)
    prune.Pruner(model, prune.SecondOrder(), prune.TwoFour(), calibration=calibration).step()

    pruner = prune.Pruner(model, prune.Magnitude(), prune.Block(32), 0.9, schedule=prune.Gradual(0, 1000, 50))
    pruner.step()                # after each step of the optimizer
    print(prune.report(model))   # how sparse each layer is

    prune.masks(model)           # {fqn: mask}, of torch.nn.utils.prune too
    prune.mask_(model, masks)    # given masks, e.g. those of a state_dict, before it is loaded
    prune.remove_(model)         # plain layers with zeros in them
    report = prune.finalize_(model, measure=batch)   # fast layers without their zeros, where they are faster
    prune.channels_(model, example_inputs, 0.5)     # whole channels, by the torch-pruning package

A :class:`Pruner` joins a criterion (:mod:`burnish.prune.criteria`: what a weight is worth), a pattern
(:mod:`burnish.prune.patterns`: which go together), a scope, and a schedule (:mod:`burnish.prune.schedules`: when).
:mod:`burnish.prune.masking` says what a mask is. A sparsity is a share of zeros, 1 minus the density that sparse layers
are configured by.
"""

from burnish.prune.channels import ChannelReport, channels_
from burnish.prune.criteria import Criterion, Magnitude, Wanda
from burnish.prune.finalize import finalize_
from burnish.prune.masking import Mask, mask_, masks, remove_
from burnish.prune.patterns import Block, Pattern, TwoFour, Unstructured
from burnish.prune.pruner import Pruner
from burnish.prune.schedules import Gradual, OneShot, Schedule
from burnish.prune.second_order import SecondOrder
from burnish.prune.sparsity import SparsityReport, report

__all__ = [
    "Block",
    "ChannelReport",
    "Criterion",
    "Gradual",
    "Magnitude",
    "Mask",
    "OneShot",
    "Pattern",
    "Pruner",
    "Schedule",
    "SecondOrder",
    "SparsityReport",
    "TwoFour",
    "Unstructured",
    "Wanda",
    "channels_",
    "finalize_",
    "mask_",
    "masks",
    "remove_",
    "report",
]
