"""The command line: real commands, real pipelines with random weights."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from edsc.choices import RecipeName
from edsc.cli import app
from edsc.recipes import ORDER, recipe
from gateway.answer import EditAnswer
from shared.errors import InvalidRequest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(path)
    return path


def edsc(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edsc.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def failed(result: Result, said: str) -> None:
    """Status 2, one clear line on stderr, no traceback."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("edsc: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert isinstance(result.exception, SystemExit)


# ------------------------------------------------------------------------------------------ edit


def test_edit_writes_the_received_picture(photo: Path, random_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = edsc(
        "edit", photo, "make the smile bigger", "--snr-db", 6, "-o", out,
        "--no-align", "--weights", random_bundle, "--seed", 7,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert size_of(out) == (32, 32)
    for word in ("read as", "degrees", "CBR", "time, ms", "6 dB, seed 7", str(out)):
        assert word in result.stdout


def test_edit_prints_the_rest_answer_as_json(
    photo: Path, random_bundle: Path, tmp_path: Path
) -> None:
    result = edsc(
        "edit", photo, "-", "-o", tmp_path / "out.png", "--no-align", "--json",
        "--weights", random_bundle, "--channel", "rician", "--k-factor-db", 3, "--csi", "estimated",
    )  # fmt: skip
    answer = EditAnswer.model_validate_json(result.stdout)
    assert answer.edit is None
    assert (answer.channel, answer.k_factor_db, answer.csi) == ("rician", 3.0, "estimated")
    assert answer.cbr.pilot_uses == 8


def test_edit_with_the_same_seed_is_the_same_picture(
    photo: Path, random_bundle: Path, tmp_path: Path
) -> None:
    def received(seed: int) -> bytes:
        out = tmp_path / f"{seed}.png"
        edsc(
            "edit", photo, "-", "-o", out, "--no-align", "--weights", random_bundle,
            "--seed", seed, "--snr-db", 0, "--channel", "rayleigh", "--quality", "fast",
        )  # fmt: skip
        return out.read_bytes()

    assert received(1) == received(1)
    assert received(1) != received(2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "nowhere"], "nowhere"),
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--device", "warp"], "warp"),
        (["--channel", "rayleigh", "--fading", "fast", "--csi", "estimated"], "pilots"),
    ],
)
def test_edit_fails_with_one_line(
    photo: Path, random_bundle: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    weights = [] if "--weights" in arguments else ["--weights", str(random_bundle)]
    out = tmp_path / "out.png"
    failed(edsc("edit", photo, "-", "-o", out, "--no-align", *weights, *arguments), said)
    assert not out.exists()


def test_edit_of_a_bad_photo_fails_with_one_line(
    photo: Path, random_bundle: Path, tmp_path: Path
) -> None:
    weights, out = ("--weights", random_bundle), tmp_path / "out.png"
    failed(edsc("edit", tmp_path / "none.jpg", "-", "-o", out, *weights), "none.jpg")
    failed(edsc("edit", tmp_path, "-", "-o", out, *weights), "directory")
    failed(edsc("edit", photo, "-", "-o", out, *weights), "no face")
    failed(edsc("edit", photo, "", "-o", out, "--no-align", *weights), "empty")
    failed(edsc("edit", photo, "😀", "-o", out, "--no-align", *weights), "no words")
    photo.write_text("not a picture")
    failed(edsc("edit", photo, "-", "-o", out, *weights), "picture")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--snr-db", "1000"],
        ["--snr-db", "nan"],
        ["--snr-db", "loud"],
        ["--channel", "nakagami"],
        ["--k-factor-db", "-1"],
        ["--seed", "-1"],
        ["--quality", "best"],
        ["--unknown"],
    ],
)
def test_a_wrong_option_is_status_2(photo: Path, tmp_path: Path, arguments: list[str]) -> None:
    result = edsc("edit", photo, "-", "-o", tmp_path / "out.png", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------------- parse


def test_parse_answers_every_line(random_bundle: Path) -> None:
    lines = ["make the smile bigger", "-", "", "😀", "x" * 3000, "mehr Bart ä"]
    result = edsc("parse", "--weights", random_bundle, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [a["text"] for a in answers] == lines
    fields = ["text", "attribute", "mode", "direction", "value", "target", "confidence"]
    assert list(answers[0]) == fields
    assert answers[1] == dict.fromkeys(fields) | {"text": "-"}
    for refused in answers[2:5]:
        assert list(refused) == ["text", "error"]
    assert "3000" in answers[4]["error"]


def test_parse_of_nothing_is_nothing(random_bundle: Path) -> None:
    result = edsc("parse", "--weights", random_bundle, stdin="")
    assert (result.exit_code, result.stdout) == (0, "")


# ----------------------------------------------------------------------------------------- batch


def write_jobs(path: Path, rows: list[dict[str, str]]) -> Path:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(file.getvalue(), encoding="utf-8")
    return path


def test_batch_runs_every_job_in_order(photo: Path, random_bundle: Path, tmp_path: Path) -> None:
    good = {
        "image": photo.name, "instruction": "-", "snr_db": "6", "channel": "awgn", "seed": "1",
        "scheme": "editable-deepsc", "align": "false",
    }  # fmt: skip
    rows = [
        good,
        {**good, "image": "none.png"},
        {**good, "instruction": "make the smile bigger", "snr_db": "", "channel": "", "scheme": ""},
        {**good, "snr_db": "nan"},
        {**good, "channel": "nakagami"},
        {**good, "align": "true"},
        {**good, "image": str(photo)},
    ]
    out = tmp_path / "out"
    jobs = write_jobs(tmp_path / "jobs.csv", rows)
    result = edsc("batch", jobs, "--out", out, "--weights", random_bundle)
    assert result.exit_code == 0, result.output
    assert "3 edits done, 4 failed" in result.stdout
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows)
    errors = [line.get("error", "") for line in lines]
    for error, said in zip(
        errors, ["", "none.png", "", "snr_db", "channel", "face", ""], strict=True
    ):
        assert said in error
        assert bool(said) == bool(error)
    first = EditAnswer.model_validate({k: v for k, v in lines[0].items() if k != "image"})
    for path in first.images.model_dump().values():
        assert size_of(out / path) == (32, 32)
    assert (out / lines[0]["images"]["received"]).read_bytes() == (
        out / lines[6]["images"]["received"]
    ).read_bytes()
    assert lines[2]["snr_db"] == 12.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "(none)"),
        ("image,snr_db\n", "instruction"),
        ("image,instruction,colour\nx,y,z\n", "colour"),
        ("\x00\x01\x02", "expected"),
    ],
)
def test_batch_refuses_a_wrong_csv(
    tmp_path: Path, random_bundle: Path, text: str, said: str
) -> None:
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(text)
    failed(edsc("batch", jobs, "--out", tmp_path / "o", "--weights", random_bundle), said)


