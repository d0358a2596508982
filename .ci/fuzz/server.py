"""The app under fuzzing: quick handlers, and clients of streams that hang up.

A stream has no end of its own, and schemathesis waits for one. So here its client
"hangs up", and the response is then ended properly. What it has carried until then is
checked like any answer.
"""

import asyncio
import sys

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import taskqueue


def hang_up_streams(app: ASGIApp, after: float) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(
            ("/stream", "/events")
        ):
            return await app(scope, receive, send)
        began, open_response = asyncio.get_running_loop().time(), False

        async def receive_then_hang_up() -> Message:
            left = began + after - asyncio.get_running_loop().time()
            try:
                return await asyncio.wait_for(receive(), max(left, 0.001))
            except TimeoutError:
                return {"type": "http.disconnect"}

        async def send_and_note(message: Message) -> None:
            nonlocal open_response
            open_response = message["type"] == "http.response.start" or message.get(
                "more_body", False
            )
            await send(message)

        await app(scope, receive_then_hang_up, send_and_note)
        if open_response:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    return wrapped


if __name__ == "__main__":
    port, max_pending = int(sys.argv[1]), int(sys.argv[2])
    settings = taskqueue.Settings(
        pace=0.01,
        failure_rate=0.3,
        backoff_base=0.01,
        max_pending=max_pending,
        keep_finished=500,
        drain_seconds=0.5,
    )
    uvicorn.run(
        hang_up_streams(taskqueue.create_app(settings), after=0.05),
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=2,
        http="h11",
    )
