"""The files around the code: packaging, containers, and what may not be in the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from edsc.cli import app
from edsc.up import MODULES
from shared.settings import Settings
from shared.telemetry import Metrics

ROOT = Path(__file__).resolve().parent.parent
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"}
# Drawn by our own generator, plots, or the page's own art; any other picture may be a photograph.
PICTURE_FOLDERS = ("samples/", "docs/", "weights/", "gateway/static/")
MOST_BYTES = 2_000_000  # for a file outside weights/
SERVICES = {"transmitter", "channel_sim", "receiver", "gateway"}


def _tool(name: str) -> str:
    """A program that came with the development extra, beside the interpreter or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def _tracked() -> list[Path]:
    """The files of the repository; without git (an unpacked archive), there is nothing to ask."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        [git, "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(requirements: Iterable[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements)
    return {_canonical(match.group()) for match in found if match}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals for _, equals, _ in pins), "constraints.txt: every line pins with =="
    return {_canonical(name): version for name, _, version in pins}


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = _names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted |= _names(extra)
    assert not wanted - set(_pins())


def test_pins_are_exact_releases() -> None:
    for name, version in _pins().items():
        assert re.fullmatch(r"\d+(\.\d+)*(\.?(post|rc|a|b)\d+)?", version), f"{name}=={version}"


def test_first_torch_of_makefile_and_image_is_the_pinned_one() -> None:
    pin = f"torch=={_pins()['torch']}"
    for name in ("Makefile", "Dockerfile"):
        assert pin in (ROOT / name).read_text(), f"{name} does not install {pin}"


def test_every_package_is_in_the_distribution() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    there = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert there <= set(packages)


def test_compose_file_follows_the_schema() -> None:
    checker = _tool("check-jsonschema")
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_file_describes_the_four_services() -> None:
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    services = yaml.load((ROOT / "docker-compose.yml").read_text())["services"]
    assert set(services) == SERVICES
    for name, service in services.items():
        assert service["healthcheck"]["test"], f"{name}: no health check"
        assert service["read_only"] is True, f"{name}: may write to its image"
        assert service["command"] == ["python", "-m", name]
        assert ("ports" in service) == (name == "gateway"), f"{name}: only the gateway is reached"


def _manifests() -> list[dict[str, Any]]:
    """Every object that `kubectl apply -k deploy/kubernetes` would make."""
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    folder = ROOT / "deploy" / "kubernetes"
    files = yaml.load((folder / "kustomization.yaml").read_text())["resources"]
    assert {*files, "kustomization.yaml"} == {path.name for path in folder.iterdir()}
    return [found for name in files for found in yaml.load_all((folder / name).read_text())]


def _kind(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in _manifests() if one["kind"] == kind}


def test_kubernetes_manifests_follow_the_schema() -> None:
    checker = pytest.importorskip("kubernetes_validate")
    version = checker.latest_version()
    for found in _manifests():
        checker.validate(found, version, strict=True)


def test_kubernetes_runs_the_four_services_and_nothing_as_root() -> None:
    deployments, services = _kind("Deployment"), _kind("Service")
    settings = _kind("ConfigMap")["settings"]["data"]
    assert {one["spec"]["template"]["spec"]["containers"][0]["command"][-1]
            for one in deployments.values()} == SERVICES  # fmt: skip
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["limits"]["memory"]
        if name == "gateway":  # its volume is one pod's at a time
            assert deployment["spec"]["strategy"] == {"type": "Recreate"}
        else:
            assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        # preStop, then the drain: both must fit before SIGKILL.
        pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > pause_s + float(settings["EDSC_DRAIN_S"])
        # Names that refer to each other.
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert services[name]["spec"]["selector"].items() <= labels.items()
        ports = {port["name"] for port in container["ports"]}
        assert services[name]["spec"]["ports"][0]["targetPort"] in ports
        budget = _kind("PodDisruptionBudget")[name]["spec"]
        assert budget["selector"]["matchLabels"].items() <= labels.items()
    for scaler in _kind("HorizontalPodAutoscaler").values():
        assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
        assert "replicas" not in deployments[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]


def test_kubernetes_gateway_finds_every_pod() -> None:
    """Headless services, and targets that gRPC's own resolver turns into all of their addresses."""
    services, settings = _kind("Service"), _kind("ConfigMap")["settings"]["data"]
    for name in ("transmitter", "channel", "receiver"):
        spec = services[name]["spec"]
        assert spec["clusterIP"] == "None"
        target = settings[f"EDSC_{name.upper()}_TARGET"]
        assert target == f"dns:///{name}:{spec['ports'][0]['port']}"
    known = {f"EDSC_{field.upper()}" for field in Settings.model_fields}
    assert {key for key in settings if key.startswith("EDSC_")} <= known


