"""Check that README.md and TEACHING.md in .course name only what there is."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / ".course"
sys.path.insert(0, str(COURSE))

import break_it
import exercise
import try_it

TEXTS = ["README.md", "TEACHING.md", "OUTGROW.md"]
# Words in the texts that look like a name of the module, and are none.
FOREIGN = {"call_soon_threadsafe", "not_before", "avg_duration_ms", "task_done"}


def read(name: str) -> str:
    """One of the texts."""
    return (COURSE / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """What a link may have after its #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w -]", "", heading) for heading in headings]
    return {heading.lower().replace(" ", "-") for heading in plain}


def broken_links(name: str) -> Iterator[str]:
    """Links of a text that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        if file and not (COURSE / file).exists():
            yield f"{name}: no such file: {target}"
        elif anchor and anchor not in anchors(read(file or name)):
            yield f"{name}: no such heading: {target}"


def unknown_names() -> Iterator[str]:
    """Names in TEACHING.md that are no break, no exercise, and not in the module."""
    for name in sorted(set(re.findall(r"`(\w+)(?:\(\))?`", read("TEACHING.md")))):
        known = name in exercise.EXERCISES or name in FOREIGN
        if "_" in name and not known and name not in break_it.MODULE:
            yield f"TEACHING.md: not in taskqueue.py: {name}"
    for name in sorted(
        set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", read("TEACHING.md")))
    ):
        if name not in break_it.BREAKS:
            yield f"TEACHING.md: no such break: {name}"
    for name in set(try_it.TRAPS) - set(break_it.BREAKS):
        yield f"try_it.py: no such trap: {name}"


def wrong_minutes() -> Iterator[str]:
    """Sessions whose steps do not add up to what their heading says."""
    sessions = re.findall(
        r"^## [^\n]*: (\d+) minutes$(.*?)(?=^## |\Z)",
        read("TEACHING.md"),
        re.MULTILINE | re.DOTALL,
    )
    for minutes, text in sessions:
        steps = [int(step) for step in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
        if sum(steps) != int(minutes):
            yield f"TEACHING.md: {sum(steps)} minutes, not {minutes}"
    if len(sessions) != 6:
        yield f"TEACHING.md: {len(sessions)} sessions"


def main() -> None:
    """Check all three."""
    wrong = [line for name in TEXTS for line in broken_links(name)]
    wrong += [*unknown_names(), *wrong_minutes()]
    print(*wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
