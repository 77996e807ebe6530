"""Aligned faces for training: read once from the archives, kept as bytes in memory.

The layout read here (and written by `make_fake_data` for tests)::

    data/celeba128/{train,val,test}.tar     <name>.webp, square, aligned
    data/celeba128/labels.csv               name, split, identity, 40 attributes as 1 / -1
    data/celeba128/landmarks.csv            name, five points in pixels of the aligned picture
"""

import csv
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared.errors import InvalidRequest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class FaceSet:
    """One split, in memory.

    images: [N, 3, S, S] uint8. labels: [N, 40] int8 in {-1, 1}, columns as `label_names`.
    landmarks: [N, 5, 2] float32 pixels. identities: [N] int64, the person in each picture.
    """

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    identities: Tensor
    landmarks: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor, mirror: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, S, S] float32 in [-1, 1]; `mirror` [B] bool flips left and right."""
        pictures = self.images[index].float() / 127.5 - 1
        if mirror is not None:
            pictures = torch.where(mirror[:, None, None, None], pictures.flip(3), pictures)
        return pictures

    def first(self, count: int) -> "FaceSet":
        """The first `count` faces, or all where there are fewer."""
        part = slice(0, count)
        return FaceSet(
            self.names[part],
            self.images[part],
            self.labels[part],
            self.label_names,
            self.identities[part],
            self.landmarks[part],
        )

    def label(self, name: str) -> Tensor:
        """One CelebA attribute as [N] bool."""
        return self.labels[:, self.label_names.index(name)] > 0


def load_faces(data: Path, split: str, limit: int | None = None) -> FaceSet:
    """Read a split of `data/celeba128` into memory (about 15 s and 700 MB for train)."""
    if split not in SPLITS:
        raise InvalidRequest(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
    folder = data / "celeba128"
    archive = folder / f"{split}.tar"
    if not archive.is_file():
        raise InvalidRequest(f"no faces at {archive}: point EDSC_DATA or --data at the data folder")
    rows = _rows(folder / "labels.csv")
    points = _rows(folder / "landmarks.csv")
    label_names = tuple(key for key in next(iter(rows.values())) if key not in _NOT_LABELS)
    names: list[str] = []
    pictures: list[np.ndarray] = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isfile() or (limit is not None and len(names) >= limit):
                continue
            file = tar.extractfile(member)
            assert file is not None  # isfile() was true
            with Image.open(io.BytesIO(file.read())) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
            names.append(Path(member.name).stem)
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    labels = [[int(rows[name][key]) for key in label_names] for name in names]
    landmarks = [[float(v) for key, v in points[name].items() if key != "name"] for name in names]
    return FaceSet(
        tuple(names),
        stacked,
        torch.tensor(labels, dtype=torch.int8),
        label_names,
        torch.tensor([int(rows[name]["identity"]) for name in names]),
        torch.tensor(landmarks).reshape(-1, 5, 2),
    )


_NOT_LABELS = ("name", "split", "identity")


def _rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


class Order:
    """Draws [B] indices epoch by epoch; its state lets a resumed run see the same pictures."""

    def __init__(self, count: int, batch: int, generator: torch.Generator) -> None:
        if count < 1:
            raise InvalidRequest(f"got {count} pictures, expected at least one")
        self.count, self.batch, self.generator = count, batch, generator
        self.queue = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        while len(self.queue) < self.batch:
            epoch = torch.randperm(self.count, generator=self.generator)
            self.queue = torch.cat([self.queue, epoch])
        index, self.queue = self.queue[: self.batch], self.queue[self.batch :]
        return index

    def state(self) -> dict[str, Tensor]:
        return {"queue": self.queue, "generator": self.generator.get_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.queue = state["queue"].cpu()
        self.generator.set_state(state["generator"].cpu())


_LABELS = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose "
    "Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee "
    "Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard "
    "Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair "
    "Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie "
    "Young"
)
CELEBA_LABELS = tuple(_LABELS.split())


def make_fake_data(folder: Path, count: int = 8, size: int = 128, seed: int = 0) -> Path:
    """Write smooth random pictures in the layout above, for tests without photographs."""
    generator = np.random.default_rng(seed)
    root = folder / "celeba128"
    root.mkdir(parents=True, exist_ok=True)
    labels, landmarks = [], []
    for split in SPLITS:
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for number in range(count):
                name = f"{split}{number:04d}"
                small = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                picture = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                picture.save(buffer, "WEBP", quality=90)
                info = tarfile.TarInfo(f"{name}.webp")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
                signs = generator.choice([-1, 1], len(CELEBA_LABELS))
                labels.append([name, split, number, *signs])
                points = np.array([45, 60, 83, 60, 64, 82, 47, 101, 81, 101]) * size / 128
                landmarks.append([name, *np.round(points + generator.normal(0, 1, 10), 1)])
    corners = ("right_eye", "left_eye", "nose", "mouth_right", "mouth_left")
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["name", "split", "identity", *CELEBA_LABELS], *labels])
    with (root / "landmarks.csv").open("w", newline="") as file:
        header = ["name", *(f"{corner}_{axis}" for corner in corners for axis in "xy")]
        csv.writer(file).writerows([header, *landmarks])
    return folder
