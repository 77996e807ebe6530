"""The generated code is what proto/edsc.proto generates, and every field there says its unit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.pb import edsc_pb2

ROOT = Path(__file__).resolve().parents[1]
PROTO = ROOT / "proto" / "edsc.proto"


def test_generated_code_has_not_drifted(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-Ishared/pb=proto",
            f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}",
            "proto/edsc.proto",
        ],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    written = sorted((tmp_path / "shared" / "pb").iterdir())
    assert len(written) == 3
    for path in written:
        kept = ROOT / "shared" / "pb" / path.name
        assert kept.read_text() == path.read_text(), f"{kept}: run `make proto`"


def test_services_and_methods() -> None:
    services = edsc_pb2.DESCRIPTOR.services_by_name
    assert {name: [m.name for m in service.methods] for name, service in services.items()} == {
        "Transmitter": ["Transmit", "TransmitStream", "ReadInstruction", "DescribeModel"],
        "Channel": ["Propagate", "Describe"],
        "Receiver": ["Receive", "Describe"],
    }
    assert edsc_pb2.DESCRIPTOR.package == "edsc.v1"


FIELD = re.compile(r"^\s+(?:optional |repeated )?[\w.<>, ]+ \w+ = \d+;$")


@pytest.mark.parametrize(
    ("number", "line"),
    [(i, line) for i, line in enumerate(PROTO.read_text().splitlines()) if FIELD.match(line)],
)
def test_every_field_has_a_comment(number: int, line: str) -> None:
    before = PROTO.read_text().splitlines()[number - 1].strip()
    assert before.startswith("//"), f"line {number + 1}: {line.strip()} has no comment"
