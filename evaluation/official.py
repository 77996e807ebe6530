"""LPIPS, FID and KID as published: they need weight files, which nobody here may fetch for you.

Put the files in one folder and name it by EDSC_METRIC_WEIGHTS or `--metric-weights`:

    alexnet-owt-7be5be79.pth                   LPIPS (alex)     torchvision's ImageNet AlexNet
    vgg16-397923af.pth                         LPIPS (vgg)      torchvision's ImageNet VGG-16
    pt_inception-2015-12-05-6726825d.pth       FID, KID         Inception of the original FID code

Any of them may be missing; what is there is measured. LPIPS's linear heads (version 0.1, 6 and 7
kB) come with torchmetrics. Files are read with `weights_only`: none can run code. The networks are
plain torch, torchvision is not needed.

Zhang et al. 2018 (LPIPS), Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID), Szegedy et al.
2016 (Inception).
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import InvalidRequest, Unavailable

Backbone = Literal["alex", "vgg"]
FOLDER: Final = "EDSC_METRIC_WEIGHTS"
FILES: Final[Mapping[str, str]] = {
    "lpips_alex": "alexnet-owt-7be5be79.pth",
    "lpips_vgg": "vgg16-397923af.pth",
    "inception": "pt_inception-2015-12-05-6726825d.pth",
}
_INCEPTION_SIDE: Final = 299  # px
_INCEPTION_CLASSES: Final = 1008


@dataclass(frozen=True)
class Official:
    """The published metrics whose files are there. absent: what is missing, by metric."""

    lpips: dict[str, "Lpips"] = field(default_factory=dict)
    inception: "FidInception | None" = None
    absent: tuple[str, ...] = tuple(FILES)

    @classmethod
    def open(cls, folder: Path | None = None) -> "Official":
        """Load what `folder` holds; None: the folder named by EDSC_METRIC_WEIGHTS, or nothing.

        Raises InvalidRequest where the folder does not exist or a file is not what its name says.
        """
        named = os.environ.get(FOLDER)
        folder = folder or (Path(named) if named else None)
        if folder is None:
            return cls()
        if not folder.is_dir():
            raise InvalidRequest(f"{folder} is no folder; expected the metrics' weight files in it")
        present = {name: folder / file for name, file in FILES.items() if (folder / file).is_file()}
        lpips: dict[str, Lpips] = {}
        if "lpips_alex" in present:
            lpips["lpips_alex"] = Lpips.open("alex", present["lpips_alex"])
        if "lpips_vgg" in present:
            lpips["lpips_vgg"] = Lpips.open("vgg", present["lpips_vgg"])
        inception = FidInception.open(present["inception"]) if "inception" in present else None
        return cls(lpips, inception, tuple(name for name in FILES if name not in present))


def _read(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise InvalidRequest(f"{path} holds a {type(found).__name__}; expected tensors by name")
    return {str(key): value for key, value in found.items()}


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        raise InvalidRequest(f"{path} does not fit its network: {words}") from error
    module.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------- LPIPS


def _alexnet() -> tuple[nn.Sequential, tuple[int, ...]]:
    """torchvision's `alexnet().features` up to the last activation, and where LPIPS taps it."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )
    return layers, (1, 4, 7, 9, 11)


def _vgg16() -> tuple[nn.Sequential, tuple[int, ...]]:
    """torchvision's `vgg16().features` up to relu5_3; taps relu1_2, 2_2, 3_3, 4_3, 5_3."""
    layers: list[nn.Module] = []
    taps = []
    inputs = 3
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        taps.append(len(layers) - 1)
    return nn.Sequential(*layers), tuple(taps)


