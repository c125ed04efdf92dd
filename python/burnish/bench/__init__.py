"""Benchmarks of any registered op: checked, interleaved, from memory, against the limits of the machine.

    from burnish import bench
    plan = bench.Plan(bench.select_cases(["int8_linear"], pattern="M1-*"), rounds=10)
    for row in bench.run(plan).rows:
        print(row.case, row.impl, row.median_us, row.speedup)

An op from another package is timed by the same code as ours. For each case:

1. every contestant is checked against the op's reference; a wrong one becomes a failed row and is not timed;
2. our implementations, the record's declared torch path (``peer:torch``) and the peers are sampled round by round in
   random order, each on argument sets that overflow the last-level cache;
3. the ceilings of the machine are measured in the same rounds, so a row's share of the roofline is judged by what the
   machine could do at that moment.

Rows hold medians with quartiles over rounds. ``run`` needs torch alone; the table wants rich, the chart matplotlib.
"""

from burnish.bench.peers import Peer
from burnish.bench.rows import Results, Row
from burnish.bench.runner import Plan, run, select_cases

__all__ = ["Peer", "Plan", "Results", "Row", "run", "select_cases"]
