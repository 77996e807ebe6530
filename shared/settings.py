"""Settings of the processes: one frozen object, read once, in `main`.

Every field can be set in the environment as EDSC_<NAME> (EDSC_TRANSMITTER_PORT=50061), and the
common ones on the command line of a service (`python -m channel_sim --port 0`), which wins.
"""

import argparse
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import InvalidRequest

ServiceName = Literal["transmitter", "channel", "receiver", "baselines", "gateway"]

Precision = Literal["auto", "float32", "bfloat16"]

AT_BARRIERS: Final[Mapping[str, str]] = MappingProxyType(
    {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
)
"""Environment of processes that share cores. Threads that spin at a barrier take the others'; one
that sleeps at every barrier is late at the next: so a tenth of a millisecond first.
"""

MIB: Final = 2**20


class Settings(BaseSettings):
    """What the operator may choose. Immutable; raises pydantic's ValidationError out of range."""

    model_config = SettingsConfigDict(env_prefix="EDSC_", frozen=True, extra="ignore")

    host: str = Field(default="127.0.0.1", description="address to bind; 0.0.0.0 in a container")
    transmitter_port: int = Field(default=50051, ge=0, le=65535, description="0: any free port")
    channel_port: int = Field(default=50052, ge=0, le=65535)
    receiver_port: int = Field(default=50053, ge=0, le=65535)
    gateway_port: int = Field(default=8000, ge=0, le=65535)
    baselines_port: int = Field(default=50054, ge=0, le=65535)
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="HTTP port of a service's Prometheus metrics; unset: none",
    )

    transmitter_target: str = Field(
        default="",
        description='gRPC target: "dns:///transmitter:50051" (every address of that name), or '
        '"10.0.0.5:50051,10.0.0.6:50051"; empty: this machine',
    )
    channel_target: str = ""
    receiver_target: str = ""
    baselines_target: str = Field(
        default="", description="the optional process that carries the schemes compared with"
    )

    weights: Path | None = Field(default=None, description="bundle folder; unset: the shipped one")
    device: str = Field(default="cpu", description='torch device: "cpu", "cuda", "cuda:1", "auto"')
    precision: Precision = Field(
        default="auto",
        description='in which networks multiply: "float32", "bfloat16", or "auto": bfloat16 where '
        "the device does so natively",
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="threads per inference (1: none beside it for photos); 0: torch's choice",
    )

    queue_size: int = Field(
        default=16,
        ge=0,
        le=4096,
        description="requests of a lane (a quality) waiting, beside those in progress",
    )
    max_batch: int = Field(
        default=16,
        ge=1,
        le=256,
        description="requests of a lane in progress at once, which share passes; 1: no batching",
    )
    max_delay_ms: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="how long the first request after a pause waits for others to share with",
    )
    max_in_flight: int = Field(
        default=64, ge=1, le=4096, description="edits under way in the gateway before it says 429"
    )
    default_deadline_s: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="limit on a call, also on one that asks for more time",
    )
    drain_s: float = Field(
        default=10.0, ge=0, le=600, description="time for calls under way after SIGTERM"
    )
    max_connection_age_s: float = Field(
        default=60.0,
        gt=0,
        description="after which a client is asked to connect anew, and so finds new replicas",
    )
    max_message_mib: int = Field(default=24, ge=1, le=512, description="largest gRPC message, MiB")
    max_image_mib: int = Field(default=20, ge=1, le=256, description="largest photo, MiB")
    max_sentence: int = Field(default=2000, ge=1, description="longest sentence, characters")
    max_samples: int = Field(
        default=2**20, ge=1, description="most complex samples in a frame: messages x uses"
    )

    tls_certificate: Path | None = Field(
        default=None, description="PEM chain; with tls_key: serve TLS, and show it to servers"
    )
    tls_key: Path | None = None
    tls_ca: Path | None = Field(
        default=None,
        description="PEM: clients check servers against it, servers their clients (mTLS)",
    )
    https_certificate: Path | None = Field(
        default=None,
        description="PEM chain that the gateway shows to browsers; unset: tls_certificate",
    )
    https_key: Path | None = None

    state: Path | None = Field(
        default=None,
        description="folder of the gateway's database and pictures; unset: the user's state folder",
    )
    database: str = Field(
        default="",
        description='SQLAlchemy URL, e.g. "postgresql://user:secret@host/edsc"; empty: SQLite in '
        "the state folder",
    )
    pictures: str = Field(
        default="",
        description='fsspec URL, e.g. "s3://bucket/edits"; empty: a folder in the state folder',
    )
    retention_hours: float = Field(
        default=24.0, gt=0, le=87_600, description="an edit is forgotten after this long"
    )
    retention_edits: int = Field(
        default=2000, ge=1, description="most edits kept; the oldest go first"
    )
    retention_mib: int = Field(default=1024, ge=1, description="most MiB of pictures kept")
    lease_s: float = Field(
        default=15.0,
        gt=0,
        le=3600,
        description="an edit whose gateway has not been heard of for so long is taken over",
    )
    max_attempts: int = Field(
        default=3, ge=1, le=100, description="starts of one edit before it is given up"
    )
    patience_s: float = Field(
        default=300.0,
        ge=0,
        le=86_400,
        description="how long an edit that nobody waits for is tried while services are busy",
    )

    api_keys: Path | None = Field(
        default=None, description="file of API keys (gateway/keys.py); unset: no key is asked for"
    )
    rate_per_minute: float = Field(
        default=0.0,
        ge=0,
        description="POSTs a minute for each key, or each address without keys; 0: no limit",
    )
    rate_burst: int = Field(default=20, ge=1, description="POSTs at once before the rate counts")
    body_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="longest wait for the next piece of a body"
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        # Half a pair would quietly serve without TLS.
        for name in ("tls", "https"):
            certificate, key = getattr(self, f"{name}_certificate"), getattr(self, f"{name}_key")
            if (certificate is None) != (key is None):
                got = "key" if certificate is None else "certificate"
                raise ValueError(f"{name}_{got} alone; expected {name}_certificate and {name}_key")
        return self

    @property
    def https(self) -> tuple[Path, Path] | None:
        """Certificate and key that the gateway serves HTTPS with; None: it serves HTTP."""
        for pair in (
            (self.https_certificate, self.https_key),
            (self.tls_certificate, self.tls_key),
        ):
            if pair[0] is not None and pair[1] is not None:
                return pair[0], pair[1]
        return None

    def port(self, service: ServiceName) -> int:
        """Port that `service` binds."""
        ports: dict[ServiceName, int] = {
            "transmitter": self.transmitter_port,
            "channel": self.channel_port,
            "receiver": self.receiver_port,
            "gateway": self.gateway_port,
            "baselines": self.baselines_port,
        }
        return ports[service]

    def target(self, service: Literal["transmitter", "channel", "receiver", "baselines"]) -> str:
        """gRPC target at which the gateway finds `service`, all its replicas.

        Raises InvalidRequest for a list with a name in it: names are for DNS to make lists of.
        """
        chosen = {
            "transmitter": self.transmitter_target,
            "channel": self.channel_target,
            "receiver": self.receiver_target,
            "baselines": self.baselines_target,
        }[service]
        if "," in chosen and "://" not in chosen and not chosen.startswith(("ipv4:", "ipv6:")):
            return _several(chosen)
        return chosen or self.address(service)

    def address(self, service: ServiceName) -> str:
        """Where a process on this machine is called."""
        # 0.0.0.0 and :: are addresses to bind, none to call.
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"{host}:{self.port(service)}"


