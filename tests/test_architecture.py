"""The rules of the tree, read from the code: what may import what, and how it is laid out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The whole table: imports point down. `*` is every package of ours.
MAY_IMPORT: dict[str, set[str]] = {
    "shared": set(),
    "transmitter": {"shared"},
    "channel_sim": {"shared"},
    "receiver": {"shared"},
    "baselines": {"shared", "transmitter"},
    "gateway": {"shared"},
    "training": {"shared", "transmitter", "channel_sim", "receiver", "baselines"},
    "evaluation": {"*"},
    "edsc": {"*"},
}
NETWORK_FILES = {
    "service.py",
    "__main__.py",
    "shared/rpc.py",
    "shared/transport.py",
    "shared/probe.py",
    "gateway/link.py",
    "evaluation/bench_service.py",
}
PROTOBUF_FILES = NETWORK_FILES | {"shared/wire.py"}
BANNED_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "misc.py", "common.py"}
LONGEST = 500  # lines a file; beyond that it is two things


def _sources(*packages: str) -> list[Path]:
    """Our own Python files, generated ones left out."""
    found = [path for name in packages for path in sorted((ROOT / name).rglob("*.py"))]
    return [path for path in found if "pb" not in path.relative_to(ROOT).parts[:-1]]


def _modules(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
            for alias in node.names:  # `from shared import rpc` imports shared.rpc
                yield f"{node.module}.{alias.name}", node.lineno


def _is_one_of(path: Path, names: set[str]) -> bool:
    return path.name in names or path.relative_to(ROOT).as_posix() in names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    allowed = MAY_IMPORT[package]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in _sources(package)
        for module, line in _modules(path)
        if (top := module.split(".")[0]) in MAY_IMPORT
        and top != package
        and top not in allowed
        and "*" not in allowed
    ]
    assert not wrong, f"{package} may import {sorted(allowed) or 'nothing of ours'}: {wrong}"


def test_table_names_every_package() -> None:
    there = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert there <= set(MAY_IMPORT), f"not in the table: {there - set(MAY_IMPORT)}"


def test_training_never_imports_a_service() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _sources("training")
        for module, line in _modules(path)
        if module.split(".")[0] in MAY_IMPORT and "service" in module.split(".")
    ]
    assert not wrong


def test_network_stays_at_the_border() -> None:
    """grpc only where calls are made or answered, protobuf there and in the wire format."""
    wrong = []
    for path in _sources(*MAY_IMPORT):
        for module, line in _modules(path):
            top, where = module.split(".")[0], f"{path.relative_to(ROOT)}:{line} imports {module}"
            if top.startswith("grpc") and not _is_one_of(path, NETWORK_FILES):
                wrong.append(where)
            is_message = module.startswith(("google.protobuf", "shared.pb"))
            if is_message and not _is_one_of(path, PROTOBUF_FILES):
                wrong.append(where)
    assert not wrong


def test_gateway_never_imports_torch() -> None:
    """Statically: neither the gateway nor anything of `shared` that it reaches."""
    seen: set[Path] = set()
    todo = _sources("gateway")
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module, line in _modules(path):
            top = module.split(".")[0]
            assert top not in {"torch", "torchvision"}, f"{path.relative_to(ROOT)}:{line}: {module}"
            target = ROOT / Path(*module.split(".")).with_suffix(".py")
            if top in MAY_IMPORT and target.is_file() and "pb" not in target.parts:
                todo.append(target)


def test_gateway_process_never_loads_torch() -> None:
    """And in fact: import the app in a fresh interpreter and look."""
    if not (ROOT / "gateway" / "app.py").is_file():
        pytest.skip("no gateway/app.py yet")
    code = (
        "import sys, gateway.app, gateway.__main__\n"
        "heavy = sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'scipy'})\n"
        "assert 'torch' not in heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_files_have_telling_names_and_one_subject() -> None:
    sources = _sources(*MAY_IMPORT, "tests")
    vague = [str(path.relative_to(ROOT)) for path in sources if path.name in BANNED_NAMES]
    assert not vague, f"says nothing about what is inside: {vague}"
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in sources}
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST}
    assert not long, f"more than {LONGEST} lines: {long}"


def test_packages_are_flat() -> None:
    deep = [
        str(path.relative_to(ROOT))
        for path in _sources(*MAY_IMPORT, "tests")
        if len(path.relative_to(ROOT).parts) != 2
    ]
    assert not deep, f"packages and tests have no folders of code inside: {deep}"


def test_test_names_are_unique() -> None:
    """Flat names, one meaning each: `-k test_name` finds one test."""
    names = Counter(
        node.name
        for path in _sources("tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    )
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, f"more than one test is called {twice}"


def test_test_files_say_what_they_test() -> None:
    allowed = {"test_theory.py", "test_link.py", "test_architecture.py", "test_project.py"}
    for path in (ROOT / "tests").glob("test_*.py"):
        known = path.name in allowed or path.name.split("_")[1] in {
            name.split("_")[0] for name in MAY_IMPORT
        }
        assert known, f"{path.name}: expected test_<package>_<module>.py"
