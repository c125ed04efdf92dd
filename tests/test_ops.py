"""The conformance kit over every op of the registry and every backend that this process can run.

``TRITON_INTERPRET=1 pytest tests/test_ops.py`` runs the Triton kernels, and only them, under the repaired interpreter,
``BURNISH_EMULATE_CUDA=1 pytest tests/test_ops.py`` the CUDA kernels, and only them, on the CPU.
"""

from __future__ import annotations

from collections import Counter

import pytest
from burnish import registry, testing

PLAN = testing.plan(registry.all_ops().values())

#: rules that every op has checks of; a stand-in for a GPU cannot do what goes through PyTorch's dispatcher
EVERYWHERE = {"forward", "guard", "deterministic", "layout", "huge", "invalid"}
DISPATCHED = {"opcheck", "compile"}


@pytest.mark.parametrize("check", PLAN.checks, ids=lambda check: check.id)
def test_op(check: testing.Check, record_property) -> None:
    record_property("op", f"{check.spec.stem} on {check.backend}")
    check.run()


def test_every_op_is_checked_by_every_rule() -> None:
    rules = Counter((check.spec.name, check.rule) for check in PLAN.checks)
    stand_in = testing.stand_in()
    wanted = EVERYWHERE if stand_in else EVERYWHERE | DISPATCHED
    for spec in registry.all_ops().values():
        if stand_in and all(impl.backend != stand_in[0] for impl in spec.impls):
            continue
        missing = {rule for rule in wanted if not rules[spec.name, rule]}
        assert not missing, f"{spec.name} has no checks of {missing}"
        cases = rules[spec.name, "forward"] + sum(name.startswith(f"{spec.stem}-") and "-forward-" in name
                                                  for name in PLAN.skipped)  # fmt: skip
        assert cases >= len(spec.cases.test)
        if spec.autograd:
            assert stand_in or rules[spec.name, "gradcheck"]
            assert stand_in == testing.EMULATED or rules[spec.name, "gradient"]
            assert stand_in == testing.EMULATED or rules[spec.name, "double_backward"]


def test_what_is_left_out_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(PLAN.skipped.values())
    with capsys.disabled():
        for reason, count in Counter(PLAN.skipped.values()).items():
            print(f"\nleft out {count}: {reason}", end="")


def test_the_cpu_backend_is_always_tested() -> None:
    if not testing.stand_in():
        assert {check.spec.name for check in PLAN.checks if check.backend == "cpu"} == set(registry.all_ops())
