"""Is the embedded model ready within a bare `import torch` + 3 s? Both are measured in turns.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
from typing import Any

import msgspec

from common import Options, Results, find_model, script_options
from penstock.workbench.bench.compare import paired_difference
from penstock.workbench.bench.startup import measure_startup

LIMIT_S = 3.0


@script_options
def main(options: Options) -> None:
    """Time from exec to the first 200 of /health/ready, against a bare `import torch`."""
    results = Results("startup", options)
    rows = [["model", "ready s", "import torch s", "difference s (median, range)", f"within {LIMIT_S:.0f} s"]]
    for name in options.choose("stories"):

        def measure(name: str = name) -> Any:
            command = find_model(name, options).serve_command()
            rounds = options.repeat(7, quick=2)
            return measure_startup(command, rounds, on_run=lambda what, s: print(f"  {what:7} {s:6.2f} s", flush=True))

        data = msgspec.to_builtins(results.section(name, measure))
        difference = paired_difference(data["server_s"], data["torch_s"])
        medians = [f"{statistics.median(data[key]):.2f}" for key in ("server_s", "torch_s")]
        rows.append([name, *medians, difference.text(2), difference.below(LIMIT_S)])
    results.publish(rows, ["One unmeasured start of each comes first, so files are in the page cache."])


if __name__ == "__main__":
    main()
