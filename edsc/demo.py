"""`make demo`: the four processes, one sample face, one sentence, and what happened, in print."""

import time
from pathlib import Path
from typing import Final

from edsc.runner import Remote
from edsc.up import ROOT, Stack, print_log, watch
from gateway.answer import EditAnswer, Order
from shared.errors import NotFound
from shared.settings import Settings

SAMPLES: Final = ROOT / "samples"
PICTURES: Final = ROOT / "demo"  # ignored by git
SENTENCE: Final = "make the smile bigger"
SNR_DB: Final = 6.0


def first_sample() -> Path:
    """A sample face of the repository. Raises NotFound when there is none."""
    found = sorted(SAMPLES.glob("*.png"))
    if not found:
        raise NotFound(f"no sample face: {SAMPLES} has no PNG")
    return found[0]


def summary(answer: EditAnswer) -> str:
    """An edit in a few lines: as read, degrees, bandwidth, channel, time per stage."""
    lines = []
    if answer.edit is None:
        lines.append(f"read as     no edit ({answer.instruction!r})")
    else:
        name = answer.edit.attribute
        sure = f"{100.0 * answer.edit.confidence:.0f} % sure"
        lines.append(f"read as     {answer.edit.description} ({sure})")
        before = (answer.degrees.before or {}).get(name)
        lines.append(
            f"degrees     {name}: before {before}, expected {answer.degrees.expected.get(name)}, "
            f"after {answer.degrees.after[name]}"
        )
    others = [n for n in answer.degrees.after if answer.edit is None or n != answer.edit.attribute]
    lines.append("            " + ", ".join(f"{n} {_moved(answer, n)}" for n in others))
    channel = answer.channel.value
    if channel != "awgn":
        channel += f", {answer.fading.value} fading, {answer.csi.value} CSI"
    lines.append(f"channel     {channel} at {answer.snr_db:g} dB, seed {answer.seed}")
    lines.append(
        f"CBR         {answer.cbr.paper:.4f} as the paper counts, {answer.cbr.complex_uses:.4f} "
        f"complex uses ({answer.cbr.uses} uses)"
    )
    stages = [f"{n} {ms:.0f}" for n, ms in answer.timings_ms.items() if n != "total" and ms >= 0.5]
    lines.append(f"time, ms    {', '.join(stages)}; total {answer.timings_ms['total']:.0f}")
    lines += [f"note        {note}" for note in answer.notes]
    return "\n".join(lines)


def _moved(answer: EditAnswer, name: str) -> str:
    before, after = (answer.degrees.before or {}).get(name), answer.degrees.after[name]
    return str(after) if before in (None, after) else f"{before} -> {after}"


def run(settings: Settings, *, once: bool, free_ports: bool = False) -> None:
    """Start, edit a sample, print; then end (`once`) or serve until a signal.

    Raises EdscError when something does not start or the edit fails.
    """
    sample = first_sample()
    logs = _Quiet()
    print("starting transmitter, channel, receiver and gateway", flush=True)
    start = time.monotonic()
    with Stack(settings, free_ports=free_ports, log=logs) as stack:
        print(f"ready after {time.monotonic() - start:.1f} s: {stack.url}\n", flush=True)
        order = Order(SENTENCE, snr_db=SNR_DB)
        with Remote(stack.url) as gateway:
            done = gateway.edit("", sample.read_bytes(), order)
        PICTURES.mkdir(exist_ok=True)
        for name, png in done.pictures.items():
            (PICTURES / f"{name}.png").write_bytes(png)
        print(f"photo       {sample.relative_to(ROOT)}")
        print(f'sentence    "{SENTENCE}"')
        print(summary(done.answer))
        where = ", ".join(f"{PICTURES.name}/{name}.png" for name in done.pictures)
        print(f"pictures    {where}", flush=True)
        if once:
            return
        print(f"\nthe page is at {stack.url}  (Ctrl-C ends)", flush=True)
        logs.loud = True
        watch(stack)


class _Quiet:
    """Logs of the processes: kept back while the sample runs, shown while serving."""

    loud = False

    def __call__(self, name: str, line: str) -> None:
        if self.loud:
            print_log(name, line)
