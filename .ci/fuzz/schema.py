"""Schemathesis against our own OpenAPI document.

All of its checks and phases, and three checks of our own.

python .ci/fuzz/schema.py [--seed N] [--examples N]"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Service

HERE = Path(__file__).resolve().parent

# `Allow` names only the methods of the first route whose path matches. That is the
# router's doing, and no promise of ours. A DELETE cancels the task, and it stays until
# it is evicted: that is in the contract.
EXCLUDED = "allow_header_conformance,use_after_free"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=30)
    args = parser.parse_args()
    with Service(str(HERE / "server.py"), "{port}", "1000000") as service:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{service.url}/openapi.json",
            "--checks",
            "all",
            "--exclude-checks",
            EXCLUDED,
            "--seed",
            str(args.seed),
            "--max-examples",
            str(args.examples),
            "--generation-database",
            "none",
            "--no-color",
            "--max-failures",
            "5",
        ]
        environment = {
            **service.environment,
            "SCHEMATHESIS_HOOKS": "checks",
            "FUZZ_URL": service.url,
            "PYTHONPATH": f"{HERE}:{HERE.parent}",
        }
        with (
            tempfile.TemporaryDirectory() as scratch
        ):  # it keeps a cache where it stands
            run = subprocess.run(command, env=environment, cwd=scratch, check=False)
        assert run.returncode == 0, "schemathesis has found something"
        assert not service.trouble, service.trouble


if __name__ == "__main__":
    main()
