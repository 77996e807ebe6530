"""The mapping recipe: a bundle gets it, a stopped run resumes exactly, and it learns a law."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.bundle import Bundle
from shared.errors import InvalidRequest
from shared.stylegan2 import GeneratorConfig, Mapping, to_sphere
from training import generator as generator_recipe
from training import mapping as recipe_module
from training.data import make_fake_data
from training.generator import Recipe
from training.mapping import Critic, MappingRecipe, score
from training.run import RunOptions
from training.teachers import make_fake_teachers

TINY = MappingRecipe(length=4, batch=8, critic_width=16, critic_layers=1, r1_every=2)


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
    for part in ("mapping", "smooth", "critic"):
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


def test_a_law_is_learned() -> None:
    """Codes about four points of the sphere: the distance to them falls to a third."""
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=draws)
    codes = to_sphere(centres.repeat(64, 1) + 0.2 * torch.randn(256, 16, generator=draws))
    torch.manual_seed(0)
    mapping = Mapping(GeneratorConfig(32, 16, 16, 4, (8,) * 4))
    scale = torch.ones(16)
    critic = Critic(scale, 32, 2)
    recipe = replace(TINY, batch=64, rate=1e-3, critic_rate=2e-3)
    optimisers = (
        torch.optim.Adam(mapping.parameters(), recipe.rate, (0.0, 0.99)),
        torch.optim.Adam(critic.parameters(), recipe.critic_rate, (0.0, 0.99)),
    )
    first = score(mapping, codes, scale, 256)
    for number in range(150):
        recipe_module.step(mapping, critic, *optimisers, codes, recipe, number, draws)
    assert score(mapping, codes, scale, 256) < first / 3
