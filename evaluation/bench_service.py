"""`make bench-service`: what the service does under load, as ratios within one run.

Each experiment starts its own stack on free ports and compares within itself, so that the figures
mean something on any machine:

    hops       one edit at a time: what of it is nobody's computing (evaluation/bench.py)
    batching   goodput at saturation with batches, against max_batch=1; quality `fast`
    replicas   goodput of two one-thread transmitters, against one: asked themselves, by gRPC, with
               and without a core of their own, and through the whole link, where the receiver
               wants its share of the cores
    overload   arrivals at three times the capacity: share of the capacity that is still served, p99
               of what was accepted, statuses of the rest, growth of the memory
    kill       kill -9 of each service in turn, of one replica of two and of the only one, under
               load: which errors, how long after its return the last one came, and what became
               of the edits that were taken in (a gateway's own connections end with it)
    roll       restart of every replica of every service, one after another, under load: failures

Prints a table and, with --json, writes everything. Exit status 1 if a bar was missed, unless
--no-bars is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from edsc.up import ROOT, SERVICES, Stack, interruptible
from evaluation.arrivals import read_photos
from evaluation.bench import HOPS_GOAL_MS, BenchOptions, measure, percentile, summarise
from evaluation.traffic import (
    LOST,
    SENTENCES,
    Outcome,
    Traffic,
    closed_loop,
    cpu_seconds,
    failures,
    goodput_hz,
    in_background,
    open_loop,
    pin,
    resident_mib,
    statuses,
)
from gateway.ledger import Ledger, State
from shared.errors import InvalidRequest, Unavailable
from shared.pb import edsc_pb2, edsc_pb2_grpc
from shared.rpc import open_channel
from shared.settings import ServiceName, Settings

BATCHING_BAR: Final = 1.8
REPLICAS_BAR: Final = 1.7
OVERLOAD_BAR: Final = 0.9  # of the capacity
MEMORY_BAR: Final = 0.05  # growth
LATE_BAR_S: Final = 5.0  # after a killed service is back
RETURN_S: Final = 120.0  # to wait for it
DOWN: Final = frozenset({503, 504})


@dataclass(frozen=True)
class Options:
    """seconds: of each measurement. overload_s: of the overload. clients: under way at saturation.
    load: share of the capacity during faults. state: folder of the gateways; None: the user's."""

    photos: tuple[bytes, ...]
    seconds: float = 30.0
    overload_s: float = 60.0
    clients: int = 16
    load: float = 0.5
    deadline_s: float = 30.0
    weights: Path | None = None
    quality: str = "fast"
    align: bool = True
    state: Path | None = None

    def settings(self, **changes: Any) -> Settings:
        """For a stack of this run."""
        return Settings(
            weights=self.weights,
            state=self.state,
            default_deadline_s=self.deadline_s,
            log_level="error",
            **changes,
        )


@dataclass
class Bar:
    """One promise, what came of it, and what it should be."""

    what: str
    got: float
    bar: str
    passed: bool


@dataclass
class Report:
    """Figures of each experiment, and the bars in order."""

    figures: dict[str, Any] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)

    def at_least(self, what: str, got: float, bar: float) -> None:
        """Passed when `got` is the bar or more."""
        self.bars.append(Bar(what, got, f">= {bar:g}", got >= bar))

    def at_most(self, what: str, got: float, bar: float) -> None:
        """Passed when `got` is the bar or less."""
        self.bars.append(Bar(what, got, f"<= {bar:g}", got <= bar))


