"""Rule C3: at least 500 fuzzed examples an op and backend, 20 000 with ``--fuzz=long``."""

from __future__ import annotations

import pytest
from burnish import registry, testing

PAIRS = [(spec, backend) for spec in registry.all_ops().values() for backend in testing.backends(spec)[0]]


@pytest.mark.parametrize(("spec", "backend"), PAIRS, ids=[f"{spec.stem}-{backend}" for spec, backend in PAIRS])
def test_fuzzed(spec: registry.OpSpec, backend: registry.Backend, fuzz_examples: int, record_property) -> None:
    record_property("op", f"{spec.stem} on {backend}, fuzzed")
    assert testing.fuzz(spec, backend, fuzz_examples) >= fuzz_examples