def test_batch_needs_its_csv(tmp_path: Path) -> None:
    failed(edsc("batch", tmp_path / "none.csv", "--out", tmp_path / "o"), "none.csv")


# -------------------------------------------------------------------------------- weights, train


def test_weights_lists_nets_and_checks_hashes(random_bundle: Path, tmp_path: Path) -> None:
    result = edsc("weights", random_bundle)
    assert result.exit_code == 0, result.output
    assert "generator" in result.stdout
    assert "every hash is right" in result.stdout
    failed(edsc("weights", tmp_path), "bundle.json")


def test_every_recipe_has_a_name() -> None:
    assert {name.value for name in RecipeName} == {*ORDER, "deepsc", "all"}
    assert all(callable(recipe(name)) for name in (*ORDER, "deepsc"))
    with pytest.raises(InvalidRequest, match="painter"):
        recipe("painter")


def test_train_passes_its_options_on(tmp_path: Path) -> None:
    from training.data import make_fake_data

    make_fake_data(tmp_path / "data", 8)
    arguments: list[Any] = ["--data", tmp_path / "data", "--bundle", tmp_path / "bundle"]
    arguments += ["--runs", tmp_path / "runs", "--steps", 1, "--device", "cpu", "--seed", 3]
    result = edsc("train", "text", *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "bundle" / "text.safetensors").is_file()
    failed(edsc("train", "text", *arguments[:-1], 4), "seed")


# ------------------------------------------------------------------------------------ the process


def test_help_is_quick_because_torch_stays_out() -> None:
    code = "import sys, edsc.cli; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    result = run("--help")
    assert result.returncode == 0
    for command in ("edit", "parse", "batch", "up", "train", "weights", "evaluate", "demo"):
        assert f"  {command} " in result.stdout


def test_a_wrong_setting_is_one_line() -> None:
    result = run("up", env={"EDSC_GATEWAY_PORT": "a lot"})
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "gateway_port" in result.stderr
