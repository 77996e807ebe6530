"""The generator's recipe on random pictures: two steps, exact resume, sane parts."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator
from training import generator as recipe_module
from training.data import Order, load_faces, make_fake_data
from training.generator import (
    Judges,
    Nets,
    Recipe,
    augment,
    draw_snr_db,
    energy_distance,
    learning_rate,
)
from training.run import Run, RunOptions
from training.teachers import make_fake_teachers
from transmitter.inversion import InversionEncoder

TINY = Recipe(
    batch=4,
    channels=(8,) * 6,
    encoder_channels=(8,) * 5,
    draft_size=16,
    sampled=8,
    discriminator_channels=(8,) * 6,
    adversary_from=0,
    r1_every=2,
    validation_faces=4,
)


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_fake_data(tmp_path_factory.mktemp("data"), count=8)
    make_fake_teachers(folder)
    return folder


def options(data: Path, folder: Path, steps: int) -> RunOptions:
    return RunOptions(data, folder / "bundle", folder / "runs", steps=steps, device="cpu", seed=3)


def state(folder: Path) -> dict[str, object]:
    loaded: dict[str, object] = torch.load(
        folder / "runs" / "generator" / "state.pt", weights_only=True
    )
    return loaded


def test_two_steps_make_a_bundle_that_both_ends_can_load(fake_data: Path, tmp_path: Path) -> None:
    recipe_module.train(options(fake_data, tmp_path, 2), TINY)
    bundle = Bundle.open(tmp_path / "bundle")
    image = torch.zeros(1, 3, 128, 128)
    made = Generator.from_bundle(bundle).synthesis(InversionEncoder.from_bundle(bundle)(image))
    assert made.shape == image.shape
    assert bundle.provenance("generator")["images"] == 8
    assert list((tmp_path / "runs" / "generator").glob("sheet-*.png"))


def test_resuming_gives_what_never_stopping_gives(fake_data: Path, tmp_path: Path) -> None:
    recipe_module.train(options(fake_data, tmp_path / "whole", 3), TINY)
    for _ in range(3):
        recipe_module.train(options(fake_data, tmp_path / "parts", 1), TINY)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    for part in ("generator", "encoder", "discriminator", "smooth_generator"):
        ours, theirs = whole[part], parts[part]
        assert isinstance(ours, dict)
        assert isinstance(theirs, dict)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def test_a_lost_run_goes_on_from_the_bundle(fake_data: Path, tmp_path: Path) -> None:
    recipe_module.train(options(fake_data, tmp_path, 2), TINY)
    again = replace(options(fake_data, tmp_path, 1), runs=tmp_path / "elsewhere")
    recipe_module.train(again, TINY)
    assert Bundle.open(tmp_path / "bundle").provenance("generator")["images"] == 12


def test_another_seed_does_not_go_on_from_this_run(fake_data: Path, tmp_path: Path) -> None:
    recipe_module.train(options(fake_data, tmp_path, 1), TINY)
    with pytest.raises(InvalidRequest, match="seed 3, got seed 4"):
        recipe_module.train(replace(options(fake_data, tmp_path, 1), seed=4), TINY)


def test_sigterm_stops_between_steps(tmp_path: Path) -> None:
    with Run("toy", RunOptions(tmp_path, tmp_path, tmp_path, seed=0)) as run:
        assert not run.stopping
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        deadline = time.monotonic() + 5
        while not run.stopping and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.stopping
        run.step = 7
        run.save({})
    with Run("toy", RunOptions(tmp_path, tmp_path, tmp_path, seed=0)) as again:
        assert again.restore() == {}
        assert again.step == 7


def test_order_shows_every_picture_once_an_epoch() -> None:
    order = Order(10, 4, torch.Generator().manual_seed(0))
    seen = torch.cat([order.next() for _ in range(5)])
    assert sorted(seen.tolist()) == sorted(2 * list(range(10)))


def test_snrs_fill_the_range() -> None:
    recipe = replace(TINY, batch=2000)
    drawn = draw_snr_db(recipe, torch.Generator().manual_seed(0))
    assert recipe.snr_low_db <= float(drawn.min()) < recipe.snr_low_db + 1
    assert recipe.snr_high_db - 1 < float(drawn.max()) <= recipe.snr_high_db


def test_a_run_starts_at_the_components(fake_data: Path) -> None:
    """Before the first step G(E(face)) is the face's projection: with all components, itself."""
    faces = load_faces(fake_data, "train")
    judges = Judges.load(fake_data, torch.device("cpu"))
    nets = Nets(TINY, torch.device("cpu"))
    nets.start_from_components(faces, judges, TINY)
    face = faces.batch(torch.arange(len(faces)))
    nets.encoder.eval()
    with torch.no_grad():
        w = nets.encoder(face)
        drawn = F.avg_pool2d(nets.generator.synthesis(w), 8)
    wanted = F.avg_pool2d(face, 8)
    assert float((drawn - wanted)[:, :, 1:-1, 1:-1].square().mean().sqrt()) < 0.06
    assert float(wanted.std()) > 0.3
    torch.testing.assert_close(w.norm(dim=1), torch.full((len(w),), 512**0.5), rtol=1e-4, atol=0)


def test_energy_distance_is_zero_for_one_law_only() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 8, generator=draws)
    assert abs(float(energy_distance(a, b))) < 0.02
    assert float(energy_distance(a, b + 1)) > 0.2


def test_rate_rises_then_falls_with_the_root() -> None:
    recipe = Recipe()
    assert learning_rate(recipe, 0) < recipe.rate / 100
    assert learning_rate(recipe, recipe.warmup) == recipe.rate
    assert learning_rate(recipe, 4 * recipe.rate_falls_after) == pytest.approx(recipe.rate / 2)


def test_augmentation_passes_gradients_and_keeps_the_shape() -> None:
    images = torch.zeros(4, 3, 32, 32, requires_grad=True)
    out = augment(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    out.sum().backward()
    assert images.grad is not None


def test_fake_data_reads_back(fake_data: Path) -> None:
    faces = load_faces(fake_data, "val")
    assert faces.images.shape == (8, 3, 128, 128)
    assert faces.labels.shape == (8, 40)
    assert faces.landmarks.shape == (8, 5, 2)
    batch = faces.batch(torch.tensor([0, 1]), torch.tensor([False, True]))
    torch.testing.assert_close(batch[1], faces.batch(torch.tensor([1]))[0].flip(2))


def test_whoever_runs_several_recipes_learns_of_the_signal(tmp_path: Path) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with Run("toy", RunOptions(tmp_path, tmp_path, tmp_path)) as run:
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stopping
            assert told == []
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
