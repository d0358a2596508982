"""Hostile requests, by hand and by mutation, against the app in a process of its own.

    python .ci/fuzz/hostile.py [--seed N] [--mutants N]

After each of them: no 5xx, an answer that the OpenAPI document allows, nothing in the
log, and little CPU time. And GET /tasks, /metrics and /health still answer, in strict
JSON.
"""

import argparse
import http.client
import json
import random
import re
import sys
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import HOST, Service, strict_json

VALID = {
    "task_type": "resize_image",
    "payload": {"url": "u", "width": 4},
    "priority": 5,
    "max_retries": 1,
    "timeout": 5.5,
    "delay": 0,
}
OTHERS = ("/tasks", "/metrics", "/health")
MUCH = 0.25  # seconds of CPU for one request; its task may run, and fail, meanwhile


# ======================================================================================
# What is sent


def nested(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + closing * levels


def with_payload(text: str) -> str:
    return '{"task_type": "send_email", "delay": 0, "payload": {"x": ' + text + "}}"


NASTY_VALUES = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "1e-400",
    "-0",
    "-0.0",
    "1.0",
    "1e0",
    "true",
    "null",
    "[]",
    "{}",
    '""',
    '"1"',
    '"\\u0000"',
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\ud83d\\ude00"',
    '"\u2028"',
    "01",
    "0x1",
    "+1",
    ".5",
    "5.",
    "'x'",
    "undefined",
    "--1",
    '"' + "x" * 5000 + '"',
    "18446744073709551616",
    "0.1e-1",
    '"\x01"',
    '"__class__"',
    '{"__proto__": {"a": 1}}',
    '{"\\ud800": 1}',
    '{"": ""}',
    '{"a": 1, "a": 2}',
]


def bodies() -> Iterator[bytes]:
    for field in VALID:
        for value in NASTY_VALUES:
            rest = {name: content for name, content in VALID.items() if name != field}
            yield (json.dumps(rest)[:-1] + f', "{field}": {value}}}').encode(
                "utf-8", "surrogatepass"
            )
    for value in NASTY_VALUES:
        yield value.encode()
        yield with_payload(value).encode()
        yield with_payload(f"[{value}, {value}]").encode()
        yield (
            json.dumps(VALID)[:-1]
            + ", "
            + (value if value[0] == '"' else '"more"')
            + ": 1}"
        ).encode()
        for field in ("url", "width", "height"):
            yield f'{{"task_type": "resize_image", "payload": {{"{field}": {value}}}}}'.encode()
    for levels in [
        *range(1, 300),
        400,
        500,
        900,
        1000,
        5000,
        20_000,
    ]:  # in there are the limits of all parsers
        yield with_payload(nested(levels)).encode()
        if levels % 5 == 0:
            yield with_payload(nested(levels, '{"a":[', "]}")).encode()
    yield from (
        nested(30_000).encode(),
        nested(9_000, '{"a":', "}").encode(),
        b"[" * 60_000,
    )
    good = json.dumps(VALID).encode()
    yield from (
        b"",
        b" ",
        b"\0",
        b"\xef\xbb\xbf" + good,
        good.decode().encode("utf-16"),
        good.decode().encode("utf-32"),
        good[:-1],
        good + b"}",
        good + good,
        good + b"\0",
        b"\xff\xfe\xfd",
        good.replace(b"u", b"\xff"),
        good.replace(b"u", b"\xed\xa0\x80"),
        b"task_type=resize_image",
        b"<xml/>",
        b"/* */" + good,
        good.replace(b" ", b"\r\n\t"),
    )
    for size in (65_535, 65_536, 65_537, 70_000, 500_000):
        yield good + b" " * (size - len(good))
        yield with_payload('"' + "x" * (size - 100) + '"').encode()
    yield with_payload("[" + ",".join("0" * 1 for _ in range(30_000)) + "]").encode()
    yield with_payload(
        "{" + ",".join(f'"{n}":{n}' for n in range(5_000)) + "}"
    ).encode()
    yield ("{" + ",".join(f'"unknown{n}":{n}' for n in range(3_000)) + "}").encode()
    yield with_payload('"' + "\U0001f600" * 10_000 + '"').encode()


