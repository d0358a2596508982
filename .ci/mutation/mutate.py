"""Mutation testing of taskqueue.py: each small bug must turn a test red.

    python .ci/mutation/mutate.py [--sections Queue Workers …] [--only TEXT]
        [--lines 300-350] [--keys FILE] [--quick] [--jobs N] [--list]

WHY not mutmut or cosmic-ray: the former copies each function with all its mutants into
a trampoline, and FastAPI and Pydantic read signatures and annotations. The latter
starts an interpreter, and imports FastAPI, for each mutant. Here one process imports
all that once, and forks for each mutant: a second or two for most of them.

A mutant meets the tests that run its line, quickest first, and then all others (with
--quick it doesn't). Survivors are printed, less those that equivalent.txt lists with a
reason. Not part of the gate: it takes half an hour, or more.
"""

import argparse
import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = HERE.parent / ".work" / "mutation"
SECTIONS = [
    "Settings",
    "Models",
    "Handlers",
    "Queue",
    "Workers",
    "Middleware",
    "Routes",
    "App",
]
PROSE = {"description", "title", "summary", "name", "message", "reason", "text"}
FILES = {
    name: (ROOT / name).read_bytes()
    for name in ("test_taskqueue.py", ".pytest.ini", "requirements.txt")
}
SLOW = 1.0  # seconds; a test that takes longer starts a server of its own
MEMORY = 3 << 30  # bytes: a mutant may be an endless loop that collects something


# ======================================================================================
# Mutants


@dataclass
class Mutant:
    line: int
    start: int  # offsets into the source, in bytes
    end: int
    new: bytes
    old: bytes
    name: str
    place: str  # the class and function, and the text of the line
    red: list[str] = field(default_factory=list)  # the tests that have told
    output: str = ""  # of the last run

    def __str__(self) -> str:
        return f"{self.line}: {self.key}"

    @property
    def key(self) -> str:
        """Names the mutant without its line number: an edit elsewhere doesn't matter.

        With its place: of "constant: 0 → 1" there are dozens, and only some do no harm.
        """
        old, new = (
            re.sub(r"\s+", " ", text.decode())[:70] for text in (self.old, self.new)
        )
        return f"{self.place} | {self.name}: {old} → {new}"


COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATORS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Pow: "*",
    ast.BitOr: "&",
}


