"""What tests have counted is printed at the end: `record_property("count", text)`."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter):
    counts = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "count"
    ]
    if counts:
        terminalreporter.section("counted")
        for count in counts:
            terminalreporter.write_line(count)
