"""The face finder: `edsc train faces`. About ten minutes on one CPU core.

Learns from 3,000 unaligned photographs with five points each (training/scenes.py). First
`FaceNet`, from scenes: faces turned by up to 40 degrees, from a tenth of the picture to more than
all of it, several in one picture, or none. Then `PointNet`, from upright crops that are cut
somewhat wrong. The last 150 photographs are kept apart; on them and on empty scenes the threshold
is chosen at every checkpoint.

Loss of the first, per cell of the grid: the penalty-reduced focal loss of "Objects as points"
(Zhou et al. 2019, Eq. 1) for the score, and the distance of the points in face sizes. Of the
second: the distance of the points.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.bundle import write_net
from shared.images import to_uint8
from training.data import Order
from training.run import Run, RunOptions
from training.scenes import (
    PhotoSet,
    Scenes,
    draw_crops,
    draw_scenes,
    empty_scenes,
    load_photos,
)
from transmitter.faces import (
    LOOK_SCALE,
    LOOK_SIDE,
    STRIDE,
    Face,
    FaceFinder,
    FaceNet,
    FaceNetConfig,
    FaceNets,
    FinderConfig,
    PointNet,
    bundle_config,
    face_size,
    grid_centres,
)

NAME = "faces"
FINDER_STEPS = 3200
POINTS_STEPS = 1800
BATCH = 32
SIDE = 128  # px of a scene
RATE = 3e-3
WARM_UP = 0.05  # of each part, then half a cosine down to zero
HELD_OUT = 150
AVERAGE = 0.998  # the shipped net is a running mean of the trained one
CHECKPOINT_MINUTES = 3.0


def targets(scenes: Scenes, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the grid should say.

    Returns heat [B, G, G] in 0..1 (1 at the cell of a face's middle, a Gaussian around it), sure
    [B, G, G] bool (False around faces that may or may not be found), and the face [B, G, G] each
    cell belongs to.
    """
    grid = side // STRIDE
    centres = scenes.points.mean(-2)  # [B, K, 2]
    size = face_size(scenes.points)  # [B, K]
    far = (grid_centres(grid, grid)[None, None] - centres[:, :, None, None]).square().sum(-1)
    width = (0.12 * size).clamp(min=0.6 * STRIDE)[:, :, None, None]
    bumps = torch.exp(-far / (2 * width**2))  # [B, K, G, G]
    # The nearest cell is the face's own, wherever in it the middle lies.
    nearest = far == far.amin((2, 3), keepdim=True)
    bumps = torch.where(nearest, torch.ones(()), bumps) * scenes.known[:, :, None, None]
    heat, owner = bumps.max(1)
    reach = (0.5 * size).clamp(min=1.5 * STRIDE)[:, :, None, None]
    blurred = ((far < reach**2) & scenes.unclear[:, :, None, None]).any(1)
    return heat, ~blurred | (heat > 0.3), owner


def loss_of(net: FaceNet, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Score loss and points loss of a batch, both scalars."""
    side = scenes.pictures.shape[-1]
    heat, sure, owner = targets(scenes, side)
    logits, points = net(scenes.pictures.contiguous(memory_format=torch.channels_last))
    score = logits.sigmoid()
    peak = heat == 1
    positive = (1 - score).square() * F.logsigmoid(logits)
    negative = (1 - heat).pow(4) * score.square() * F.logsigmoid(-logits)
    faces = peak.sum().clamp(min=1)
    score_loss = -(torch.where(peak, positive, negative) * sure).sum() / faces
    batch = torch.arange(len(heat))[:, None, None]
    wanted = scenes.points[batch, owner]  # [B, G, G, 5, 2]
    size = face_size(scenes.points).clamp(min=1.0)[batch, owner]  # [B, G, G]
    weight = torch.where(heat > 0.3, heat, torch.zeros(()))
    apart = F.smooth_l1_loss(points, wanted, reduction="none").mean((3, 4)) / size
    return score_loss, (apart * weight).sum() / weight.sum().clamp(min=1)


def points_loss_of(net: PointNet, pictures: Tensor, points: Tensor) -> Tensor:
    """Mean distance along x and y in percent of the crop's side, smooth below half a percent."""
    got = net(pictures.contiguous(memory_format=torch.channels_last))
    percent = 100 / pictures.shape[-1]
    return F.smooth_l1_loss(got * percent, points * percent, beta=0.5)


def rate_at(step: int) -> float:
    """Learning rate of a step: each part warms up and comes to rest on its own."""
    if step < FINDER_STEPS:
        part = (step + 1) / FINDER_STEPS
    else:
        part = (step + 1 - FINDER_STEPS) / POINTS_STEPS
    return RATE * min(1.0, part / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(1.0, part)))


def eye_distance(points: Tensor) -> float:
    """Distance of the eyes, px; [5, 2] -> float."""
    return float((points[1] - points[0]).norm())


def match(face: Face | None, points: Tensor) -> float | None:
    """Mean distance of the five points in eye distances, or None where another or no face was
    found (middles further apart than half an eye distance)."""
    if face is None:
        return None
    eyes = max(eye_distance(points), 0.5 * float(face_size(points)) / 2)
    if float((face.points.mean(0) - points.mean(0)).norm()) > 0.5 * eyes:
        return None
    return float((face.points - points).norm(dim=1).mean()) / eyes