@contextmanager
def supervised(stack: Stack) -> Iterator[None]:
    """Processes that die are started again while the block lasts."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.1):
            stack.supervise()

    thread = threading.Thread(target=look, name="supervisor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def traffic_to(stack: Stack, options: Options) -> Traffic:
    """Edits for a stack; they wait a little longer than the gateway may take."""
    return Traffic(
        stack.url,
        options.photos,
        quality=options.quality,
        align=options.align,
        timeout_s=options.deadline_s + 30.0,
    )


def saturate(stack: Stack, options: Options) -> dict[str, float]:
    """Goodput with `clients` under way, after a warm-up; with processor time, which a busy machine
    changes less than it does the clock."""
    warm = traffic_to(stack, options)
    closed_loop(warm, options.clients, min(5.0, options.seconds / 3))
    traffic = traffic_to(stack, options)
    pids = list(stack.pids.values())
    cpu_s, start_s = cpu_seconds(pids), time.monotonic()
    closed_loop(traffic, options.clients, options.seconds)
    end_s = time.monotonic()
    cpu_s = cpu_seconds(pids) - cpu_s
    if failed := failures(traffic.outcomes):
        raise Unavailable(f"{len(failed)} edits failed at saturation: {failed[0].why}")
    done = [one for one in traffic.outcomes if one.status == 200]
    return {
        # To the last answer: edits under way at the end were worked on, and count.
        "goodput_hz": goodput_hz(traffic.outcomes, start_s, end_s + 1e-6),
        "p50_s": statistics.median(one.seconds for one in done),
        "p99_s": percentile([one.seconds for one in done], 99),
        "cpu_s_per_edit": cpu_s / len(done),
        "cores_used": cpu_s / (end_s - start_s),
    }


def hops(options: Options, report: Report) -> None:
    """One edit at a time."""
    asked = BenchOptions(edits=40, photos=options.photos, align=options.align)
    with Stack(options.settings(), free_ports=True) as stack:
        measured = measure(stack.url, options.quality, asked, options.deadline_s)
    found = summarise(measured.samples)
    report.figures["hops"] = {**asdict(found), "failures": measured.failures}
    report.at_most("gateway, store and three hops: p50, ms", found.hops_p50_ms, HOPS_GOAL_MS)


def batching(options: Options, report: Report) -> None:
    """Two stacks, one after the other, that differ in max_batch alone."""
    found = {}
    for name, changes in (("alone", {"max_batch": 1}), ("batched", {})):
        with Stack(options.settings(**changes), free_ports=True) as stack:
            found[name] = saturate(stack, options)
    ratio = found["batched"]["goodput_hz"] / found["alone"]["goodput_hz"]
    report.figures["batching"] = {**found, "ratio": ratio}
    report.at_least("goodput, batches against max_batch=1", ratio, BATCHING_BAR)


def transmit_only(stack: Stack, options: Options) -> float:
    """Transmissions a second with `clients` of them under way, from the transmitters alone."""
    settings = options.settings(transmitter_target=stack.target("transmitter"))
    numbers = count()
    with (
        open_channel(settings, "transmitter") as channel,
        ThreadPoolExecutor(options.clients) as pool,
    ):
        stub = edsc_pb2_grpc.TransmitterStub(channel)

        def until(end_s: float) -> int:
            done = 0
            while time.monotonic() < end_s:
                number = next(numbers)
                request = edsc_pb2.TransmitRequest(
                    image=options.photos[number % len(options.photos)],
                    instruction=SENTENCES[number % len(SENTENCES)],
                    snr_db=6.0,
                    quality=options.quality,
                    align=options.align,
                )
                stub.Transmit(request, timeout=options.deadline_s)
                done += 1
            return done

        def all_until(end_s: float) -> int:
            return sum(pool.map(until, [end_s] * options.clients))

        all_until(time.monotonic() + min(5.0, options.seconds / 3))
        start_s = time.monotonic()
        done = all_until(start_s + options.seconds)
        return done / (time.monotonic() - start_s)


def replicas(options: Options, report: Report) -> None:
    """One transmitter of one thread, then two; at last with one core each, all their threads.

    Left alone, one takes more than a core: photos are read and aligned beside its passes.
    """
    found: dict[str, Any] = {}
    for number in (1, 2):
        settings = options.settings(threads=1)
        with Stack(settings, free_ports=True, replicas={"transmitter": number}) as stack:
            found[f"transmitters_{number}"] = {"goodput_hz": transmit_only(stack, options)}
            found[f"link_{number}"] = saturate(stack, options)
            pin([pid for name, pid in stack.pids.items() if name.startswith("transmitter")])
            found[f"cores_{number}"] = {"goodput_hz": transmit_only(stack, options)}
    for name in ("transmitters", "link", "cores"):
        found[f"{name}_ratio"] = found[f"{name}_2"]["goodput_hz"] / found[f"{name}_1"]["goodput_hz"]
    report.figures["replicas"] = found
    report.at_least(
        "goodput, two one-thread transmitters against one",
        found["transmitters_ratio"],
        REPLICAS_BAR,
    )


def overload(options: Options, report: Report) -> None:
    """Three times what it can do. Memory is compared between the first quarter and the end."""
    with Stack(options.settings(), free_ports=True) as stack:
        capacity = saturate(stack, options)["goodput_hz"]
        traffic = traffic_to(stack, options)
        pids = list(stack.pids.values())
        memory: list[float] = []
        end = threading.Event()

        def watch_memory() -> None:
            while not end.wait(options.overload_s / 40):
                memory.append(resident_mib(pids))

        watcher = threading.Thread(target=watch_memory)
        watcher.start()
        start_s = time.monotonic()
        open_loop(traffic, 3 * capacity, options.overload_s)
        end.set()
        watcher.join()
    # From the moment that the queues are full to the end of the arrivals.
    full_s = start_s + min(10.0, options.overload_s / 4)
    served = goodput_hz(traffic.outcomes, full_s, start_s + options.overload_s)
    done = [one.seconds for one in traffic.outcomes if one.status == 200]
    quarter = max(1, len(memory) // 4)
    growth = statistics.mean(memory[-quarter:]) / statistics.mean(memory[quarter : 2 * quarter]) - 1
    other = failures(traffic.outcomes)
    report.figures["overload"] = {
        "seconds": options.overload_s,
        "capacity_hz": capacity,
        "offered_hz": len(traffic.outcomes) / options.overload_s,
        "served_hz": served,
        "share": served / capacity,
        "p99_s": percentile(done, 99),
        "deadline_s": options.deadline_s,
        "statuses": statuses(traffic.outcomes),
        "other": [one.why for one in other[:10]],
        "memory_growth": growth,
    }
    report.at_least("overload: goodput as a share of capacity", served / capacity, OVERLOAD_BAR)
    report.at_most("overload: p99 of the accepted, s", percentile(done, 99), options.deadline_s)
    report.at_most("overload: answers that are neither 200 nor 429", len(other), 0)
    report.at_most("overload: growth of memory", growth, MEMORY_BAR)


def _kill_one(stack: Stack, name: str, traffic: Traffic) -> dict[str, Any]:
    """kill -9, wait for its return, and a while longer."""
    before = len(traffic.outcomes)
    killed_s = time.monotonic()
    os.kill(stack.pids[name], signal.SIGKILL)
    while stack.is_ready(name):
        time.sleep(0.01)
    while not stack.is_ready(name):
        if time.monotonic() - killed_s > RETURN_S:
            raise Unavailable(f"the {name} did not come back in {RETURN_S:g} s")
        time.sleep(0.05)
    back_s = time.monotonic()
    time.sleep(LATE_BAR_S + 3.0)
    errors = [one for one in failures(traffic.outcomes[before:]) if one.ended_s >= killed_s]
    late_s = max((one.ended_s - back_s for one in errors), default=0.0)
    return {
        "back_after_s": back_s - killed_s,
        "statuses": statuses(traffic.outcomes[before:]),
        "errors": len(errors),
        "last_error_after_return_s": max(0.0, late_s),
        "why": sorted({one.why for one in errors})[:5],
        "odd": [
            one.why
            for one in errors
            if one.status not in DOWN and not (one.status == LOST and name.startswith("gateway"))
        ][:5],
    }


def _left_open(options: Options) -> int:
    """Edits in the gateways' ledger that have not ended, once there was time to run them again."""
    assert options.state is not None  # a run has a folder of its own
    ledger = Ledger.open(f"sqlite:///{options.state}/edits.sqlite3", "bench")
    end_s = time.monotonic() + RETURN_S
    try:
        while time.monotonic() < end_s:
            states = ledger.counts()
            if not (left := sum(states.get(state, 0) for state in (State.ACCEPTED, State.RUNNING))):
                break
            time.sleep(0.5)
        return left
    finally:
        ledger.close()


