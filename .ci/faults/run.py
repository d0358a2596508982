"""Faults, on a real server: signals, bad handlers, bad readers, load.

python .ci/faults/run.py [--load-seconds 20] [--seed N] [--only NAME]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import handlers
import load
import readers
import shutdown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load-seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=["shutdown", "handlers", "readers", "load"])
    args = parser.parse_args()
    parts = {
        "shutdown": shutdown.run,
        "handlers": handlers.run,
        "readers": readers.run,
        "load": lambda: load.run(args.seed, args.load_seconds),
    }
    for name, run in parts.items():
        if args.only in (None, name):
            began = time.monotonic()
            print(f"- {name}", flush=True)
            run()
            print(f"  {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
