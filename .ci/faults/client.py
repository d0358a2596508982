"""A client of event streams that sees what is on the wire.

It sees the chunks, their end, and whether it was a proper one.
"""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from harness import HOST


@dataclass
class Frame:
    event: str
    id: int | None
    data: Any


@dataclass
class Stream:
    """What a stream has brought so far. `clean`: it was not cut off."""

    status: int = 0
    frames: list[Frame] = field(default_factory=list)
    clean: bool = False
    opened: asyncio.Event = field(
        default_factory=asyncio.Event
    )  # the first frame is here

    @property
    def last(self) -> str:
        """ "shutdown", or the last status that was sent."""
        if not self.frames:
            return "nothing"
        frame = self.frames[-1]
        return frame.event if frame.event != "progress" else str(frame.data["status"])


def parse(text: str) -> list[Frame]:
    frames = []
    for block in text.split("\n\n"):
        lines = [
            line.split(": ", 1)
            for line in block.split("\n")
            if line and not line.startswith(":")
        ]
        if fields := dict(lines):
            version = int(fields["id"]) if "id" in fields else None
            frames.append(Frame(fields["event"], version, json.loads(fields["data"])))
    return frames


async def follow(port: int, path: str, stream: Stream) -> Stream:
    """Read a stream to its end into `stream`."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        stream.status = int(head.split()[1])
        rest = ""
        while "chunked" in head.lower():
            size = int(await reader.readline() or b"-1", 16)
            chunk = await reader.readexactly(size + 2)
            if size == 0:
                stream.clean = not rest
                break
            *blocks, rest = (
                (rest + chunk[:-2].decode()).replace("\r\n", "\n").rpartition("\n\n")
            )
            stream.frames += parse(blocks[0])
            if stream.frames:
                stream.opened.set()
    except (ConnectionError, asyncio.IncompleteReadError, ValueError):
        stream.clean = False
    finally:
        writer.close()
    return stream
