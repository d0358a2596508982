"""A pytest plugin for mutate.py.

It writes to $BASELINE which lines each test runs, and how long it takes.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from types import FrameType
from typing import Any

import pytest

lines: defaultdict[int, set[str]] = defaultdict(set)
seconds: dict[str, float] = {}
failed: list[str] = []
current = ""


def trace(frame: FrameType, event: str, argument: Any) -> Any:
    if not frame.f_code.co_filename.endswith("/taskqueue.py"):
        return None
    if (
        event == "line" and current
    ):  # not "call": it names the line of a decorator, which has run at import
        lines[frame.f_lineno].add(current)
    return trace


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    global current
    current, began = item.nodeid, time.perf_counter()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        return (yield)
    finally:
        sys.settrace(None)
        seconds[current], current = time.perf_counter() - began, ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    good = {
        test: round(taken, 3) for test, taken in seconds.items() if test not in failed
    }
    with open(os.environ["BASELINE"], "w") as file:
        json.dump(
            {
                "failed": failed,
                "seconds": good,
                "lines": {
                    line: sorted(tests & good.keys()) for line, tests in lines.items()
                },
            },
            file,
        )
