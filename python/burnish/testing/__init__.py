"""The conformance kit: what every op must pass, on every backend that can run, ours and outside authors' alike.

    from burnish import testing

    CHECKS = testing.plan([SPEC]).checks

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
    def test_my_op(check):
        check.run()

    def test_my_op_fuzzed():
        assert testing.fuzz(SPEC, "cpu") >= testing.EXAMPLES

or, without pytest, ``python -m burnish.testing my_op``. Everything is derived from the op's record: its test cases, its
reference (in float64 the oracle, in the inputs' dtype "eager torch"), its surrogate and its bad calls.

===============  ======================================================================================
forward          results against the oracle (rules N1, N2, N4, N5, C4 of :mod:`.numerics`); fake equals real in
                 shape, dtype and strides; inputs unchanged to the byte
unbiased         the signed error averages out (N3)
special          NaN, infinities, -0 and subnormals in every position (N7)
gradient         gradients against the surrogate's; ``gradcheck`` against finite differences in float64;
                 ``double_backward`` is right or refused by name (C2)
guard            inputs read-only between guard pages, uninitialised outputs poisoned with NaN (C5)
long             forward, with each dimension in turn longer than any block of a kernel
layout           any strides and leading dimensions, the same bits; ``huge``: beyond 2**31 elements (C6)
deterministic    run again, and with another number of threads, the same bits; on the CPU also of enough rows for
                 every thread to get some
opcheck          torch.library.opcheck on eight and more input sets a dtype (C1)
compile          torch.compile: one graph, at most one recompile, the bits of eager (C7)
invalid          each bad call of the record raises its message: eager, meta and fake
fuzz             hypothesis, at least 500 examples (C3)
===============  ======================================================================================

An op with an integer result must be bit-exact. Tolerances are in :mod:`.numerics` and nowhere else.
"""

from burnish.testing.calls import EMULATED, SCHEDULES, Violation, backends, eager, oracle, run, stand_in
from burnish.testing.digest import digest
from burnish.testing.fuzz import EXAMPLES, LONG_EXAMPLES, fuzz
from burnish.testing.interpreter import interpreting
from burnish.testing.memory import folded, guarded, lazy, poisoned
from burnish.testing.plan import Check, Plan, plan

__all__ = [
    "EMULATED",
    "EXAMPLES",
    "LONG_EXAMPLES",
    "SCHEDULES",
    "Check",
    "Plan",
    "Violation",
    "backends",
    "digest",
    "eager",
    "folded",
    "fuzz",
    "guarded",
    "interpreting",
    "lazy",
    "oracle",
    "plan",
    "poisoned",
    "run",
    "stand_in",
]