def mutants(random: random.Random, count: int) -> Iterator[bytes]:
    """Valid bodies with a few things in them replaced, doubled, dropped or flipped."""
    seeds = [
        json.dumps(VALID),
        with_payload('[1, "a", {"b": null}]'),
        json.dumps({"task_type": "generate_report"}),
    ]
    for _ in range(count):
        body = bytearray(random.choice(seeds).encode())
        for _ in range(random.randint(1, 4)):
            at, to = sorted(random.randrange(len(body) + 1) for _ in range(2))
            match random.randrange(4):
                case 0:
                    body[at:to] = random.choice(NASTY_VALUES).encode(
                        "utf-8", "surrogatepass"
                    )
                case 1:
                    body[at:at] = body[at:to]
                case 2:
                    del body[at : min(to, at + 5)]
                case 3:
                    body[at : at + 1] = bytes([random.randrange(256)])
        yield bytes(body)


def post(
    body: bytes, *headers: bytes, content_type: bytes | None = b"application/json"
) -> bytes:
    lines = [
        b"POST /tasks HTTP/1.1",
        b"Host: x",
        b"Connection: close",
        b"Content-Length: %d" % len(body),
        *headers,
    ]
    if content_type is not None:
        lines.append(b"Content-Type: " + content_type)
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(target: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    return (
        b"\r\n".join(
            [
                method + b" " + target + b" HTTP/1.1",
                b"Host: x",
                b"Connection: close",
                *headers,
            ]
        )
        + b"\r\n\r\n"
    )


def with_headers(task: bytes) -> Iterator[bytes]:
    good = json.dumps(VALID).encode()
    for value in (
        b"",
        b" ",
        b"a",
        b"x" * 64,
        b"x" * 65,
        b"x" * 8000,
        b"a b",
        b"\xff\xfe",
        b"a\tb",
        b"<script>",
        b"%0a%0d",
        b"../..",
        b'"',
        b"a,b",
        b"\xe2\x80\xa8",
        b"1\x01",
        b"-" * 64,
        b"\x85forged",
    ):
        for name in (
            b"X-Request-ID",
            b"Idempotency-Key",
            b"Last-Event-ID",
            b"Accept",
            b"Content-Type",
            b"User-Agent",
            b"Origin",
        ):
            yield post(good, name + b": " + value)
            yield get(b"/tasks/" + task, name + b": " + value)
            yield get(b"/metrics", name + b": " + value)
    for value in (
        b"-1",
        b"0",
        b"1",
        b"00",
        b"9" * 19,
        b"9" * 20,
        b"9" * 4300,
        b"9" * 4301,
        b"1.0",
        b"1e3",
        b" 7",
        b"+7",
        b"0x7",
        b"\xb2",
        b"1_000",
        b"\xd9\xa1",
        b"null",
        b"NaN",
        b"1,2",
        b"18446744073709551616",
    ):
        for target in (b"/events", b"/tasks/" + task + b"/stream"):
            yield get(target, b"Last-Event-ID: " + value)
    yield get(b"/events", b"Last-Event-ID: 1", b"Last-Event-ID: 2")
    for value in (b"x" * 255, b"x" * 256, b"\xff" * 255, b"k1", b"k1"):
        yield post(good, b"Idempotency-Key: " + value)
    yield post(good, b"Idempotency-Key: k1", b"Idempotency-Key: k2")
    yield post(json.dumps({**VALID, "priority": 1}).encode(), b"Idempotency-Key: k1")
    for content_type in (
        None,
        b"",
        b"text/plain",
        b"application/JSON",
        b"application/json; charset=utf-16",
        b"application/json; charset=\xff",
        b"application/json;;;",
        b"application/problem+json",
        b"multipart/form-data",
        b"multipart/form-data; boundary=x",
        b"application/x-www-form-urlencoded",
        b"*/*",
        b"application/octet-stream",
        b"x" * 5000,
    ):
        yield post(good, content_type=content_type)
        yield post(b"\xff" * 100, content_type=content_type)
    for encoding in (b"gzip", b"deflate", b"br", b"x" * 300):
        yield post(good, b"Content-Encoding: " + encoding)
    for accept in (
        b"text/plain",
        b"application/openmetrics-text; version=1.0.0",
        b"text/plain;q=0, application/json",
        b"*/*",
        b"text/*",
        b"TEXT/PLAIN",
        b"\xff",
        b"application/xml",
        b"text/plain, " * 500,
    ):
        yield get(b"/metrics", b"Accept: " + accept)
    for header in (
        b"Expect: 100-continue",
        b"Expect: nonsense",
        b"Upgrade: websocket",
        b"Upgrade: h2c",
        b"Range: bytes=0-1",
        b"If-None-Match: *",
        b"Cookie: " + b"a=b;" * 1000,
        b"X-Forwarded-For: evil\tname",
        b"X-Forwarded-Proto: \xff",
        b"Host: y",
        b"Transfer-Encoding: identity",
        b"Connection: upgrade",
        b"TE: trailers",
        b"Content-Length: 5",
        b"Content-Length: -5",
        b"Content-Length: 1e3",
    ):
        yield get(b"/tasks", header)
        yield get(b"/events", header)
    yield get(b"/tasks", *(b"X-%d: y" % n for n in range(90)))
    yield get(b"/tasks", b"X-Big: " + b"y" * 60_000)
    yield get(b"/tasks", b"X-Big: " + b"y" * 300_000)
    for target in (
        b"/events",
        b"/tasks/" + task + b"/stream",
        b"/tasks",
        b"/metrics",
        b"/tasks/" + task,
    ):
        for size in (1, 65_537, 300_000):  # a body where none belongs
            yield get(target, b"Content-Length: %d" % size) + b"x" * size
    chunked = b"Transfer-Encoding: chunked"
    for chunks in (
        b"0\r\n\r\n",
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good),
        b"zz\r\n",
        b"-1\r\n\r\n",
        b"".join(b"4000\r\n" + b" " * 0x4000 + b"\r\n" for _ in range(8))
        + b"0\r\n\r\n",
    ):
        yield (
            get(b"/tasks", chunked, b"Content-Type: application/json", method=b"POST")
            + chunks
        )
        yield (
            get(
                b"/tasks",
                chunked,
                b"Content-Length: 3",
                b"Content-Type: application/json",
                method=b"POST",
            )
            + chunks
        )


