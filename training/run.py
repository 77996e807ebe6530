"""What every recipe shares: a run folder that survives, and a stop that loses nothing.

A recipe keeps its own loop and reads downwards; this module only answers four questions for it:
where did we stop (`restore`), must we stop (`stopping`), is it time to write (`due`), and what
has been done (`record`, `provenance`).

::

    ~/edsc-runs/<name>/
        state.pt       the last checkpoint, replaced atomically; tensors and plain values only
        log.jsonl      one line per report: step, images, hours, images/s, scores
        sheet-*.png    what the nets make, to be looked at
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from shared.bundle import Bundle, default_folder
from shared.errors import InvalidRequest
from shared.images import encode_png

State = dict[str, Any]


def default_data() -> Path:
    """`EDSC_DATA`, else the folder `shared/data` beside this tree."""
    named = os.environ.get("EDSC_DATA")
    return Path(named) if named else Path(__file__).parents[2] / "shared" / "data"


def default_runs() -> Path:
    """`EDSC_RUNS`, else `~/edsc-runs`: outside the tree, since a run is not a product."""
    named = os.environ.get("EDSC_RUNS")
    return Path(named) if named else Path.home() / "edsc-runs"


@dataclass(frozen=True)
class RunOptions:
    """How one recipe is to be run.

    `minutes` and `steps` bound this call (None: the recipe's own length); a recipe that was stopped
    goes on from its last checkpoint unless `fresh`.
    """

    data: Path
    bundle: Path
    runs: Path
    minutes: float | None = None
    steps: int | None = None
    device: str = "auto"
    seed: int = 0
    fresh: bool = False

    @classmethod
    def default(cls, **changes: Any) -> "RunOptions":
        places = {"data": default_data(), "bundle": default_folder(), "runs": default_runs()}
        return cls(**{**places, **changes})

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Run:
    """One recipe's progress. Use it as `with Run(NAME, options) as run:`."""

    def __init__(self, name: str, options: RunOptions) -> None:
        self.name, self.options = name, options
        self.folder = options.runs / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = options.torch_device()
        torch.manual_seed(options.seed)  # nets that are made next start from the seed
        self.step = 0
        self.images = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._first_step = 0
        self._signal: int | None = None
        self._due: dict[str, float] = {}
        self._last_report = (time.monotonic(), 0)
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Run":
        def stop(number: int, frame: FrameType | None) -> None:
            self._signal = number

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old_handlers[number] = signal.signal(number, stop)
            except ValueError:  # not the main thread: the owner of the process decides
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        # Now that the state is safe, whoever runs several recipes in a row learns of the signal.
        outer = self._old_handlers.get(self._signal or 0)
        if callable(outer) and exception[0] is None:
            outer(self._signal, None)

    @property
    def seconds(self) -> float:
        """Seconds trained, over all calls that were resumed into this one."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def minutes_here(self) -> float:
        return (time.monotonic() - self._started) / 60

    @property
    def stopping(self) -> bool:
        """True once the time or the steps of this call are used up, or SIGTERM arrived."""
        options = self.options
        return (
            self._signal is not None
            or (options.minutes is not None and self.minutes_here >= options.minutes)
            or (options.steps is not None and self.step - self._first_step >= options.steps)
        )

    def due(self, what: str, minutes: float) -> bool:
        """True once every `minutes` for each `what`; the first time after one whole interval."""
        now = time.monotonic()
        last = self._due.setdefault(what, self._started)
        if now - last < 60 * minutes:
            return False
        self._due[what] = now
        return True

    def restore(self, digest: str | None = None) -> State | None:
        """The last checkpoint's state, with the global random state put back; None at a start.

        digest: of the nets that the run is about (`digest_of`), which its state keeps under that
        name. Raises InvalidRequest for a checkpoint of another seed or of other nets.
        """
        path = self.folder / "state.pt"
        if self.options.fresh or not path.is_file():
            return None
        state: State = torch.load(path, map_location=self.device, weights_only=True)
        meta = state.pop("run")
        if meta["seed"] != self.options.seed:
            raise InvalidRequest(
                f"{path} was begun with seed {meta['seed']}, got seed {self.options.seed}: "
                "use the same seed, or --fresh"
            )
        if digest is not None and state["digest"] != digest:
            raise InvalidRequest(
                f"{self.folder} belongs to nets {state['digest']}, the bundle now has {digest}: "
                "start anew with --fresh"
            )
        self.step, self.images = int(meta["step"]), int(meta["images"])
        self._seconds_before = float(meta["seconds"])
        self._first_step = self.step
        self._last_report = (time.monotonic(), self.images)
        torch.set_rng_state(meta["torch_rng"].cpu())
        if self.device.type == "cuda" and "cuda_rng" in meta:
            torch.cuda.set_rng_state(meta["cuda_rng"].cpu())
        return state

    def save(self, state: State) -> None:
        """Write a checkpoint: the recipe's state plus step, images, hours and random state."""
        meta: State = {
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
            "seed": self.options.seed,
            "torch_rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            meta["cuda_rng"] = torch.cuda.get_rng_state()
        temporary = self.folder / "state.pt.new"
        torch.save({**state, "run": meta}, temporary)
        temporary.replace(self.folder / "state.pt")

    def record(self, **scores: float) -> None:
        """Append a line to log.jsonl and print it."""
        now = time.monotonic()
        then, images = self._last_report
        rate = (self.images - images) / max(now - then, 1e-9)
        self._last_report = (now, self.images)
        line = {
            "step": self.step,
            "images": self.images,
            "hours": round(self.seconds / 3600, 4),
            "images_per_s": round(rate, 2),
            "device": self.device.type,
            **{key: round(float(value), 5) for key, value in scores.items()},
        }
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(self.name, " ".join(f"{key}={value}" for key, value in line.items()), flush=True)

    def sheet(self, images: Tensor, columns: int, name: str = "sheet") -> Path:
        """Write images [B, 3, H, W] in [-1, 1] as one PNG with `columns` pictures a row."""
        count, channels, height, width = images.shape
        rows = -(-count // columns)
        padded = torch.full((rows * columns, channels, height, width), -1.0)
        padded[:count] = images.detach().float().cpu()
        grid = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
        path = self.folder / f"{name}-{self.images:08d}.png"
        path.write_bytes(encode_png(grid.reshape(1, channels, rows * height, columns * width)))
        return path

    def provenance(self, **extra: Any) -> dict[str, Any]:
        """What the bundle says of this net's making."""
        return {
            "recipe": f"training/{self.name}.py",
            "commit": commit(),
            "seed": self.options.seed,
            "data": "CelebA train split, 128 px (non-commercial research)",
            "steps": self.step,
            "images": self.images,
            "hours": round(self.seconds / 3600, 3),
            "device": self.device.type,
            "torch": torch.__version__.split("+")[0],
            **extra,
        }


def require(bundle: Bundle, nets: Sequence[str], recipe: str) -> None:
    """Raise InvalidRequest, naming it, for the first of the nets that the bundle does not have."""
    for net in nets:
        if not bundle.has(net):
            raise InvalidRequest(
                f"training {recipe} needs {net!r} in {bundle.folder}: train it first"
            )


def digest_of(bundle: Bundle, nets: Sequence[str]) -> str:
    """Which of these nets the bundle has, told by their hashes; those it lacks do not count."""
    return "".join(bundle.index["nets"][net]["sha256"][:8] for net in nets if bundle.has(net))


def commit() -> str:
    """The commit of this tree, `unknown` outside a checkout."""
    answer = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Inside, the modules neither learn nor keep statistics; on leaving, they are as before."""
    before = [(m, m.training, [p.requires_grad for p in m.parameters()]) for m in modules]
    for module in modules:
        module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training, flags in before:
            module.train(training)
            for parameter, flag in zip(module.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