class Lpips(nn.Module):
    """LPIPS version 0.1: pictures [B, 3, H, W] in [-1, 1], twice -> distance [B] >= 0.

    Unit-normalised activations, squared differences, weighted per channel by the learned heads,
    averaged over positions, summed over five layers.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.features, self.taps = _alexnet() if backbone == "alex" else _vgg16()
        widths = (64, 192, 384, 256, 256) if backbone == "alex" else (64, 128, 256, 512, 512)
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c in widths)
        # ImageNet's mean and deviation, for pictures in [-1, 1]; the paper's ScalingLayer.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def open(cls, backbone: Backbone, path: Path) -> "Lpips":
        """torchvision's weights from `path`, the heads from torchmetrics."""
        net = cls(backbone)
        weights = {
            key.removeprefix("features."): value
            for key, value in _read(path).items()
            if key.startswith("features.")
        }
        _fill(net.features, weights, path)
        file = _heads_folder() / f"{backbone}.pth"
        heads = _read(file)
        _fill(net.heads, {str(k): heads[f"lin{k}.model.1.weight"] for k in range(5)}, file)
        return net.eval().requires_grad_(False)

    def _activations(self, image: Tensor) -> list[Tensor]:
        x = (image - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.taps:
                length = x.square().sum(1, keepdim=True).sqrt()
                found.append(x / (length + 1e-10))
        return found

    @torch.no_grad()
    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        total = torch.zeros(len(image))
        pairs = zip(self._activations(image), self._activations(reference), self.heads, strict=True)
        for a, b, head in pairs:
            total = total + ((a - b).square() * head).sum(1).mean((1, 2))
        return total


def _heads_folder() -> Path:
    spec = importlib.util.find_spec("torchmetrics")  # found, not imported: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("LPIPS takes its heads from torchmetrics: install the `eval` extra")
    return Path(next(iter(spec.submodule_search_locations))) / "functional/image/lpips_models"


# --------------------------------------------------------------------------------------- Inception


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return F.relu(y)


def _pooled(x: Tensor) -> Tensor:
    """The original graph's average pooling leaves the border's padding out of the mean."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


_ROW, _COLUMN = (1, 7), (7, 1)
_ROW_PAD, _COLUMN_PAD = (0, 3), (3, 0)


class _A(nn.Module):
    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_pooled(x))], 1)


class _B(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = _Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(288, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, c, 1)
        self.branch7x7_2 = _Conv(c, c, _ROW, padding=_ROW_PAD)
        self.branch7x7_3 = _Conv(c, 192, _COLUMN, padding=_COLUMN_PAD)
        self.branch7x7dbl_1 = _Conv(768, c, 1)
        self.branch7x7dbl_2 = _Conv(c, c, _COLUMN, padding=_COLUMN_PAD)
        self.branch7x7dbl_3 = _Conv(c, c, _ROW, padding=_ROW_PAD)
        self.branch7x7dbl_4 = _Conv(c, c, _COLUMN, padding=_COLUMN_PAD)
        self.branch7x7dbl_5 = _Conv(c, 192, _ROW, padding=_ROW_PAD)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_pooled(x))], 1)


class _D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, _ROW, padding=_ROW_PAD)
        self.branch7x7x3_3 = _Conv(192, 192, _COLUMN, padding=_COLUMN_PAD)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    """maximum: the last block of the original graph pools by maximum, the one before by mean."""

    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(F.max_pool2d(x, 3, 1, 1) if self.maximum else _pooled(x)),
        ]
        return torch.cat(parts, 1)


class FidInception(nn.Module):
    """The FID network: pictures [B, 3, H, W] in [-1, 1] -> embeddings [B, 2048].

    Pictures are scaled to 299 px (bilinear, corners not aligned), as pytorch-fid does. Names are
    those of the published file; its classifier `fc` is loaded and not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _C(128),
            _C(160),
            _C(160),
            _C(192),
        )
        self.Mixed_7a = _D()
        self.Mixed_7b, self.Mixed_7c = _E(1280, maximum=False), _E(2048, maximum=True)
        self.fc = nn.Linear(2048, _INCEPTION_CLASSES)

    @classmethod
    def open(cls, path: Path) -> "FidInception":
        net = cls()
        _fill(net, _read(path), path)
        return net

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        side = (_INCEPTION_SIDE, _INCEPTION_SIDE)
        x = F.interpolate(image.float(), side, mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        x = self.Mixed_7c(self.Mixed_7b(x))  # [B, 2048, 8, 8]
        pooled: Tensor = x.mean((2, 3))
        return pooled
