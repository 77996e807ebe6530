"""REST under requests that nobody thought of, made from our own OpenAPI description.

Whatever comes, the answer is one that the description has: its status, its media type, its schema;
and a 5xx only where a service is away (503) or late (504).
"""

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from shared.settings import Settings
from tests.test_gateway_app import png
from tests.test_gateway_edits import gateway

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
ON_PURPOSE = {503, 504}


@pytest.fixture(scope="module")
def fuzzed(
    services: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, str]]:
    """A gateway process before the three services; gives it and its address."""
    with gateway(services, tmp_path_factory.mktemp("fuzz"), LOG_LEVEL="error") as both:
        yield both


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024.0
    raise AssertionError("no VmRSS")


def ask(url: str, examples: int) -> int:
    """`examples` requests to every operation, valid and not; gives how many there were."""
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    photo = png()
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        strategy = st.one_of(
            *(
                operation.as_strategy(generation_mode=mode)
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            )
        )

        @given(case=strategy, whole=st.booleans())
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def one(case: Any, whole: bool) -> None:
            nonlocal asked
            asked += 1
            if whole and isinstance(case.body, dict) and "image" in case.body:
                # A real picture, or nothing would ever come as far as the link.
                case.body = {**case.body, "image": photo, "quality": "fast", "align": False}
            answer = case.call(base_url=url, timeout=60)
            assert answer.status_code < 500 or answer.status_code in ON_PURPOSE, answer.text
            if answer.status_code >= 400:
                kind = answer.headers["content-type"][0]
                assert kind in ("application/problem+json", "application/json"), answer.text
            case.validate_response(answer, checks=CHECKS)

        one()
    return asked


def shout(url: str, times: int) -> None:
    """Bytes that are hardly HTTP, and connections that end in the middle."""
    host, _, port = url.removeprefix("http://").partition(":")
    chance = random.Random(5)
    heads = [
        b"POST /v1/edits HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n"
        b"content-type: multipart/form-data; boundary=x\r\n\r\n",
        b"POST /v1/edits HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
        b"content-type: multipart/form-data; boundary=x\r\n\r\nffffffff\r\n",
        b"GET /v1/edits/%00%ff/%2e%2e/sent.png HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/instructions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/9.9\r\n" + b"a: " + b"b" * 70_000 + b"\r\n\r\n",
    ]
    for number in range(times):
        data = bytearray(heads[number % len(heads)] + chance.randbytes(20))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(bytes(data))
            if number % 3 == 0:
                connection.shutdown(socket.SHUT_WR)
                line = connection.recv(100).split(b"\r\n")[0]
                assert not line or int(line.split()[1]) < 500, line


def test_what_openapi_describes_is_what_is_answered(fuzzed: tuple[Any, str]) -> None:
    process, url = fuzzed
    assert ask(url, examples=2) >= 20
    shout(url, 10)
    assert process.poll() is None
    assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.slow
def test_ten_thousand_requests_and_no_harm_done(fuzzed: tuple[Any, str]) -> None:
    process, url = fuzzed
    operations = len(
        list(schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations())
    )
    ask(url, examples=25)
    before_mib = resident_mib(process.pid)
    asked = 0
    while asked < 10_000:
        asked += ask(url, examples=-(-(10_000 - asked) // operations) + 1)
    shout(url, 500)
    assert process.poll() is None
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert resident_mib(process.pid) < 1.15 * before_mib + 8.0