def _several(addresses: str) -> str:
    """`host:port,host:port` as gRPC's own resolvers want it."""
    hosts = [one.strip().rpartition(":")[0] for one in addresses.split(",")]
    versions = set()
    for host in hosts:
        try:
            versions.add(ip_address(host.strip("[]")).version)
        except ValueError:
            raise InvalidRequest(
                f"the target {addresses!r} has the host {host!r}; expected IP addresses with ports,"
                ' or one name as "dns:///name:port"'
            ) from None
    if len(versions) > 1:
        raise InvalidRequest(f"the target {addresses!r} mixes IPv4 and IPv6; expected one of them")
    return f"ipv{versions.pop()}:{addresses.replace(' ', '')}"


def settings_from_flags(service: ServiceName, argv: Sequence[str] | None = None) -> Settings:
    """Settings of a service process: flags over environment over defaults.

    Exits with status 2 and a usage line on a flag or a value that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {'channel_sim' if service == 'channel' else service}",
        description=f"The {service} of Editable-DeepSC. Every setting also reads EDSC_<NAME>.",
    )
    parser.add_argument("--host", help="address to bind (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to bind; 0: any free one, printed")
    parser.add_argument("--metrics-port", type=int, help="HTTP port of the Prometheus metrics")
    parser.add_argument("--weights", type=Path, help="bundle folder")
    parser.add_argument("--device", help='"cpu" (default), "cuda", "auto"')
    parser.add_argument("--threads", type=int, help="threads per inference; 0: torch's choice")
    parser.add_argument("--queue-size", type=int, help="requests that may wait, per quality (16)")
    parser.add_argument("--max-batch", type=int, help="requests that share passes; 1: none (16)")
    parser.add_argument("--max-delay-ms", type=float, help="wait for others to share with (0)")
    parser.add_argument("--drain-s", type=float, help="seconds for calls under way after SIGTERM")
    parser.add_argument("--state", type=Path, help="folder of the gateway's database and pictures")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"])
    flags = vars(parser.parse_args(argv))
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if "port" in given:
        given[f"{service}_port"] = given.pop("port")
    try:
        return Settings(**given)
    except ValueError as error:
        parser.error(str(error))
