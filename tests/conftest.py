"""What every test shares: how many threads, where the data and the shipped bundle are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from shared.settings import AT_BARRIERS, Settings

# Before torch is imported, here and in every process a test starts: more threads than cores, or two
# test processes that both take all of them, cost several times the work itself.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.update({**AT_BARRIERS, **os.environ})

import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def _logs() -> None:
    """Services in this process log to its stderr: what a command prints is the command's alone."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.__stderr__))


@pytest.fixture
def logging_undone() -> Iterator[None]:
    """For a test that configures logging: afterwards it is as it was."""
    before = structlog.get_config()
    yield
    structlog.contextvars.clear_contextvars()
    structlog.configure(**before)


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gateways that tests start keep their edits here, not among the user's own."""
    os.environ["EDSC_STATE"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The pictures and labels to train and test with, which may not be redistributed.

    Looked for at `EDSC_DATA`, then at `../shared/data`; a test that wants them skips without.
    """
    folder = Path(os.environ.get("EDSC_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "celeba128").is_dir():
        pytest.skip(f"no data: {folder} has no celeba128 (set EDSC_DATA)")
    return folder


@pytest.fixture(scope="session")
def bundle_folder() -> Path:
    """The bundle that the services load: `EDSC_WEIGHTS`, then the shipped one."""
    folder = Path(os.environ.get("EDSC_WEIGHTS") or ROOT / "weights" / "celeba-128")
    if not (folder / "bundle.json").is_file():
        pytest.skip(f"no bundle: {folder} has no bundle.json (set EDSC_WEIGHTS, or train one)")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness: every draw in a test comes from one like this."""
    return torch.Generator().manual_seed(20240531)


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle of small random nets at 32 px: edits that mean nothing, quickly."""
    from dataclasses import asdict

    from shared.bundle import write_net
    from shared.stylegan2 import Generator, GeneratorConfig
    from transmitter.faces import FaceNetConfig, FaceNets, FinderConfig, bundle_config
    from transmitter.fields import Fields, FieldsConfig
    from transmitter.inversion import InversionConfig, InversionEncoder
    from transmitter.predictor import Predictor, PredictorConfig
    from transmitter.regressor import Regressor, RegressorConfig
    from transmitter.text import TextConfig, TextEncoder

    folder = tmp_path_factory.mktemp("random-bundle")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        generator = GeneratorConfig(image_size=32, mapping_layers=2, channels=(16, 16, 16, 16))
        inversion = InversionConfig(image_size=32, channels=(16, 16, 16))
        predictor = PredictorConfig(resolution=32, widths=(8, 8, 8), depths=(0, 0, 0))
        faces, finder = FaceNetConfig((8, 8, 8, 8, 8), (0, 0, 0)), FinderConfig()
        fields, regressor = FieldsConfig(depth=2), RegressorConfig(width=16)
        text = TextConfig(pieces=64, width=16, hidden=16, threshold=0.0)
        nets = {
            "generator": (Generator(generator), asdict(generator)),
            "inversion": (InversionEncoder(inversion), inversion.to_json()),
            "predictor": (Predictor(predictor), predictor.to_json()),
            "faces": (FaceNets(faces), bundle_config(faces, finder)),
            "fields": (Fields(fields), fields.to_json()),
            "regressor": (Regressor(regressor), regressor.to_json()),
            "text": (TextEncoder(text), text.to_json()),
        }
    for name, (net, config) in nets.items():
        write_net(
            folder, name, config=config, tensors=net.state_dict(), provenance={"recipe": "random"}
        )
    return folder


@pytest.fixture(scope="session")
def baselines_bundle(random_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random bundle with a picture codec: untrained, on components of random pictures."""
    import shutil

    from baselines.deepsc import NET, Deepsc, DeepscConfig, PatchCode
    from shared.bundle import write_net

    folder = tmp_path_factory.mktemp("baselines") / "bundle"
    shutil.copytree(random_bundle, folder)
    draws = torch.Generator().manual_seed(2)
    pictures = torch.nn.functional.interpolate(torch.randn(32, 3, 5, 5, generator=draws) * 0.4, 32)
    config = DeepscConfig(wide=8, narrow=8, blocks=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = Deepsc(config, PatchCode.fit(pictures, config.components))
    write_net(folder, NET, config=config.to_json(), tensors=net.state_dict(), provenance={})
    return folder


@pytest.fixture(scope="session")
def services(random_bundle: Path) -> Iterator[Settings]:
    """The three real services in this process, on free ports, with random weights, in float32.

    Gives the settings with which a client finds them.
    """
    import channel_sim.service
    import receiver.service
    import transmitter.service
    from shared.rpc import GrpcService, Server

    settings = Settings(
        transmitter_port=0,
        channel_port=0,
        receiver_port=0,
        weights=random_bundle,
        threads=1,
        precision="float32",  # company shows in no byte of a picture
    )
    registers: dict[GrpcService, Callable[[Server], Callable[[], None]]] = {
        "transmitter": transmitter.service.register,
        "channel": channel_sim.service.register,
        "receiver": receiver.service.register,
    }
    servers = {name: Server(settings, name) for name in registers}
    targets = {}
    for name, server in servers.items():
        load = registers[name](server)
        targets[f"{name}_target"] = f"127.0.0.1:{server.start()}"
        server.worker.submit(None, load).result(60)
        server.ready()
    yield settings.model_copy(update=targets)
    for server in servers.values():
        server.drain(0.0)
