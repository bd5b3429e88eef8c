"""Kill runs of both trainers before every operation that changes a file, and resume: the long form of the tests.

    python scripts/kill_points.py             # every point: an hour or so
    python scripts/kill_points.py --every 10

Prints how many points there were, which checkpoints the runs were resumed from, and what went wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from kill_points import RUNS, start, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try every so many points (default: all)")
    options = parser.parse_args()
    problems = []
    for trainer in RUNS:
        for rotation in (True, False):
            counts = start(trainer, "--every", str(options.every), *["--rotation"] * rotation)
            print(summary(trainer, rotation, counts), flush=True)
            problems += counts["problems"]
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
