"""The paper suite on fake faces and random networks: rows, resuming, workers, tables, figures."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from channel_sim.channel import Channel, ChannelConfig
from edsc.cli import app
from evaluation.candidates import OURS, RAW, UNMATCHED, steps_name
from evaluation.claims import judge
from evaluation.metrics import Figure
from evaluation.report import write_report
from evaluation.results import Results
from evaluation.sweep import Plan, _peak, append_rows, make_plan, plan_trials, read_rows, run
from evaluation.trial import (
    NO_CHANNEL,
    ORIGINAL,
    SENTENCES,
    Conditions,
    Tools,
    Trial,
    choose_sentence,
    noise_seed,
    run_trial,
)
from shared.attributes import ATTRIBUTES
from shared.bundle import Bundle
from shared.errors import InvalidRequest
from training.data import make_fake_data
from training.teachers import make_fake_teachers
from transmitter.text import TextReader

CONDITIONS = Conditions(quality="fast", snrs_db=(-6.0, 18.0), channels=("awgn", "rayleigh"))
SCHEMES = (OURS, "pca-lmmse", "edit+jpeg-ldpc", "jpeg-ldpc+edit")


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_fake_data(tmp_path_factory.mktemp("data"), count=3, size=32)
    make_fake_teachers(data)
    return data


@pytest.fixture(scope="module")
def tools(random_bundle: Path, fake_data: Path) -> Tools:
    return Tools(random_bundle, fake_data, commit="test")


@pytest.fixture(scope="module")
def plan(random_bundle: Path, fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(
        bundle=random_bundle,
        data=fake_data,
        folder=tmp_path_factory.mktemp("rows"),
        ood=None,
        limit=2,
        schemes=SCHEMES,
        conditions=CONDITIONS,
    )


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Two lengths of inversion instead of six, and no process of its own for every scheme."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.sweep.STEPS", (0, 10))
        patch.setattr("evaluation.sweep._measure_memory", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def swept(plan: Plan, quick: None) -> Path:
    return run(plan)


@pytest.fixture
def trial(plan: Plan, tools: Tools) -> Trial:
    return next(plan_trials(plan, tools, SCHEMES))


def test_every_cell_has_one_row(swept: Path, plan: Plan, tools: Tools) -> None:
    rows = read_rows(swept)
    main = [row for row in rows if row["part"] == "main"]
    cells = [cell for trial in _main(plan, tools) for cell in trial.cells(CONDITIONS)]
    assert len(main) == len(cells) == 2 * (1 + 1 + 4 * 2 * 2)
    assert {row["scheme"] for row in main} == {ORIGINAL, *SCHEMES}
    changed = {row["scheme"] for row in rows if row["part"] == "changes"}
    assert {RAW, UNMATCHED, steps_name(0), steps_name(10)} <= changed
    assert OURS not in changed  # measured in the main part already
    for row in main:
        assert row["bundle"] == tools.bundle.digest
        assert "edgeface" in row["embeddings"] or "error" in row


def _main(plan: Plan, tools: Tools) -> Iterator[Trial]:
    return (trial for trial in plan_trials(plan, tools, SCHEMES) if trial.part == "main")


def test_a_finished_sweep_measures_nothing(
    swept: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = swept.read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("evaluation.trial._run_scheme", never)
    assert run(plan) == swept
    assert swept.read_bytes() == before


def test_rows_are_what_the_schemes_themselves_give(tools: Tools, trial: Trial) -> None:
    """The sweep sends once and receives often; a plain call gives the same picture's figures."""
    rows = {row["key"]: row for rows in run_trial(tools, CONDITIONS, trial) for row in rows}
    reference = tools.panel.reference(trial.face)
    compared = 0
    for name in SCHEMES:
        key = trial.key(CONDITIONS, name, "rayleigh", -6.0)
        if "error" in rows[key]:
            continue
        seed = noise_seed(CONDITIONS, trial, "rayleigh", -6.0)
        tools.candidates.memory.clear()
        outcome = tools.candidates[name](
            trial.face,
            trial.wish.edit,
            -6.0,
            Channel(ChannelConfig("rayleigh")),
            torch.Generator().manual_seed(seed),
            "fast",
        )
        (measured,) = tools.panel.measure([outcome.image], reference, trial.wish)
        for metric in ("psnr_db", "ms_ssim", "perceptual", "drift"):
            assert rows[key][metric] == pytest.approx(measured[metric], abs=1e-4), (name, metric)
        assert rows[key]["ber"] == outcome.ber
        assert rows[key]["cbr"] == outcome.cbr.paper
        assert set(rows[key]["timings_ms"]) == set(outcome.timings_ms) - {"total"}
        compared += 1
    assert compared >= 2


