"""From rows to numbers: means with intervals, distances of sets, gains over the next best
scheme.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from evaluation.candidates import OURS
from evaluation.metrics import (
    CodedErrors,
    Figure,
    coded_errors,
    figure,
    frechet_distance,
    frechet_figure,
    gain_figure,
    kernel_distance,
    kernel_figure,
)
from evaluation.panel import unpack
from evaluation.trial import NO_CHANNEL, ORIGINAL, Row
from shared.errors import InvalidRequest
from shared.schemes import Scheme

CONTROLS: Final = (Scheme.PCA_LMMSE.value,)
"""Our own latent without what was trained: shown, and not counted as a competitor."""

EMBEDDINGS: Final = ("inception", "edgeface", "predictor")
"""The best one that rows carry names fd and kd."""

_RESAMPLES: Final = 200  # of set distances


@dataclass(frozen=True)
class Results:
    """The rows of a sweep, to be asked for tables."""

    rows: Sequence[Row]

    def __post_init__(self) -> None:
        if not any(row.get("part") != "memory" for row in self.rows):
            raise InvalidRequest(
                "there are no rows to report on: run `edsc evaluate --suite paper` first"
            )

    # ------------------------------------------------------------------------------- what there is

    @cached_property
    def trials(self) -> list[Row]:
        """Rows of pictures, without photographs themselves, failures and memory."""
        left_out = {ORIGINAL}
        return [
            row
            for row in self.rows
            if row.get("part") != "memory" and row["scheme"] not in left_out and "error" not in row
        ]

    @cached_property
    def faces(self) -> str:
        """The main set of faces."""
        inside = (row["faces"] for row in self.trials if row["part"] != "ood")
        return str(next(inside, self.trials[0]["faces"]))

    @cached_property
    def ood_faces(self) -> str | None:
        """The second set, where there is one."""
        return next((row["faces"] for row in self.trials if row["part"] == "ood"), None)

    @cached_property
    def snrs_db(self) -> list[float]:
        return sorted({row["snr_db"] for row in self.trials if row["snr_db"] is not None})

    @cached_property
    def channels(self) -> list[str]:
        order = ("awgn", "rayleigh", "rician")
        there = {row["channel"] for row in self.trials}
        return [channel for channel in order if channel in there]

    @cached_property
    def embedding(self) -> str:
        """The embedding of fd and kd: the best one that every row has."""
        every = set.intersection(*(set(row["embeddings"]) for row in self.trials))
        return next(name for name in EMBEDDINGS if name in every)

    def names(self, faces: str | None = None, channel: str = "awgn") -> list[str]:
        """Schemes with rows, ours first, changed ones (with a "/") left out, else as measured."""
        wanted = faces or self.faces
        found = dict.fromkeys(
            row["scheme"]
            for row in self.trials
            if row["faces"] == wanted and row["channel"] == channel and "/" not in row["scheme"]
        )
        return sorted(found, key=lambda name: (name != OURS, list(found).index(name)))

    def cell(
        self, scheme: str, channel: str, snr_db: float | None, faces: str | None = None
    ) -> list[Row]:
        """The rows of one cell, ordered by picture and sentence."""
        wanted = (faces or self.faces, scheme, channel, snr_db)
        return self._cells.get(wanted, [])

    @cached_property
    def _cells(self) -> dict[tuple[str, str, str, float | None], list[Row]]:
        found: dict[tuple[str, str, str, float | None], list[Row]] = {}
        for row in self.trials:
            place = (row["faces"], row["scheme"], row["channel"], row["snr_db"])
            found.setdefault(place, []).append(row)
        for rows in found.values():
            rows.sort(key=_picture)
        return found

    @cached_property
    def _originals(self) -> dict[tuple[str, str], Row]:
        return {
            (row["faces"], row["image"]): row
            for row in self.rows
            if row.get("scheme") == ORIGINAL and "embeddings" in row
        }

    def pictures(self) -> int:
        """Faces measured in the main set (count)."""
        return len({row["image"] for row in self.trials if row["faces"] == self.faces})

    # -------------------------------------------------------------------------------------- numbers

    def mean(self, rows: Iterable[Row], metric: str) -> Figure | None:
        """Mean of a metric with its interval, over the rows that have it."""
        values = [float(row[metric]) for row in rows if row.get(metric) is not None]
        return figure(torch.tensor(values)) if values else None

    def sets(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Embeddings of the photographs and of what was received, [N, D] each, row by row."""
        originals = [self._originals[row["faces"], row["image"]] for row in rows]
        name = self.embedding
        a = torch.stack([unpack(row["embeddings"][name]) for row in originals])
        return a, torch.stack([unpack(row["embeddings"][name]) for row in rows])

    def distance(self, rows: Sequence[Row], kind: str, intervals: bool = True) -> Figure | None:
        """fd or kd between photographs and received pictures; None with fewer than two."""
        if len(rows) < 2:
            return None
        a, b = self.sets(rows)
        if not intervals:
            plain = frechet_distance(a, b) if kind == "fd" else kernel_distance(a, b, paired=True)
            return Figure(plain, plain, plain, len(rows))
        of: Callable[..., Figure] = frechet_figure if kind == "fd" else kernel_figure
        return of(a, b, _RESAMPLES)

    def value(self, rows: Sequence[Row], metric: str, intervals: bool = True) -> Figure | None:
        """Any metric of a cell: fd and kd of its set, the mean of everything else."""
        if metric in ("fd", "kd"):
            return self.distance(rows, metric, intervals)
        return self.mean(rows, metric)

    def competitors(self, channel: str, snr_db: float) -> Iterator[tuple[str, list[Row]]]:
        """Every other complete scheme at a channel and an SNR."""
        mine = len(self.cell(OURS, channel, snr_db))
        for name in self.names(channel=channel):
            rows = self.cell(name, channel, snr_db)
            if name != OURS and name not in CONTROLS and len(rows) == mine:
                yield name, rows

    def best_other(self, metric: str, channel: str, snr_db: float) -> tuple[str, list[Row]] | None:
        """The competitor with the smallest distance; None where there is none."""
        best: tuple[float, str, list[Row]] | None = None
        for name, rows in self.competitors(channel, snr_db):
            found = self.value(rows, metric, intervals=False)
            if found is not None and (best is None or found.mean < best[0]):
                best = found.mean, name, rows
        return None if best is None else best[1:]

    def gain(self, metric: str, channel: str, snr_db: float) -> tuple[str, Figure] | None:
        """By what share ours is smaller than the best competitor, whose name comes first.

        fd and kd: from resamples of the pictures, the same ones in both sets.
        """
        best = self.best_other(metric, channel, snr_db)
        mine = self.cell(OURS, channel, snr_db)
        if best is None or len(mine) < 2:
            return None
        name, theirs = best
        if metric not in ("fd", "kd"):
            ours, others = (
                torch.tensor([float(row[metric]) for row in rows]) for rows in (mine, theirs)
            )
            return name, gain_figure(ours, others)
        return name, self._set_gain(metric, mine, theirs)

    def _set_gain(self, metric: str, mine: Sequence[Row], theirs: Sequence[Row]) -> Figure:
        reference, ours = self.sets(mine)
        _, others = self.sets(theirs)
        draws = torch.Generator().manual_seed(0)
        n = len(ours)

        def of(index: Tensor) -> float:
            parts = []
            for received in (ours, others):
                a, b = reference[index], received[index]
                parts.append(
                    frechet_distance(a, b) if metric == "fd" else kernel_distance(a, b, paired=True)
                )
            return 1 - parts[0] / max(parts[1], 1e-12)

        resampled = []
        for _ in range(_RESAMPLES):
            index = torch.randint(n, (n,), generator=draws)
            if metric == "kd":  # equal pictures would add k(x, x)
                index = index.unique()
            if len(index) > 1:
                resampled.append(of(index))
        low, high = torch.quantile(
            torch.tensor(resampled, dtype=torch.float64),
            torch.tensor([0.025, 0.975], dtype=torch.float64),
        )
        return Figure(of(torch.arange(n)), float(low), float(high), n)

    def first_at(self, metric: str, channel: str, smaller_is_better: bool = True) -> list[float]:
        """SNRs at which no competitor is better than ours in the mean."""
        sign = 1 if smaller_is_better else -1
        won = []
        for snr_db in self.snrs_db:
            mine = self.value(self.cell(OURS, channel, snr_db), metric, intervals=False)
            others = [
                self.value(rows, metric, intervals=False)
                for _, rows in self.competitors(channel, snr_db)
            ]
            if mine and others and all(o and sign * mine.mean <= sign * o.mean for o in others):
                won.append(snr_db)
        return won

    def coded(self, rows: Sequence[Row]) -> CodedErrors | None:
        """What a digital link lost; None for analogue ones."""
        digital = [row for row in rows if row.get("blocks")]
        if not digital:
            return None
        return coded_errors(
            [row["ber"] for row in digital],
            [row["blocks"] for row in digital],
            [row["block_errors"] for row in digital],
            [row["decoded"] for row in digital],
        )

    def arrived(self, scheme: str) -> list[Row]:
        """Rows of a scheme at all SNRs, AWGN, whose message was decoded: the others leave work out,
        as an edit after the channel that finds nothing to edit."""
        return [
            row
            for row in self.trials
            if row["scheme"] == scheme
            and row["faces"] == self.faces
            and row["channel"] == "awgn"
            and row.get("decoded")
        ]

    def stages(self, scheme: str) -> dict[str, float]:
        """Mean milliseconds by stage of what `arrived`."""
        rows = self.arrived(scheme)
        names = dict.fromkeys(stage for row in rows for stage in row["timings_ms"])
        return {
            stage: sum(row["timings_ms"].get(stage, 0.0) for row in rows) / len(rows)
            for stage in names
        }

    def memory_mib(self, scheme: str) -> float | None:
        """Peak memory of a process that ran the scheme alone."""
        return next(
            (
                float(row["memory_mib"])
                for row in self.rows
                if row.get("part") == "memory" and row["scheme"] == scheme
            ),
            None,
        )

    def unreachable(self) -> dict[str, float]:
        """Schemes that had no stream small enough, and for which share of the faces."""
        found: dict[str, set[Any]] = {}
        tried: dict[str, set[Any]] = {}
        for row in self.rows:
            if row.get("part") == "main" and row["scheme"] != ORIGINAL:
                tried.setdefault(row["scheme"], set()).add(row["image"])
                if "error" in row:
                    found.setdefault(row["scheme"], set()).add(row["image"])
        return {name: len(images) / len(tried[name]) for name, images in found.items()}

    @cached_property
    def side_images(self) -> set[str]:
        """Pictures that the changed schemes were measured on."""
        return {row["image"] for row in self.trials if "/" in row["scheme"]}

    def side_cell(self, scheme: str, snr_db: float | None, channel: str = "awgn") -> list[Row]:
        """A cell on those pictures alone, so that a changed scheme meets ours on equal terms."""
        return [r for r in self.cell(scheme, channel, snr_db) if r["image"] in self.side_images]

    def noiseless(self, scheme: str, faces: str | None = None) -> list[Row]:
        """What a channel without noise would give."""
        return self.cell(scheme, NO_CHANNEL, None, faces)


def _picture(row: Row) -> tuple[str, str]:
    return row["image"], row["sentence"]
