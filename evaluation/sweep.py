"""`edsc evaluate --suite paper`: plan the trials, run them on some processes, keep every row.

::

    faces --choose sentences--> trials --processes--> rows.jsonl   (append only)
                                  ^                      |
                                  '---- keys it has -----'

Stopping loses at most one scheme of one face: the same command goes on from there. A larger --limit
adds faces to those measured already. Rows of other weights are never mixed in: the file lies in a
folder named after the bundle's digest.
"""

import json
import multiprocessing
import os
import queue
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from baselines.editor import Watch
from evaluation.candidates import OURS, PER_SNR, RAW, UNMATCHED, steps_name
from evaluation.datasets import open_faces
from evaluation.metrics import peak_memory_mib
from evaluation.trial import (
    Conditions,
    Row,
    Tools,
    Trial,
    choose_sentence,
    read_wish,
    run_trial,
)
from shared.adapters import NET_PER_SNR
from shared.bundle import Bundle
from shared.errors import BundleError, EdscError, InvalidRequest, Unavailable
from shared.schemes import Scheme
from training.run import commit, default_data, default_runs
from transmitter.editing import Quality

SCHEMES: Final = (
    Scheme.EDITABLE_DEEPSC.value,
    Scheme.PCA_LMMSE.value,
    Scheme.DEEPSC_EDIT.value,
    Scheme.EDIT_DEEPSC.value,
    Scheme.JPEG_EDIT.value,
    Scheme.EDIT_JPEG.value,
    Scheme.EDIT_JPEG_R12.value,
    Scheme.EDIT_JPEG_R23.value,
    Scheme.EDIT_JPEG_R34.value,
    Scheme.AVIF_EDIT.value,
    Scheme.EDIT_AVIF.value,
)
"""What is compared unless schemes are named: the paper's, JPEG at every code rate where the edit
comes first (M1 sends the same bits), and the controls.
"""

OOD_SCHEMES: Final = (
    Scheme.EDITABLE_DEEPSC.value,
    Scheme.DEEPSC_EDIT.value,
    Scheme.EDIT_DEEPSC.value,
    Scheme.JPEG_EDIT.value,
    Scheme.EDIT_JPEG.value,
)
STEPS: Final = (0, 70, 90, 110, 130, 150)  # r_inv; the paper: 70..150, chosen 110
AWGN: Final = ("awgn",)
_LEAST_FACES: Final = 2
PATIENCE_S: Final = 5.0  # between looks at whether the process at the other end still lives