class Mutator(ast.NodeVisitor):
    """Collects all mutants of a tree, but of annotations, docstrings and logs."""

    def __init__(self, source: bytes) -> None:
        self.source, self.mutants = source, list[Mutant]()
        self.lines, self.scope = source.decode().splitlines(), list[str]()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int | None, column: int | None) -> int:
        return self.starts[(line or 1) - 1] + (column or 0)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(
            node.end_lineno, node.end_col_offset
        )

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def replace(self, node: ast.expr | ast.stmt, new: str, name: str) -> None:
        start, end = self.span(node)
        line = self.lines[node.lineno - 1].partition("  # ")[0].strip()
        place = f"{'.'.join(self.scope) or 'module'} | {line}"
        self.mutants.append(
            Mutant(
                node.lineno,
                start,
                end,
                new.encode(),
                self.source[start:end],
                name,
                place,
            )
        )

    # -- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        parts = [node.left, *node.comparators]
        for number in range(len(node.ops)):
            texts = [self.text(parts[0])]
            for other, (op, part) in enumerate(zip(node.ops, parts[1:], strict=True)):
                symbol = COMPARISONS[type(op)] if other == number else SYMBOLS[type(op)]
                texts += [symbol, self.text(part)]
            self.replace(node, " ".join(texts), "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = " or " if isinstance(node.op, ast.And) else " and "
        if not any(
            isinstance(part, ast.NamedExpr)
            for value in node.values
            for part in ast.walk(value)
        ):
            self.replace(
                node,
                "("
                + other.join(f"({self.text(value)})" for value in node.values)
                + ")",
                "boolean",
            )
        for value in node.values:
            if not any(isinstance(part, ast.NamedExpr) for part in ast.walk(value)):
                self.replace(
                    value, str(isinstance(node.op, ast.And)), "boolean part dropped"
                )
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.replace(node, f"bool({self.text(node.operand)})", "not dropped")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if symbol := OPERATORS.get(type(node.op)):
            self.replace(
                node,
                f"({self.text(node.left)}) {symbol} ({self.text(node.right)})",
                "arithmetic",
            )
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, str(not value), "constant")
        elif isinstance(value, int | float):
            self.replace(node, repr(value + 1), "constant")
        elif isinstance(value, str | bytes) and value:
            self.replace(
                node,
                repr(value + ("XX" if isinstance(value, str) else b"XX")),
                "constant",
            )

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace(node.test, f"not ({self.text(node.test)})", "condition")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound and not isinstance(bound, ast.Constant):
                self.replace(bound, f"({self.text(bound)}) + 1", "slice")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.text(node.func)
        if function.startswith("logger."):
            return
        for part in [node.func, *node.args]:
            self.visit(part)
        for keyword in node.keywords:
            if keyword.arg in PROSE:
                continue
            constant = isinstance(keyword.value, ast.Constant)
            if keyword.arg and not constant and function != "functools.partial":
                self.replace(keyword.value, "None", "keyword to None")
            self.visit(keyword.value)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "description":
                continue  # prose
            for part in (key, value):
                if part:
                    self.visit(part)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                self.visit(value.value)

    # -- statements

    def visit_If(self, node: ast.If) -> None:
        if not any(isinstance(part, ast.NamedExpr) for part in ast.walk(node.test)):
            self.replace(node.test, f"not ({self.text(node.test)})", "condition")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # a docstring
            return
        if not self.text(node).startswith("logger."):
            self.replace(
                node,
                "pass" if not isinstance(node.value, ast.Yield) else "yield",
                "statement dropped",
            )
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(
            isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets
        ):
            self.replace(node, "pass", "statement dropped")
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names & PROSE and isinstance(node.value, ast.Constant):
            return
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace(node, "pass", "statement dropped")
        if isinstance(node.op, ast.Add):
            self.replace(
                node,
                f"{self.text(node.target)} -= {self.text(node.value)}",
                "arithmetic",
            )
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self.replace(node, "pass", "statement dropped")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value and not (
            isinstance(node.value, ast.Constant) and node.value.value is None
        ):
            self.replace(node, "return None", "return None")
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace(node, "pass", "statement dropped")
        parts = (
            node.exc.args
            if isinstance(node.exc, ast.Call)
            else [node.exc]
            if node.exc
            else []
        )
        for part in parts:
            if not (
                isinstance(part, ast.Constant) and isinstance(part.value, str)
            ):  # a message is prose
                self.visit(part)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace(node, "pass", "statement dropped")

    def visit_Await(self, node: ast.Await) -> None:
        self.visit(node.value)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        lesser = {"BaseException": "Exception", "Exception": "ZeroDivisionError"}
        if node.type and (caught := self.text(node.type)) in lesser:
            self.replace(node.type, lesser[caught], "except")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.scope.append(node.name)
        for decorator in node.decorator_list:
            self.visit(decorator)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.scope.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]


SYMBOLS = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.In: "in",
    ast.NotIn: "not in",
}


def sections(source: str) -> dict[str, range]:
    """The lines of each section, by its banner."""
    banners = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), start=1)
        if (match := re.match(r"# =+ (\w+) =+", line))
    ]
    ends = [number for number, _ in banners[1:]] + [len(source.splitlines()) + 1]
    return {
        title: range(number, end)
        for (number, title), end in zip(banners, ends, strict=True)
    }


def mutants_of(source: bytes, wanted: list[str]) -> list[Mutant]:
    mutator = Mutator(source)
    mutator.visit(ast.parse(source))
    lines = [sections(source.decode())[title] for title in wanted]
    return sorted(
        (
            mutant
            for mutant in mutator.mutants
            if any(mutant.line in part for part in lines) and mutant.new != mutant.old
        ),
        key=lambda mutant: (mutant.line, mutant.start),
    )


# ======================================================================================
# Tests


def measure(python: str) -> tuple[dict[str, float], dict[int, list[str]]]:
    """Run the suite once, unharmed: the seconds of each test, and the lines it runs."""
    WORK.mkdir(parents=True, exist_ok=True)
    report = WORK / "baseline.json"
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), (ROOT / "taskqueue.py").read_bytes())
        shutil.copy(HERE / "baseline.py", directory)
        subprocess.run(
            [python, "-m", "pytest", "-p", "baseline", "-q"],
            cwd=directory,
            check=False,
            env={**os.environ, "BASELINE": str(report), "PYTHONPATH": directory},
        )
    baseline = json.loads(report.read_text())
    if baseline["failed"]:
        print(f"red before any mutation, and left out: {baseline['failed']}")
    return baseline["seconds"], {
        int(line): tests for line, tests in baseline["lines"].items()
    }


