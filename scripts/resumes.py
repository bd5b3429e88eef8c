"""Cut runs with every averager in every kind of loop, resume them, and print which equal the straight run bit for bit.

python scripts/resumes.py                   # the table, as the tests check it
python scripts/resumes.py --engine transformers "Lightning FSDP2"
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ranks import on_ranks
from resume_runs import ENGINES, NOT_POSSIBLE, ON_TWO, WAYS, equal_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=[*ENGINES], help="which loops (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    count = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        two: list[dict[str, dict[tuple[str, str], bool]]] = []
        for engine in options.engine:
            if engine in ON_TWO:
                two = two or on_ranks(2, "resume_runs:on_two", Path(folder))
                ranks = [rank[engine] for rank in two]
            else:
                ranks = [equal_cells(engine, Path(folder) / engine.replace(" ", "-"))]
            for name in dict.fromkeys(name for name, _ in ranks[0]):
                for way in WAYS:
                    equal = all(rank[name, way] for rank in ranks)
                    count, failed = count + 1, failed + (not equal)
                    print(f"{engine:16} {name:13} {way:27} {'equal' if equal else 'DIFFERENT'}", flush=True)
            for (which, name), reason in NOT_POSSIBLE.items():
                if which == engine:
                    print(f"{engine:16} {name:13} {'no such run':27} {reason}")
    print(f"{count - failed} of {count} resumed runs equal the straight one bit for bit")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