def evaluate(
    nets: FaceNets, photos: PhotoSet, empty: Tensor
) -> tuple[FinderConfig, dict[str, float]]:
    """Choose the threshold on empty pictures [N, 3, S, S]; score the finder on held-out photos."""
    low = FaceFinder(nets, FinderConfig(threshold=0.3))
    false = [max((f.score for f in low(to_uint8(picture))), default=0.0) for picture in empty]
    threshold = min(0.8, max(0.4, max(false) + 0.05))
    config = replace(low.config, threshold=round(threshold, 3))
    finder = FaceFinder(nets, config)
    errors: list[float] = []
    started = time.perf_counter()
    for number in range(len(photos)):
        faces = finder(photos.photo(number))
        error = match(faces[0] if faces else None, photos.points[number])
        if error is not None:
            errors.append(error)
    milliseconds = (time.perf_counter() - started) * 1000 / len(photos)
    return config, {
        "found": len(errors) / len(photos),
        "error": sum(errors) / max(1, len(errors)),
        "false_best": max(false),
        "threshold": config.threshold,
        "ms": milliseconds,
    }


def sheet_of(nets: FaceNets, config: FinderConfig, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in [-1, 1] with what the finder sees in them drawn in."""
    drawn = pictures.clone()
    finder = FaceFinder(nets, config)
    for picture in drawn:
        for face in finder(to_uint8(picture)):
            for x, y in face.points.round().int().tolist():
                picture[:, max(0, y - 1) : y + 1, max(0, x - 1) : x + 1] = torch.tensor(
                    [-1.0, 1.0, -1.0]
                )[:, None, None]
    return drawn


def train(options: RunOptions) -> None:
    """Train the finder and write net `faces` to the bundle. Reads data/raw_photos_train."""
    photos = load_photos(Path(options.data) / "raw_photos_train")
    held = min(HELD_OUT, max(1, len(photos) // 4))
    kept, held_out = photos.subset(0, len(photos) - held), photos.subset(-held, len(photos))
    with Run(NAME, options) as run:
        state = run.restore()
        generator = torch.Generator().manual_seed(options.seed)
        order = Order(len(kept), BATCH, generator)
        nets, average = FaceNets(FaceNetConfig()), FaceNets(FaceNetConfig())
        average.load_state_dict(nets.state_dict())
        optimizers = [
            torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.02)
            for net in (nets.finder, nets.points)
        ]
        if state is not None:
            nets.load_state_dict(state["nets"])
            average.load_state_dict(state["average"])
            for optimizer, kept_state in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept_state)
            order.load(state["order"])
        empty = empty_scenes(held_out, max(4, 2 * held), SIDE)
        nets.train()
        sums, count = torch.zeros(2), 0
        while run.step < FINDER_STEPS + POINTS_STEPS and not run.stopping:
            finding = run.step < FINDER_STEPS
            net: nn.Module = nets.finder if finding else nets.points
            optimizer = optimizers[0 if finding else 1]
            if finding:
                scenes = draw_scenes(kept, order.next(), SIDE, generator)
                score_loss, points_loss = loss_of(nets.finder, scenes)
                run.images += len(scenes.pictures)
            else:
                crops = draw_crops(kept, order.next(), LOOK_SIDE, LOOK_SCALE, generator)
                score_loss, points_loss = torch.zeros(()), points_loss_of(nets.points, *crops)
                run.images += BATCH
            optimizer.zero_grad()
            (score_loss + 10.0 * points_loss).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 5.0 if finding else 50.0)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(run.step)
            optimizer.step()
            run.step += 1
            part = run.step if finding else run.step - FINDER_STEPS
            following = average.finder if finding else average.points
            _follow(following, net, min(AVERAGE, part / (part + 10)))
            sums += torch.stack([score_loss.detach(), points_loss.detach()])
            count += 1
            if run.step % 200 == 0:
                run.record(score_loss=float(sums[0]) / count, points_loss=float(sums[1]) / count)
                sums, count = torch.zeros(2), 0
            if run.due("checkpoint", CHECKPOINT_MINUTES):
                _save(run, nets, average, optimizers, order)
                _write(run, average, held_out, empty)
        _save(run, nets, average, optimizers, order)
        _write(run, average, held_out, empty)


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, keep: float) -> None:
    """average <- keep * average + (1 - keep) * net, batch statistics included."""
    for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - keep)
        else:
            mean.copy_(value)


def _save(
    run: Run,
    nets: FaceNets,
    average: FaceNets,
    optimizers: list[torch.optim.AdamW],
    order: Order,
) -> None:
    state: dict[str, Any] = {
        "nets": nets.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "order": order.state(),
    }
    run.save(state)


def _write(run: Run, average: FaceNets, held_out: PhotoSet, empty: Tensor) -> None:
    config, scores = evaluate(average, held_out, empty)
    run.record(**scores)
    write_net(
        run.options.bundle,
        NAME,
        config=bundle_config(average.config, config),
        tensors=average.state_dict(),
        provenance=run.provenance(held_out_photos=len(held_out), scores=scores),
    )
    generator = torch.Generator().manual_seed(run.options.seed)
    index = torch.arange(32) % len(held_out)
    scenes = draw_scenes(held_out, index, SIDE, generator)
    run.sheet(sheet_of(average, config, scenes.pictures), columns=8)
