"""A pytest plugin: of each failure show the line and the assertion, and no traceback.

break_it.py and exercise.py use it, with `pytest -p brief`.
"""

import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MOST_LINES = 14


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    """Put our short text in the place of pytest's long one."""
    report = yield
    if report.failed:
        report.longrepr = describe(call.excinfo.value) + describe_500(report.caplog)
    return report


def describe_500(log: str) -> str:
    """What the service has logged of its unhandled exception, if there was one."""
    _, found, log = log.partition("unhandled exception")
    if not found:
        return ""
    lines = log.strip().splitlines()
    return "\n".join(["", "The log of that 500:", *lines[-MOST_LINES:]])


def describe(error: BaseException) -> str:
    """For example:

    test_taskqueue.py:120, in test_queue_tie_break
        assert started == ["a", "b"]
    AssertionError: assert ['b', 'a'] == ['a', 'b']
    """
    while isinstance(error, BaseExceptionGroup):  # anyio wraps what its tasks raise
        error = error.exceptions[0]
    lines = []
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).name.startswith("test_"):  # the last of these counts
            place = f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
            lines = [place, f"    {frame.line}"]
    text = f"{type(error).__name__}: {error}"
    lines += [line[:200] for line in text.splitlines() if "Use -v" not in line]
    return "\n".join(lines[:MOST_LINES])
