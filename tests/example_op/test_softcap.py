"""What the author of an op writes to test it: burnish's conformance kit does the rest."""

import pytest
import softcap_ops
import torch
from burnish import testing

CHECKS = testing.plan([softcap_ops.SPEC, softcap_ops.BACKWARD]).checks


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_conformance(check: testing.Check) -> None:
    check.run()


@pytest.mark.parametrize("spec", [softcap_ops.SPEC, softcap_ops.BACKWARD], ids=["forward", "backward"])
def test_fuzzed(spec) -> None:
    assert testing.fuzz(spec, "cpu") >= testing.EXAMPLES


def test_the_public_function_keeps_logits_within_the_cap() -> None:
    x = torch.linspace(-1000, 1000, 101, requires_grad=True)
    y = softcap_ops.softcap(x, 30.0)
    assert y.abs().max() <= 30
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[50] == 1
