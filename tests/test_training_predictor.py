"""Recipes of predictor, fields and regressor: evidence, cuts, made-up data, exact resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.adapters import Adapters
from shared.bundle import Bundle, write_net
from shared.errors import InvalidRequest
from shared.stylegan2 import Generator, GeneratorConfig, to_sphere
from training import fields as fields_recipe
from training import opinions as opinions_recipe
from training import predictor as predictor_recipe
from training import regressor as regressor_recipe
from training.augment import Augmentation, augment, erase
from training.data import CELEBA_LABELS, make_fake_data
from training.degrees import LEVELS, MIN_GAP, auc, cut_points, levels
from training.fields import FieldsRecipe
from training.opinions import MEMBERS
from training.predictor import JUDGE_RECIPE, PredictorRecipe, ordered_pairs
from training.regressor import RegressorRecipe, Walked, fit
from training.run import RunOptions
from transmitter.fields import Fields
from transmitter.inversion import InversionConfig, InversionEncoder
from transmitter.opinions import OPINIONS, Opinions
from transmitter.predictor import Predictor, PredictorConfig
from transmitter.regressor import Regressor

P_RECIPE = PredictorRecipe(length=4, batch=3, report_steps=2, calibration_faces=4)
F_RECIPE = FieldsRecipe(
    length=4, depth=2, walks=(1,) * 5, codes=10, report_steps=2, validation_faces=1
)
R_RECIPE = RegressorRecipe(length=4, faces=2, walks=2, width=8, fit_steps=3, fit_batch=4)


def test_levels_order_the_evidence() -> None:
    rows: list[tuple[set[str], list[int]]] = [
        ({"No_Beard", "Young"}, [0, 0, 0, 0, 0]),
        ({"Bangs", "Eyeglasses", "No_Beard", "Young", "Smiling"}, [1, 1, 0, 1, 0]),
        ({"5_o_Clock_Shadow", "Young", "High_Cheekbones"}, [0, 0, 1, 0, 0]),
        ({"Goatee", "Young", "Bags_Under_Eyes", "Smiling", "Mouth_Slightly_Open"}, [0, 0, 2, 2, 1]),
        ({"Goatee", "Mustache"}, [0, 0, 3, 0, 2]),
        ({"Goatee", "Mustache", "Sideburns", "Gray_Hair", "Bald"}, [0, 0, 4, 0, 4]),
        ({"No_Beard", "Double_Chin"}, [0, 0, 0, 0, 3]),
        (
            {"No_Beard", "Young", "Smiling", "Mouth_Slightly_Open", "High_Cheekbones"},
            [0, 0, 0, 3, 0],
        ),
    ]
    got = levels(lambda name: torch.tensor([name in yes for yes, _ in rows]))
    assert got.tolist() == [want for _, want in rows]
    assert (got <= torch.tensor(LEVELS)).all()


def test_cut_points_are_quantiles_and_keep_apart() -> None:
    scores = torch.linspace(-50, 50, 1001)[:, None].expand(1001, 5)
    cuts = cut_points(scores, torch.zeros(5))
    # bangs: degree 1 from the learnt threshold, the rest at quantiles of the positive scores.
    expected = torch.tensor([0.0, 10.08, 21.06, 32.04, 42.52])
    torch.testing.assert_close(cuts[0], expected, atol=0.05, rtol=0)
    # age: quantiles of everybody.
    expected = torch.tensor([-44.0, -30.0, 12.0, 30.0, 43.0])
    torch.testing.assert_close(cuts[4], expected, atol=0.05, rtol=0)
    crowded = cut_points(scores / 1000, torch.zeros(5))
    assert (crowded.diff(dim=1) >= MIN_GAP - 1e-5).all()
    # bangs keep their learnt threshold, age the middle of its quantiles.
    torch.testing.assert_close(crowded[0], MIN_GAP * torch.arange(5.0), atol=0.02, rtol=0)
    torch.testing.assert_close(
        crowded[4], MIN_GAP * torch.arange(-2.0, 3.0) + 0.012, atol=1e-3, rtol=0
    )


def test_auc_and_ordered_pairs_by_hand() -> None:
    score = torch.tensor([0.1, 0.4, 0.4, 0.9])
    assert auc(score, torch.tensor([False, False, True, True])) == pytest.approx(3.5 / 4)
    assert auc(score, torch.tensor([False] * 4)) != auc(score, torch.tensor([False] * 4))  # nan
    assert ordered_pairs(score, torch.tensor([0, 1, 2, 2])) == pytest.approx(4 / 5)


def test_augmentation_is_repeatable_and_differentiable() -> None:
    image = (torch.rand(6, 3, 32, 32) * 2 - 1).requires_grad_(True)
    first = augment(image, torch.Generator().manual_seed(3))
    again = augment(image, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert first.shape == image.shape
    (gradient,) = torch.autograd.grad(first.square().sum(), image)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


def test_erasing_hides_one_rectangle_in_about_half_of_the_pictures() -> None:
    image = torch.ones(400, 3, 20, 20)
    seen = erase(image, torch.Generator().manual_seed(0), 0.4)
    hidden = seen[:, 0] == 0
    some = hidden.any(2).any(1)
    assert 0.4 < float(some.float().mean()) < 0.6
    # A rectangle is the outer product of its rows and columns.
    rectangle = hidden.any(2)[:, :, None] & hidden.any(1)[:, None]
    assert torch.equal(hidden, rectangle)
    assert float(hidden.float().mean((1, 2)).max()) <= 0.45**2
    assert bool((seen[~some] == 1).all())


def test_augmentations_differ_by_their_numbers() -> None:
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    still = Augmentation(shift=0, turn_deg=0, zoom=0, colour=0, noise=0)
    seen = still(image[:1], torch.Generator().manual_seed(1))
    nearest = min(float((seen - other).abs().max()) for other in (image[:1], image[:1].flip(3)))
    assert nearest < 1e-3
    first = Augmentation()(image, torch.Generator().manual_seed(2))
    assert torch.equal(first, augment(image, torch.Generator().manual_seed(2)))


def _options(folder: Path, name: str, steps: int | None) -> RunOptions:
    return RunOptions(
        data=folder / "data",
        bundle=folder / f"bundle-{name}",
        runs=folder / f"runs-{name}",
        steps=steps,
        device="cpu",
        seed=5,
    )


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_predictor_recipe_resumes_exactly(tmp_path: Path) -> None:
    make_fake_data(tmp_path / "data", 6)
    predictor_recipe.train(_options(tmp_path, "whole", 4), recipe=P_RECIPE)
    for _ in range(2):
        predictor_recipe.train(_options(tmp_path, "halves", 2), recipe=P_RECIPE)
    whole = Bundle.open(tmp_path / "bundle-whole")
    halves = Bundle.open(tmp_path / "bundle-halves")
    assert _same(whole.tensors("predictor"), halves.tensors("predictor"))
    assert halves.provenance("predictor")["steps"] == 4
    net = Predictor.from_bundle(halves)
    assert (net.cuts.diff(dim=1) > 0).all()
    assert net.degrees(torch.zeros(1, 3, 128, 128)).shape == (1, 5)


def test_a_judge_is_the_same_recipe_under_another_name_with_true_degrees(tmp_path: Path) -> None:
    make_fake_data(tmp_path / "data", 3)
    names = [f"{split}{i:04d}" for split in ("train", "val", "test") for i in range(3)]
    lines = [f"{name}.jpg {i % 6} 1 2 3 {5 - i % 6}" for i, name in enumerate(names)]
    folder = tmp_path / "data" / "celeba128"
    (folder / predictor_recipe.DIALOG_FILE).write_text("\n".join(lines))
    predictor_recipe.train(_options(tmp_path, "judge", 1), net="judge", recipe=P_RECIPE)
    bundle = Bundle.open(tmp_path / "bundle-judge")
    assert bundle.nets == ("judge",)
    assert "CelebA-Dialog" in bundle.config("judge")["degrees"]


def test_judge_is_another_net_from_another_start(tmp_path: Path) -> None:
    make_fake_data(tmp_path / "data", 6)
    small = replace(
        JUDGE_RECIPE, length=2, batch=3, widths=(8, 8, 8, 8), depths=(0, 0, 0, 0), report_steps=1
    )
    predictor_recipe.train_judge(_options(tmp_path, "second", 2), recipe=small)
    bundle = Bundle.open(tmp_path / "bundle-second")
    assert bundle.nets == ("judge",)
    assert bundle.provenance("judge")["seed"] == 5 + predictor_recipe.JUDGE_SEED
    judge = Predictor.from_bundle(bundle, "judge")
    assert judge(torch.zeros(1, 3, 128, 128)).shape == (1, 5, 6)


def test_recut_moves_the_cuts_and_nothing_else(tmp_path: Path) -> None:
    make_fake_data(tmp_path / "data", 6)
    options = _options(tmp_path, "recut", 1)
    predictor_recipe.train(options, recipe=P_RECIPE)
    before = Bundle.open(options.bundle)
    old = before.tensors("predictor")
    scattered = {**old, "cuts": old["cuts"][:, :1] + torch.arange(5.0) / 10}
    write_net(
        options.bundle,
        "predictor",
        config={**before.config("predictor"), "min_gap": 0.1},
        tensors=scattered,
        provenance=before.provenance("predictor"),
    )
    predictor_recipe.recut(options, recipe=P_RECIPE)
    after = Bundle.open(options.bundle)
    new = after.tensors("predictor")
    assert after.config("predictor") == before.config("predictor")
    assert "recut_at" in after.provenance("predictor")
    torch.testing.assert_close(new["cuts"], old["cuts"], atol=0.02, rtol=1e-3)
    assert all(torch.equal(new[key], old[key]) for key in old if key != "cuts")


def test_judge_of_full_size_takes_three_megabytes() -> None:
    shapes = PredictorConfig(
        JUDGE_RECIPE.resolution, JUDGE_RECIPE.widths, JUDGE_RECIPE.depths, CELEBA_LABELS
    )
    count = sum(p.numel() for p in Predictor(shapes).parameters())
    assert 2 * count < 3e6
    shipped = PredictorRecipe()
    assert JUDGE_RECIPE.augmentation != shipped.augmentation
    assert len(JUDGE_RECIPE.widths) != len(shipped.widths)


@pytest.fixture
def bundle_of_tiny_nets(tmp_path: Path) -> Path:
    """A bundle with small random nets in place of the generator, the inversion encoder and P."""
    torch.manual_seed(1)
    make_fake_data(tmp_path / "data", 6)
    predictor_recipe.train(_options(tmp_path, "fields", 1), recipe=P_RECIPE)
    folder = tmp_path / "bundle-fields"
    generator = Generator(GeneratorConfig(channels=(16, 16, 8, 8, 4, 4), mapping_layers=1))
    encoder = InversionEncoder(InversionConfig(channels=(8, 8, 8, 8, 8)))
    for net, module, config in (
        ("generator", generator, generator.config.to_json()),
        ("inversion", encoder, encoder.config.to_json()),
    ):
        write_net(folder, net, config=config, tensors=module.state_dict(), provenance={})
    return folder


def test_fields_recipe_resumes_exactly(tmp_path: Path, bundle_of_tiny_nets: Path) -> None:
    options = _options(tmp_path, "fields", 4)
    fields_recipe.train(options, recipe=F_RECIPE)
    whole = Bundle.open(bundle_of_tiny_nets).tensors("fields")
    halves = replace(options, runs=tmp_path / "runs-other", steps=2)
    for _ in range(2):
        fields_recipe.train(halves, recipe=F_RECIPE)
    assert _same(whole, Bundle.open(bundle_of_tiny_nets).tensors("fields"))
    loaded = Fields.from_bundle(Bundle.open(bundle_of_tiny_nets))
    w = to_sphere(torch.randn(2, 512, generator=torch.Generator().manual_seed(0)))
    assert loaded(w).shape == (2, 5, 512)
    assert len(loaded.config.slopes) == 5


def test_opinions_are_nets_of_the_bundle(tmp_path: Path, bundle_of_tiny_nets: Path) -> None:
    options = _options(tmp_path, "fields", 4)
    small = {net: replace(each, recipe=P_RECIPE) for net, each in MEMBERS.items()}
    opinions_recipe.train(options, members=small)
    bundle = Bundle.open(bundle_of_tiny_nets)
    assert not _same(bundle.tensors(OPINIONS[0]), bundle.tensors(OPINIONS[1]))
    assert len(Opinions.from_bundle(bundle).members) == 3
    for net, member in MEMBERS.items():
        assert bundle.provenance(net)["seed"] == options.seed + member.seed
    fields_recipe.train(replace(options, steps=1), recipe=F_RECIPE)  # against all three


def test_opinions_are_built_like_neither_of_the_others() -> None:
    """What guides a walk together with a net like the judge would be judged by its like."""
    trunks = [PredictorRecipe(), JUDGE_RECIPE, *(each.recipe for each in MEMBERS.values())]
    for what in ("resolution", "widths", "augmentation"):
        assert len({str(getattr(each, what)) for each in trunks}) == len(trunks)
    seeds = [0, predictor_recipe.JUDGE_SEED, *(each.seed for each in MEMBERS.values())]
    assert len(set(seeds)) == len(seeds)


def test_walks_aim_at_the_middle_of_the_degree() -> None:
    cuts = torch.tensor([[0.0, 2.0, 4.0, 7.0, 8.0]]).expand(6, 5)
    aims = fields_recipe.aims(cuts, torch.arange(6))
    assert aims.tolist() == [-1.5, 1.0, 3.0, 5.5, 7.5, 9.5]


def test_fields_of_other_nets_are_not_resumed(tmp_path: Path, bundle_of_tiny_nets: Path) -> None:
    options = _options(tmp_path, "fields", 1)
    fields_recipe.train(options, recipe=F_RECIPE)
    generator = Generator(GeneratorConfig(channels=(16, 16, 8, 8, 4, 4), mapping_layers=1))
    write_net(
        bundle_of_tiny_nets,
        "generator",
        config=generator.config.to_json(),
        tensors=generator.state_dict(),
        provenance={},
    )
    with pytest.raises(InvalidRequest, match="--fresh"):
        fields_recipe.train(options, recipe=F_RECIPE)
    fields_recipe.train(replace(options, fresh=True), recipe=F_RECIPE)


def test_fields_need_the_nets_they_edit(tmp_path: Path) -> None:
    make_fake_data(tmp_path / "data", 3)
    predictor_recipe.train(_options(tmp_path, "bare", 1), recipe=P_RECIPE)
    with pytest.raises(InvalidRequest, match="generator"):
        fields_recipe.train(_options(tmp_path, "bare", 1), recipe=F_RECIPE)


def test_a_regressor_learns_what_can_be_learned() -> None:
    """Scores that are linear in the latent are foreseen, and how well is told on unseen walks."""
    draw = torch.Generator().manual_seed(5)
    w, w_hat = torch.randn(2, 1200, 16, generator=draw)
    law = torch.randn(16, 5, generator=draw)
    attribute = torch.randint(5, (1200,), generator=draw)
    walked = Walked(w, w_hat, attribute, w @ law, w_hat @ law)
    recipe = replace(R_RECIPE, faces=4, walks=3, width=16, fit_steps=600, fit_batch=128, rate=1e-2)
    net, unseen = fit(walked, recipe, torch.Generator().manual_seed(1))
    for wrong, moves in zip(unseen["wrong_by"], unseen["moves_by"], strict=True):
        assert 0 < wrong < 0.1 * moves
    blind, nothing = fit(walked, replace(recipe, fit_steps=0), torch.Generator().manual_seed(1))
    assert min(nothing["wrong_by"]) > 0.5 * min(nothing["moves_by"])
    assert not _same(dict(net.state_dict()), dict(blind.state_dict()))
    with pytest.raises(InvalidRequest, match="12 walks"):
        fit(walked[torch.arange(12)], recipe, torch.Generator())


def test_regressor_recipe_resumes_exactly(tmp_path: Path, bundle_of_tiny_nets: Path) -> None:
    options = _options(tmp_path, "fields", 4)
    fields_recipe.train(options, recipe=F_RECIPE)
    regressor_recipe.train(options, recipe=R_RECIPE)
    whole = Bundle.open(bundle_of_tiny_nets).tensors("regressor")
    halves = replace(options, runs=tmp_path / "runs-other", steps=2)
    regressor_recipe.train(halves, recipe=R_RECIPE)
    assert not _same(whole, Bundle.open(bundle_of_tiny_nets).tensors("regressor"))
    regressor_recipe.train(halves, recipe=R_RECIPE)
    assert _same(whole, Bundle.open(bundle_of_tiny_nets).tensors("regressor"))
    loaded = Regressor.from_bundle(Bundle.open(bundle_of_tiny_nets))
    assert loaded is not None
    assert loaded(torch.randn(3, 512, generator=torch.Generator().manual_seed(0))).shape == (3, 5)


def test_a_regressor_of_other_nets_is_not_resumed(
    tmp_path: Path, bundle_of_tiny_nets: Path
) -> None:
    options = _options(tmp_path, "fields", 1)
    with pytest.raises(InvalidRequest, match="needs 'fields'"):
        regressor_recipe.train(options, recipe=R_RECIPE)
    fields_recipe.train(options, recipe=F_RECIPE)
    regressor_recipe.train(options, recipe=R_RECIPE)
    assert not Bundle.open(bundle_of_tiny_nets).has("regressor")  # one batch: nothing to learn of
    for changed in ("fields", "adapters"):
        if changed == "fields":
            fields_recipe.train(replace(options, seed=1, fresh=True), recipe=F_RECIPE)
        else:
            code = Adapters()
            write_net(
                bundle_of_tiny_nets,
                "adapters",
                config=code.config.to_json(),
                tensors=code.state_dict(),
                provenance={},
            )
        with pytest.raises(InvalidRequest, match="--fresh"):
            regressor_recipe.train(options, recipe=R_RECIPE)
        regressor_recipe.train(replace(options, fresh=True), recipe=R_RECIPE)
