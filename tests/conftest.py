"""What tests have counted is printed at the end.

``record_property("count", text)`` prints a line, and ``record_property("count of <things>", number)`` adds to one.
"""

from __future__ import annotations

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    lines: list[str] = []
    sums: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "count":
                lines.append(value)
            elif name.startswith("count of "):
                sums[name.removeprefix("count of ")] += value
    lines += [f"{things}: {number}" for things, number in sums.items()]
    if lines:
        terminalreporter.section("counted")
        for line in lines:
            terminalreporter.write_line(line)
