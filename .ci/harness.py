"""A server in a process of its own: started, watched, and always ended."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
T = TypeVar("T")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], T], what: str, seconds: float = 20) -> T:
    """Poll until `condition` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s: not {what}"
        time.sleep(0.02)
    return value


class Service:
    """`with Service("taskqueue.py", "--no-tour", "--port", "{port}") as service: …`

    The command is given to this Python; `{port}` in it becomes the port. Its output is
    kept in `log`.
    """

    def __init__(self, *command: str, **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [
            sys.executable,
            *(word.format(port=self.port) for word in command),
        ]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self.environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_until(self.answers, "listening")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind and not issubclass(kind, KeyboardInterrupt):
            tail = "\n".join(self.log.splitlines()[-20:])
            print(
                f"--- the end of the log of {' '.join(self.command[1:])}\n{tail}\n---",
                file=sys.stderr,
            )
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def answers(self) -> bool:
        assert self.process.poll() is None, f"it has ended:\n{self.log}"
        with contextlib.suppress(OSError), self.connect():
            return True
        return False

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        try:
            connection.connect((HOST, self.port))
        except BaseException:
            connection.close()
            raise
        return connection

    def exchange(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send raw bytes over a new connection; return status, headers and body."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):  # it may have heard enough
                connection.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while data := connection.recv(65_536):
                    answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if "content-length" in headers:  # what follows is another answer
            body = body[: int(headers["content-length"])]
        elif headers.get("transfer-encoding") == "chunked":
            body = joined(body)
        return int(first.split()[1]) if first else 0, headers, body

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    @property
    def trouble(self) -> list[str]:
        """The lines of the log that no run may have.

        A failed attempt logs its traceback, behind bars: that is as it should be.
        """
        words = "Traceback|ERROR|CRITICAL|was never (awaited|retrieved)|was destroyed"
        lines = [
            line for line in self.log.splitlines() if not line.startswith("    | ")
        ]
        return [line for line in lines if re.search(words, line)]

    def stop(
        self, how: signal.Signals = signal.SIGTERM, seconds: float = 30
    ) -> tuple[int, float]:
        """Send a signal, wait for the end; return the exit code and the seconds."""
        began = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(seconds), time.monotonic() - began

    # What the process holds, as Linux tells it.

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def cpu(self) -> float:
        """The CPU seconds that it has used."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> int:
        """Resident memory, in KB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


def joined(chunks: bytes) -> bytes:
    """The body that was sent in chunks; as much of it as has come."""
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        chunks = rest[length + 2 :]
    return body


def strict_json(text: str | bytes) -> Any:
    """json.loads() that refuses what is no JSON: NaN, Infinity, lone surrogates."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value
