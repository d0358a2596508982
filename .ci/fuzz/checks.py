"""What schemathesis asks of every answer besides its own checks. It loads this through SCHEMATHESIS_HOOKS."""

import os, uuid
from typing import Any

import requests
import schemathesis

from harness import strict_json

session = requests.Session()
URL = os.environ.get("FUZZ_URL", "")


@schemathesis.check
def json_is_strict(ctx: Any, response: Any, case: Any) -> None:
    """No NaN and no lone surrogate in any JSON that is sent."""
    if "json" in response.headers.get("content-type", [""])[0] and response.content:
        strict_json(response.content)

@schemathesis.check
def has_a_request_id(ctx: Any, response: Any, case: Any) -> None:
    assert response.headers.get("x-request-id"), "no X-Request-ID"

@schemathesis.check
def others_are_unharmed(ctx: Any, response: Any, case: Any) -> None:
    """Whatever was sent, these three still answer, in JSON."""
    for path in ("/tasks", "/metrics", "/health"):
        answer = session.get(URL + path, timeout=10)
        assert answer.status_code == 200, f"GET {path}: {answer.status_code} {answer.text[:500]}"
        strict_json(answer.content)

@schemathesis.hook
def map_headers(ctx: Any, headers: Any) -> Any:
    """A key of its own for each request: one that was used before is a 422, whatever the schema says of the rest."""
    for name in headers or {}:
        if name.lower() == "idempotency-key" and isinstance(headers[name], str) and 0 < len(headers[name]) < 200:
            headers[name] += f"-{uuid.uuid4()}"
    return headers
