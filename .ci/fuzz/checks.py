"""What schemathesis asks of every answer besides its own checks.

It loads this through SCHEMATHESIS_HOOKS.
"""

import os
import uuid
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
        assert answer.status_code == 200, (
            f"GET {path}: {answer.status_code} {answer.text[:500]}"
        )
        strict_json(answer.content)


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """Mend what the document can't say, and what would be refused in spite of it."""
    for name, value in list(
        (case.headers or {}).items()
    ):  # a key that came with another body is a 422
        if (
            name.lower() == "idempotency-key"
            and isinstance(value, str)
            and 0 < len(value) < 200
        ):
            case.headers[name] = f"{value}-{uuid.uuid4()}"
    if isinstance(case.body, dict):  # to JSON Schema, 1.0 is an integer
        for name in ("priority", "max_retries"):
            if isinstance(value := case.body.get(name), float) and value.is_integer():
                case.body[name] = int(value)
