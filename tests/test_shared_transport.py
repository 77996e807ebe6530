"""TLS between services, with real certificates made here: who is let in, who is believed."""

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pydantic import ValidationError

from shared.errors import Unavailable
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.probe import probe
from shared.rpc import FULL_NAMES, GrpcService, Server, open_channel, translated
from shared.settings import Settings
from shared.transport import server_credentials
from tests.test_shared_rpc import REQUEST, Probe

pytest.importorskip("cryptography", reason="certificates are made with the development extra")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A CA in a folder, and what it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self.key, issuer=name, ca=True)
        self.pem = folder / f"{name}.pem"
        self.pem.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _sign(
        self, name: str, key: Any, issuer: str, ca: bool, host: str = "", days: int = 1
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, issuer)]
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if host:
            name_or_ip: x509.GeneralName
            if host[0].isdigit():
                name_or_ip = x509.IPAddress(ipaddress.ip_address(host))
            else:
                name_or_ip = x509.DNSName(host)
            builder = builder.add_extension(x509.SubjectAlternativeName([name_or_ip]), False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, name: str, host: str = "127.0.0.1", days: int = 1) -> Pair:
        """A certificate for `host`; a negative number of `days`: over."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, self.name, ca=False, host=host, days=days)
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair

    def tls(self, pair: Pair) -> dict[str, Path]:
        """Settings of a process that shows `pair` and believes this CA."""
        return {"tls_certificate": pair.certificate, "tls_key": pair.key, "tls_ca": self.pem}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@contextmanager
def serving(tls: dict[str, Path]) -> Iterator[str]:
    server = Server(Settings(channel_port=0, **tls), "channel")  # type: ignore[arg-type]
    edsc_pb2_grpc.add_ChannelServicer_to_server(Probe(server), server.grpc)
    target = f"127.0.0.1:{server.start()}"
    server.ready()
    try:
        yield target
    finally:
        server.drain(0.0)


def call(target: str, tls: dict[str, Path]) -> int:
    settings = Settings(channel_target=target, **tls)  # type: ignore[arg-type]
    with open_channel(settings, "channel") as channel, translated("channel"):
        reply: edsc_pb2.PropagateReply = edsc_pb2_grpc.ChannelStub(channel).Propagate(
            REQUEST, timeout=2
        )
    return reply.seed


def test_both_ends_show_what_the_same_ca_has_signed(ours: Authority) -> None:
    with serving(ours.tls(ours.issue("channel"))) as target:
        assert call(target, ours.tls(ours.issue("gateway"))) == 3


def test_whoever_shows_nothing_or_anothers_is_not_let_in(
    ours: Authority, theirs: Authority
) -> None:
    with serving(ours.tls(ours.issue("channel"))) as target:
        stranger = theirs.issue("gateway")
        forged = {**theirs.tls(stranger), "tls_ca": ours.pem}
        late = ours.tls(ours.issue("late", days=-1))
        for tls in ({}, {"tls_ca": ours.pem}, forged, late):
            with pytest.raises(Unavailable):
                call(target, tls)
        with grpc.insecure_channel(target) as plain, pytest.raises(grpc.RpcError):
            edsc_pb2_grpc.ChannelStub(plain).Propagate(REQUEST, timeout=2)
        assert call(target, ours.tls(ours.issue("gateway"))) == 3


def test_a_server_that_cannot_prove_its_name_is_not_believed(
    ours: Authority, theirs: Authority
) -> None:
    client = ours.tls(ours.issue("gateway"))
    elsewhere = ours.issue("elsewhere", host="10.0.0.1")
    for tls in (theirs.tls(theirs.issue("channel")), ours.tls(elsewhere)):
        with serving(tls) as target, pytest.raises(Unavailable):
            call(target, client)


def test_a_probe_of_this_machine_expects_the_name_that_others_call(
    ours: Authority, theirs: Authority
) -> None:
    """As in a container: called by a name elsewhere, asked at its own port here."""
    tls = ours.tls(ours.issue("named", host="channel_sim"))
    with serving(tls) as target:
        port = int(target.rpartition(":")[2])
        here = Settings(channel_port=port, channel_target="dns:///channel_sim:50052", **tls)  # type: ignore[arg-type]
        probe("channel", here)
        misnamed = here.model_copy(update={"channel_target": "dns:///receiver:50053"})
        with pytest.raises(Unavailable, match="the channel does not answer"):
            probe("channel", misnamed, timeout_s=2.0)
        stranger = theirs.tls(theirs.issue("stranger"))
        with pytest.raises(Unavailable):
            probe("channel", here.model_copy(update=stranger), timeout_s=2.0)


def test_half_a_pair_is_told() -> None:
    for name in ("tls", "https"):
        with pytest.raises(ValidationError, match=f"{name}_key alone; expected"):
            Settings(**{f"{name}_key": Path("k")})  # type: ignore[arg-type]
        with pytest.raises(ValidationError, match=f"{name}_certificate alone; expected"):
            Settings(**{f"{name}_certificate": Path("c")})  # type: ignore[arg-type]


def test_a_service_never_falls_back_to_plain_text(ours: Authority) -> None:
    with pytest.raises(Unavailable, match="plain text"):
        server_credentials(Settings(tls_ca=ours.pem))
    assert server_credentials(Settings()) is None


def test_the_browser_is_shown_another_certificate_than_the_services(ours: Authority) -> None:
    inside, outside = ours.issue("inside"), ours.issue("outside")
    both = Settings(
        tls_certificate=inside.certificate,
        tls_key=inside.key,
        https_certificate=outside.certificate,
        https_key=outside.key,
    )
    assert both.https == (outside.certificate, outside.key)
    only = Settings(tls_certificate=inside.certificate, tls_key=inside.key)
    assert only.https == (inside.certificate, inside.key)
    assert Settings().https is None


@pytest.mark.slow
def test_four_processes_with_tls_everywhere(ours: Authority, random_bundle: Path) -> None:
    """HTTPS in front, mTLS behind: ready, and not readable without."""
    from edsc.up import Stack

    inside, outside = ours.issue("stack"), ours.issue("page")
    settings = Settings(
        weights=random_bundle,
        threads=1,
        https_certificate=outside.certificate,
        https_key=outside.key,
        **ours.tls(inside),  # type: ignore[arg-type]
    )
    with Stack(settings, free_ports=True) as stack:
        assert stack.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(ours.pem))
        assert httpx.get(f"{stack.url}/readyz", verify=trust).json()["ready"]
        probe(
            "gateway",
            settings.model_copy(update={"gateway_port": int(stack.url.rpartition(":")[2])}),
        )
        assert httpx.get(f"{stack.url}/v1/model", verify=trust).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{stack.url}/readyz")
        with pytest.raises(httpx.HTTPError):
            httpx.get(stack.url.replace("https", "http"))
        names: tuple[GrpcService, ...] = tuple(FULL_NAMES)
        for name in names:
            with grpc.insecure_channel(stack.target(name)) as plain:
                stub = edsc_pb2_grpc.ReceiverStub(plain)
                with pytest.raises(grpc.RpcError):
                    stub.Describe(edsc_pb2.DescribeModelRequest(), timeout=2)
