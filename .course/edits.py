"""Edits of a text, as breaks.toml and the solutions of the exercises have them.

An edit has one of four forms. Each looks for a text that stands there exactly once.

    find, replace     this text becomes that one
    line, replace     the line with this text becomes these lines
    after, insert     below the line with this text come these lines
    before, insert    above the line with this text come these lines
"""

import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping


def demand_packages() -> None:
    """End the program with one clear line if it runs outside of the .venv."""
    for name in ("fastapi", "pytest"):
        if importlib.util.find_spec(name) is None:
            sys.exit(f"There is no {name} here. Run it with .venv/bin/python.")


class EditError(Exception):
    """The text that an edit looks for is not there, or more than once."""


def apply_edit(source: str, edit: Mapping[str, str]) -> str:
    """Return the text as it is with this edit. Raises EditError."""
    form = next(key for key in ("find", "line", "after", "before") if key in edit)
    anchor = edit[form].strip("\n")
    if source.count(anchor) != 1:
        raise EditError(
            f"this text stands there {source.count(anchor)} times:\n{anchor}"
        )
    if form == "find":
        return source.replace(anchor, edit["replace"].strip("\n"))
    begin = source.rindex("\n", 0, source.index(anchor)) + 1
    end = source.index("\n", begin) + 1
    if form == "line":
        return source[:begin] + edit["replace"] + source[end:]
    if form == "after":
        return source[:end] + edit["insert"] + source[end:]
    return source[:begin] + edit["insert"] + source[begin:]


def apply_edits(source: str, edits: Iterable[Mapping[str, str]]) -> str:
    """Return the text as it is with all these edits, one after the other."""
    for edit in edits:
        source = apply_edit(source, edit)
    return source


def diff(before: str, after: str) -> str:
    """What is different, as a unified diff."""
    lines = difflib.unified_diff(
        before.splitlines(),
        after.splitlines(),
        "taskqueue.py",
        "taskqueue.py, edited",
        n=2,
        lineterm="",
    )
    return "\n".join(lines)
