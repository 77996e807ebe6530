"""The adapters recipe on fake data: it runs, it resumes exactly, it never loses to its start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.adapters import NET_PER_SNR, PAPER_SNRS_DB, Adapters, LinearCode
from shared.bundle import Bundle, write_net
from shared.errors import BundleError, InvalidRequest
from shared.stylegan2 import Generator, GeneratorConfig, to_sphere
from training.adapters import AdaptersRecipe, score, start, train
from training.data import make_fake_data
from training.judging import Judges, Probes, picture_metric, seen_metric
from training.run import RunOptions
from transmitter.inversion import InversionConfig, InversionEncoder
from transmitter.predictor import Predictor

SIZE, LATENT = 32, 64
RECIPE = AdaptersRecipe(length=4, batch=4, probes=Probes(16), warm_up=1, report_steps=2)


def _write_sources(folder: Path, seed: int = 0) -> None:
    """A small untrained generator and inversion encoder, which is all the recipe asks for."""
    torch.manual_seed(seed)
    generator = Generator(
        GeneratorConfig(SIZE, LATENT, LATENT, mapping_layers=1, channels=(8, 8, 8, 8))
    )
    write_net(
        folder,
        "generator",
        config=generator.config.to_json(),
        tensors=generator.state_dict(),
        provenance={},
    )
    encoder = InversionEncoder(InversionConfig(SIZE, (8, 8, 8), LATENT))
    write_net(
        folder,
        "inversion",
        config=encoder.config.to_json(),
        tensors=encoder.state_dict(),
        provenance={},
    )


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    _write_sources(tmp_path / "bundle")
    data = make_fake_data(tmp_path / "data", count=12, size=SIZE)
    return RunOptions(data=data, bundle=tmp_path / "bundle", runs=tmp_path / "runs", device="cpu")


def test_two_steps_write_a_net_that_loads(options: RunOptions) -> None:
    train(replace(options, steps=2), RECIPE)
    bundle = Bundle.open(options.bundle)
    adapters = Adapters.from_bundle(bundle)
    assert adapters.config.latent == LATENT
    assert bundle.provenance("adapters")["steps"] == 2
    x = adapters.encoder(to_sphere(torch.randn(3, LATENT)), 6.0)
    assert x.shape == (3, LATENT // 2)


def test_resuming_is_the_same_as_never_stopping(options: RunOptions) -> None:
    train(replace(options, runs=options.runs / "whole"), RECIPE)
    whole = Bundle.open(options.bundle).tensors("adapters")
    for _ in range(2):
        train(replace(options, runs=options.runs / "halves", steps=2), RECIPE)
    halves = Bundle.open(options.bundle).tensors("adapters")
    assert Bundle.open(options.bundle).provenance("adapters")["steps"] == 4
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name


def test_one_pair_per_snr_is_a_net_of_its_own(options: RunOptions) -> None:
    train(replace(options, steps=1), replace(RECIPE, per_snr=True))
    bundle = Bundle.open(options.bundle)
    assert not bundle.has("adapters")
    adapters = Adapters.from_bundle(bundle, NET_PER_SNR)
    assert adapters.config.classes_db == PAPER_SNRS_DB


def test_a_checkpoint_for_another_generator_is_refused(options: RunOptions) -> None:
    train(replace(options, steps=1), replace(RECIPE, probes=Probes(0)))
    _write_sources(options.bundle, seed=1)
    with pytest.raises(InvalidRequest, match="another generator"):
        train(replace(options, steps=1), replace(RECIPE, probes=Probes(0)))
    train(replace(options, steps=1, fresh=True), replace(RECIPE, probes=Probes(0)))


def test_the_recipe_needs_a_generator(options: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        train(replace(options, bundle=tmp_path / "nothing", steps=1), RECIPE)


def test_the_metric_finds_what_the_picture_depends_on() -> None:
    """A distance that sees only the first coordinates: the metric must weigh those alone."""

    class Picture:
        @staticmethod
        def synthesis(w: torch.Tensor) -> torch.Tensor:
            return w

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b)[:, :4].square().sum(1)

    latents = to_sphere(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    metric = picture_metric(latents, Picture(), distance, Probes(512, floor=0.1), seed=0)  # type: ignore[arg-type]
    assert metric is not None
    weights = metric.diagonal()
    # 4 of 16 directions share a mean weight of 1: 0.9 * 4 + 0.1 each; the others get the floor.
    assert weights[:4] == pytest.approx(torch.full((4,), 3.7), rel=0.15)
    assert weights[4:] == pytest.approx(torch.full((12,), 0.1), rel=1e-6)


def test_scores_repeat_and_the_closed_form_wins_on_coloured_latents(
    generator: torch.Generator,
) -> None:
    shape = torch.linspace(1.0, -3.0, LATENT).exp()
    latents = to_sphere(torch.randn(2000, LATENT, generator=generator) * shape)
    code = LinearCode.fit(latents)
    config = replace(Adapters().config, latent=LATENT)
    plain, closed = Adapters(config), Adapters(config, code)
    assert score(closed, latents, code) == score(closed, latents, code)
    for snr, left in score(closed, latents, code).items():
        assert left < score(plain, latents, code)[snr]


def test_a_turned_start_sends_the_turned_components(generator: torch.Generator) -> None:
    """Fitted to the same latents, the turn of one code is another: both ends agree with it."""
    latents = to_sphere(torch.randn(2000, 32, generator=generator) * torch.linspace(2, 0.2, 32))
    code = LinearCode.fit(latents)
    looked_at = torch.diag(torch.linspace(0.1, 3.0, 32))
    turned = LinearCode.fit(latents, looked_at)
    pair = start(code, turned, ()).requires_grad_(False)
    direct = Adapters(replace(pair.config, turned=False), turned).requires_grad_(False)
    w = latents[:8]
    for snr in (-6.0, 12.0):
        x = direct.encoder(w, snr)
        assert torch.allclose(pair.encoder(w, snr), x, atol=1e-3)
        assert torch.allclose(pair.decoder(x, snr), direct.decoder(x, snr), atol=2e-3)
    # Without the turn what stays is the closed form that was there before.
    closed = Adapters(pair.config, code).requires_grad_(False)
    plain = Adapters(direct.config, code).requires_grad_(False)
    assert torch.equal(closed.encoder(w, 0.0), plain.encoder(w, 0.0))


class Mirrorless:
    """Faces whose pictures are three of the latent's numbers, mirrored or not."""

    def __init__(self, w: torch.Tensor) -> None:
        self.w = w

    def batch(self, index: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
        picture = 0.1 * self.w[index][:, :3, None, None]
        return picture.expand(-1, -1, 4, 4)


def test_the_metric_is_what_a_direction_explains(generator: torch.Generator) -> None:
    """What is seen moves with two of the latent's directions: the metric sees those."""
    w = torch.randn(4000, 8, generator=generator)
    faces: Any = Mirrorless(w)
    metric = seen_metric(w, faces, lambda face: [face[:, :2].flatten(1) / 4])
    assert metric is not None
    assert metric.diagonal()[:2] == pytest.approx(torch.full((2,), 0.01), rel=0.1)
    assert float(metric.diagonal()[2:].abs().max()) < 2e-4
    assert float(torch.linalg.eigvalsh(metric).min()) > -1e-9  # no direction is worth less than 0
    assert seen_metric(w, faces, lambda face: []) is None


def test_rows_of_the_features_have_the_perceptual_distance(bundle_folder: Path) -> None:
    """Squared differences of what the regression is fitted to are the distance that is judged."""
    predictor = Predictor.from_bundle(Bundle.open(bundle_folder))
    judges = Judges(predictor, None)
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        rows = zip(judges.features(a), judges.features(b), strict=True)
        found = sum((x - y).square().sum(1) for x, y in rows)
        wanted = predictor.perceptual(a, b)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert judges.person(a) == []
