"""Faces to measure with: the data folder's, anybody's photographs, four public sets as published.

::

    celeba128                DATA/celeba128/test.tar                      aligned, as trained on
    ood                      DATA/ood_lfw_grey128.tar                     aligned, grey press photos
    photos                   DATA/raw_photos/*.jpg, landmarks.csv         as a user uploads them
    folder:PATH              any pictures                                 faces are looked for
    celeba:PATH              img_align_celeba/, list_landmarks_align_celeba.txt, and where it is
                             there list_eval_partition.txt                test split
    celeba-hq:PATH           CelebA-HQ-img/, CelebA-HQ-to-CelebA-mapping.txt   test split of CelebA
    metfaces:PATH            images/ (metfaces.json is not needed)        all
    celeba-dialog:PATH       image/ or CelebA's, test_attr_list.txt or combined_annotation.txt;
                             brings true degrees                          the pictures of that list

The official archives keep CelebA's lists in Anno/ and Eval/ and its pictures in Img/; both that and
everything in one folder is read. CelebA-HQ, MetFaces and square CelebA-Dialog pictures are cut like
FFHQ already, of which the alignment used here is the inner 85 %.

Pictures are taken in the order of a permutation that depends on the names and on the seed, so
a smaller --limit measures a subset of a larger one.
"""

import csv
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import EdscError, InvalidRequest, NoFaceFound
from shared.images import decode_photo, to_float
from transmitter.faces import FaceFinder, align
from transmitter.predictor import read_celeba_dialog

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp")
KINDS: Final = ("celeba128", "ood", "photos")
OFFICIAL: Final = ("folder", "celeba", "celeba-hq", "metfaces", "celeba-dialog")
FFHQ_SCALE: Final = 0.85  # of the FFHQ square that our alignment keeps
_FIRST_TEST: Final = 182638  # CelebA's first test picture; the last is 202599

Degrees = tuple[int, int, int, int, int]
Cut = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Subject:
    """One face to measure with.

    face: [1, 3, S, S] float32 in [-1, 1], aligned. degrees: annotated 0..5, where the set has them.
    """

    name: str
    face: Tensor
    degrees: Degrees | None = None


@dataclass(frozen=True)
class FaceSet:
    """Pictures by name. `read` gives the file's bytes, `cut` the aligned square of its pixels."""

    kind: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]
    cut: Callable[[str], Cut]
    degrees: Mapping[str, Degrees] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def order(self, seed: int) -> list[str]:
        """The names, shuffled: the same set and seed give the same order."""
        names = sorted(self.names)
        draws = torch.Generator().manual_seed(zlib.crc32(f"{self.kind} {seed}".encode()))
        return [names[i] for i in torch.randperm(len(names), generator=draws).tolist()]

    def subjects(self, size: int, seed: int = 0) -> Iterator[Subject]:
        """Faces in shuffled order. Pictures that show none, or cannot be read, are passed over."""
        for name in self.order(seed):
            try:
                face = self.cut(name)(decode_photo(self.read(name)), size)
            except NoFaceFound:
                continue
            except EdscError as error:
                raise InvalidRequest(f"{self.kind}, picture {name}: {error}") from error
            yield Subject(name, face, self.degrees.get(name))


def open_faces(where: str, data: Path, finder: FaceFinder | None = None) -> FaceSet:
    """The set called `where`: one of `KINDS`, or `KIND:PATH` with one of `OFFICIAL`.

    data: the data folder. finder: looks for faces where no points are given. Raises InvalidRequest
    for an unknown name, and where files are missing.
    """
    kind, colon, place = where.partition(":")
    if kind in KINDS and not colon:
        match kind:
            case "celeba128":
                return _archive(kind, data / "celeba128" / "test.tar")
            case "ood":
                return _archive(kind, data / "ood_lfw_grey128.tar")
            case _:
                return _photos(data / "raw_photos")
    if kind not in OFFICIAL or not place:
        raise InvalidRequest(
            f"faces are {where!r}; expected one of {', '.join(KINDS)}, or one of "
            f"{', '.join(f'{name}:PATH' for name in OFFICIAL)}"
        )
    root = Path(place)
    if not root.is_dir():
        raise InvalidRequest(f"{root} is no folder; expected the {kind} files in it")
    match kind:
        case "folder":
            return _folder(root, finder)
        case "celeba":
            return _celeba(root)
        case "celeba-hq":
            return _celeba_hq(root)
        case "metfaces":
            names = _pictures(root / "images")
            return _set("metfaces", root / "images", names, lambda name: cut_ffhq)
        case _:
            return _celeba_dialog(root, finder)


# ---------------------------------------------------------------------------- squares of pictures


def cut_aligned(pixels: Tensor, size: int) -> Tensor:
    """An aligned square uint8 [3, S, S] -> [1, 3, size, size]. InvalidRequest unless square."""
    height, width = pixels.shape[1:]
    if height != width:
        raise InvalidRequest(f"got a {width} x {height} px picture, expected an aligned square")
    image = to_float(pixels)
    if height != size:
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return image.clamp(-1, 1)


def cut_ffhq(pixels: Tensor, size: int) -> Tensor:
    """A square cut like FFHQ uint8 [3, S, S] -> its inner 85 % as [1, 3, size, size]."""
    margin = round(pixels.shape[1] * (1 - FFHQ_SCALE) / 2)
    end = pixels.shape[1] - margin
    return cut_aligned(pixels[:, margin:end, margin:end], size)


