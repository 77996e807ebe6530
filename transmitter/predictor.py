"""The attribute predictor P: from a face to the degree 0..5 of each of the five attributes.

    image [B,3,128,128] -> stem 64 px -> stage 32 px -> stage 16 px -> stage 8 px -> stage 4 px
                               |             |              |             |             |
                               +-------------+---- features: perceptual --+-------------+
                                                                                        |
                                                            five scores s [B,5], one per attribute
                                                                                        |
                                                        cut points c_1 < ... < c_5, ordered logit
                                                                                        |
                                                                          logits [B,5,6]

Each attribute has one monotone score, and the six classes are intervals of it (a cumulative-link
model): P(degree >= k) = sigmoid(s - c_k). So the logits are smooth in the image, their gradient
does not vanish far from the asked degree, and "more" always means "higher score". The paper's P
(Talk-to-Edit's, a ResNet-50 trunk with five six-way heads) has the same input and output shapes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.attributes import ATTRIBUTES, MAX_DEGREE
from shared.bundle import Bundle
from shared.errors import InvalidRequest

N_CLASSES = MAX_DEGREE + 1
_SLOPE = 0.1


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes of the trunk: widths[i] channels at resolution / 2**(i+1) px, depths[i] blocks there.

    `auxiliary` names further binary labels the trunk was trained on (they make the features richer;
    only `heads()` returns them). `batch_norm` is true while training; a shipped net has it folded
    into the convolutions.
    """

    resolution: int = 128
    widths: tuple[int, ...] = (24, 48, 96, 192, 256)
    depths: tuple[int, ...] = (0, 1, 2, 2, 0)
    auxiliary: tuple[str, ...] = ()
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ValueError(
                "widths and depths must be equally long, got "
                f"{len(self.widths)} and {len(self.depths)}"
            )
        if self.resolution % 2 ** len(self.widths):
            raise ValueError(
                f"resolution must be a multiple of {2 ** len(self.widths)}, got {self.resolution}"
            )

    @property
    def final_resolution(self) -> int:
        return int(self.resolution // 2 ** len(self.widths))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PredictorConfig:
        """Reads the fields it knows; a bundle's config also carries scores and notes."""
        return cls(
            resolution=int(values["resolution"]),
            widths=tuple(int(v) for v in values["widths"]),
            depths=tuple(int(v) for v in values["depths"]),
            auxiliary=tuple(str(v) for v in values["auxiliary"]),
            batch_norm=bool(values["batch_norm"]),
        )


class _Conv(nn.Module):
    """Convolution, then batch normalisation while training (folded: a bias)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else None
        nn.init.kaiming_normal_(self.conv.weight, a=_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if self.norm is None else self.norm(y)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain convolution that computes the same in evaluation mode."""
        if self.norm is None:
            assert self.conv.bias is not None
            return self.conv.weight, self.conv.bias
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        gain = self.norm.weight / (variance + self.norm.eps).sqrt()  # [outputs]
        return self.conv.weight * gain[:, None, None, None], self.norm.bias - gain * mean


class _Block(nn.Module):
    """x + conv(act(conv(x))): two 3x3 convolutions with a shortcut."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.first = _Conv(width, width, 3, 1, norm)
        self.second = _Conv(width, width, 3, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.first(x), _SLOPE)
        return F.leaky_relu(x + self.second(y), _SLOPE)


class _Stage(nn.Module):
    """Halves the resolution, then `depth` residual blocks."""

    def __init__(self, inputs: int, outputs: int, depth: int, kernel: int, norm: bool) -> None:
        super().__init__()
        self.down = _Conv(inputs, outputs, kernel, 2, norm)
        self.blocks = nn.Sequential(*(_Block(outputs, norm) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.down(x), _SLOPE)
        y: Tensor = self.blocks(x)
        return y


class Predictor(nn.Module):
    """P: `predictor(image)` gives ordered logits [B,5,6]; its stages are the perceptual distance.

    The buffer `cuts` [5,5] (increasing along the degrees, in the logistic units of the score) turns
    scores into classes; the training recipe sets it, and says how in the bundle.
    """

    cuts: Tensor

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3, *config.widths[:-1])
        self.stages = nn.ModuleList(
            _Stage(
                inputs[i], config.widths[i], config.depths[i], 5 if i == 0 else 3, config.batch_norm
            )
            for i in range(len(config.widths))
        )
        flat = config.widths[-1] * config.final_resolution**2
        self.scores_head = nn.Linear(flat, len(ATTRIBUTES))
        self.evidence_head = nn.Linear(flat, len(config.auxiliary)) if config.auxiliary else None
        for head in (self.scores_head, self.evidence_head):
            if head is not None:
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)
        self.register_buffer("cuts", (3.0 * torch.arange(MAX_DEGREE)).repeat(len(ATTRIBUTES), 1))

    @classmethod
    def from_bundle(cls, bundle: Bundle, net: str = "predictor") -> Predictor:
        """The bundle's predictor (or its `judge`), in evaluation mode, its weights frozen."""
        module = cls(PredictorConfig.from_json(bundle.config(net)))
        bundle.load_into(net, module)
        # Channels-last convolutions are about a third faster on CPU and at least as fast on GPU.
        return module.channels_last()

    def channels_last(self) -> Predictor:
        """Itself, its convolutions laid out channels-last."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def features(self, image: Tensor) -> list[Tensor]:
        """Activations after every stage, finest first: [B, widths[i], resolution/2^(i+1), same]."""
        side = self.config.resolution
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be [B, 3, {side}, {side}], got {list(image.shape)}")
        if image.shape[-2:] != (
            side,
            side,
        ):  # a 1024 px generator is judged at the predictor's own resolution
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        x = image.contiguous(memory_format=torch.channels_last)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def scores(self, image: Tensor) -> Tensor:
        """The monotone score of each attribute, [B,5], no unit; compare with `cuts`."""
        flat = self.features(image)[-1].float().flatten(1)
        with torch.autocast(flat.device.type, enabled=False):  # 8 bits are a tenth of a degree
            s: Tensor = self.scores_head(flat)
        return s

    def steady_scores(self, image: Tensor) -> Tensor:
        """Scores [B,5], the mean over the picture and its mirror image: what is seen in one of them
        only does not count.
        """
        both: Tensor = self.scores(torch.cat([image, image.flip(3)])).unflatten(0, (2, -1)).mean(0)
        return both

    def score_logits(self, scores: Tensor) -> Tensor:
        """Scores [B,5] -> log P(degree = k) [B,5,6], k = 0..5, of the ordered-logit model.

        With a > b, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b-a)): a sum of logs
        without cancellation, whose gradient stays finite and non-zero at both ends.
        """
        z = scores[..., None] - self.cuts  # [B,5,5], decreasing along the last axis
        above = F.logsigmoid(z)  # log P(degree >= k), k = 1..5
        below = F.logsigmoid(-z)  # log P(degree < k)
        gap = torch.log(-torch.expm1(self.cuts[:, :-1] - self.cuts[:, 1:]))  # [5,4]
        middle = above[..., :-1] + below[..., 1:] + gap  # degrees 1..4
        return torch.cat([below[..., :1], middle, above[..., -1:]], dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        """image [B,3,128,128] in [-1,1] -> logits [B,5,6], which are log probabilities."""
        return self.score_logits(self.scores(image))

    def heads(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Last features [B,n] -> scores [B,5], logits of the auxiliary labels [B,m]."""
        if self.evidence_head is None:
            return self.scores_head(flat), flat.new_zeros(flat.shape[0], 0)
        return self.scores_head(flat), self.evidence_head(flat)

    def degrees(self, image: Tensor) -> Tensor:
        """The degree seen for each attribute, [B,5] int64 in 0..5: the interval the score is in."""
        return self.score_degrees(self.scores(image))

    def score_degrees(self, scores: Tensor) -> Tensor:
        """Scores [B,5] -> degrees [B,5] int64."""
        return (scores[..., None] >= self.cuts).sum(-1)

    def expected_degrees(self, image: Tensor) -> Tensor:
        """The degree as a mean over the six classes, [B,5] float in 0..5, differentiable."""
        return expected_degree(self(image))

    def perceptual(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance [B] >= 0 of two batches: this net's own, uncalibrated, not LPIPS.

        Unit-normalised features, squared differences summed over channels, averaged over positions
        and stages.
        """
        return feature_distance(self.features(a), self.features(b))

    def fold(self) -> Predictor:
        """A frozen copy with batch normalisation folded into the convolutions, for shipping."""
        values = {**asdict(self.config), "batch_norm": False}
        copy = Predictor(PredictorConfig(**values))
        own = dict(self.named_modules())
        with torch.no_grad():
            for name, module in copy.named_modules():
                if isinstance(module, _Conv):
                    source = own[name]
                    assert isinstance(source, _Conv)
                    assert module.conv.bias is not None
                    weight, bias = source.folded()
                    module.conv.weight.copy_(weight)
                    module.conv.bias.copy_(bias)
                elif isinstance(module, nn.Linear):
                    module.load_state_dict(own[name].state_dict())
            copy.cuts.copy_(self.cuts)
        return copy.eval().requires_grad_(False)


def expected_degree(logits: Tensor) -> Tensor:
    """Logits [B,5,6] -> mean degree [B,5] in 0..5."""
    degrees = torch.arange(N_CLASSES, dtype=logits.dtype, device=logits.device)
    return (logits.softmax(-1) * degrees).sum(-1)


def feature_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Distance [B] of two feature lists as `Predictor.features` gives them."""
    total = a[0].new_zeros(a[0].shape[0], dtype=torch.float32)
    for x, y in zip(a, b, strict=True):
        x = x.float() * torch.rsqrt(x.float().square().sum(1, keepdim=True) + 1e-6)
        y = y.float() * torch.rsqrt(y.float().square().sum(1, keepdim=True) + 1e-6)
        total = total + (x - y).square().sum(1).mean((1, 2))
    return total / len(a)


def read_celeba_dialog(path: Path) -> dict[str, tuple[int, int, int, int, int]]:
    """CelebA-Dialog's annotation file -> {picture name without suffix: its five degrees}.

    The file has one line a picture: its name, then five numbers 0..5 in the order of the header's
    attribute names (Bangs, Eyeglasses, No_Beard, Smiling, Young; the public files write their beard
    as `No_Beard` and their age as `Young`, with degrees that grow with the beard and with the age).
    Separators may be blanks, tabs or commas; a leading line with the number of pictures is skipped.
    Raises InvalidRequest, naming the line, for anything else.
    """
    aliases = {"no_beard": "beard", "young": "age"}
    names = [attribute.value for attribute in ATTRIBUTES]
    order = list(
        range(len(names))
    )  # without a header: the public files' order, which is ATTRIBUTES'
    degrees: dict[str, tuple[int, int, int, int, int]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(line.replace(",", " ") for line in file), 1):
            fields = row[0].split() if row else []
            if not fields or (number == 1 and len(fields) == 1):
                continue
            words = [
                aliases.get(f.lower(), f.lower()) for f in fields if f.lower() in {*names, *aliases}
            ]
            if words:
                if sorted(words) != sorted(names):
                    raise InvalidRequest(
                        f"{path}, line {number}: expected the attributes {names}, got {words}"
                    )
                order = [words.index(name) for name in names]
                continue
            values = fields[1:]
            if len(values) != len(names) or not all(
                v in {"0", "1", "2", "3", "4", "5"} for v in values
            ):
                raise InvalidRequest(
                    f"{path}, line {number}: expected a name and {len(names)} degrees 0..5, "
                    f"got {fields[:8]}"
                )
            a, b, c, d, e = (int(values[i]) for i in order)
            degrees[Path(fields[0]).stem] = (a, b, c, d, e)
    if not degrees:
        raise InvalidRequest(
            f"{path}: no annotation found, expected lines like '000001.jpg 0 0 2 3 1'"
        )
    return degrees