@dataclass(frozen=True)
class Plan:
    """What to measure.

    bundle: None is the shipped one. faces: a set as `evaluation.datasets` names it. ood: a second
    one, None for none. limit: faces of the first; the second and the changes of parts use a quarter
    of it, at most 25. sentences: per face. schemes: None for `SCHEMES`. changes: also measure
    Editable-DeepSC with parts changed (r_inv, matching, adapters). workers: processes.
    """

    bundle: Path | None = None
    data: Path = field(default_factory=default_data)
    folder: Path | None = None
    faces: str = "celeba128"
    ood: str | None = "ood"
    limit: int = 100
    sentences: int = 1
    schemes: tuple[str, ...] | None = None
    changes: bool = True
    workers: int = 1
    metric_weights: Path | None = None
    conditions: Conditions = field(default_factory=Conditions)

    def __post_init__(self) -> None:
        for name in ("limit", "sentences", "workers"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def fewer(self) -> int:
        """Faces of the side experiments."""
        return max(_LEAST_FACES, min(25, self.limit // 4))

    def rows_path(self) -> Path:
        """Where the rows are kept: outside the tree, apart for every bundle."""
        if self.folder is not None:
            return self.folder / "rows.jsonl"
        digest = Bundle.open(self.bundle, verify=False).digest[:12]
        return default_runs() / "paper" / digest / "rows.jsonl"


def make_plan(
    *,
    data: Path | None = None,
    limit: int | None = None,
    workers: int | None = None,
    quality: Quality = "balanced",
    seed: int = 0,
    **options: Any,
) -> Plan:
    """A plan from the options of a command line; None stands for the default."""
    return Plan(
        data=default_data() if data is None else data,
        limit=100 if limit is None else limit,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        conditions=Conditions(quality=quality, seed=seed),
        **options,
    )


# ------------------------------------------------------------------------------------ rows on disk


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, the last one of every key. A line cut short by a crash ends the file."""
    if not path.is_file():
        return []
    found: dict[str, Row] = {}
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InvalidRequest(f"{path}, line {number} is not JSON: {error}") from error
        found[str(row["key"])] = row
    return list(found.values())


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add lines, whole ones; what an earlier crash left half is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode())


# -------------------------------------------------------------------------------- what is to be run


def usable(tools: Tools, names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The schemes that this installation and bundle can run, and why the others cannot."""
    able, left_out = [], {}
    for name in names:
        try:
            tools.candidates[name]
        except (BundleError, Unavailable) as error:
            left_out[name] = str(error)
        else:
            able.append(name)
    return tuple(able), left_out


def changed_schemes(bundle: Bundle) -> tuple[str, ...]:
    """Editable-DeepSC with one part changed at a time."""
    per_snr = (PER_SNR,) if bundle.has(NET_PER_SNR) else ()
    return (OURS, RAW, *per_snr, UNMATCHED, *(steps_name(steps) for steps in STEPS))


def plan_trials(plan: Plan, tools: Tools, schemes: Sequence[str]) -> Iterator[Trial]:
    """The trials, the main ones first."""
    channels = plan.conditions.channels
    yield from _trials(plan, tools, "main", plan.faces, plan.limit, schemes, channels)
    few = AWGN if "awgn" in channels else channels[:1]
    if plan.ood is not None:
        wanted = tuple(name for name in schemes if name in OOD_SCHEMES)
        yield from _trials(plan, tools, "ood", plan.ood, plan.fewer, wanted, few)
    if plan.changes:
        changed = changed_schemes(tools.bundle)
        yield from _trials(plan, tools, "changes", plan.faces, plan.fewer, changed, few)


def _trials(
    plan: Plan,
    tools: Tools,
    part: str,
    faces: str,
    limit: int,
    schemes: Sequence[str],
    channels: Sequence[str],
) -> Iterator[Trial]:
    source = open_faces(faces, plan.data, tools.candidates.transmitter.finder)
    subjects = islice(source.subjects(tools.size, plan.conditions.seed), limit)
    found = 0
    for number, subject in enumerate(subjects):
        found += 1
        with torch.no_grad():
            degrees = tools.panel.judge.degrees(subject.face)[0]
        for turn in range(plan.sentences):
            sentence, attribute, direction = choose_sentence(number + turn, degrees)
            extra = {} if subject.degrees is None else {"annotated": list(subject.degrees)}
            yield Trial(
                part=part,
                faces=faces,
                image=subject.name,
                face=subject.face,
                sentence=sentence,
                wish=read_wish(tools.reader, sentence, attribute, direction),
                schemes=tuple(schemes),
                channels=tuple(channels),
                extra=extra,
            )
    if not found:
        raise InvalidRequest(f"no face was found in {faces}; expected at least one")


# ----------------------------------------------------------------------------------------- running


def run(plan: Plan, console: Console | None = None) -> Path:
    """Measure what is missing of the plan; the path of the rows.

    Shows a progress bar with the time that is left. Raises EdscError, and RuntimeError with the
    traceback of a process that failed.
    """
    console = console or Console(stderr=True)
    path = plan.rows_path()
    # More threads than cores cost several times the work; said before processes are started.
    if plan.workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    tools = _tools(plan)
    schemes, left_out = usable(tools, plan.schemes or SCHEMES)
    for name, why in left_out.items():
        console.print(f"left out, {name}: {why}", style="yellow", markup=False)
    if not schemes:
        raise InvalidRequest("none of the schemes can be run here; expected at least one")
    done = {str(row["key"]) for row in read_rows(path)}
    trials: list[Trial] = []
    seen = set(done)
    total = 0
    for trial in plan_trials(plan, tools, schemes):
        keys = {trial.key(plan.conditions, *cell) for cell in trial.cells(plan.conditions)}
        if missing := keys - seen:
            trials.append(trial)
            total += len(missing)
            seen |= missing  # another part may ask for the same cell
    console.print(f"{total} rows to measure, {len(done)} there already: {path}", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=total)
        source = (
            _in_this_process(tools, plan, trials, done)
            if plan.workers == 1
            else _in_processes(plan, trials, done)
        )
        for rows in source:
            append_rows(path, rows)
            progress.advance(task, len(rows))
    _measure_memory(plan, schemes, path)
    return path


def measure(plan: Plan) -> Iterator[str]:
    """`run`, and what a command line says of it."""
    yield str(run(plan))
    yield "edsc evaluate --suite paper --report draws what is in it"


def _tools(plan: Plan) -> Tools:
    return Tools(plan.bundle, plan.data, metric_weights=plan.metric_weights, commit=commit())


def _in_this_process(
    tools: Tools, plan: Plan, trials: Sequence[Trial], done: set[str]
) -> Iterator[list[Row]]:
    have = set(done)
    for trial in trials:
        for rows in run_trial(tools, plan.conditions, trial, have):
            yield rows
            have |= {str(row["key"]) for row in rows}


def _in_processes(plan: Plan, trials: Sequence[Trial], done: set[str]) -> Iterator[list[Row]]:
    """Trials to `plan.workers` fresh processes; their rows as they come."""
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    results: Any = context.Queue()
    # What a trial must not measure again: rows on disk, and cells of trials that run before it.
    promised = set(done)
    for trial in trials:
        keys = {trial.key(plan.conditions, *cell) for cell in trial.cells(plan.conditions)}
        jobs.put((trial, keys & promised))
        promised |= keys
    for _ in range(plan.workers):
        jobs.put(None)
    processes = [
        context.Process(target=_work, args=(plan, jobs, results), daemon=True)
        for _ in range(plan.workers)
    ]
    for process in processes:
        process.start()
    try:
        finished = 0
        while finished < len(processes):
            try:
                kind, value = results.get(timeout=PATIENCE_S)
            except queue.Empty:
                dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise RuntimeError(f"a worker ended with status {dead[0]}") from None
                continue
            if kind == "rows":
                yield value
            elif kind == "finished":
                finished += 1
            else:
                raise RuntimeError(f"a worker failed:\n{value}")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(plan: Plan, jobs: Any, results: Any) -> None:
    """A worker: trials until None comes."""
    try:
        torch.set_num_threads(1)
        tools = _tools(plan)
        while (job := next_job(jobs)) is not None:
            trial, done = job
            for rows in run_trial(tools, plan.conditions, trial, done):
                results.put(("rows", rows))
        results.put(("finished", None))
        if orphaned():
            results.cancel_join_thread()  # nobody takes them any more
    except BaseException:
        results.put(("failed", traceback.format_exc()))
        raise


def next_job(jobs: Any) -> Any:
    """What comes next in a queue that this process was given; None once who gave it is gone: a
    queue whose other end was killed says nothing, for ever.
    """
    while not orphaned():
        try:
            return jobs.get(timeout=PATIENCE_S)
        except queue.Empty:
            continue
    return None


def orphaned() -> bool:
    """Whether the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


# ----------------------------------------------------------------------------------------- memory


def _measure_memory(plan: Plan, schemes: Sequence[str], path: Path) -> None:
    """One row a scheme: the peak memory of a fresh process that ran it once."""
    there = {str(row["key"]) for row in read_rows(path)}
    # Code rates differ in nothing that takes memory.
    usual = [name for name in schemes if "-r" not in name.replace(OURS, "")]
    keys = {name: f"memory|{name}|{plan.conditions.quality}" for name in usual}
    wanted = [name for name in usual if keys[name] not in there]
    with ThreadPoolExecutor(max_workers=plan.workers) as waiters:
        peaks = waiters.map(lambda name: _peak(plan, name), wanted)
        for name, peak in zip(wanted, peaks, strict=True):
            append_rows(path, [{"key": keys[name], "part": "memory", "scheme": name, **peak}])


def _peak(plan: Plan, name: str) -> Mapping[str, float]:
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run_once, args=(plan, name, send), daemon=True)
    process.start()
    send.close()
    try:
        found: Mapping[str, float] = receive.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {name} failed") from None
    finally:
        process.join()
    return found


def _run_once(plan: Plan, name: str, send: Any) -> None:
    """Load the scheme alone and run it once; report the peak before and after."""
    from channel_sim.channel import channel
    from evaluation.candidates import Candidates

    torch.set_num_threads(1)
    candidates = Candidates(Bundle.open(plan.bundle))
    source = open_faces(plan.faces, plan.data, candidates.transmitter.finder)
    subject = next(source.subjects(candidates.transmitter.image_size, plan.conditions.seed))
    wish = read_wish(candidates.transmitter.reader, *choose_sentence(0, torch.zeros(5)))
    scheme = candidates[name]
    snr_db, watch = plan.conditions.snrs_db[-1], Watch()
    try:
        sent = scheme.transmit(subject.face, wish.edit, snr_db, plan.conditions.quality, watch)
        scheme.receive(channel(sent.symbols, snr_db, torch.Generator().manual_seed(0)), watch)
    except EdscError as error:
        send.send({"memory_mib": peak_memory_mib(), "error": str(error)})
        return
    send.send({"memory_mib": peak_memory_mib()})
