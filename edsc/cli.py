"""`edsc`: one edit, many edits, the four processes, the recipes, the weights.

Commands import what they need when they run, so `edsc --help` never waits for torch. Whatever goes
wrong on purpose ends as one line on stderr and status 2.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, ParamSpec, TypeVar

import typer

from edsc.choices import RecipeName, Suite
from edsc.cluster import Engine
from gateway.answer import (
    DEFAULT_K_DB,
    DEFAULT_SNR_DB,
    K_MAX_DB,
    K_MIN_DB,
    MAX_SEED,
    SNR_MAX_DB,
    SNR_MIN_DB,
    UNEDITED,
    ChannelName,
    Csi,
    Fading,
    Order,
    Quality,
)
from shared.errors import EdscError, InvalidRequest, Unavailable
from shared.schemes import Scheme
from shared.settings import Settings

app = typer.Typer(
    name="edsc",
    help="Edit a face photograph with a sentence, across a simulated radio channel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: a mistake on the command line is a line, not a box
)

P = ParamSpec("P")
R = TypeVar("R")
FAILED: Final = 2
RESULTS: Final = Path(__file__).resolve().parent.parent / "docs" / "results"


def one_line(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a command: an error of ours is one line on stderr and status 2."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (EdscError, OSError) as error:
            typer.echo(f"edsc: {_words(error)}", err=True)
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:  # `edsc parse | head`
            raise typer.Exit(0) from None

    return wrapped


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


Url = Annotated[
    str | None, typer.Option(help="a running gateway; otherwise the edit is made in this process")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="bundle folder; otherwise the shipped one")
]
Device = Annotated[str, typer.Option(help='torch device: "cpu", "cuda", "auto"')]


@app.command()
@one_line
def edit(
    photo: Annotated[Path, typer.Argument(help="the photograph")],
    sentence: Annotated[str, typer.Argument(help='what to change; "-" sends the photo unedited')],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write")],
    snr_db: Annotated[
        float, typer.Option(min=SNR_MIN_DB, max=SNR_MAX_DB, help="Es/N0 in dB")
    ] = DEFAULT_SNR_DB,
    channel: Annotated[ChannelName, typer.Option(help="law of the channel")] = ChannelName.AWGN,
    fading: Annotated[Fading, typer.Option(help="a coefficient a message, or a use")] = (
        Fading.BLOCK
    ),
    k_factor_db: Annotated[
        float, typer.Option(min=K_MIN_DB, max=K_MAX_DB, help="Rician K in dB")
    ] = DEFAULT_K_DB,
    csi: Annotated[Csi, typer.Option(help="what the receiver knows of the fading")] = Csi.PERFECT,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="of fading and noise")
    ] = None,
    quality: Annotated[Quality, typer.Option(help="refinement: 0, 10 or 110 steps")] = (
        Quality.BALANCED
    ),
    scheme: Annotated[Scheme, typer.Option(help="how the picture travels")] = (
        Scheme.EDITABLE_DEEPSC
    ),
    align: Annotated[bool, typer.Option(help="find and align the face")] = True,
    url: Url = None,
    weights: Weights = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="print the whole answer")] = False,
) -> None:
    """Edit one photograph and write what was received."""
    from edsc.demo import summary
    from edsc.runner import runner

    order = Order(
        instruction=sentence,
        snr_db=snr_db,
        channel=channel,
        fading=fading,
        k_factor_db=k_factor_db,
        csi=csi,
        quality=quality,
        scheme=scheme,
        align=align,
    )
    if seed is not None:
        order = Order(**{**vars(order), "seed": seed})
    data = photo.read_bytes()
    if not out.parent.is_dir():  # said before the work, not after it
        raise InvalidRequest(f"{out.parent} is no folder to write {out.name} to")
    with runner(url, weights, device) as work:
        done = work.edit(out.stem, data, order)
    out.write_bytes(done.pictures["received"])
    if as_json:
        typer.echo(done.answer.model_dump_json())
    else:
        typer.echo(f"{summary(done.answer)}\nreceived    {out}")


@app.command()
@one_line
def parse(
    weights: Weights = None,
) -> None:
    """Read sentences on stdin, one a line; print the edit each asks for as a JSON object a line."""
    from edsc.runner import edit_read
    from shared.bundle import Bundle
    from transmitter.text import TextReader

    reader = TextReader.from_bundle(Bundle.open(weights))
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        typer.echo(json.dumps(_parse_one(text, reader, edit_read), ensure_ascii=False))


def _parse_one(
    text: str, reader: Callable[[str], Any], edit_read: Callable[..., Any]
) -> dict[str, Any]:
    if text.strip() == UNEDITED:
        nothing = ("attribute", "mode", "direction", "value", "target", "confidence")
        return {"text": text, **dict.fromkeys(nothing)}
    try:
        reading = reader(text)
    except EdscError as error:
        return {"text": text, "error": str(error)}
    read = edit_read(reading.edit, reading.confidence).model_dump(exclude={"description"})
    return {"text": text, **read}


@app.command()
@one_line
def batch(
    jobs: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns image, instruction, snr_db, channel, seed, scheme"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="folder for results.jsonl and the PNGs")],
    url: Url = None,
    weights: Weights = None,
    device: Device = "cpu",
    engine: Annotated[Engine, typer.Option(help="ray: spread over a cluster")] = Engine.LOCAL,
    workers: Annotated[int | None, typer.Option(min=1, help="ray: edits at a time")] = None,
) -> None:
    """Run the edits of a CSV: a line of results.jsonl a job, in order, `error` where it failed."""
    from edsc.batch import run_batch

    done, failed = run_batch(
        jobs, out, url=url, weights=weights, device=device, engine=engine, workers=workers
    )
    typer.echo(f"{done} edits done, {failed} failed: {out / 'results.jsonl'}")


@app.command()
@one_line
def up(
    free_ports: Annotated[bool, typer.Option(help="let the system choose the ports")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="a fifth one, for the schemes compared with")
    ] = False,
    replicas: Annotated[
        str, typer.Option(help="how many of which, e.g. transmitter=2,receiver=2; otherwise one")
    ] = "",
    engine: Annotated[
        Engine, typer.Option(help="ray: the three services on a cluster, the gateway here")
    ] = Engine.LOCAL,
    weights: Weights = None,
) -> None:
    """Start the four services on this machine and serve until Ctrl-C; what dies starts again."""
    from edsc.up import Interrupted, Stack, interruptible, parse_replicas, print_log, watch

    try:
        with interruptible():
            if engine is Engine.RAY:
                if baselines:
                    raise InvalidRequest("got --baselines with --engine ray, expected one of them")
                from edsc.ray_up import up_on_ray

                up_on_ray(_settings(weights), replicas, free_ports=free_ports)
            with Stack(
                _settings(weights),
                free_ports=free_ports,
                baselines=baselines,
                log=print_log,
                replicas=parse_replicas(replicas),
            ) as stack:
                typer.echo(f"the page is at {stack.url}  (Ctrl-C ends)")
                watch(stack)
    except Interrupted:
        typer.echo("stopped", err=True)


@app.command()
@one_line
def demo(
    once: Annotated[bool, typer.Option("--once", help="end after the sample")] = False,
    free_ports: Annotated[bool, typer.Option(help="let the system choose the ports")] = False,
    weights: Weights = None,
) -> None:
    """Start the four processes, edit a sample face, print what happened, keep serving."""
    from edsc.demo import run
    from edsc.up import Interrupted, interruptible

    try:
        with interruptible():
            run(_settings(weights), once=once, free_ports=free_ports)
    except Interrupted:
        typer.echo("stopped", err=True)


@app.command()
@one_line
def train(
    name: Annotated[RecipeName, typer.Argument(help="what to train")],
    minutes: Annotated[float | None, typer.Option(min=0, help="stop after so long")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="stop after so many steps")] = None,
    data: Annotated[Path | None, typer.Option(help="folder laid out as ../shared/data")] = None,
    bundle: Annotated[Path | None, typer.Option(help="bundle folder to write to")] = None,
    runs: Annotated[
        Path | None, typer.Option("--run", "--runs", help="folder for checkpoints, logs, sheets")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget the last checkpoint")] = False,
) -> None:
    """Train one net, or all of them; goes on from the last checkpoint."""
    from edsc.recipes import train_one

    given = {"data": data, "bundle": bundle, "runs": runs, "minutes": minutes, "steps": steps}
    options = {key: value for key, value in given.items() if value is not None}
    train_one(name.value, **options, device=device, seed=seed, fresh=fresh)


@app.command()
@one_line
def weights(
    folder: Annotated[Path | None, typer.Argument(help="bundle; otherwise the shipped one")] = None,
) -> None:
    """Show a bundle: its nets with sizes and hashes, checked, and its scores."""
    from edsc.recipes import describe_bundle

    typer.echo(describe_bundle(folder))


@app.command()
@one_line
def evaluate(
    suite: Annotated[Suite, typer.Option(help="what to measure")] = Suite.LINK,
    weights: Weights = None,
    data: Annotated[Path | None, typer.Option(help="folder laid out as ../shared/data")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="link, bundle, paper: only so many photos")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="link, bundle: JSON report")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="link, bundle: scores and model card into the bundle")
    ] = False,
    edited: Annotated[int, typer.Option(min=1, help="bundle: of them, faces to edit")] = 200,
    samples: Annotated[int, typer.Option(min=2, help="bundle: sampled faces")] = 5000,
    quality: Annotated[
        Quality | None, typer.Option(help="of inversion and edits; bundle: fast, paper: balanced")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="bundle: this part; again for more")
    ] = None,
    per_snr: Annotated[
        Path | None, typer.Option(help="bundle: another one, with the adapters per SNR")
    ] = None,
    sheets: Annotated[Path, typer.Option(help="sheets: folder to draw into")] = Path("docs"),
    report: Annotated[
        bool, typer.Option("--report", help="paper: tables and figures from the rows there are")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="paper: folder for the report")] = RESULTS,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="paper: folder of rows.jsonl; outside the tree")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="paper: processes; otherwise one a core")
    ] = None,
    faces: Annotated[
        str, typer.Option(help="paper: celeba128, ood, photos, folder:PATH, celeba:PATH, ...")
    ] = "celeba128",
    ood: Annotated[str, typer.Option(help="paper: a second set; empty for none")] = "ood",
    scheme: Annotated[
        list[str] | None, typer.Option(help="paper: this scheme; again for more")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="paper: sentences per face")] = 1,
    changes: Annotated[
        bool, typer.Option(help="paper: also with parts changed: r_inv, matching, adapters")
    ] = True,
    seed: Annotated[int, typer.Option(help="paper: of the choice of faces and of noise")] = 0,
    metric_weights: Annotated[
        Path | None, typer.Option(help="paper: folder of weights for LPIPS, FID, KID")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="bench: passed on to it; try -- --help")
    ] = None,
) -> None:
    """Measure a bundle against its bars, the link on photographs, speed; draw sheets of edits;
    `paper`: every scheme at every SNR, resumable, then its tables and figures with --report.
    """
    if suite is Suite.BENCH:
        from evaluation.bench import main

        if status := main(arguments or []):
            raise typer.Exit(status)
        return
    if suite is Suite.SHEETS:
        from evaluation.sheets import draw

        lines = draw(weights, sheets)
    elif suite is Suite.BUNDLE:
        from evaluation import bundle_suite

        options = bundle_suite.SuiteOptions(
            limit=limit,
            edited=edited,
            samples=samples,
            quality="fast" if quality is None else quality.value,
            per_snr=per_snr,
            parts=tuple(part) if part else bundle_suite.PARTS,
        )
        lines = bundle_suite.measure(weights, data, options, output=output, write=write)
    elif suite is Suite.PAPER:
        from evaluation.sweep import make_plan, measure

        plan = make_plan(
            bundle=weights,
            data=data,
            folder=rows,
            faces=faces,
            ood=ood or None,
            limit=limit,
            sentences=sentences,
            schemes=None if scheme is None else tuple(scheme),
            changes=changes,
            workers=workers,
            metric_weights=metric_weights,
            quality="balanced" if quality is None else quality.value,
            seed=seed,
        )
        lines = _report(plan, out) if report else measure(plan)
    else:
        from evaluation import link_suite

        lines = link_suite.measure(weights, data, limit=limit, output=output, write=write)
    for line in lines:
        typer.echo(line)


def _report(plan: Any, out: Path) -> Iterator[str]:
    try:
        from evaluation.report import write_report
    except ModuleNotFoundError as error:
        raise Unavailable(f"the report wants the `eval` extra: {error}") from error
    yield from map(str, write_report(plan, out))


@app.command()
@one_line
def load(
    url: Annotated[str, typer.Option(help="the gateway")] = "http://127.0.0.1:8000",
    rate: Annotated[
        list[float] | None, typer.Option(help="arrivals a second; a step each, may be given again")
    ] = None,
    seconds: Annotated[float, typer.Option(help="length of a step")] = 30.0,
    count: Annotated[int, typer.Option(help="most arrivals in all")] = 10_000,
    photos: Annotated[Path | None, typer.Option(help="a folder; otherwise samples/")] = None,
    sentences: Annotated[Path | None, typer.Option(help="a text file, one a line")] = None,
    snr_db: Annotated[list[float] | None, typer.Option(help="Es/N0 in dB; again for more")] = None,
    channel: Annotated[list[ChannelName] | None, typer.Option(help="again for more")] = None,
    quality: Annotated[list[Quality] | None, typer.Option(help="again for more")] = None,
    align: Annotated[bool, typer.Option(help="find and align the face")] = True,
    deadline_s: Annotated[float, typer.Option(help="an answer later than this is no good")] = 30.0,
    timeout_s: Annotated[float, typer.Option(help="then a request is given up")] = 60.0,
    baseline: Annotated[int, typer.Option(help="edits made again without load")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="of arrivals and mix")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the report")] = Path("load"),
    allow_host: Annotated[
        list[str] | None, typer.Option(help="a host that is not this machine, named once more")
    ] = None,
    api_key: Annotated[
        str, typer.Option(envvar="EDSC_API_KEY", help="sent as a bearer token")
    ] = "",
    authority: Annotated[Path | None, typer.Option(help="PEM to check https against")] = None,
) -> None:
    """Put load on a running gateway: Poisson arrivals; writes load.json and load.html."""
    from edsc.demo import SAMPLES
    from evaluation.arrivals import SENTENCES, SNRS_DB, Mix, read_photos, read_sentences
    from evaluation.load import LoadOptions, run_load
    from evaluation.load_report import write_report

    mix = Mix(
        read_photos(photos or SAMPLES),
        sentences=SENTENCES if sentences is None else read_sentences(sentences),
        snrs_db=tuple(snr_db or SNRS_DB),
        channels=tuple(channel or ChannelName),
        qualities=tuple(quality or (Quality.FAST,)),
        align=align,
    )
    options = LoadOptions(
        mix,
        url=url,
        rates=tuple(rate or (0.5, 1.0, 2.0)),
        seconds=seconds,
        most=count,
        seed=seed,
        deadline_s=deadline_s,
        timeout_s=timeout_s,
        baseline=baseline,
        allowed_hosts=tuple(allow_host or ()),
        api_key=api_key,
        authority=authority,
    )
    report = run_load(options, lambda line: typer.echo(line))
    data, page = write_report(report, out)
    same = {True: "the same", False: "NOT the same", None: "not compared"}[report.same_quality]
    typer.echo(f"quality with and without load: {same}\n{data}, {page}")


def _settings(weights: Path | None) -> Settings:
    changes: dict[str, Any] = {} if weights is None else {"weights": weights.resolve()}
    try:
        return Settings(**changes)
    except ValueError as error:
        raise InvalidRequest(f"an EDSC_ setting is not valid: {error}") from None


if __name__ == "__main__":
    app()
