"""`python -m benchmarks [NAME...]`: progress on stderr, then a table, then one JSON object a line for each figure."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PANTALA_BOX_INSTANCE", "8")  # beside a box that the developer runs

IN_A_BOX = ("wake", "create", "deploy", "cli", "memory")
ALONE = ("api", "catalogue", "mesh", "placement", "proxy", "routes", "regions", "trace")
"""These bring what they measure themselves."""
NAMES = IN_A_BOX + ALONE
NEVER_IDLE_S = 3600.0


def main(arguments: list[str]) -> int:
    from benchmarks.figures import Figure, json_line, table
    from pantala.testing.box import running_box

    if unknown := [name for name in arguments if name not in NAMES]:
        sys.stderr.write(f"there is no benchmark {', '.join(unknown)}; there is {', '.join(NAMES)}\n")
        return 2
    figures: list[Figure] = []
    for name in arguments or NAMES:
        if name in ALONE:
            sys.stderr.write(f"==> {name}: measuring\n")
            figures += importlib.import_module(f"benchmarks.{name}").measure()
            continue
        sys.stderr.write(f"==> {name}: a box of its own\n")
        with (
            tempfile.TemporaryDirectory(prefix="pantala-bench-") as work,
            running_box(Path(work), idle_window_s=NEVER_IDLE_S) as box,
        ):
            sys.stderr.write(f"==> {name}: measuring\n")
            figures += importlib.import_module(f"benchmarks.{name}").measure(box)
    sys.stdout.write(f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}\n\n")
    sys.stdout.write(table(figures) + "\n\n")
    sys.stdout.writelines(json_line(figure) + "\n" for figure in figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