def test_dockerfile_is_clean() -> None:
    done = subprocess.run(
        [_tool("hadolint"), "--no-fail", "--format", "json", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert not found, found


def test_image_never_runs_as_root() -> None:
    instructions = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users, "Dockerfile has no USER"
    assert users[-1] not in {"root", "0"}


def test_the_image_gets_every_package() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = tool["setuptools"]["packages"]
    sent = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name.partition('.')[0]}" for name in packages} <= set(sent)


def test_only_the_gateway_keeps_anything() -> None:
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    compose = yaml.load((ROOT / "docker-compose.yml").read_text())
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], f"{name}: has capabilities"
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert ("volumes" in service) == (name == "gateway"), f"{name}: keeps something"
    assert compose["services"]["gateway"]["volumes"] == ["state:/var/lib/edsc"]
    assert "-o 10001 -g 10001 -m 700 /var/lib/edsc" in (ROOT / "Dockerfile").read_text()


def _known_metrics() -> dict[str, set[str]]:
    """Every series name that a process can show, with its labels."""
    known: dict[str, set[str]] = {}
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    collectors: dict[Any, Any] = dict(Metrics("gateway").registry._collector_to_names)
    for collector, names in collectors.items():
        labels = set(getattr(collector, "_labelnames", ()))
        (family,) = collector.describe()
        for ending in endings[family.type]:
            known[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
        assert names
    return known


def test_dashboard_asks_for_metrics_that_there_are() -> None:
    known = _known_metrics()
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "editable-deepsc.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = set()
    for query in queries:
        names = set(re.findall(r"\bedsc_[a-z_]+", query))
        assert names, f"asks for nothing of ours: {query}"
        assert names <= set(known), f"{names - set(known)} in {query}"
        asked |= names
        used = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=)", query))
        for listing in re.findall(r"by \(([^)]*)\)", query):
            used |= {label.strip() for label in listing.split(",")}
        labels = set.union(*(known[name] for name in names))
        assert used <= labels, f"labels {used - labels} in {query}"
    for name in ("requests_total", "stage_seconds_bucket", "in_flight", "queue_depth"):
        assert f"edsc_{name}" in asked
    assert "edsc_rejected_total" in asked


def test_prometheus_asks_where_metrics_are() -> None:
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    jobs = yaml.load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    services = yaml.load((ROOT / "docker-compose.yml").read_text())["services"]
    (found,) = (job["dns_sd_configs"][0] for job in jobs if "dns_sd_configs" in job)
    assert set(found["names"]) == set(services) - {"gateway"}
    for name in found["names"]:
        assert services[name]["environment"]["EDSC_METRICS_PORT"] == str(found["port"])
        assert str(found["port"]) in services[name]["expose"]


def test_repository_holds_no_photographs_and_no_big_files() -> None:
    for path in _tracked():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix.lower() in PICTURES:
            assert name.startswith(PICTURE_FOLDERS), f"{name}: whose picture is that?"
        if not name.startswith("weights/"):
            assert path.stat().st_size <= MOST_BYTES, f"{name}: {path.stat().st_size} bytes"


def test_repository_names_no_machine() -> None:
    """No one's folders, no package index: both are chosen by whoever installs."""
    # Put together here so that this file does not find itself.
    banned = [
        re.compile("/" + "root/"),
        re.compile("/" + r"home/\w+/"),
        re.compile("/" + r"(work|opt)/(shared|main|pypi|wheels)"),
        re.compile(r"https?://[\w.]*" + r"(pypi\.org|pythonhosted|pytorch\.org/whl)"),
    ]
    for path in _tracked():
        if path.suffix in {".safetensors", *PICTURES}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for pattern in banned:
            hit = pattern.search(text)
            assert hit is None, f"{path.relative_to(ROOT)}: {hit.group() if hit else ''}"


def _readme_block(language: str, number: int) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return str(blocks[number])


def test_readme_example_runs(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = json.loads((bundle_folder / "bundle.json").read_text())["nets"]
    needed = {"generator", "inversion", "predictor", "faces", "text", "fields", "adapters"}
    if missing := needed - set(nets):
        pytest.skip(f"the bundle {bundle_folder} has no {', '.join(sorted(missing))}")
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(compile(_readme_block("python", 0), "README.md", "exec"), names)
    assert names["symbols"].shape == (1, 256)
    assert names["image"].shape == (1, 3, 128, 128)
    assert float(names["image"].abs().max()) <= 1.0


def test_readme_names_what_there_is() -> None:
    """Every command, target and link in README.md."""
    readme = (ROOT / "README.md").read_text()
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    }
    assert set(re.findall(r"\bedsc ([a-z]+)\b", readme)) <= commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`|=1 )make ([a-z-]+)", readme, re.MULTILINE)) <= targets
    for link in re.findall(r"\]\(([^):]+)\)", readme):
        assert (ROOT / link).exists(), f"README links to {link}"
    folders = re.findall(r"^([a-z_]+)/ ", readme, re.MULTILINE)
    assert set(MODULES.values()) <= set(folders)
    for folder in folders:
        assert (ROOT / folder).is_dir(), f"README's tree has {folder}/"


def test_no_pickles_among_the_weights() -> None:
    """Weights are data: loading them must not run code."""
    files = [path for path in (ROOT / "weights").rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert suffixes <= {".safetensors", ".json", ".md", ".png", ".txt"}, suffixes