def test_all_schemes_meet_the_same_fading(swept: Path) -> None:
    gains: dict[tuple[str, float], set[float]] = {}
    for row in read_rows(swept):
        if row.get("channel") == "rayleigh" and row["part"] == "main" and "gain" in row:
            gains.setdefault((row["image"], row["snr_db"]), set()).add(row["gain"])
    assert len(gains) == 4
    assert all(len(found) == 1 for found in gains.values())
    assert len({next(iter(found)) for found in gains.values()}) == 4


def test_inverting_is_done_once_and_editing_once_for_what_is_foreseen(
    tools: Tools, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    plain = tools.candidates.editor._latent

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tools.candidates.editor, "_latent", counted)
    before_channel = [OURS, "pca-lmmse", "edit+jpeg-ldpc"]
    only = Trial(**{**vars(trial), "schemes": tuple(before_channel)})
    rows = [row for rows in run_trial(tools, CONDITIONS, only) for row in rows]
    assert len(calls) == 3  # for a picture, and for latents at -6 and at 18 dB
    spent = {row["timings_ms"]["invert"] for row in rows if "timings_ms" in row}
    assert len(spent) == 1  # and every row says what it cost


def test_a_row_cut_short_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"key": "a", "value": 1}, {"key": "b", "value": 2}])
    path.write_text(path.read_text() + '{"key": "c", "val', "utf-8")
    assert [row["key"] for row in read_rows(path)] == ["a", "b"]
    append_rows(path, [{"key": "a", "value": 3}])
    assert [(row["key"], row["value"]) for row in read_rows(path)] == [("a", 3), ("b", 2)]
    path.write_text("no json\n" + path.read_text(), "utf-8")
    with pytest.raises(InvalidRequest, match="line 1 is not JSON"):
        read_rows(path)


def test_requests_take_turns_and_can_be_met() -> None:
    for number in range(10):
        degrees = torch.full((5,), 5 * (number % 2))
        sentence, attribute, direction = choose_sentence(number, degrees)
        assert attribute is ATTRIBUTES[number % 5]
        assert direction == ("more" if number % 2 == 0 else "less")
        assert SENTENCES[attribute, direction] == sentence


def test_shipped_reader_understands_every_sentence(bundle_folder: Path) -> None:
    reader = TextReader.from_bundle(Bundle.open(bundle_folder))
    for (attribute, direction), sentence in SENTENCES.items():
        edit = reader(sentence).edit
        assert (edit.attribute, edit.direction) == (attribute, direction), sentence


@pytest.mark.slow
def test_report_has_tables_and_figures(swept: Path, plan: Plan, tmp_path: Path) -> None:
    written = write_report(plan, tmp_path)
    names = {path.name for path in written}
    assert {"README.md", "quality.md", "bandwidth.md", "errors.md", "changes.md", "costs.md"} <= (
        names
    )
    assert {"quality-awgn.png", "bounds.png", "changes.png", "time.png", "faces-low.png"} <= names
    for path in written:
        assert path.stat().st_size < 200_000, path.name
        if path.suffix == ".md":
            text = path.read_text("utf-8")
            assert "None" not in text
            assert "nan" not in text
            assert str(plan.data) not in text
            for line in text.splitlines():
                if "](" in line and line.startswith("!"):
                    assert line.split("](")[1].rstrip(")") in names
    index = (tmp_path / "README.md").read_text("utf-8")
    assert "are few" in index
    assert "40.4 %" in index


def test_rows_of_other_weights_are_not_reported(swept: Path, plan: Plan, tmp_path: Path) -> None:
    rows = [{**row, "bundle": "0" * 64} for row in read_rows(swept)]
    append_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InvalidRequest, match="000000000000"):
        write_report(Plan(**{**vars(plan), "folder": tmp_path}), tmp_path)
    with pytest.raises(InvalidRequest, match="no rows"):
        Results([])