def prepare(directory: Path, source: bytes) -> None:
    for (
        name,
        content,
    ) in FILES.items():  # as they were at the start: somebody may go on working on them
        (directory / name).write_bytes(content)
    (directory / "taskqueue.py").write_bytes(source)


def fork_pytest(directory: Path, tests: list[str]) -> int:
    """Start pytest in a child; return its process id.

    The child has everything imported but the module under test.
    """
    if child := os.fork():
        return child
    os.setsid()
    os.chdir(directory)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path[0] = str(directory)
    os.environ["PYTHONPATH"] = str(directory)
    import pytest

    # Pytest warns of plugins that are imported already: it can't rewrite their asserts.
    # And to rewrite the asserts takes a second, for each mutant.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--assert=plain"]
    code = pytest.main(["-x", "-q", *quiet, *tests])
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Run:
    mutant: Mutant
    directory: str
    phases: list[list[str]]  # tests still to run, one list after the other
    child: int = 0
    deadline: float = 0.0
    tests: list[str] = field(default_factory=list)  # of the list that runs now
    widened: bool = False

    def start(self, seconds: dict[str, float]) -> None:
        tests = self.tests = self.phases.pop(0)
        self.child = fork_pytest(Path(self.directory), tests)
        expected = sum(seconds.get(test, SLOW) for test in tests)
        self.deadline = time.monotonic() + 30 + 4 * expected

    def widen(self, tests: list[str]) -> None:
        """Plan these tests again, by their names alone.

        The id of a case has its parameter in it: "test_x[pending]". A mutant that
        changes that has none of this id.
        """
        names = [test.partition("[")[0] for test in tests]
        self.phases.insert(0, list(dict.fromkeys(names)))
        self.widened = True


def plan(
    mutant: Mutant, seconds: dict[str, float], lines: dict[int, list[str]], quick: bool
) -> list[list[str]]:
    """The tests in the order in which they are likely to tell.

    A line that no test runs is run at import: by all.
    """
    near = [test for test in lines.get(mutant.line, seconds) if seconds[test] < SLOW]
    phases = (
        [near]
        if quick and near
        else [near, [test for test in seconds if test not in near]]
    )
    return [sorted(tests, key=lambda test: seconds[test]) for tests in phases if tests]


def run_all(
    mutants: list[Mutant],
    source: bytes,
    seconds: dict[str, float],
    lines: dict[int, list[str]],
    jobs: int,
    quick: bool = False,
) -> Iterator[tuple[Mutant, str]]:
    """Yield each mutant with what became of it: killed, timeout or survived."""
    waiting, running = list(reversed(mutants)), list[Run]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, directory = waiting.pop(), tempfile.mkdtemp(prefix="mutant-")
            prepare(
                Path(directory),
                source[: mutant.start] + mutant.new + source[mutant.end :],
            )
            run = Run(mutant, directory, plan(mutant, seconds, lines, quick))
            run.start(seconds)
            running.append(run)
        time.sleep(0.02)
        for run in list(running):
            done, status = os.waitpid(run.child, os.WNOHANG)
            late = time.monotonic() > run.deadline
            if not done and not late:
                continue
            if late and not done:
                os.killpg(run.child, signal.SIGKILL)
                os.waitpid(run.child, 0)
            elif status == 0 and run.phases:
                run.start(seconds)
                continue
            elif os.waitstatus_to_exitcode(status) == 4 and not run.widened:
                run.widen(run.tests)
                run.start(seconds)
                continue
            running.remove(run)
            output = run.mutant.output = (Path(run.directory) / "output").read_text(
                errors="replace"
            )
            shutil.rmtree(run.directory, ignore_errors=True)
            if late and not done:
                yield run.mutant, "timeout"
            elif status == 0:
                yield run.mutant, "survived"
            else:  # only a named test has killed it; else it is a fault of this tool
                run.mutant.red = re.findall(
                    r"^(?:FAILED|ERROR) (test_taskqueue\.py.*)", output, re.MULTILINE
                )
                broken = (
                    f"broken, {os.waitstatus_to_exitcode(status)}: {output[-1000:]}"
                )
                yield run.mutant, "killed" if run.mutant.red else broken