def cut_at(points: Tensor) -> Cut:
    """A cut by five known points [5, 2] px."""
    return lambda pixels, size: align(pixels, points, size)


def cut_found(finder: FaceFinder | None) -> Cut:
    """A cut that looks for the face. NoFaceFound where there is none."""

    def cut(pixels: Tensor, size: int) -> Tensor:
        if finder is None:
            raise InvalidRequest("got no face finder, expected one for pictures without points")
        faces = finder(pixels)
        if not faces:
            raise NoFaceFound(
                f"found no face in this {pixels.shape[2]} x {pixels.shape[1]} picture"
            )
        return align(pixels, faces[0].points, size)

    return cut


# ------------------------------------------------------------------------------------- the sources


def _archive(kind: str, path: Path) -> FaceSet:
    if not path.is_file():
        raise InvalidRequest(f"no faces at {path}: point EDSC_DATA or --data at the data folder")
    with tarfile.open(path) as tar:
        members = {Path(m.name).stem: m for m in tar if m.isfile()}

    def read(name: str) -> bytes:
        with tarfile.open(path) as tar:
            file = tar.extractfile(members[name])
            assert file is not None  # members are files
            return file.read()

    return FaceSet(kind, tuple(members), read, lambda name: cut_aligned)


def _photos(folder: Path) -> FaceSet:
    names = _pictures(folder)
    points: dict[str, Tensor] = {}
    with (folder / "landmarks.csv").open(newline="") as file:
        for row in csv.reader(file):
            if row and row[0] in set(names):
                points[row[0]] = torch.tensor([float(v) for v in row[1:11]]).reshape(5, 2)
    missing = [name for name in names if name not in points]
    if missing:
        raise InvalidRequest(f"{folder / 'landmarks.csv'} has no points for {missing[0]}")
    return _set("photos", folder, names, lambda name: cut_at(points[name]))


def _folder(folder: Path, finder: FaceFinder | None) -> FaceSet:
    cut = cut_found(finder)
    return _set(f"folder {folder.name}", folder, _pictures(folder), lambda name: cut)


def _celeba(root: Path) -> FaceSet:
    images = _there(root, "img_align_celeba", "Img/img_align_celeba", "Img")
    points = _celeba_points(root)
    names = [name for name in _pictures(images) if name in points]
    partition = _maybe(root, "list_eval_partition.txt", "Eval/list_eval_partition.txt")
    if partition is not None:
        test = {row[0] for row in _rows(partition) if len(row) == 2 and row[1] == "2"}
        names = [name for name in names if name in test]
    return _set("celeba", images, names, lambda name: cut_at(points[name]))


def _celeba_hq(root: Path) -> FaceSet:
    images = _there(root, "CelebA-HQ-img")
    mapping = _there(root, "CelebA-HQ-to-CelebA-mapping.txt")
    test = set()
    for row in _rows(mapping):
        if len(row) >= 3 and row[0].isdigit() and int(Path(row[2]).stem) >= _FIRST_TEST:
            test.add(int(row[0]))
    names = [name for name in _pictures(images) if int(Path(name).stem) in test]
    return _set("celeba-hq", images, names, lambda name: cut_ffhq)


def _celeba_dialog(root: Path, finder: FaceFinder | None) -> FaceSet:
    lists = ("test_attr_list.txt", "combined_annotation.txt")
    annotation = _there(root, *lists, *(f"Anno/{name}" for name in lists))
    images = _there(root, "image", "images", "img_align_celeba", "Img/img_align_celeba")
    annotated = read_celeba_dialog(annotation)
    names = [name for name in _pictures(images) if Path(name).stem in annotated]
    degrees = {name: annotated[Path(name).stem] for name in names}
    try:
        points = _celeba_points(root)
    except InvalidRequest:  # the pictures may be square ones, which need none
        points = {}
    look = cut_found(finder)

    def of(name: str) -> Cut:
        def cut(pixels: Tensor, size: int) -> Tensor:
            if pixels.shape[1] == pixels.shape[2]:
                return cut_ffhq(pixels, size)
            return cut_at(points[name])(pixels, size) if name in points else look(pixels, size)

        return cut

    return FaceSet(
        "celeba-dialog", _some("celeba-dialog", images, names), _file(images), of, degrees
    )


def _celeba_points(root: Path) -> dict[str, Tensor]:
    """list_landmarks_align_celeba.txt: a count, a header, then a name and ten numbers a line."""
    name = "list_landmarks_align_celeba.txt"
    found: dict[str, Tensor] = {}
    for row in _rows(_there(root, name, f"Anno/{name}")):
        if len(row) == 11 and Path(row[0]).suffix:
            found[row[0]] = torch.tensor([float(v) for v in row[1:]]).reshape(5, 2)
    return found


def _rows(path: Path) -> Iterator[list[str]]:
    for line in path.read_text("utf-8").splitlines():
        yield line.replace(",", " ").split()


def _maybe(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).exists()), None)


def _there(root: Path, *names: str) -> Path:
    found = _maybe(root, *names)
    if found is None:
        raise InvalidRequest(f"{root} has none of {', '.join(names)}; expected the official layout")
    return found


def _pictures(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder; expected pictures in it")
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _file(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


def _some(kind: str, folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise InvalidRequest(f"{folder} has no pictures for {kind}; expected at least one")
    return tuple(names)


def _set(kind: str, folder: Path, names: Sequence[str], cut: Callable[[str], Cut]) -> FaceSet:
    return FaceSet(kind, _some(kind, folder, names), _file(folder), cut)