def test_verdicts_claim_no_more_than_the_interval() -> None:
    assert judge(Figure(0.5, 0.45, 0.55, 100), 0.40) == "holds"
    assert judge(Figure(0.5, 0.35, 0.65, 100), 0.40) == "open"
    assert judge(Figure(0.3, 0.25, 0.35, 100), 0.40) == "does not hold"
    assert judge(None, 0.40) == "not measured"


def test_a_report_without_rows_is_one_line_on_stderr(random_bundle: Path, tmp_path: Path) -> None:
    options = ["--suite", "paper", "--report", "--weights", str(random_bundle)]
    done = CliRunner().invoke(app, ["evaluate", *options, "--rows", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.startswith("edsc: there are no rows to report on")
    assert done.stderr.count("\n") == 1


def test_what_a_command_line_leaves_out_has_a_default() -> None:
    plan = make_plan(limit=None, workers=None, quality="fast", seed=3, ood=None)
    assert (plan.limit, plan.workers, plan.fewer) == (100, os.cpu_count(), 25)
    assert (plan.conditions.quality, plan.conditions.seed, plan.ood) == ("fast", 3, None)
    assert make_plan(limit=8).fewer == 2


@pytest.mark.parametrize("option", ["limit", "workers", "sentences"])
def test_a_plan_needs_at_least_one_of_everything(option: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is 0"):
        make_plan(**{option: 0})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="fog"):
        Conditions(channels=("fog",))


@pytest.mark.slow
def test_workers_give_the_rows_of_one_process(swept: Path, plan: Plan, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # `run` changes it
        two = run(Plan(**{**vars(plan), "folder": tmp_path, "workers": 2, "changes": False}))
    ours = {row["key"]: row for row in read_rows(swept) if row["part"] == "main"}
    theirs = {row["key"]: row for row in read_rows(two) if row["part"] == "main"}
    assert set(ours) == set(theirs)
    for key, row in ours.items():
        for metric in ("perceptual", "psnr_db", "ber"):
            if row.get(metric) is not None:
                assert theirs[key][metric] == pytest.approx(row[metric], abs=1e-3), key


BOSS = """
import multiprocessing, time
from evaluation.sweep import next_job

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=next_job, args=(context.Queue(),))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_worker_whose_parent_was_killed_ends(tmp_path: Path) -> None:
    script = tmp_path / "boss.py"
    script.write_text(BOSS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as boss:
        assert boss.stdout is not None
        worker = Path(f"/proc/{int(boss.stdout.readline())}")
        assert worker.exists()
        boss.kill()
    until = time.monotonic() + 60.0
    while worker.exists() and (worker / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "the worker waits for jobs that nobody gives"
        time.sleep(0.1)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(plan: Plan) -> None:
    found = _peak(plan, OURS)
    assert 100 < found["memory_mib"] < 20_000


@pytest.mark.slow
def test_real_faces_through_the_shipped_bundle(
    bundle_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    """A tiny real sweep: what must be true whatever the weights are worth."""
    conditions = Conditions(quality="fast", snrs_db=(-6.0, 18.0), channels=("awgn",))
    plan = Plan(
        bundle=bundle_folder,
        data=data_folder,
        folder=tmp_path,
        limit=2,
        schemes=(OURS, "edit+jpeg-ldpc"),
        changes=False,
        conditions=conditions,
    )
    results = Results(read_rows(run(plan)))
    lost = results.coded(results.cell("edit+jpeg-ldpc", "awgn", -6.0))
    whole = results.coded(results.cell("edit+jpeg-ldpc", "awgn", 18.0))
    assert lost is not None
    assert whole is not None
    assert (lost.outage.mean, whole.outage.mean) == (1.0, 0.0)  # either side of the cliff
    assert whole.ber.mean == 0.0
    left = [results.mean(results.cell(OURS, "awgn", s), "latent_left") for s in (-6.0, 18.0)]
    assert left[0] is not None
    assert left[1] is not None
    assert left[0].mean > 5 * left[1].mean
    assert results.noiseless(OURS)[0]["channel"] == NO_CHANNEL
    assert results.ood_faces == "ood"
    assert json.dumps(results.trials[0], allow_nan=False)