def unfinished() -> Iterator[bytes]:
    """Requests whose rest never comes."""
    yield from (b"\r\n\r\n\r\n", b"GET /tas")
    yield b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-"
    yield post(b'{"task_type": ').replace(b"Content-Length: 14", b"Content-Length: 99")
    yield (
        get(b"/tasks", b"Transfer-Encoding: chunked", method=b"POST")
        + b"FFFFFFFFFFFFFFF\r\nx"
    )
    yield get(b"/events", b"Content-Length: 70000") + b"x"


def targets(task: bytes) -> Iterator[bytes]:
    numbers = (
        b"0",
        b"1",
        b"-1",
        b"1000",
        b"1001",
        b"1e3",
        b"1.0",
        b"1_0",
        b"+5",
        b"%2B5",
        b"0x1",
        b"NaN",
        b"null",
        b"true",
        b"",
        b"%20",
        b"%00",
        b"%FF",
        b"%D9%A1",
        b"9" * 18,
        b"9" * 30,
        b"9" * 4300,
        b"9" * 4301,
        b"1&limit=2",
        b"1;2",
        b"[]",
        b"%ED%A0%80",
    )
    for name in (b"limit", b"offset", b"status", b"status=pending&limit", b"nonsense"):
        for value in numbers:
            yield get(b"/tasks?" + name + b"=" + value)
    for value in (
        b"pending",
        b"PENDING",
        b"running,failed",
        b"pending&status=running",
        b"%00",
        b"%ED%A0%80",
    ):
        yield get(b"/tasks?status=" + value)
    for value in (
        b"true",
        b"false",
        b"1",
        b"yes",
        b"2",
        b"",
        b"%FF",
        b"true&force=false",
        b"null",
    ):
        yield get(b"/tasks/" + task + b"?force=" + value, method=b"DELETE")
    for path in (
        b"%00",
        b"%0A",
        b"%0D%0Aforged: 1",
        b"%0d%0aforged",
        b"..",
        b"%2e%2e",
        b"%2F",
        b"%FF",
        b"%ED%A0%80",
        b"a/b",
        b"",
        b"%F0%9F%98%80",
        b"'; DROP TABLE tasks; --",
        b"<script>",
        b"{task_id}",
        b"x" * 5_000,
        b"x" * 60_000,
        b"%",
        b"%zz",
        b";a=b",
        task.upper(),
        b"\xff",
        b"\x7f",
    ):
        path = path.replace(b" ", b"%20")
        for tail in (b"", b"/stream", b"/"):
            yield get(b"/tasks/" + path + tail)
        yield get(b"/tasks/" + path, method=b"DELETE")
    for target in (
        b"/",
        b"//",
        b"//tasks",
        b"/tasks/",
        b"/Tasks",
        b"/tasks%3Fstatus=1",
        b"http://elsewhere/tasks",
        b"*",
        b"/tasks#x",
        b"/tasks?",
        b"/?x",
        b"/docs",
        b"/redoc",
        b"/openapi.json",
        b"/docs/oauth2-redirect",
        b"/favicon.ico",
        b"/health/",
        b"/metrics?x=1",
        b"/events/x",
    ):
        yield get(target)
    for method in (
        b"HEAD",
        b"OPTIONS",
        b"PUT",
        b"PATCH",
        b"DELETE",
        b"TRACE",
        b"CONNECT",
        b"FOO",
        b"get",
        b"PROPFIND",
        b"X" * 40,
        b'A"B',
        b"POST",
    ):
        for target in (
            b"/tasks",
            b"/tasks/" + task,
            b"/events",
            b"/metrics",
            b"/health",
            b"/nowhere",
        ):
            yield get(target, method=method)
    yield b"GET /tasks HTTP/1.0\r\n\r\n"
    yield b"GET /tasks HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n"
    yield b"GET /tasks\r\n\r\n"
    yield (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n"
    )  # someone speaks TLS
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"GET /tasks HTTP/1.1\r\nHost: x\r\nX-Fold: a\r\n  b\r\nConnection: close\r\n\r\n"
    yield b"GET /tasks HTTP/1.1\nHost: x\nConnection: close\n\n"
    yield b"GET /tasks HTTP/1.1\r\nHost x\r\nConnection: close\r\n\r\n"


