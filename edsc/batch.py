"""`edsc batch`: the edits of a CSV, one JSON line each.

Columns `image` and `instruction`; optional are `snr_db`, `channel`, `seed`, `scheme`, and the other
fields of POST /v1/edits. An empty cell means the default. A picture is looked for beside the CSV
unless its path is absolute. A job that fails does not stop the others.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edsc.cluster import Engine, fan_out
from edsc.runner import InProcess, Runner, runner
from gateway.answer import (
    DEFAULT_K_DB,
    DEFAULT_SNR_DB,
    K_MAX_DB,
    K_MIN_DB,
    MAX_SEED,
    SNR_MAX_DB,
    SNR_MIN_DB,
    ChannelName,
    Csi,
    Fading,
    Images,
    Order,
    Quality,
    StoredEdit,
)
from shared.errors import EdscError, InvalidRequest
from shared.schemes import Scheme

REQUIRED: Final = ("image", "instruction")


class Job(BaseModel):
    """One row, checked; the same limits as POST /v1/edits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    instruction: str
    snr_db: Annotated[float, Field(ge=SNR_MIN_DB, le=SNR_MAX_DB, allow_inf_nan=False)] = (
        DEFAULT_SNR_DB
    )
    channel: ChannelName = ChannelName.AWGN
    k_factor_db: Annotated[float, Field(ge=K_MIN_DB, le=K_MAX_DB, allow_inf_nan=False)] = (
        DEFAULT_K_DB
    )
    fading: Fading = Fading.BLOCK
    csi: Csi = Csi.PERFECT
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    quality: Quality = Quality.BALANCED
    scheme: Scheme = Scheme.EDITABLE_DEEPSC
    align: bool = True

    @field_validator("image", "instruction")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value

    def order(self) -> Order:
        """The edit asked for; a seed is drawn where none is given."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "image"}
        if self.seed is None:
            del fields["seed"]
        return Order(**fields)


@dataclass(frozen=True)
class _Work:
    """A row, read: its job and photo, or why there is none. Travels to whoever makes the edit."""

    name: str
    row: Mapping[str, str]
    job: Job | None = None
    photo: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class _Result:
    """What became of a row."""

    name: str
    row: Mapping[str, str]
    edit: StoredEdit | None = None
    error: str = ""


def run_batch(
    jobs: Path,
    out: Path,
    *,
    url: str | None = None,
    weights: Path | None = None,
    device: str = "cpu",
    engine: Engine = Engine.LOCAL,
    workers: int | None = None,
) -> tuple[int, int]:
    """Run every job of `jobs` and write `out`/results.jsonl; gives (done, failed).

    engine: RAY spreads the edits over a cluster, `workers` at a time; photos are read and results
    written here. Raises InvalidRequest for a CSV without the columns wanted, before anything is
    computed, and Unavailable without a gateway or a cluster that was asked for.
    """
    if url is not None and engine is not Engine.LOCAL:
        raise InvalidRequest(f"url is {url} and engine {engine.value}; expected one or the other")
    rows = list(_rows(jobs))
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with ExitStack() as stack:
        spread = stack.enter_context(fan_out(engine, workers=workers))
        if engine is Engine.LOCAL:
            work = partial(_run_one, stack.enter_context(runner(url, weights, device)))
        else:
            work = partial(_run_there, None if weights is None else weights.resolve(), device)
        results = stack.enter_context((out / "results.jsonl").open("w", encoding="utf-8"))
        for done in spread(work, _read(rows, jobs.parent)):
            line = _line(done, out)
            failed += "error" in line
            results.write(json.dumps(line, ensure_ascii=False) + "\n")
            results.flush()  # a line is there as soon as its job is done
    return len(rows) - failed, failed


def _rows(jobs: Path) -> Iterator[dict[str, str]]:
    with jobs.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            known = set(Job.model_fields)
            missing = [name for name in REQUIRED if name not in columns]
            unknown = [name for name in columns if name not in known]
            if missing or unknown:
                raise InvalidRequest(
                    f"{jobs} has the columns {', '.join(columns) or '(none)'}; expected "
                    f"{', '.join(REQUIRED)} and any of {', '.join(sorted(known - set(REQUIRED)))}"
                )
            reader.fieldnames = columns
            for row in reader:
                yield {str(name): str(value or "") for name, value in row.items()}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{jobs} is not a CSV in UTF-8: {error}") from None


def _read(rows: list[dict[str, str]], beside: Path) -> Iterator[_Work]:
    for number, row in enumerate(rows, start=1):
        name = f"{number:04d}"
        try:
            job = Job.model_validate({key: value for key, value in row.items() if value.strip()})
            yield _Work(name, row, job, (beside / job.image).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            yield _Work(name, row, error=f"{field}: {first['msg']}")
        except OSError as error:
            yield _Work(name, row, error=f"{error.filename}: {error.strerror}")


def _run_one(work: Runner, wanted: _Work) -> _Result:
    if wanted.job is None:
        return _Result(wanted.name, wanted.row, error=wanted.error)
    try:
        edit = work.edit(wanted.name, wanted.photo, wanted.job.order())
    except EdscError as error:
        return _Result(wanted.name, wanted.row, error=str(error))
    return _Result(wanted.name, wanted.row, edit)


def _run_there(weights: Path | None, device: str, wanted: _Work) -> _Result:
    """The same in a worker process of a cluster, which loads the weights once."""
    return _run_one(_pipelines(weights, device), wanted)


@lru_cache(maxsize=1)
def _pipelines(weights: Path | None, device: str) -> InProcess:
    return InProcess(weights, device)


def _line(done: _Result, out: Path) -> dict[str, Any]:
    """The line of one job: the REST answer's fields, or the row and its error; writes the PNGs."""
    if done.edit is None:
        return {"id": done.name, **done.row, "error": done.error}
    folder = out / done.name
    folder.mkdir(exist_ok=True)
    paths = {}
    for picture, png in done.edit.pictures.items():
        (folder / f"{picture}.png").write_bytes(png)
        paths[picture] = f"{done.name}/{picture}.png"
    answer = done.edit.answer.model_copy(update={"images": Images(**paths)})
    return {**answer.model_dump(mode="json"), "image": done.row["image"]}
