"""What the checks need from README.md: `readme.py command run|test` prints one of its two commands, as printed."""

import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def command(name: str) -> str:
    """The first shell block after the heading that ends in `name`, with its lines joined."""
    last_word = {"run": "taskqueue.py", "test": "pytest"}[name]
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README.read_text(), re.DOTALL):
        if block.strip().endswith(last_word) and ".venv" in block:
            return block.strip()
    sys.exit(f"README.md has no command that ends in {last_word}")


if __name__ == "__main__":
    print(command(sys.argv[2]))