# ======================================================================================
# What must hold


class Judge:
    def __init__(self, service: Service) -> None:
        self.service, self.statuses = service, Counter[int]()
        self.connection = http.client.HTTPConnection(HOST, service.port, timeout=20)
        self.document = self.fetch("/openapi.json")
        self.validators: dict[tuple[str, str, int], jsonschema_rs.Validator | None] = {}
        for path, operations in self.document["paths"].items():
            for method, operation in operations.items():
                for status, answer in operation["responses"].items():
                    schema = (
                        answer.get("content", {})
                        .get("application/json", {})
                        .get("schema")
                    )
                    self.validators[path, method.upper(), int(status)] = self.validator(
                        schema
                    )

    def validator(self, schema: Any) -> "jsonschema_rs.Validator | None":
        if not schema:
            return None
        return jsonschema_rs.validator_for(
            {**schema, "components": self.document["components"]}
        )

    def fetch(self, path: str) -> Any:
        self.connection.request("GET", path)
        answer = self.connection.getresponse()
        body = answer.read()
        assert answer.status == 200, f"GET {path}: {answer.status} {body[:500]!r}"
        return strict_json(body)

    def template(self, target: str) -> str | None:
        path = urllib.parse.unquote(target.split("?")[0])
        return next(
            (
                template
                for template in self.document["paths"]
                if re.fullmatch(re.sub(r"\{.*?\}", "[^/]+", template), path)
            ),
            None,
        )

    def send(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send it, and check the answer and what others see afterwards."""
        before = self.service.cpu
        try:
            status, headers, body = self.service.exchange(request)
        except TimeoutError:
            raise AssertionError(
                f"no end of the answer to {request[:1000]!r}"
            ) from None
        self.statuses[status] += 1
        spent = self.service.cpu - before
        assert spent < MUCH, f"{spent:.2f} s of CPU for {request[:1000]!r}"
        try:
            self.check_answer(request, status, headers, body)
            for path in OTHERS:
                self.fetch(path)
        except (AssertionError, ValueError) as error:
            answer = f"{status} {headers} {body[:500]!r}"
            exchanged = f"request: {request[:1000]!r}\nanswer: {answer}"
            raise AssertionError(f"{error}\n{exchanged}") from error
        return status, headers, body

    def check_answer(
        self, request: bytes, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        assert status, "no answer at all"
        if status == 503:
            assert int(headers["retry-after"]) > 0
        else:
            assert status < 500
        if "x-request-id" not in headers:
            # The server itself has refused it: it was no HTTP.
            assert status in (100, 400), "no request id"
            assert status == 100 or not body or b"Invalid HTTP request" in body
            return
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", headers["x-request-id"])
        if headers.get("content-type", "").startswith("application/json") and body:
            content = strict_json(body)
            assert status < 400 or content["detail"]
        method, target = request.split(b" ")[:2]
        if (template := self.template(target.decode("latin-1"))) is None:
            return
        operation = template, method.decode("latin-1")
        if known := {
            status for *other, status in self.validators if (*other,) == operation
        }:
            assert status in known, f"{operation} does not document a {status}"
            if validator := self.validators[*operation, status]:
                validator.validate(strict_json(body))


def check_metrics(judge: Judge) -> None:
    """They are in the text format, and don't grow with what is asked for."""
    status, _, text = judge.send(get(b"/metrics", b"Accept: text/plain"))
    assert status == 200
    lines = text.decode("ascii").splitlines()
    label = r'\w+="[^"\n]*"'
    sample = re.compile(rf"\w+(\{{{label}(,{label})*\}})? [0-9.e+-]+")
    for line in lines:
        known = sample.fullmatch(line) or re.fullmatch(r"# (TYPE|HELP) \w+ .+", line)
        assert known, f"not the text format: {line}"
    assert len(lines) < 300, "the metrics grow with what is asked for"


def run(seed: int, count: int) -> None:
    with Service(
        str(Path(__file__).with_name("server.py")), "{port}", "1000000"
    ) as service:
        judge = Judge(service)
        _, headers, _ = judge.send(post(json.dumps({**VALID, "delay": 3600}).encode()))
        task = headers["location"].rpartition("/")[2].encode()
        requests = [
            *(post(body) for body in bodies()),
            *with_headers(task),
            *targets(task),
            *(post(body) for body in mutants(random.Random(seed), count)),
        ]
        for request in requests:
            judge.send(request)
        for request in unfinished():
            with service.connect() as connection:
                connection.sendall(request)
                judge.send(get(b"/health"))
        check_metrics(judge)
        assert not service.trouble, service.trouble
        assert not re.search("^forged", service.log, re.MULTILINE), (
            "a forged line in the log"
        )
        code, _ = service.stop()
        assert not service.trouble, service.trouble
        assert code in (0, -15), code
    print(
        f"hostile requests: {len(requests)}, answered {dict(sorted(judge.statuses.items()))}"
    )


def run_full_queue() -> None:
    """The one 5xx there is. It says when to come back; nobody else sees any of it."""
    with Service(str(Path(__file__).with_name("server.py")), "{port}", "5") as service:
        judge = Judge(service)
        order = post(
            json.dumps({**VALID, "delay": 3600}).encode(), b"Idempotency-Key: first"
        )
        statuses = [judge.send(order)[0]]
        statuses += [
            judge.send(post(json.dumps({**VALID, "delay": 3600}).encode()))[0]
            for _ in range(20)
        ]
        assert statuses == [202] * 5 + [503] * 16, statuses
        assert judge.send(order)[0] == 202, "what a key has made is still there"
        assert judge.send(post(b"{}"))[0] == 422, "a wrong order is wrong first"
        assert not service.trouble, service.trouble
    print("full queue: 16 times 503 with Retry-After")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutants", type=int, default=800)
    args = parser.parse_args()
    print(f"hostile requests: seed {args.seed}", flush=True)
    run(args.seed, args.mutants)
    run_full_queue()


if __name__ == "__main__":
    main()
