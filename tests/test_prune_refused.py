"""What cannot be pruned is refused in one clear sentence, before any work, and a failure changes nothing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import burnish
import pytest
import torch
from burnish import Calibration, prune
from burnish.calibration import Inputs
from burnish.prune.masking import parameter_of
from swap_models import IDS, Model, same, snapshot
from torch import nn
from torch.nn.utils import prune as torch_prune


def pruner(model: Any, criterion: Any = None, pattern: Any = None, sparsity: Any = 0.5, **options: Any) -> prune.Pruner:
    return prune.Pruner(model, criterion or prune.Magnitude(), pattern or prune.Unstructured(), sparsity, **options)


def tied(model: Model) -> Model:
    model.head.weight = model.embed.weight
    return model


def normed(model: Model) -> Model:
    torch.nn.utils.parametrizations.weight_norm(model.head)
    return model


def hooked(model: Model) -> Model:
    torch.nn.utils.weight_norm(model.head)
    return model


def with_value(model: Model, value: float) -> Model:
    with torch.no_grad():
        model.blocks[1].mlp[2].weight[3, 1] = value
    return model


def masked(model: Model) -> Model:
    pruner(model).step()
    return model


def torch_masked(model: Model) -> Model:
    torch_prune.l1_unstructured(model.head, "weight", 0.3)
    return model


def swapped(model: Model) -> Model:
    burnish.swap_(model, burnish.Int8())
    return model


def adapted(model: Model) -> Model:
    burnish.swap_(model, burnish.LoRA(r=2))
    return model


def sharded(model: Model) -> Model:
    class Shard(nn.Parameter):
        pass

    model.head.weight = Shard(model.head.weight.detach())
    return model


def lacking(fqn: str) -> Calibration:
    whole = burnish.calibrate(Model(), [IDS])
    return Calibration({name: whole[name] for name in whole if name != fqn})


def wrong(moment: torch.Tensor) -> Calibration:
    return Calibration({**burnish.calibrate(Model(), [IDS]), "head": Inputs(moment, 40)})


def indefinite() -> Calibration:
    return wrong(torch.ones(32, 32) - 2 * torch.eye(32))


GRADUAL = prune.Gradual(0, 10)
BAD = {
    "model": (lambda m: pruner("model"), TypeError, "model is a str, expected an nn.Module"),
    "criterion": (lambda m: pruner(m, "l1"), TypeError, r"criterion is a str, expected Magnitude\(\), Wanda\(\) or"),
    "class": (lambda m: pruner(m, prune.Wanda), TypeError, "criterion is the class Wanda, expected"),
    "pattern": (lambda m: pruner(m, pattern=4), TypeError, r"pattern is a int, expected Unstructured\(\), TwoFour"),
    "schedule": (lambda m: pruner(m, schedule="cubic"), TypeError, r"schedule is a str, expected OneShot\(\) or Grad"),
    "calibration kind": (lambda m: pruner(m, calibration={}), TypeError, "calibration is a dict, expected the result"),
    "scope": (lambda m: pruner(m, scope="all"), ValueError, "scope is 'all', expected 'local' or 'global'"),
    "one": (lambda m: pruner(m, sparsity=1.0), ValueError, r"sparsity is 1.0, expected a share of zeros in \[0, 1\)"),
    "negative": (lambda m: pruner(m, sparsity=-0.1), ValueError, "sparsity is -0.1, expected a share of zeros"),
    "nan share": (lambda m: pruner(m, sparsity=math.nan), ValueError, "sparsity is nan, expected a share of zeros"),
    "percent": (lambda m: pruner(m, sparsity=50), ValueError, "sparsity is 50, expected a share of zeros"),
    "text share": (lambda m: pruner(m, sparsity="half"), TypeError, "sparsity is 'half', expected a number"),
    "bool share": (lambda m: pruner(m, sparsity=True), TypeError, "sparsity is True, expected a number"),
    "no share": (lambda m: pruner(m, sparsity=None), TypeError, "sparsity is missing, expected .* for unstructured"),
    "no rules": (lambda m: pruner(m, sparsity={}), ValueError, "sparsity is an empty mapping"),
    "rule key": (lambda m: pruner(m, sparsity={3: 0.5}), TypeError, "sparsity has the key 3, expected a glob"),
    "rule share": (lambda m: pruner(m, sparsity={"*": 2}), ValueError, r"sparsity of '\*' is 2, expected a share"),
    "rule regex": (lambda m: pruner(m, sparsity={"re:(": 0.5}), ValueError, r"sparsity of 're:\(': not a regular exp"),
    "rule typo": (
        lambda m: pruner(m, sparsity={"haed": 0.5}), ValueError, "'haed' decides no layer; layers that come near: 'hea"
    ),
    "rule shadowed": (
        lambda m: pruner(m, sparsity={"*": 0.5, "head": 0.1}), ValueError,
        "'head' decides no layer; those it matches are decided by patterns before it",
    ),
    "rules global": (
        lambda m: pruner(m, sparsity={"*": 0.5}, scope="global"), ValueError, "scope is 'global' and sparsity a map",
    ),
    "filter": (lambda m: pruner(m, filter_fn=lambda *_: False), ValueError, "filter_fn accepts none of 13 layers"),
    "no layers": (lambda m: pruner(nn.ReLU()), ValueError, "the model has no linear or convolution layer"),
    "2:4 share": (lambda m: pruner(m, pattern=prune.TwoFour(), sparsity=0.6), ValueError, "0.6, and 2:4 has 0.5 alone"),
    "2:4 schedule": (
        lambda m: pruner(m, pattern=prune.TwoFour(), schedule=GRADUAL), ValueError, "2:4 has one sparsity, 0.5, which",
    ),
    "2:4 global": (
        lambda m: pruner(m, pattern=prune.TwoFour(), scope="global"), ValueError, "2:4 takes 0.5 of every layer",
    ),
    "2:4 narrow": (
        lambda m: pruner(nn.Linear(2, 9), pattern=prune.TwoFour()), ValueError, "it has 2 columns, and 2:4 zeroes none",
    ),
    "one weight": (lambda m: pruner(nn.Linear(1, 1)), ValueError, "layer '' cannot .* unstructured: it has one weight"),
    "one block": (
        lambda m: pruner(m, pattern=prune.Block(64)), ValueError,
        "'blocks.0.q' .* blocks of 64 x 64: it has 32 x 32 weights, a single block",
    ),
    "wanda global": (
        lambda m: pruner(m, prune.Wanda(), scope="global"), ValueError, "Wanda says what a weight does to its own",
    ),
    "second order global": (
        lambda m: pruner(m, prune.SecondOrder(), scope="global"), ValueError, "use 'local', or Magnitude",
    ),
    "no calibration": (
        lambda m: pruner(m, prune.Wanda()), ValueError, "calibration is None and Wanda looks at inputs, expected",
    ),
    "layer lacking": (
        lambda m: pruner(m, prune.SecondOrder(), calibration=lacking("blocks.1.k")), ValueError,
        "calibration has nothing of layer 'blocks.1.k', which SecondOrder needs",
    ),
    "other model": (
        lambda m: pruner(m, prune.Wanda(), calibration=wrong(torch.eye(7))), ValueError,
        r"a moment \(7, 7\) for layer 'head', expected 32 x 32 for its inputs: it is of another model",
    ),
    "calibration device": (
        lambda m: pruner(m, prune.Wanda(), calibration=burnish.calibrate(Model(), [IDS]).to("meta")), ValueError,
        r"calibration is on meta and layer 'blocks.0.q' on cpu: call calibration.to\('cpu'\)",
    ),
    "indefinite": (
        lambda m: pruner(m, prune.SecondOrder(), calibration=indefinite()).step(), ValueError,
        "damping is 0.01, too little for this calibration",
    ),
    "gradual start": (
        lambda m: pruner(m, schedule=prune.Gradual(0, 4, initial=0.6)), ValueError,
        "initial is 0.6, expected at most the final sparsity, 0.5",
    ),
    "nan": (
        lambda m: pruner(m), ValueError, "layer 'blocks.1.mlp.2' has NaN or infinite weights",
    ),
    "infinity": (lambda m: pruner(m), ValueError, "layer 'blocks.1.mlp.2' has NaN or infinite"),
    "twice": (
        lambda m: pruner(m, sparsity=0.2), ValueError,
        r"layer 'blocks.0.q' .* it has a mask already, 50.0% zero: call burnish.prune.remove_\(model\)",
    ),
    "other pattern": (lambda m: pruner(m, pattern=prune.Block(8)), ValueError, "it has a mask already, 50.0%"),
    "torch's mask": (lambda m: pruner(m), ValueError, "layer 'head' .* it has a mask already, 30.0% zero"),
    "tied": (
        lambda m: pruner(m), ValueError, "'head' .* its weight is shared by 'embed.weight' and 'head.weight', and",
    ),
    "parametrized": (lambda m: pruner(m), ValueError, "'head' .* its weight is parametrized: remove the param"),
    "hook": (lambda m: pruner(m), ValueError, r"its weight is computed by a hook \(weight or spectral norm\)"),
    "meta": (lambda m: pruner(m), ValueError, "'blocks.0.q' .* on the meta device and has no values"),
    "lazy": (lambda m: pruner(nn.Sequential(nn.LazyLinear(4))), ValueError, "'0' .* it is lazy and has no shape yet"),
    "sharded": (lambda m: pruner(m), ValueError, "'head' .* is a Shard, not a plain parameter: prune before"),
    "complex": (lambda m: pruner(nn.Linear(4, 4, dtype=torch.complex64)), ValueError, "its weight is complex64"),
    "empty": (lambda m: pruner(nn.Linear(4, 0)), ValueError, r"its weight has no elements: shape \(0, 4\)"),
    "int8": (lambda m: pruner(m), ValueError, "layers are swapped, 'blocks.0.q' to Int8Linear: prune before swapping"),
    "lora": (lambda m: pruner(m), ValueError, "layers are swapped, 'blocks.0.q' to LoRALinear: prune before swapping"),
    "state": (
        lambda m: pruner(m).load_state_dict({"step": 3}), ValueError, r"state is {'step': 3}, expected {'steps': a num",
    ),
    "mask_ model": (lambda m: prune.mask_(3, {}), TypeError, "mask_: model is a int, expected an nn.Module"),
    "mask_ masks": (lambda m: prune.mask_(m, [1]), TypeError, "masks is a list, expected a mapping"),
    "mask_ none": (lambda m: prune.mask_(m, {}), ValueError, "mask_: masks is empty, expected at least one"),
    "mask_ name": (lambda m: mask_(m, haed=torch.ones(2) > 0), ValueError, "no linear or convolution layer 'haed'"),
    "mask_ dtype": (lambda m: mask_(m, head=torch.ones(50, 32)), TypeError, "'head' is torch.float32, expected a bool"),
    "mask_ shape": (
        lambda m: mask_(m, head=torch.ones(32, 50) > 0), ValueError, r"is \(32, 50\) on cpu, expected \(50, 32\) on",
    ),
    "mask_ device": (
        lambda m: mask_(m, head=torch.ones(50, 32, device="meta") > 0), ValueError, r"is \(50, 32\) on meta, expected",
    ),
    "mask_ twice": (
        lambda m: mask_(m, head=torch.ones(50, 32) > 0), ValueError, "'head' cannot be masked: it has a mask",
    ),
    "masks": (lambda m: prune.masks(3), TypeError, "masks: source is a int, expected an nn.Module or a state_dict"),
    "report": (lambda m: prune.report([m]), TypeError, "report: model is a list, expected an nn.Module"),
    "remove_ model": (lambda m: prune.remove_([m]), TypeError, "remove_: model is a list, expected an nn.Module"),
    "remove_ none": (lambda m: prune.remove_(m), ValueError, "remove_: the model has no masks, expected one that"),
    "p": (lambda m: prune.Magnitude(3), ValueError, "Magnitude: p is 3, expected 1 or 2"),
    "damping": (lambda m: prune.SecondOrder(0), ValueError, "SecondOrder: damping is 0, expected a finite number"),
    "damping text": (lambda m: prune.SecondOrder("1"), TypeError, "SecondOrder: damping is '1', expected a number"),
    "columns": (lambda m: prune.SecondOrder(block_size=0), ValueError, "block_size is 0, expected at least 1 column"),
    "columns text": (lambda m: prune.SecondOrder(block_size=1.5), TypeError, "block_size is 1.5, expected a number of"),
    "block zero": (lambda m: prune.Block(0), ValueError, "Block: shape is 0, expected a whole number of at least 1"),
    "block sides": (lambda m: prune.Block((1, 2, 3)), ValueError, r"Block: shape is \(1, 2, 3\), expected a whole num"),
    "block none": (lambda m: prune.Block(()), ValueError, r"Block: shape is \(\), expected a whole number"),
    "block text": (lambda m: prune.Block("32"), TypeError, "Block: shape is '32', expected a whole number"),
    "block half": (lambda m: prune.Block((1, 2.0)), TypeError, r"Block: shape is \(1, 2.0\), expected a whole number"),
    "end": (lambda m: prune.Gradual(5, 5), ValueError, "start is 5 and end 5, expected 0 <= start < end"),
    "start": (lambda m: prune.Gradual(-1, 5), ValueError, "start is -1 and end 5, expected 0 <= start < end"),
    "steps": (lambda m: prune.Gradual(0, 5.0), TypeError, "Gradual: end is 5.0, expected a number of steps"),
    "frequency": (lambda m: prune.Gradual(0, 5, 2), ValueError, "frequency is 2, expected .* divides .*, which is 5"),
    "initial": (lambda m: prune.Gradual(0, 5, initial=1), ValueError, "Gradual: initial is 1, expected a share"),
}  # fmt: skip


#: what is done to the model first
PREPARED = {
    "nan": partial(with_value, value=math.nan), "infinity": partial(with_value, value=-math.inf), "twice": masked,
    "other pattern": masked, "torch's mask": torch_masked, "tied": tied, "parametrized": normed, "hook": hooked,
    "sharded": sharded, "int8": swapped, "lora": adapted, "mask_ twice": masked, "meta": lambda m: m.to("meta"),
}  # fmt: skip


def mask_(model: nn.Module, **masks: Any) -> None:
    prune.mask_(model, masks)


@pytest.mark.parametrize("label", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_refused_and_changes_nothing(label: str) -> None:
    call, kind, match = BAD[label]
    model = PREPARED.get(label, lambda m: m)(Model())
    before = snapshot(model)
    with pytest.raises(kind, match=match) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    if label != "meta":
        assert same(before, snapshot(model))


def test_every_preparation_is_of_a_case() -> None:
    assert PREPARED.keys() <= BAD.keys()


def test_weights_that_become_nan_stop_a_schedule_where_it_was() -> None:
    model = Model()
    pruning = pruner(model, schedule=prune.Gradual(0, 4))
    assert pruning.step()
    with torch.no_grad():
        parameter_of(model.head)[0].fill_(math.nan)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'head' has NaN or infinite weights"):
        pruning.step()
    assert same(before, snapshot(model))
    assert pruning.steps == 1


def test_layers_that_were_exchanged_stop_a_schedule() -> None:
    model = Model()
    pruning = pruner(model, schedule=prune.Gradual(0, 4))
    pruning.step()
    model.head = nn.Linear(32, 50)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'head' is a Linear now"):
        pruning.step()
    assert same(before, snapshot(model))


def test_an_interruption_while_masks_are_put_on_takes_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    before = snapshot(model)
    register = torch.nn.utils.parametrize.register_parametrization

    def interrupted(module: nn.Module, *rest: Any) -> nn.Module:
        if module is model.blocks[2].q:
            raise KeyboardInterrupt
        return register(module, *rest)

    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner(model).step()
    assert same(before, snapshot(model))
    assert not prune.masks(model)
    model(IDS).sum().backward()


def test_other_parametrizations_beside_a_mask_are_not_removed() -> None:
    model = masked(Model())
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", nn.Identity())
    with pytest.raises(ValueError, match="layer 'head' has another parametrization beside its mask"):
        prune.remove_(model)
    assert len(prune.masks(model)) == 13


def test_a_share_may_leave_everything_and_never_takes_everything() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for share, zeros in ((0.0, 0), (0.1, 0), (0.999, 3)):
        pruner(model, sparsity=share).step()
        assert [row.zeros for row in prune.report(model).rows] == [zeros] * 2
        prune.remove_(model)
