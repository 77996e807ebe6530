"""`edsc batch`: the edits of a CSV, one JSON line each.

Columns `image` and `instruction`; optional are `snr_db`, `channel`, `seed`, `scheme`, and the other
fields of POST /v1/edits. An empty cell means the default. A picture is looked for beside the CSV
unless its path is absolute. A job that fails does not stop the others.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edsc.runner import Runner, runner
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


def run_batch(
    jobs: Path,
    out: Path,
    *,
    url: str | None = None,
    weights: Path | None = None,
    device: str = "cpu",
) -> tuple[int, int]:
    """Run every job of `jobs` and write `out`/results.jsonl; gives (done, failed).

    Raises InvalidRequest for a CSV without the columns wanted, before anything is computed.
    """
    rows = list(_rows(jobs))
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with (
        runner(url, weights, device) as work,
        (out / "results.jsonl").open("w", encoding="utf-8") as results,
    ):
        for number, row in enumerate(rows, start=1):
            result = _run_one(f"{number:04d}", row, jobs.parent, out, work)
            failed += "error" in result
            results.write(json.dumps(result, ensure_ascii=False) + "\n")
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


def _run_one(
    name: str, row: Mapping[str, str], beside: Path, out: Path, work: Runner
) -> dict[str, Any]:
    """The line of one job: the REST answer's fields, or the row and its error."""
    try:
        job = Job.model_validate({key: value for key, value in row.items() if value.strip()})
        photo = (beside / job.image).read_bytes()
        done = work.edit(name, photo, job.order())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return {"id": name, **row, "error": f"{field}: {first['msg']}"}
    except OSError as error:
        return {"id": name, **row, "error": f"{error.filename}: {error.strerror}"}
    except EdscError as error:
        return {"id": name, **row, "error": str(error)}
    folder = out / name
    folder.mkdir(exist_ok=True)
    paths = {}
    for picture, png in done.pictures.items():
        (folder / f"{picture}.png").write_bytes(png)
        paths[picture] = f"{name}/{picture}.png"
    answer = done.answer.model_copy(update={"images": Images(**paths)})
    return {**answer.model_dump(mode="json"), "image": job.image}
