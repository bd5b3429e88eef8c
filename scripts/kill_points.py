"""Kill runs before every operation that changes a file, and resume: the long form of the tests.

    python scripts/kill_points.py --record kills.jsonl          # every point: some hours
    python scripts/kill_points.py --every 10 --every-of-one 50

Prints how many points there were, which checkpoints the runs were resumed from, and what went wrong. What the record
holds already is not run again. With TMPDIR=/dev/shm nothing waits for a disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from kill_points import RUNS, start, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="which (default: all)")
    parser.add_argument("--every", type=int, default=1, help="try every so many points (default: all)")
    parser.add_argument("--every-of-one", type=int, default=1, help="of those where one of two ranks is killed")
    parser.add_argument("--record", type=Path, help="a file that keeps the counts")
    options = parser.parse_args()
    done = {}
    if options.record and options.record.exists():
        lines = map(json.loads, options.record.read_text().splitlines())
        done = {(line["run"], line["rotation"], line["every"], line["every_of_one"]): line["counts"] for line in lines}
    problems = []
    for run in options.runs:
        for rotation in (True, False):
            counts = done.get((run, rotation, options.every, options.every_of_one))
            if counts is None:
                every = ["--every", str(options.every), "--every-of-one", str(options.every_of_one)]
                counts = start(run, *every, *["--rotation"] * rotation)
                line = {"run": run, "rotation": rotation, **vars(options), "counts": counts}
                if options.record:
                    with options.record.open("a") as file:
                        file.write(json.dumps({key: line[key] for key in line if key not in ("runs", "record")}) + "\n")
            print(*summary(run, rotation, counts), sep="\n", flush=True)
            problems += counts["problems"]
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
