"""Does taskqueue.py still read as it should? Prints each measure; exit 1 if one misses.

    python .ci/measure.py

The numbers are no aim of their own: they say where to look. What counts is a reader.
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "taskqueue.py"
SUITE = ROOT / "test_taskqueue.py"
BREAKS = next(ROOT.glob(".c*/breaks.toml"))

MARK = "# First reading."
LESSON_ENDS = "# ===== Page ="
LESSON_BEGINS = "# ===== Settings ="
BLANK = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Named = Function | ast.ClassDef

SOURCE = MODULE.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)


def lines_of(node: ast.stmt | ast.expr) -> set[int]:
    """The numbers of its lines."""
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def docstring_of(node: ast.Module | Named) -> set[int]:
    """The lines of its docstring."""
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return lines_of(node.body[0])


def named(tree: ast.AST) -> Iterator[Named]:
    """All functions and classes in it."""
    for node in ast.walk(tree):
        if isinstance(node, Named):
            yield node


def code_and_prose() -> tuple[set[int], set[int]]:
    """The lines with code on them, and those with a comment or docstring alone."""
    docstrings = docstring_of(TREE)
    for node in named(TREE):
        docstrings |= docstring_of(node)
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        lines = set(range(token.start[0], token.end[0] + 1))
        if token.type == tokenize.COMMENT:
            comments |= lines
        elif token.type not in BLANK and token.string:
            code |= lines - docstrings
    return code, (comments - code) | docstrings


CODE, PROSE = code_and_prose()


def is_formatted() -> bool:
    """Whether `ruff format` would change nothing."""
    command = [sys.executable, "-m", "ruff", "format", "--check", "-q", str(MODULE)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def lesson() -> set[int]:
    """The lines from Settings to App."""
    first = next(n for n, line in enumerate(LINES, 1) if line.startswith(LESSON_BEGINS))
    end = next(n for n, line in enumerate(LINES, 1) if line.startswith(LESSON_ENDS))
    return set(range(first, end))


def lengths() -> list[tuple[int, str]]:
    """How many lines of code each function has of its own. The shortest is first."""
    found = []
    for node in named(TREE):
        if isinstance(node, Function):
            own = lines_of(node) & CODE
            for inner in named(node):
                if inner is not node:
                    own -= lines_of(inner)
            found.append((len(own), node.name))
    return sorted(found)


def without_docstring() -> list[str]:
    """Functions and classes of more than three lines that say nothing of themselves."""
    found = []
    for node in named(TREE):
        long = len(lines_of(node) & CODE) > 4  # its head is no part of the three
        if long and not docstring_of(node) and node.name != "__init__":
            found.append(node.name)
    return found


def gotchas() -> set[str]:
    """The names of all traps that the module tells of."""
    return set(re.findall(r"GOTCHA \[([a-z0-9-]+)\]:", SOURCE))


def gotchas_without_test() -> list[str]:
    """No test has the name of the trap in its own name."""
    tests = " ".join(re.findall(r"def (test_\w+)", SUITE.read_text(encoding="utf-8")))
    return sorted(name for name in gotchas() if name.replace("-", "_") not in tests)


def gotchas_without_break() -> list[str]:
    """No edit brings the trap back."""
    breaks = tomllib.loads(BREAKS.read_text(encoding="utf-8"))["break"]
    return sorted(gotchas() - {entry["name"] for entry in breaks})


def named_lines() -> Iterator[tuple[int, str]]:
    """The first line of each function, class and table, and its name."""
    for node in ast.walk(TREE):
        if isinstance(node, Named):
            first = min(each.lineno for each in [node, *node.decorator_list])
            yield first, node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.lineno, node.target.id


def first_reading() -> tuple[set[str], set[str]]:
    """The names in the header's list, and the names below a line `# First reading.`"""
    header = ast.get_docstring(TREE) or ""
    part = header.partition("THE FIRST READING")[2].partition("THE WORDS")[0]
    indented = re.findall(r"^ {4}(.*)$", part, re.MULTILINE)
    words = [re.sub(r"\w+:", "", line) for line in indented]
    listed = set(re.findall(r"\w+", " ".join(words)))
    marks = [n for n, line in enumerate(LINES, 1) if line.strip() == MARK]
    starts = dict(named_lines())
    marked = set()
    for mark in marks:
        marked.add(starts[min(line for line in starts if line > mark)])
    return listed, marked


def main() -> None:
    """Print the measures."""
    part = lesson()
    ratio = len(part & PROSE) / len(part & CODE)
    functions = lengths()
    sizes = [size for size, _ in functions]
    median = statistics.median(sizes)
    p90 = sizes[int(len(sizes) * 0.9)]
    listed, marked = first_reading()
    formatted = is_formatted()
    rows: list[tuple[str, object, bool]] = [
        ("as ruff format leaves it", formatted, formatted),
        ("prose ÷ code in the lesson, 0.6–0.95", f"{ratio:.2f}", 0.6 <= ratio <= 0.95),
        ("function: median ≤ 7", f"{median:g}", median <= 7),
        ("function: nine of ten ≤ 18", f"{p90}", p90 <= 18),
        ("function: longest ≤ 35", "{} ({})".format(*functions[-1]), sizes[-1] <= 35),
    ]
    for name, missing in (
        ("over three lines without a docstring", without_docstring()),
        ("GOTCHA without a test of its name", gotchas_without_test()),
        ("GOTCHA without a break", gotchas_without_break()),
        ("listed for the first reading, not marked", sorted(listed - marked)),
        ("marked for the first reading, not listed", sorted(marked - listed)),
    ):
        rows.append((name, ", ".join(missing) or "none", not missing))
    for name, value, holds in rows:
        verdict = "ok   " if holds else "SHORT"
        print(f"{verdict} {name}: {value}")
    if not all(holds for *_, holds in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
