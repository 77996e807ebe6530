"""The attribute predictor: its ordered logits against closed forms, its shapes, its annotations."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.bundle import Bundle, default_folder, write_net
from shared.errors import InvalidRequest
from transmitter.predictor import (
    Predictor,
    PredictorConfig,
    expected_degree,
    read_celeba_dialog,
)

TINY = PredictorConfig(
    resolution=32, widths=(4, 6, 8), depths=(0, 1, 0), auxiliary=("Male", "Young"), batch_norm=True
)


def tiny(seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    return Predictor(TINY)


def faces(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


def test_logits_are_the_ordered_logit_model() -> None:
    """P(degree = k) = sigmoid(s - c_k) - sigmoid(s - c_{k+1}), with c_0 = -inf and c_6 = inf."""
    net = tiny()
    net.cuts.copy_(torch.tensor([-2.0, -0.5, 0.7, 1.5, 4.0]).repeat(5, 1))
    scores = torch.linspace(-6, 8, 35).reshape(7, 5)
    at_least = torch.sigmoid(scores[..., None].double() - net.cuts.double())  # [7, 5, 5]
    one, zero = torch.ones(7, 5, 1, dtype=torch.float64), torch.zeros(7, 5, 1, dtype=torch.float64)
    expected = torch.cat([one, at_least], -1) - torch.cat([at_least, zero], -1)
    torch.testing.assert_close(
        net.score_logits(scores).exp(), expected.float(), atol=1e-6, rtol=1e-4
    )


def test_logits_are_finite_and_pull_even_far_away() -> None:
    net = tiny()
    scores = torch.tensor([[-300.0, -40.0, 0.0, 40.0, 300.0]], requires_grad=True)
    logits = net.score_logits(scores)
    assert torch.isfinite(logits).all()
    (gradient,) = torch.autograd.grad(logits[0, :, 3].sum(), scores)
    assert gradient[0, 0] > 0.9  # far below degree 3: up
    assert gradient[0, 4] < -0.9  # far above: down


def test_degrees_are_intervals_and_the_mean_degree_rises_with_the_score() -> None:
    net = tiny()
    net.cuts.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).repeat(5, 1))
    scores = torch.tensor([-0.1, 0.0, 1.5, 3.9, 4.0])
    assert net.score_degrees(scores.expand(1, 5)).tolist() == [[0, 1, 2, 4, 5]]
    rising = torch.linspace(-9, 12, 200)[:, None].expand(200, 5)
    mean = expected_degree(net.score_logits(rising))
    assert (mean.diff(dim=0) > 0).all()
    assert 0 <= float(mean.min()) <= float(mean.max()) <= 5


def test_steady_scores_do_not_tell_left_from_right() -> None:
    net, image = tiny().eval(), faces(3)
    steady = net.steady_scores(image)
    assert steady.shape == (3, 5)
    torch.testing.assert_close(net.steady_scores(image.flip(3)), steady)
    torch.testing.assert_close(steady, (net.scores(image) + net.scores(image.flip(3))) / 2)
    assert not torch.allclose(net.scores(image), net.scores(image.flip(3)))


def test_shapes_gradients_and_resolution() -> None:
    net = tiny().eval()
    image = faces(2).requires_grad_(True)
    logits = net(image)
    assert logits.shape == (2, 5, 6)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 5))
    assert net.degrees(image).shape == (2, 5)
    assert net.degrees(image).dtype == torch.int64
    assert [tuple(f.shape) for f in net.features(image)] == [
        (2, 4, 16, 16),
        (2, 6, 8, 8),
        (2, 8, 4, 4),
    ]
    (gradient,) = torch.autograd.grad(net.expected_degrees(image).sum(), image)
    assert gradient.abs().sum() > 0
    assert net(faces(1, side=64)).shape == (1, 5, 6)  # a larger picture is judged at 32 px
    with pytest.raises(ValueError, match=r"image must be \[B, 3, 32, 32\], got \[2, 1, 32, 32\]"):
        net(faces(2)[:, :1])


def test_perceptual_distance_is_a_distance() -> None:
    net = tiny().eval()
    a = faces(3)
    near, far = (a + 0.02).clamp(-1, 1), -a
    assert net.perceptual(a, a).abs().max() < 1e-6
    torch.testing.assert_close(net.perceptual(a, near), net.perceptual(near, a))
    assert (net.perceptual(a, near) < net.perceptual(a, far)).all()


def test_folding_changes_nothing() -> None:
    net = tiny()
    for _ in range(3):  # let the running statistics move away from their start
        net(faces(8))
    net.eval()
    folded = net.fold()
    assert not any(p.requires_grad for p in folded.parameters())
    torch.testing.assert_close(folded(faces(4)), net(faces(4)), atol=1e-4, rtol=1e-4)


def test_predictor_comes_back_from_a_bundle(tmp_path: Path) -> None:
    folded = tiny().eval().fold()
    write_net(
        tmp_path,
        "judge",
        config={**folded.config.to_json(), "degrees": "toy"},
        tensors=folded.state_dict(),
        provenance={},
        half=False,
    )
    loaded = Predictor.from_bundle(Bundle.open(tmp_path), "judge")
    torch.testing.assert_close(loaded(faces(2)), folded(faces(2)))


def test_config_names_both_numbers() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        PredictorConfig(widths=(4, 4), depths=(0,))
    with pytest.raises(ValueError, match="multiple of 8, got 36"):
        PredictorConfig(resolution=36, widths=(4, 4, 4), depths=(0, 0, 0))


def test_celeba_dialog_annotation_is_read(tmp_path: Path) -> None:
    path = tmp_path / "annotation.txt"
    path.write_text("000001.jpg 0 1 2 3 4\n000002.jpg 5 4 3 2 1\n")
    assert read_celeba_dialog(path) == {"000001": (0, 1, 2, 3, 4), "000002": (5, 4, 3, 2, 1)}
    path.write_text("2\nname,Young,Smiling,No_Beard,Eyeglasses,Bangs\n000001.png,4,3,2,1,0\n")
    assert read_celeba_dialog(path) == {"000001": (0, 1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no annotation"),
        ("a.jpg 0 1 2 3 6\n", "line 1"),
        ("a.jpg 0 1 2 3 4\nb.jpg 0 1\n", "line 2"),
        ("name Bangs Smiling\n", "expected the attributes"),
    ],
)
def test_broken_annotations_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "annotation.txt"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_celeba_dialog(path)


def test_shipped_predictor_is_small_and_ordered() -> None:
    try:
        bundle = Bundle.open(default_folder())
    except Exception as error:
        pytest.skip(f"no bundle to look at: {error}")
    if not bundle.has("predictor"):
        pytest.skip("the bundle has no predictor yet")
    net = Predictor.from_bundle(bundle)
    assert sum(p.numel() for p in net.parameters()) < 3_000_000
    assert (net.cuts.diff(dim=1) > 0.5).all()
    image = faces(1, side=128)
    with torch.no_grad():
        net(image)
        begin = time.perf_counter()
        net(image)
    assert time.perf_counter() - begin < 0.5  # milliseconds, unless something is very wrong
