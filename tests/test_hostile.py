"""Malformed and hostile inputs: one clear line, exit status 2, nothing hung, nothing left, nothing changed."""

import importlib
from pathlib import Path

import hostile
import pytest

for more in hostile.MORE:
    importlib.import_module(more)


@pytest.fixture(scope="module")
def worker():
    worker = hostile.Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("group", hostile.CASES)
def test_hostile_inputs(worker, group, record_property):
    cases = hostile.CASES[group]
    failures = {name: wrong for name in cases if (wrong := worker.run(group, name))}
    assert not failures, "\n".join(f"{name}: {problem}" for name, wrong in failures.items() for problem in wrong)
    refused = sum(not case.works for case in cases.values())
    record_property("count", f"hostile inputs, {group}: {len(cases)} tried, {refused} refused")


def test_readme_knows_how_many():
    count = sum(map(len, hostile.CASES.values()))
    readme = Path(__file__).parents[1] / "README.md"
    assert f"malformed or hostile files: {count:,} headers" in readme.read_text()
