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


# What the fields of each task type's payload take. The document can't say it: there any
# of the three models will do.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "resize_image": {"url": (str,), "width": (int,), "height": (int,)},
    "generate_report": {"report_id": (str, int), "format": (str,)},
    "send_email": {"to": (str,), "subject": (str,), "body": (str,)},
}


@schemathesis.hook
def before_call(ctx: Any, case: Any, kwargs: Any) -> None:
    """Mend what the document can't say, and what would be refused in spite of it."""
    for name, value in list((case.headers or {}).items()):
        # A key that came with another body is a 422.
        key = name.lower() == "idempotency-key" and isinstance(value, str)
        if key and 0 < len(value) < 200:
            case.headers[name] = f"{value}-{uuid.uuid4()}"
    if isinstance(case.body, dict):
        whole_numbers(case.body, "priority", "max_retries")
        payload = case.body.get("payload")
        fields = FIELDS.get(str(case.body.get("task_type")))
        if isinstance(payload, dict) and fields:
            fit(payload, fields)


def whole_numbers(body: dict[str, Any], *names: str) -> None:
    """To JSON Schema, 1.0 is an integer."""
    for name in names:
        value = body.get(name)
        if isinstance(value, float) and value.is_integer():
            body[name] = int(value)


def fit(payload: dict[str, Any], fields: dict[str, tuple[type, ...]]) -> None:
    """Leave out what fits another task type's model, and not this one's."""
    whole_numbers(payload, *fields)
    for name, types in fields.items():
        value = payload.get(name)
        fits = isinstance(value, types) and not isinstance(value, bool)
        small = name in ("width", "height") and fits and value < 1
        if name in payload and (small or not fits):
            del payload[name]
