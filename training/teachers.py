"""Frozen helper networks that judge pictures while the nets of a bundle are trained.

They come from the data folder and never enter a bundle: SqueezeNet features for an *uncalibrated*
perceptual distance (unit-normalised features, squared differences; not LPIPS), and EdgeFace for
the identity of a face.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import InvalidRequest

SQUEEZE_FILE = "squeezenet1_1_caffe_features.safetensors"
IDENTITY_FILE = "edgeface_xs.torchscript.pt"

_FIRES = {3: (64, 16), 4: (128, 16), 6: (128, 32), 7: (256, 32), 9: (256, 48), 10: (384, 48)}
_FIRES |= {11: (384, 64), 12: (512, 64)}
_TAPS = (1, 4, 7, 9, 10, 11, 12)


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, 4 * squeeze, 1)
        self.expand3x3 = nn.Conv2d(squeeze, 4 * squeeze, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def _squeeze_layers() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
    for index in range(2, 13):
        layers.append(
            _Fire(*_FIRES[index]) if index in _FIRES else nn.MaxPool2d(3, 2, ceil_mode=True)
        )
    return nn.Sequential(*layers)


class SqueezeFeatures(nn.Module):
    """Features of SqueezeNet 1.1 after seven of its layers, each unit-normalised over channels."""

    mean: Tensor

    def __init__(self, data: Path) -> None:
        super().__init__()
        path = data / "nets" / SQUEEZE_FILE
        if not path.is_file():
            raise InvalidRequest(f"no SqueezeNet features at {path}")
        self.features = _squeeze_layers()
        weights = {key.removeprefix("features."): value for key, value in load_file(path).items()}
        self.features.load_state_dict(weights, strict=True)
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> list[Tensor]:
        x = ((image.flip(1) + 1) * 127.5 - self.mean).contiguous(memory_format=torch.channels_last)
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                taps.append(F.normalize(x.float(), dim=1, eps=1e-6))
        return taps

    def distance(self, image: Tensor, reference: list[Tensor]) -> Tensor:
        """Squared differences of the features, summed over layers: [B]."""
        parts = [
            (a - b).square().sum(1).mean((1, 2))
            for a, b in zip(self(image), reference, strict=True)
        ]
        return torch.stack(parts).sum(0)


@contextmanager
def _deprecated_format() -> Iterator[None]:
    """TorchScript is deprecated, but it is the form in which this recogniser is published."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class FaceIdentity:
    """EdgeFace-XS: aligned faces [B, 3, 128, 128] in [-1, 1] -> unit vectors [B, 512]."""

    def __init__(self, data: Path, device: torch.device | str = "cpu") -> None:
        path = data / "nets" / IDENTITY_FILE
        if not path.is_file():
            raise InvalidRequest(f"no face recognition net at {path}")
        with _deprecated_format():
            self.net = torch.jit.load(str(path), map_location=device).eval()
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)

    def __call__(self, image: Tensor) -> Tensor:
        # The recogniser was made for tighter crops: eyes 35 px apart of 112, here 37.6 of 128.
        margin = image.shape[-1] // 32
        crop = image[:, :, margin:-margin, margin:-margin].float()
        crop = F.interpolate(crop, (112, 112), mode="bilinear", align_corners=False, antialias=True)
        return F.normalize(self.net(crop).float(), dim=1)


class _FakeIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 7 * 7, 512)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(F.avg_pool2d(x, 16).flatten(1))
        return out


def make_fake_teachers(data: Path) -> None:
    """Write helper nets with random weights in the data folder's layout, for tests without them."""
    folder = data / "nets"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {f"features.{k}": v for k, v in _squeeze_layers().state_dict().items()}
        with _deprecated_format():
            traced = torch.jit.trace(_FakeIdentity(), torch.zeros(1, 3, 112, 112))
    save_file(weights, folder / SQUEEZE_FILE)
    traced.save(str(folder / IDENTITY_FILE))
