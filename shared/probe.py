"""Is the process beside me serving? What a container's health check runs in it.

    python -m shared.probe transmitter        exit status 0: it serves; 1, and why, if not

It is asked at its own port on this machine, whatever replicas there are elsewhere, as the settings
have it: over TLS where they say so. A service's certificate names the host that the gateway calls
it by; so that host, from EDSC_<SERVICE>_TARGET, is the name expected of it here.
"""

import argparse
import ssl
import sys
from collections.abc import Sequence
from typing import Any, get_args
from urllib.request import urlopen

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.errors import EdscError, Unavailable
from shared.rpc import translated
from shared.settings import ServiceName, Settings
from shared.transport import OFFERS, GrpcService, client_credentials


def probe(service: ServiceName, settings: Settings, timeout_s: float = 5.0) -> None:
    """Return if the process of this machine serves. Raises EdscError if not, or not in time."""
    if service == "gateway":
        _ask_gateway(settings, timeout_s)
    else:
        _ask_service(service, settings, timeout_s)


def _ask_gateway(settings: Settings, timeout_s: float) -> None:
    scheme, context = "http", None
    if settings.https is not None:
        # Of this machine's own port: whose certificate it is says nothing about its health.
        scheme, context = "https", ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        url = f"{scheme}://{settings.address('gateway')}/healthz"
        urlopen(url, timeout=timeout_s, context=context).close()
    except OSError as error:
        raise Unavailable(f"the gateway does not answer: {error}") from error


def _ask_service(service: GrpcService, settings: Settings, timeout_s: float) -> None:
    here = settings.address(service)
    credentials = client_credentials(settings)
    if credentials is None:
        channel = grpc.insecure_channel(here)
    else:
        host = settings.target(service).rpartition("/")[2].rpartition(":")[0].strip("[]")
        named = [("grpc.ssl_target_name_override", host)]
        channel = grpc.secure_channel(here, credentials, named)
    with channel, translated(service):
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods exist at run time only
        asked = health_pb2.HealthCheckRequest(service=OFFERS[service][0])
        status = stub.Check(asked, timeout=timeout_s).status
    if status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        raise Unavailable(f"the {service} says {name}; expected SERVING")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if it serves."""
    parser = argparse.ArgumentParser(prog="python -m shared.probe", description=__doc__)
    parser.add_argument("service", choices=get_args(ServiceName))
    try:
        probe(parser.parse_args(argv).service, Settings())
    except EdscError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
