"""The recipe of the learned codec on fake data: it runs, it resumes exactly, it starts well."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines.deepsc import NET, Deepsc, DeepscConfig, PatchCode
from shared.bundle import Bundle
from shared.symbols import average_power
from training.data import make_fake_data
from training.deepsc import DeepscRecipe, linear_error, over_awgn, patch_variance, score, train
from training.run import RunOptions

SIZE = 32
RECIPE = DeepscRecipe(
    config=DeepscConfig(wide=16, narrow=8, blocks=1),
    length=4,
    batch=4,
    warm_up=1,
    held_out=4,
    report_minutes=0.0,
)


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    data = make_fake_data(tmp_path / "data", count=12, size=SIZE)
    return RunOptions(data=data, bundle=tmp_path / "bundle", runs=tmp_path / "runs", device="cpu")


def test_two_steps_of_the_codec_write_a_net_that_loads(options: RunOptions) -> None:
    train(replace(options, steps=2), RECIPE)
    bundle = Bundle.open(options.bundle)
    net = Deepsc.from_bundle(bundle)
    assert net.config == RECIPE.config
    assert bundle.provenance(NET)["steps"] == 2
    assert bundle.provenance(NET)["psnr_db"].keys() == {"closed form", "trained"}
    x = net.encode(torch.zeros(1, 3, SIZE, SIZE), 6.0)
    assert average_power(x) == pytest.approx(1.0)
    run = options.runs / NET
    assert (run / "log.jsonl").is_file()
    assert list(run.glob("sheet-*.png"))


def test_resuming_the_codec_is_the_same_as_never_stopping(options: RunOptions) -> None:
    train(replace(options, runs=options.runs / "whole"), RECIPE)
    whole = Bundle.open(options.bundle).tensors(NET)
    for _ in range(2):
        train(replace(options, runs=options.runs / "halves", steps=2), RECIPE)
    halves = Bundle.open(options.bundle).tensors(NET)
    assert Bundle.open(options.bundle).provenance(NET)["steps"] == 4
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), name


def test_the_seed_decides_the_codec(options: RunOptions) -> None:
    nets = []
    for seed in (0, 0, 1):
        train(replace(options, steps=1, seed=seed, fresh=True), RECIPE)
        nets.append(Bundle.open(options.bundle).tensors(NET)["encoder.stem.weight"])
    assert torch.equal(nets[0], nets[1])
    assert not torch.equal(nets[0], nets[2])


def test_what_linear_coding_leaves_is_what_it_leaves(generator: torch.Generator) -> None:
    """The closed form's own error over AWGN, for patches that are what it was made for."""
    pictures = torch.randn(64, 3, SIZE, SIZE, generator=generator) * 0.3
    weights = torch.linspace(1, 0.05, 16)
    basis = torch.linalg.qr(torch.randn(192, 16, generator=generator))[0].T  # [16, 192]
    white = torch.randn(64, 16, 4, 4, generator=generator) * weights[:, None, None]
    pictures = torch.nn.functional.conv_transpose2d(white, basis.reshape(16, 3, 8, 8), stride=8)
    code = PatchCode.fit(pictures, 16)
    net = Deepsc(RECIPE.config, code)
    net.offset.data.zero_()
    total = patch_variance(pictures, code.mean)
    for snr_db in (0.0, 12.0):
        snrs = torch.tensor([snr_db])
        expected = float(linear_error(net, total, snrs, snrs))
        with torch.no_grad():
            decoded = over_unclamped(net, pictures, snr_db)
        found = 192 * float((decoded - pictures).square().mean())
        # The power constraint scales every message a little, which the closed form does not know.
        assert found == pytest.approx(expected, rel=0.15)


def over_unclamped(net: Deepsc, pictures: torch.Tensor, snr_db: float) -> torch.Tensor:
    draws = torch.Generator().manual_seed(2)
    x = net.encode(pictures, snr_db)
    noise = 10 ** (-snr_db / 10)
    pairs = torch.randn(*x.shape, 2, generator=draws) * (noise / 2) ** 0.5
    return net.decode(x + torch.view_as_complex(pairs), snr_db, snr_db, pictures.shape[3])


def test_scores_of_the_codec_repeat_and_rise_with_the_snr(options: RunOptions) -> None:
    pictures = torch.nn.functional.interpolate(
        torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.4, SIZE
    )
    net = Deepsc(RECIPE.config, PatchCode.fit(pictures, 16))
    found = score(net, pictures)
    assert found == score(net, pictures)
    assert list(found.values()) == sorted(found.values())
    assert over_awgn(net, pictures, 6.0).abs().max() <= 1
