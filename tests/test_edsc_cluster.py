"""Work spread over a cluster: the same results in the same order as here; a real Ray when slow."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from edsc.batch import run_batch
from edsc.cli import app
from edsc.cluster import Engine, Map, fan_out
from edsc.up import parse_counts
from shared.errors import InvalidRequest, NoFaceFound, Unavailable
from shared.rpc import GrpcService


def raised_to(exponent: int, base: int) -> int:
    if base == 13:
        raise NoFaceFound("thirteen has no face")
    return int(base**exponent)


def die_once(marks: Path, item: int) -> tuple[int, int]:
    """Ends its process without a word the first time that it is asked for item 3."""
    mark = marks / "died"
    if item == 3 and not mark.exists():
        mark.write_text("")
        os._exit(1)
    return item, os.getpid()


def write_jobs(folder: Path, count: int) -> Path:
    file = io.BytesIO()
    Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(file, "PNG")
    (folder / "photo.png").write_bytes(file.getvalue())
    jobs = folder / "jobs.csv"
    with jobs.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "instruction", "seed", "quality", "align"])
        for seed in range(count):
            photo = "photo.png" if seed != 2 else "missing.png"
            writer.writerow([photo, "-" if seed % 2 else "add bangs", seed, "fast", "false"])
    return jobs


def lines(folder: Path) -> list[dict[str, object]]:
    """results.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "timings_ms"} for row in rows]


# ------------------------------------------------------------------------------------ without Ray


def test_local_work_is_map() -> None:
    with fan_out() as spread:
        assert list(spread(partial(raised_to, 2), range(4))) == [0, 1, 4, 9]
        with pytest.raises(NoFaceFound):
            list(spread(partial(raised_to, 2), [13]))


def test_without_ray_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, random_bundle: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it then fails
    with pytest.raises(Unavailable, match="scale"), fan_out(Engine.RAY):
        pass
    jobs = write_jobs(tmp_path, 1)
    for arguments in (
        ["batch", str(jobs), "--out", str(tmp_path / "out"), "--engine", "ray"],
        ["up", "--engine", "ray"],
    ):
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "Ray is not installed" in result.stderr


def test_workers_and_threads_have_limits() -> None:
    for wrong in ({"workers": 0}, {"workers": 10**6}, {"threads": 0}):
        with pytest.raises(InvalidRequest, match="expected"), fan_out(Engine.RAY, **wrong):
            pass


def test_a_gateway_and_a_cluster_are_one_or_the_other(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="one or the other"):
        run_batch(tmp_path / "j", tmp_path, url="http://127.0.0.1:9", engine=Engine.RAY)


def test_replicas_are_read() -> None:
    services: tuple[GrpcService, ...] = ("transmitter", "receiver")
    counts = {"transmitter": 2, "receiver": 3}
    assert parse_counts("transmitter=2, receiver=3", services, 4) == counts
    assert parse_counts("", services, 4) == {}
    for wrong in ("transmitter", "gateway=2", "transmitter=0", "transmitter=5", "receiver=two"):
        with pytest.raises(InvalidRequest, match=r"expected SERVICE=1\.\.4"):
            parse_counts(wrong, services, 4)


# --------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Map]:
    """Two workers of a Ray on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[scale]'")
    with fan_out(Engine.RAY, workers=2) as spread:
        yield spread


# Ray leaves files, sockets and processes to their finalisers.
on_ray = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class TestOnRay:
    pytestmark = on_ray

    def test_results_come_in_order(self, cluster: Map) -> None:
        assert list(cluster(partial(raised_to, 2), iter(range(12)))) == [n * n for n in range(12)]

    def test_an_error_is_the_one_that_was_raised(self, cluster: Map) -> None:
        results = cluster(partial(raised_to, 2), [2, 13, 4])
        assert next(results) == 4
        with pytest.raises(NoFaceFound, match="thirteen"):
            next(results)

    def test_work_of_a_worker_that_died_is_done_again(self, cluster: Map, tmp_path: Path) -> None:
        done = list(cluster(partial(die_once, tmp_path), range(6)))
        assert [item for item, _ in done] == list(range(6))
        assert (tmp_path / "died").exists()
        assert os.getpid() not in {pid for _, pid in done}

    def test_a_batch_on_ray_is_the_batch(
        self, cluster: Map, random_bundle: Path, tmp_path: Path
    ) -> None:
        del cluster  # running: run_batch uses it
        jobs = write_jobs(tmp_path, 5)
        here, there = tmp_path / "here", tmp_path / "there"
        counts = run_batch(jobs, here, weights=random_bundle)
        assert counts == (4, 1)
        assert counts == run_batch(jobs, there, weights=random_bundle, engine=Engine.RAY, workers=2)
        assert lines(here) == lines(there)
        pictures = sorted(path.relative_to(here) for path in here.rglob("*.png"))
        assert len(pictures) == 12
        for path in pictures:
            assert (here / path).read_bytes() == (there / path).read_bytes()