def check_tool(
    source: bytes, seconds: dict[str, float], lines: dict[int, list[str]]
) -> None:
    """Controls: the unharmed module has to survive, and one that is surely harmed must not.

    Without the first, a child that can't even start looks like a killed mutant, and the
    rate like a triumph.
    """
    nothing = Mutant(0, 0, 0, b"", b"", "control, unharmed", "")
    at = source.index(b"            record.progress = 100\n")
    line = source[:at].count(b"\n") + 1
    harmed = Mutant(
        line,
        at,
        at + 33,
        b"            record.progress = 1\n",
        b"",
        "control, harmed",
        "",
    )
    # A test that waits in real time can be late on a busy machine.
    for _ in range(3):
        [(_, fate)] = run_all([nothing], source, seconds, lines, 1)
        if fate == "survived":
            break
        print(
            f"the unharmed module is not green here, but {fate}: {nothing.red}\n"
            f"{nothing.output[-3000:]}",
            flush=True,
        )
    assert fate == "survived", (
        "this tool does not work here: it takes the unharmed module for harmed"
    )
    [(_, fate)] = run_all([harmed], source, seconds, lines, 1)
    assert fate == "killed", (
        f"this tool does not work here: a mutant that is surely harmed is {fate}"
    )


def equivalents() -> dict[str, str]:
    """Key → reason: in the file a reason, then an indented line for each mutant."""
    reasons, reason = {}, ""
    for line in (HERE / "equivalent.txt").read_text().splitlines():
        if line.startswith("    "):
            reasons[line.strip()] = reason
        elif line and not line.startswith("#"):
            reason = line
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="*", default=SECTIONS)
    parser.add_argument(
        "--only", default="", help="mutants whose description contains this"
    )
    parser.add_argument("--lines", default="", help="mutants of these lines: 300-350")
    parser.add_argument(
        "--keys",
        type=Path,
        help="mutants that stand in this file, such as an earlier output",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the quick tests that run the line"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only list them")
    args = parser.parse_args()
    source = (ROOT / "taskqueue.py").read_bytes()
    mutants = [
        mutant
        for mutant in mutants_of(source, args.sections)
        if args.only in str(mutant)
    ]
    if args.lines:
        first, last = map(int, args.lines.split("-"))
        mutants = [mutant for mutant in mutants if first <= mutant.line <= last]
    if args.keys:
        keys = {
            re.sub(r"^\w+: \d+: ", "", line).strip()
            for line in args.keys.read_text().splitlines()
        }
        mutants = [mutant for mutant in mutants if mutant.key in keys]
    if args.list:
        print(*mutants, sep="\n")
        return
    seconds, lines = measure(sys.executable)
    import fastapi  # noqa: F401  # for the children

    print(
        f"{len(mutants)} mutants, {len(seconds)} tests of {sum(seconds.values()):.0f} s",
        flush=True,
    )
    check_tool(source, seconds, lines)
    reasons = equivalents()
    if unknown := reasons.keys() - {
        mutant.key for mutant in mutants_of(source, SECTIONS)
    }:
        print(
            "in equivalent.txt, but no mutant:", *sorted(unknown), sep="\n", flush=True
        )
    counts = {"killed": 0, "timeout": 0, "survived": 0, "equivalent": 0, "broken": 0}
    began = time.monotonic()
    for number, (mutant, fate) in enumerate(
        run_all(mutants, source, seconds, lines, args.jobs, args.quick), start=1
    ):
        if fate == "survived" and mutant.key in reasons:
            fate = "equivalent"
        elif mutant.key in reasons:
            print(
                f"held to be equivalent, but it is {fate} by {mutant.red}: {mutant}",
                flush=True,
            )
        counts[fate.partition(",")[0]] += 1
        if fate not in ("killed", "equivalent"):
            print(f"{fate}: {mutant}", flush=True)
        if number % 50 == 0:
            print(
                f"… {number} after {time.monotonic() - began:.0f} s: {counts}",
                flush=True,
            )
    killed = counts["killed"] + counts["timeout"]
    rate = 100 * killed / max(1, killed + counts["survived"])
    print(f"{counts}: {rate:.1f} % of those that are not equivalent are killed")
    assert not counts["broken"], "the rate says nothing of those that are broken"


if __name__ == "__main__":
    main()
