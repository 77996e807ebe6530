"""The mapping recipe: a bundle gets it, a stopped run resumes exactly, and it learns a law."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator, GeneratorConfig, to_sphere
from training import generator as generator_recipe
from training import mapping as recipe_module
from training.data import make_fake_data
from training.generator import Recipe
from training.mapping import Learners, MappingRecipe, calibrate, looking, score
from training.run import RunOptions
from training.teachers import SqueezeFeatures, make_fake_teachers

TINY = MappingRecipe(
    length=4,
    pictures_from=1,
    batch=8,
    drawn=4,
    critic_width=16,
    critic_layers=1,
    head_width=4,
    r1_every=2,
    falling=2,
    strong=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> RunOptions:
    """Fake data, and a bundle with a generator and an inversion encoder of two steps."""
    folder = make_fake_data(tmp_path_factory.mktemp("mapping"), count=8)
    make_fake_teachers(folder)
    options = RunOptions(folder, folder / "bundle", folder / "runs", steps=2, device="cpu", seed=3)
    small = Recipe(
        batch=4,
        channels=(8,) * 6,
        encoder_channels=(8,) * 5,
        discriminator_channels=(8,) * 6,
        draft_size=16,
        sampled=8,
        validation_faces=4,
    )
    generator_recipe.train(options, small)
    return options


def test_only_the_mapping_changes(place: RunOptions, tmp_path: Path) -> None:
    before = Bundle.open(place.bundle).tensors("generator")
    recipe_module.train(replace(place, runs=tmp_path / "whole", steps=None), TINY)
    whole = Bundle.open(place.bundle)
    for key, tensor in whole.tensors("generator").items():
        if not key.startswith("mapping"):
            torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)
    moved = whole.tensors("generator")["mapping.layers.0.weight"]
    assert not torch.equal(moved, before["mapping.layers.0.weight"])
    made = whole.provenance("generator")
    assert (made["images"], made["mapping"]["steps"]) == (8, 4)


def test_a_stopped_run_resumes_exactly(place: RunOptions, tmp_path: Path) -> None:
    start = {path.name: path.read_bytes() for path in place.bundle.iterdir()}
    states = []
    for name, calls in (("parts", (2, 2)), ("whole", (4,))):
        bundle = tmp_path / name / "bundle"
        bundle.mkdir(parents=True)
        for file, data in start.items():
            (bundle / file).write_bytes(data)
        options = replace(place, bundle=bundle, runs=tmp_path / name)
        for steps in calls:
            recipe_module.train(replace(options, steps=steps), TINY)
        states.append(torch.load(tmp_path / name / "mapping" / "state.pt", weights_only=True))
    for part in ("mapping", "smooth", "critic", "picture_critic"):
        for key, tensor in states[0][part].items():
            torch.testing.assert_close(tensor, states[1][part][key], rtol=0, atol=0)


def test_another_encoder_is_refused(place: RunOptions, tmp_path: Path) -> None:
    options = replace(place, runs=tmp_path, steps=1)
    recipe_module.train(options, TINY)
    path = tmp_path / "mapping" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "encoder": "another"}, path)
    with pytest.raises(InvalidRequest, match="another inversion encoder"):
        recipe_module.train(options, TINY)


@pytest.fixture(scope="module")
def generator() -> Generator:
    """16 numbers to 32 px, with a draft of 16 px."""
    torch.manual_seed(0)
    return Generator(GeneratorConfig(32, 16, 16, 4, (8,) * 4, draft_size=16)).requires_grad_(False)


def crowd(draws: torch.Generator) -> Tensor:
    """256 codes about four points of the sphere."""
    centres = torch.randn(4, 16, generator=draws)
    return to_sphere(centres.repeat(64, 1) + 0.2 * torch.randn(256, 16, generator=draws))


def test_a_law_is_learned(place: RunOptions, generator: Generator) -> None:
    """By the critic of codes alone: the distance to four points falls to a third."""
    draws = torch.Generator().manual_seed(0)
    codes, scale = crowd(draws), torch.ones(16)
    recipe = replace(
        TINY, pictures_from=150, batch=64, rate=1e-3, critic_rate=2e-3, critic_width=32
    )
    look = looking(generator, SqueezeFeatures(place.data), recipe.side)
    mapping = deepcopy(generator.mapping).requires_grad_(True)
    learners = Learners.of(mapping, scale, look, recipe)
    first = score(mapping, codes, scale, 256)
    for number in range(150):
        recipe_module.step(learners, codes, look, recipe, number, draws)
    assert score(mapping, codes, scale, 256) < first / 3


def test_the_critic_of_pictures_teaches_alone(place: RunOptions, generator: Generator) -> None:
    """With the other critic blind and no anchor, drafts still come nearer to those of the codes."""
    draws = torch.Generator().manual_seed(0)
    codes, scale = crowd(draws), torch.ones(16)
    recipe = replace(
        TINY, pictures_from=0, batch=32, drawn=32, rate=1e-3, critic_rate=2e-3, head_width=16
    )
    recipe = replace(recipe, energy=0.0)
    look = looking(generator, SqueezeFeatures(place.data), recipe.side)
    mapping = deepcopy(generator.mapping).requires_grad_(True)
    learners = Learners.of(mapping, scale, look, recipe)
    for parameter in learners.critic.out.parameters():
        parameter.requires_grad_(False).zero_()
    first = score(mapping, codes, scale, 256)
    for number in range(60):
        recipe_module.step(learners, codes, look, recipe, number, draws)
    assert score(mapping, codes, scale, 256) < 0.7 * first


def test_the_spread_is_set(generator: Generator) -> None:
    """Number for number as in the codes; the two strongest are narrower."""
    codes = crowd(torch.Generator().manual_seed(0))
    mapping, scale = deepcopy(generator.mapping), torch.ones(16)
    scale[3] = scale[5] = 2.0
    with torch.no_grad():
        next(mapping.layers[-1].parameters())[3] *= 4
        calibrate(mapping, codes, scale, replace(TINY, narrow=0.5))
        spread = mapping(torch.randn(4_000, 16)).std(0)
    share = torch.ones(16)
    share[[3, 5]] = 0.5
    torch.testing.assert_close(spread, share * codes.std(0), rtol=0.15, atol=0)


@pytest.mark.parametrize("draft_size", [0, 16])
def test_what_is_looked_at_follows_the_latent(place: RunOptions, draft_size: int) -> None:
    """Four layers of features, which pass gradients on, with and without a draft."""
    config = GeneratorConfig(32, 16, 16, 1, (8,) * 4, draft_size=draft_size)
    look = looking(Generator(config).requires_grad_(False), SqueezeFeatures(place.data), 64)
    w = to_sphere(torch.randn(2, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    features = look(w, torch.Generator().manual_seed(1))
    assert [found.shape[1] for found in features] == [64, 128, 256, 512]
    again = look(w.detach(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(features[0].detach(), again[0], rtol=0, atol=0)
    (slope,) = torch.autograd.grad(features[0].sum(), w)
    assert bool((slope.abs().sum(1) > 0).all())
    other = look(w.detach().flip(0), torch.Generator().manual_seed(1))
    assert not torch.equal(again[0], other[0])
