"""Who is let in, and how often: keys, shares, and what belongs to whom."""

import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from gateway.app import create_app
from gateway.keys import MOST_CALLERS, Key, Keyring, RateLimit
from shared.errors import InvalidRequest
from tests.test_gateway_desk import HeldLink
from tests.test_gateway_store import PHOTO

ALICE, BOB = "alice-" + "a" * 20, "bob-" + "b" * 20


def ring() -> Keyring:
    pairs = (("alice", ALICE), ("bob", BOB))
    return Keyring([Key(name, hashlib.sha256(key.encode()).digest()) for name, key in pairs])


@contextmanager
def gateway(**options: Any) -> Iterator[TestClient]:
    """The app over a link that is always free."""
    link = HeldLink()
    link.free.set()
    with TestClient(create_app(link, **options), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, key: str | None = None, **headers: str) -> Any:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    form = {"instruction": "-", "align": "false"}
    return client.post("/v1/edits", files={"image": PHOTO}, data=form, headers=headers)


# -------------------------------------------------------------------------------------- the keyring


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    file.write_text(f"# who\n\nalice sha256:{digest}   # her phone\nbob {BOB}#7 120\n")
    found = Keyring.read(file)
    assert found.find(ALICE) == Key("alice", bytes.fromhex(digest))
    bob = found.find(BOB + "#7")
    assert bob is not None
    assert (bob.name, bob.per_minute) == ("bob", 120.0)
    for wrong in ("", BOB, ALICE[:-1], ALICE + " ", digest, "sha256:" + digest, "\udcff"):
        assert found.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 keys"),
        ("# nothing\n", "0 keys"),
        ("alice", "1 words"),
        ("alice hush-hush", "at least 16"),
        ("alice sha256:hush-hush", "64 hexadecimal"),
        (f"al/ice {ALICE}", "the name"),
        (f"alice {ALICE} often", "POSTs a minute"),
        (f"alice {ALICE} 0", "POSTs a minute"),
        (f"alice {ALICE} nan", "POSTs a minute"),
        (f"alice {ALICE} 1 1", "4 words"),
        (f"alice {ALICE}\nalice {BOB}", "twice"),
        (f"alice {ALICE}\nbob {ALICE}", "twice"),
    ],
)
def test_a_wrong_line_is_told_without_its_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=said) as raised:
        Keyring.read(file)
    assert ALICE not in str(raised.value)
    assert "hush-hush" not in str(raised.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Keyring.read(tmp_path / "none")


def test_every_key_is_compared_whole_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time: all digests, all bytes, by hmac.compare_digest, found early or not at all."""
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr("gateway.keys.hmac.compare_digest", compare)
    for shown in (ALICE, BOB, "unknown", "x" * 10_000):
        compared.clear()
        ring().find(shown)
        assert compared == [(32, 32)] * 2


# ----------------------------------------------------------------------------------- the rate limit


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = [0.0]
    limit = RateLimit(60.0, burst=3, clock=lambda: now[0])
    assert [limit.take("a") for _ in range(3)] == [0.0] * 3
    assert limit.take("a") == pytest.approx(1.0)
    assert limit.take("b") == 0.0  # another caller's share is another
    now[0] += 0.5
    assert limit.take("a") == pytest.approx(0.5)  # asking again costs nothing
    now[0] += 0.5
    assert limit.take("a") == 0.0
    now[0] += 3600.0
    assert [limit.take("a") for _ in range(3)] == [0.0] * 3
    assert limit.take("a") > 0.0  # a long silence saves up no more than the burst
    served = 0
    for _ in range(1000):
        now[0] += 0.1
        served += limit.take("a") == 0.0
    assert served == pytest.approx(100, abs=2)


def test_no_rate_is_no_limit_and_a_keys_own_rate_wins() -> None:
    free = RateLimit(0.0, burst=1, clock=lambda: 0.0)
    assert [free.take("a") for _ in range(100)] == [0.0] * 100
    assert free.take("a", per_minute=60.0) == 0.0
    assert free.take("a", per_minute=60.0) == pytest.approx(1.0)


def test_strangers_do_not_fill_the_memory() -> None:
    limit = RateLimit(1.0, burst=1, clock=lambda: 0.0)
    for number in range(MOST_CALLERS + 100):
        limit.take(str(number))
    assert len(limit._buckets) == MOST_CALLERS


# ----------------------------------------------------------------------------------------- the door


def test_without_a_key_there_is_only_the_page() -> None:
    with gateway(keyring=ring()) as client:
        for path in ("/", "/docs", "/openapi.json", "/healthz", "/static/app.js", "/v1/samples"):
            assert client.get(path).status_code == 200, path
        for answer in (
            post(client),
            post(client, "wrong"),
            client.get("/v1/attributes"),
            client.get("/metrics"),
            client.delete("/v1/edits/" + "0" * 32),
            client.get("/v1/attributes", headers={"authorization": f"Basic {ALICE}"}),
            client.get("/v1/attributes", headers={"authorization": "Bearer"}),
            client.get("/v1//attributes"),
            client.get("/static/../v1/attributes"),
        ):
            assert answer.status_code == 401, answer.url
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["type"] == "urn:edsc:problem:unauthorized"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]
        for headers in ({"authorization": f"bearer {ALICE}"}, {"x-api-key": ALICE}):
            assert client.get("/v1/attributes", headers=headers).status_code == 200
            metrics = client.get("/metrics", headers=headers).text
        assert 'edsc_rejected_total{reason="Unauthorized",service="gateway"} 9.0' in metrics


def test_an_edit_exists_for_its_owner_alone() -> None:
    with gateway(keyring=ring()) as client:
        edit = post(client, ALICE, **{"idempotency-key": "same"}).json()
        other = post(client, BOB, **{"idempotency-key": "same"}).json()
        assert edit["id"] != other["id"]
        paths = [f"/v1/edits/{edit['id']}", *edit["images"].values()]
        paths.append(f"/v1/edits/{edit['id']}/latent")
        for path in paths:
            assert client.get(path, headers={"x-api-key": ALICE}).status_code == 200
            assert client.get(path, headers={"x-api-key": BOB}).status_code == 404
        for method, path in (("DELETE", paths[0]), ("POST", f"{paths[0]}/rerun")):
            assert client.request(method, path, headers={"x-api-key": BOB}).status_code == 404
        assert client.delete(paths[0], headers={"x-api-key": ALICE}).status_code == 204


def test_asking_too_often_is_429_with_when_to_come_back() -> None:
    now = [0.0]
    limit = RateLimit(6.0, burst=2, clock=lambda: now[0])
    with gateway(keyring=ring(), rate_limit=limit) as client:
        assert [post(client, ALICE).status_code for _ in range(3)] == [200, 200, 429]
        answer = post(client, ALICE)
        assert answer.json()["type"] == "urn:edsc:problem:rate-limited"
        assert answer.headers["retry-after"] == "10"
        assert post(client, BOB).status_code == 200
        assert client.get("/v1/attributes", headers={"x-api-key": ALICE}).status_code == 200
        now[0] += 10.0
        assert post(client, ALICE).status_code == 200
        metrics = client.get("/metrics", headers={"x-api-key": BOB}).text
        assert 'edsc_rejected_total{reason="RateLimited",service="gateway"} 2.0' in metrics


def test_without_keys_every_address_has_its_share() -> None:
    limit = RateLimit(1.0, burst=1, clock=lambda: 0.0)
    with gateway(rate_limit=limit) as client:
        assert [post(client).status_code for _ in range(2)] == [200, 429]