def kill(options: Options, report: Report) -> None:
    """Every service: one replica of two, then the only one."""
    figures: dict[str, Any] = {}
    lost = 0
    for number in (2, 1):
        counts: dict[ServiceName, int] = {name: number for name in SERVICES}
        with Stack(options.settings(), free_ports=True, replicas=counts) as stack:
            rate_hz = options.load * saturate(stack, options)["goodput_hz"]
            traffic = traffic_to(stack, options)
            with supervised(stack), in_background(traffic, rate_hz):
                time.sleep(3.0)
                for name in SERVICES:
                    figures[f"{name}, 1 of {number}"] = _kill_one(stack, name, traffic)
            lost += _left_open(options)
    report.figures["kill"] = figures
    report.figures["kill_left_open"] = lost
    odd = sum(len(one["odd"]) for one in figures.values())
    late_s = max(one["last_error_after_return_s"] for one in figures.values())
    report.at_most("kill -9: errors that are neither 503 nor 504", odd, 0)
    report.at_most("kill -9: edits taken in that neither ended nor were run again", lost, 0)
    report.at_most("kill -9: last error after the return, s", late_s, LATE_BAR_S)


def roll(options: Options, report: Report) -> None:
    """Two of each; all of them restarted in turn."""
    counts: dict[ServiceName, int] = {name: 2 for name in SERVICES}
    with Stack(options.settings(), free_ports=True, replicas=counts) as stack:
        rate_hz = options.load * saturate(stack, options)["goodput_hz"]
        traffic = traffic_to(stack, options)
        start_s = time.monotonic()
        with in_background(traffic, rate_hz):
            time.sleep(2.0)
            stack.roll()
            time.sleep(2.0)
        seconds = time.monotonic() - start_s
    failed: list[Outcome] = [one for one in traffic.outcomes if one.status != 200]
    report.figures["roll"] = {
        "seconds": seconds,
        "edits": len(traffic.outcomes),
        "statuses": statuses(traffic.outcomes),
        "why": sorted({one.why for one in failed})[:10],
    }
    report.at_most("rolling restart: failed edits", len(failed), 0)


