"""`readme.py command run` and `readme.py command test` print the README's commands."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
ENDS = {"run": "taskqueue.py", "test": "pytest"}


def command(name: str) -> str:
    """The first block of shell that makes a venv and ends so."""
    text = README.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        if block.strip().endswith(ENDS[name]) and "-m venv" in block:
            return str(block).strip()
    sys.exit(f"README.md has no command that ends in {ENDS[name]}")


if __name__ == "__main__":
    print(command(sys.argv[2]))
