"""docker-compose.yml for real: `make compose-test` builds the image, starts the four containers
with podman and podman-compose, edits a sample, kills one container and sees it come back.

Podman gets a home of its own (EDSC_COMPOSE_HOME, otherwise a folder in the user's cache), image
store and settings, so nothing of the user's is touched. The base image is pulled; where no registry
can be reached, Debian's own Python stands in for it, made by debootstrap. pip inside the build is
set up as it is outside.
"""

from __future__ import annotations

import configparser
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from edsc.demo import first_sample
from edsc.runner import Remote
from gateway.answer import EditAnswer, Order, Quality
from shared.errors import EdscError

ROOT = Path(__file__).resolve().parent.parent
BASE = "docker.io/library/python:3.11-slim"
SERVICES = ("transmitter", "channel_sim", "receiver", "gateway")
PORT = 18_000
READY_S = 300.0
PACKAGES = "apt-get install podman runc netavark aardvark-dns catatonit iptables debootstrap"

pytestmark = pytest.mark.slow


class Podman:
    """Podman with its store and settings in `home`; raises CalledProcessError with its words."""

    def __init__(self, home: Path, driver: str) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        # Without systemd: cgroups through the file system; limits that a container may have here.
        (home / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "runc"\n'
            '[network]\nnetwork_backend = "netavark"\n'
        )
        (home / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{home}/graph"\nrunroot = "{home}/run"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(home / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(home / "storage.conf"),
            "EDSC_PUBLISH": f"127.0.0.1:{PORT}",
        }

    def run(self, *command: str, timeout_s: float = 60.0, program: str = "podman") -> str:
        """stdout of a podman command."""
        done = subprocess.run(
            [program, *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            raise EdscError(
                f"{program} {' '.join(command[:4])} ... ended with {done.returncode}\n"
                + (done.stdout + done.stderr)[-3000:]
            )
        return done.stdout

    def works(self, *command: str, timeout_s: float = 60.0) -> bool:
        """Whether a podman command ends well."""
        try:
            self.run(*command, timeout_s=timeout_s)
        except (EdscError, subprocess.TimeoutExpired):
            return False
        return True


def _home() -> Path:
    chosen = os.environ.get("EDSC_COMPOSE_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else cache / "editable-deepsc" / "compose"


@pytest.fixture(scope="module")
def podman() -> Podman:
    """Podman as it works here: overlay storage, or plain copies where the kernel has none."""
    for program in ("podman", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed ({PACKAGES})")
    for driver in ("overlay", "vfs"):
        found = Podman(_home() / driver, driver)
        if found.works("info"):
            return found
    pytest.skip("podman info fails here with overlay and with vfs storage: not allowed to?")


@pytest.fixture(scope="module")
def composer() -> str:
    """The program podman-compose."""
    beside = Path(sys.executable).with_name("podman-compose")
    found = str(beside) if beside.is_file() else shutil.which("podman-compose")
    if found is None:
        pytest.skip("podman-compose is not installed (pip install podman-compose)")
    return found


def _need_base(podman: Podman) -> None:
    """The image that Dockerfile begins with; skips where there is no way to have one."""
    if podman.works("image", "exists", BASE) or podman.works("pull", "-q", BASE, timeout_s=120.0):
        return
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        pytest.skip(f"{BASE} cannot be pulled, and debootstrap (as root) is not there to stand in")
    tree, archive = podman.home / "base", podman.home / "base.tar"
    shutil.rmtree(tree, ignore_errors=True)
    include = "--include=python3,python3-venv,python3-pip,ca-certificates"
    podman.run(
        "--variant=minbase", include, "bookworm", str(tree), program="debootstrap", timeout_s=1200.0
    )
    (tree / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    podman.run("-C", str(tree), "-cf", str(archive), ".", program="tar", timeout_s=300.0)
    podman.run("import", "-q", str(archive), BASE, timeout_s=900.0)
    shutil.rmtree(tree)
    archive.unlink()


def _pip_volumes(folder: Path) -> list[str]:
    """Options that give pip in a build the settings, folders and certificates of pip here."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^global\.([\w-]+)='(.*)'$", listing, re.MULTILINE))
    settings |= dict(re.findall(r"^:env:\.([\w-]+)='(.*)'$", listing, re.MULTILINE))
    config = configparser.RawConfigParser()
    config["global"] = settings
    text = io.StringIO()
    config.write(text)
    (folder / "pip.conf").write_text(text.getvalue())
    volumes = {f"{folder}/pip.conf": "/etc/pip.conf"}
    for value in settings.values():
        for path in re.findall(r"(?:file://)?(/[^\s:]+)", value):
            # An index is a folder of links beside its files.
            place = Path(path).parent if path.endswith("/simple") else Path(path)
            if place.exists() and place != Path("/"):
                volumes[str(place)] = str(place)
    return [part for here, there in volumes.items() for part in ("-v", f"{here}:{there}:ro")]


@pytest.fixture(scope="module")
def image(podman: Podman, composer: str) -> str:
    """The image of the four services, built from Dockerfile as it is."""
    del composer  # first of all: without it nothing is built
    _need_base(podman)
    options = ["--pull=never", "--network", "host", "-t", "editable-deepsc"]
    podman.run("build", *options, *_pip_volumes(podman.home), ".", timeout_s=3000.0)
    return "editable-deepsc"


class Composed:
    """The running project."""

    def __init__(self, podman: Podman, composer: str, file: Path) -> None:
        self.podman = podman
        self._command = (composer, "-p", "edsc-compose-test", "-f", str(file))
        self.url = f"http://127.0.0.1:{PORT}"

    def compose(self, *command: str) -> None:
        program, *options = self._command
        self.podman.run(*options, *command, program=program, timeout_s=300.0)

    def container(self, service: str) -> str:
        return f"edsc-compose-test_{service}_1"

    def pid(self, service: str) -> int:
        return int(self.podman.run("inspect", "-f", "{{.State.Pid}}", self.container(service)))

    def services(self) -> Mapping[str, str]:
        """What the gateway thinks of the three; nothing while it does not answer."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5.0)
            found: dict[str, str] = answer.json()["services"]
        except (httpx.HTTPError, ValueError):
            return {}
        return found

    def wait(self, service: str, state: str, timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.services()
            if found and all(s == state for n, s in found.items() if service in ("all", n)):
                return
            time.sleep(0.2)
        logs = "".join(
            f"{name}:\n{self.podman.run('logs', '--tail', '20', self.container(name))}\n"
            for name in SERVICES
        )
        raise EdscError(
            f"{service} is not {state} after {timeout_s:g} s: {self.services()}\n{logs}"
        )

    def edit(self) -> EditAnswer:
        order = Order("make the smile bigger", snr_db=6.0, seed=7, quality=Quality.FAST)
        with Remote(self.url) as remote:
            done = remote.edit("", first_sample().read_bytes(), order)
        assert set(done.pictures) == {"aligned", "sent", "received"}
        return done.answer


def _supported(text: str, version: Sequence[int]) -> str:
    """The compose file without what a podman of this version has no option for."""
    if tuple(version) >= (4, 5):
        return text
    return "".join(line for line in text.splitlines(True) if "start_interval:" not in line)


@pytest.fixture(scope="module")
def composed(
    podman: Podman, composer: str, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composed]:
    version = podman.run("version", "-f", "{{.Client.Version}}").split(".")[:2]
    file = tmp_path_factory.mktemp("compose") / "docker-compose.yml"
    text = (ROOT / "docker-compose.yml").read_text()
    file.write_text(_supported(text, [int(part) for part in version]))
    project = Composed(podman, composer, file)
    project.compose("down")  # what a run that was cut off has left
    try:
        project.compose("up", "-d", "--no-build")
        project.wait("all", "SERVING")
        yield project
    finally:
        project.compose("down")


def test_an_edit_goes_through_four_containers(composed: Composed) -> None:
    answer = composed.edit()
    assert answer.edit is not None
    assert (answer.edit.attribute, answer.edit.direction) == ("smiling", "more")
    assert answer.faces_found >= 1


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_healthy_not_root_and_read_only(composed: Composed, service: str) -> None:
    name = composed.container(service)
    # Their timers want systemd, so they are run by hand.
    composed.podman.run("healthcheck", "run", name)
    assert composed.podman.run("exec", name, "id", "-u").strip() == "10001"
    assert not composed.podman.works("exec", name, "touch", "/app/written")
    assert composed.podman.works("exec", name, "touch", "/tmp/written")


def test_only_the_gateway_is_published(composed: Composed) -> None:
    ports = {name: composed.podman.run("port", composed.container(name)) for name in SERVICES}
    assert [name for name, told in ports.items() if told.strip()] == ["gateway"]


def test_a_killed_container_comes_back(composed: Composed) -> None:
    before = composed.pid("receiver")
    os.kill(before, signal.SIGKILL)  # a crash: `podman kill` would be taken for a wish
    composed.wait("receiver", "NOT_SERVING", timeout_s=30.0)
    with pytest.raises(EdscError):
        composed.edit()
    composed.wait("all", "SERVING")
    assert composed.pid("receiver") not in (0, before)
    assert composed.edit().snr_db == 6.0
