"""The benchmark of a GPU that is there for minutes: the cases that matter most, in that order, until the time is up.

    python bench/on_gpu.py --seconds 150 --json gpu.json

A case is a row of ``burnish bench --device cuda --peers``, timed alike; what there was no time for is listed. The
JSON file is rewritten after each case, so that what was timed stays when the run is cut off. Peers that compile are
left out: they take longer than all else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from burnish import bench
from burnish.bench import peers, table
from burnish.bench.rows import Results
from burnish.registry import Case, OpSpec

PEERS = ("torch-dense", "torch-frozen", "torch-sequence", "burnish-sequence", "torch-foreach", "torch-int8")
#: op and glob over case ids, the most wanted first
WANTED = (
    ("lora_linear", "M4096-*"),
    ("adam_step", "N768-fp32-transformer"),
    ("bsr_linear", "M4096-*"),
    ("sparse24_linear", "M4096-*"),
    ("lowrank_linear", "M4096-*"),
    ("int8_linear", "M4096-*"),
    ("adam_step", "*-amp-*"),
    ("grad_norm", "N768-fp32-*"),
    ("sparse24_linear", "M1-*bf16*"),
    ("int8_linear", "M1-*"),
    ("lowrank_linear", "M1-*bf16*"),
    ("bsr_linear", "M1-*32x32*"),
    ("sparse_linear", "M1-*bf16*"),
    ("adam_step", "*-stochastic-*"),
    ("lora_linear", "M512-*"),
    ("sparse24_linear", "M512-*"),
    ("bsr_linear", "M512-*"),
    ("lowrank_linear", "M512-*bf16*"),
    ("int8_linear", "M512-*"),
    ("adam_step", "*-thousand"),
    ("int8_linear", "M16-*"),
    ("lora_linear", "M16-*"),
    ("sparse_linear", "M16-*bf16*"),
    ("lowrank_linear", "M16-*bf16*"),
    ("lora_linear_backward", "M4096-*"),
    ("bsr_linear_backward", "M512-*"),
    ("sgd_step", "N768-fp32-momentum-transformer"),
    ("lion_step", "N768-fp32-transformer"),
    ("lamb_step", "N768-fp32-transformer"),
    ("adam_step", "*-bf16-int8-*"),
    ("lowrank_linear_backward", "M512-*"),
    ("sparse24_linear_backward", "M512-*"),
    ("rmsprop_step", "N768-fp32-momentum-transformer"),
    ("adagrad_step", "N768-fp32-transformer"),
    ("int8_linear_backward", "M512-*"),
    ("bsr_linear", "M128-*"),
    ("int8_quantize_rows", "*"),
)


def wanted_cases() -> list[tuple[OpSpec, Case]]:
    """The cases of :data:`WANTED`, in its order."""
    return [pair for op, pattern in WANTED for pair in bench.select_cases([op], pattern=pattern, device="cuda")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="begin no case after so long (default: 150)")
    parser.add_argument("--json", type=Path, required=True, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=7, help="samples a row (default: 7)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    if options.seconds <= 0:
        parser.error(f"--seconds is {options.seconds:g}, expected more than 0")
    began = time.monotonic()
    found, absent = peers.load(Path(__file__).parent / "peers")
    found = [peer for peer in found if peer.name in PEERS]
    cases = wanted_cases()
    rows: list[bench.Row] = []
    ceilings: dict[str, float] = {}
    for index, case in enumerate(cases):
        if time.monotonic() - began > options.seconds:
            print(f"no time for {len(cases) - index} cases: " + ", ".join(f"{s.stem} {c.id}" for s, c in cases[index:]))
            break
        plan = bench.Plan((case,), device="cuda", peers=tuple(found), rounds=options.rounds)
        result = bench.run(plan, absent_peers=absent)
        rows += result.rows
        ceilings |= result.machine["ceilings"]
        result.machine["ceilings"] = ceilings
        options.json.write_text(Results(result.machine, tuple(rows)).to_json())
        print(f"{time.monotonic() - began:6.1f} s  {case[0].stem} {case[1].id}", flush=True)
    table.show(Results(result.machine, tuple(rows)), table.console())


if __name__ == "__main__":
    main()
