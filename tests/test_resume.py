"""A resumed run equals the straight one bit for bit: every averager, in every kind of loop, cut in every way.

`scripts/resumes.py` prints the whole table.
"""

from __future__ import annotations

import pytest
from ranks import once_on_ranks
from resume_runs import ENGINES, NOT_POSSIBLE, ON_TWO, WAYS, averages, equal_cells, write_backs
from write_backs import IGNORED_OF_LIGHTNING

LIBRARIES = {"transformers": "transformers", "Lightning": "lightning.pytorch", "accelerate": "accelerate"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", *IGNORED_OF_LIGHTNING)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_equals_the_straight_one(engine, tmp_path, tmp_path_factory, record_property):
    for library in LIBRARIES.values() if engine in ON_TWO else filter(None, [LIBRARIES.get(engine)]):
        pytest.importorskip(library)
    if engine in ON_TWO:
        _, ranks = once_on_ranks(2, "resume_runs:on_two", tmp_path_factory.getbasetemp())
        results = [rank[engine] for rank in ranks]
    else:
        results = [equal_cells(engine, tmp_path)]
    kept = [*averages(tmp_path), *write_backs(tmp_path)]
    cells = {(name, way) for name in kept for way in WAYS if (engine, name) not in NOT_POSSIBLE}
    for result in results:
        assert result.keys() == cells
        assert [cell for cell, equal in result.items() if not equal] == []
    record_property("count of runs cut and resumed that equal the straight run bit for bit", len(cells))