EXPERIMENTS: Final[dict[str, Callable[[Options, Report], None]]] = {
    "hops": hops,
    "batching": batching,
    "replicas": replicas,
    "overload": overload,
    "kill": kill,
    "roll": roll,
}


def show(console: Console, report: Report) -> None:
    """The bars as a table."""
    table = Table(title="bars", title_justify="left")
    for name in ("what", "got", "bar", ""):
        table.add_column(name, justify="left" if name == "what" else "right")
    for bar in report.bars:
        verdict = "[green]passed[/]" if bar.passed else "[red]missed[/]"
        table.add_row(bar.what, f"{bar.got:.3g}", bar.bar, verdict)
    console.print(table)


def _options(argv: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    defaults = Options(())
    parser = argparse.ArgumentParser(
        prog="make bench-service", description="The service under load."
    )
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="a measurement")
    parser.add_argument("--overload-s", type=float, default=defaults.overload_s)
    parser.add_argument("--clients", type=int, default=defaults.clients)
    parser.add_argument("--load", type=float, default=defaults.load, help="during faults, 0..1")
    parser.add_argument("--deadline-s", type=float, default=defaults.deadline_s)
    parser.add_argument("--quality", default=defaults.quality)
    parser.add_argument("--no-align", action="store_true", help="the photos are aligned faces")
    parser.add_argument("--weights", type=Path, help="bundle; otherwise the shipped one")
    parser.add_argument(
        "--only", action="append", choices=sorted(EXPERIMENTS), help="may be given again"
    )
    parser.add_argument(
        "--photos", type=Path, default=ROOT / "samples", help="a folder of photographs"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--no-bars", action="store_true", help="exit status 0 also when missed")
    given = parser.parse_args(argv)
    try:
        photos = tuple(photo.data for photo in read_photos(given.photos))
    except InvalidRequest as error:
        parser.error(str(error))
    if min(given.seconds, given.overload_s, given.clients, given.load, given.deadline_s) <= 0:
        parser.error("seconds, overload-s, clients, load and deadline-s are more than 0")
    options = Options(
        photos=photos,
        seconds=given.seconds,
        overload_s=given.overload_s,
        clients=given.clients,
        load=given.load,
        deadline_s=given.deadline_s,
        weights=given.weights,
        quality=given.quality,
        align=not given.no_align,
    )
    return options, given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments, print each as it ends, then the bars."""
    options, given = _options(argv)
    console = Console()
    report = Report(
        figures={
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.machine(),
                "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
                "load_before": os.getloadavg()[0],
            },
            "options": {
                name: value
                for name, value in asdict(options).items()
                if name not in ("photos", "weights", "state")
            },
        }
    )
    console.print(f"{os.cpu_count()} cores, load before: {os.getloadavg()[0]:.2f}")
    # Thousands of edits should not push the user's own out of their store.
    with interruptible(), TemporaryDirectory() as state:
        options = replace(options, state=Path(state))
        for name, experiment in EXPERIMENTS.items():
            if given.only and name not in given.only:
                continue
            started_s = time.monotonic()
            experiment(options, report)
            console.print(f"\n{name} ({time.monotonic() - started_s:.0f} s)")
            console.print_json(data=report.figures[name], default=str)
    show(console, report)
    if given.json is not None:
        everything = {**report.figures, "bars": [asdict(bar) for bar in report.bars]}
        given.json.write_text(json.dumps(everything, indent=2) + "\n")
    missed = any(not bar.passed for bar in report.bars)
    return 1 if missed and not given.no_bars else 0


if __name__ == "__main__":
    raise SystemExit(main())
