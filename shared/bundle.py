"""A bundle: one folder that holds every trained net of the system, and can be checked.

::

    weights/celeba-128/
        bundle.json              per net: file, sha256, bytes, config, provenance; scores of all
        generator.safetensors    one file per net, fp16 unless the net asks for more or less
        inversion.safetensors
        ...

No pickles: loading a bundle runs no code. The hash of every file is checked before its tensors
are used, and `Bundle.digest` names the whole, so both ends of a link can tell that they hold the
same nets.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from shared.errors import BundleError

FORMAT = 1
INDEX = "bundle.json"

_SCALE = ".scale"  # beside a tensor that is kept in a byte

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def default_folder() -> Path:
    """The bundle used when none is named: `EDSC_WEIGHTS`, else this tree's `weights/celeba-128`."""
    named = os.environ.get("EDSC_WEIGHTS")
    return Path(named) if named else Path(__file__).parents[1] / "weights" / "celeba-128"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise BundleError(f"no bundle at {folder}: expected a file {INDEX} in it")
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise BundleError(f"{path}: got bundle format {got!r}, expected {FORMAT}")
    return index


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two recipes may write to one bundle at the same time: the index is theirs in turn."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Bundle:
    """A bundle opened for reading. Build it with `Bundle.open`."""

    folder: Path
    index: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path | None = None, verify: bool = True) -> "Bundle":
        """Read the index; with `verify`, hash every file first (about 0.1 s for 60 MB).

        Raises BundleError where a file is missing or differs from its recorded hash.
        """
        folder = default_folder() if folder is None else Path(folder)
        bundle = cls(folder, _read_index(folder))
        if verify:
            for net in bundle.nets:
                bundle._bytes(net)
        return bundle

    @property
    def name(self) -> str:
        return str(self.index["name"])

    @property
    def nets(self) -> tuple[str, ...]:
        return tuple(self.index["nets"])

    @property
    def scores(self) -> Mapping[str, Any]:
        return dict(self.index.get("scores", {}))

    @property
    def digest(self) -> str:
        """sha256 over names, hashes and configurations of the nets: the identity of the weights."""
        parts = {
            net: [entry["sha256"], entry["config"]] for net, entry in self.index["nets"].items()
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def has(self, net: str) -> bool:
        return net in self.index["nets"]

    def _entry(self, net: str) -> Mapping[str, Any]:
        if not self.has(net):
            raise BundleError(
                f"bundle {self.folder} has no net {net!r}; it has: {', '.join(self.nets) or 'none'}"
            )
        entry: Mapping[str, Any] = self.index["nets"][net]
        return entry

    def config(self, net: str) -> dict[str, Any]:
        return dict(self._entry(net)["config"])

    def provenance(self, net: str) -> dict[str, Any]:
        return dict(self._entry(net)["provenance"])

    def _bytes(self, net: str) -> bytes:
        entry = self._entry(net)
        path = self.folder / str(entry["file"])
        if not path.is_file():
            raise BundleError(f"{path} is missing, but {INDEX} lists it")
        data = path.read_bytes()
        got = hashlib.sha256(data).hexdigest()
        if got != entry["sha256"]:
            raise BundleError(f"{path}: got sha256 {got}, expected {entry['sha256']}")
        return data

    def tensors(self, net: str) -> dict[str, Tensor]:
        """The net's tensors; floating ones, and those that were kept in a byte, as float32."""
        stored = load(self._bytes(net))
        scales = {key: stored.pop(key) for key in list(stored) if key.endswith(_SCALE)}
        found = {
            key: value.float() if value.is_floating_point() else value
            for key, value in stored.items()
        }
        for key, scale in scales.items():
            name = key.removesuffix(_SCALE)
            found[name] = found[name] * scale  # [..., n] * [..., 1]
        return found

    def load_into(self, net: str, module: ModuleT) -> ModuleT:
        """Fill `module` (names and shapes must agree), freeze it and set it to inference."""
        try:
            module.load_state_dict(self.tensors(net), strict=True)
        except RuntimeError as error:
            # torch names every tensor that does not fit, maybe hundreds: the first tell enough.
            words = " ".join(str(error).split())[:300]
            raise BundleError(f"net {net!r} of {self.folder}: {words}") from error
        return module.eval().requires_grad_(False)


def write_net(
    folder: Path,
    net: str,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    half: bool = True,
    bytewise: Collection[str] = (),
) -> None:
    """Add or replace one net of the bundle at `folder`, which is made where it is missing.

    `half` stores floating tensors as fp16, which halves the file; what overflows it is refused.
    `bytewise` names tensors to store as int8, every row (last dimension) with a scale of its own:
    for those whose net does not mind an error of 1/254 of a row's largest number.
    Each file is replaced atomically, the index last, so a reader never sees half a net.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    if unknown := set(bytewise) - set(tensors):
        raise BundleError(f"net {net!r} has no tensors {sorted(unknown)} to store bytewise")
    for key, value in tensors.items():
        kept = value.detach().cpu().contiguous()
        if key in bytewise:
            scale = (kept.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
            if not torch.isfinite(scale).all():
                raise BundleError(f"net {net!r}: tensor {key!r} is not finite")
            stored[key + _SCALE] = scale
            kept = (kept.float() / scale).round().to(torch.int8)
        elif kept.is_floating_point():
            kept = kept.half() if half else kept.float()
            if not torch.isfinite(kept).all():
                raise BundleError(f"net {net!r}: tensor {key!r} is not finite as {kept.dtype}")
        stored[key] = kept.clone()
    data = save(stored)
    entry = {
        "file": f"{net}.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "config": dict(config),
        "provenance": dict(provenance),
    }
    with _locked(folder):
        if (folder / INDEX).is_file():
            index = _read_index(folder)
        else:
            index = {"format": FORMAT, "name": folder.name, "nets": {}, "scores": {}}
        index["nets"] = dict(sorted({**index["nets"], net: entry}.items()))
        _write_atomically(folder / f"{net}.safetensors", data)
        _write_index(folder, index)


def write_scores(folder: Path, scores: Mapping[str, Any]) -> None:
    """Merge measured scores into the index of the bundle at `folder`."""
    with _locked(folder):
        index = _read_index(folder)
        index["scores"] = {**index.get("scores", {}), **scores}
        _write_index(folder, index)


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    text = json.dumps(index, indent=1, sort_keys=False) + "\n"
    _write_atomically(folder / INDEX, text.encode())
