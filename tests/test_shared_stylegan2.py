"""The generator against slow, literal versions of the paper's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import InvalidRequest
from shared.stylegan2 import (
    Discriminator,
    Generator,
    GeneratorConfig,
    ModulatedConv,
    _double,
    default_channels,
    to_sphere,
)


def small(image_size: int = 32, **changes: object) -> Generator:
    torch.manual_seed(0)
    count = image_size.bit_length() - 2
    config = GeneratorConfig(image_size, 16, 16, 2, (8,) * count, **changes)  # type: ignore[arg-type]
    return Generator(config).eval()


def per_sample(conv: ModulatedConv, w: Tensor) -> Tensor:
    """Weights scaled per sample and demodulated: Eqs. 1 to 3 of the StyleGAN2 paper, literally."""
    style = conv.style(w)
    weight: Tensor = conv.weight[None] * style[:, None, :, None, None]
    demodulated: Tensor = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    return demodulated


@pytest.mark.parametrize("up", [False, True])
def test_modulating_activations_equals_modulating_weights(up: bool) -> None:
    torch.manual_seed(1)
    conv, x, w = ModulatedConv(5, 7, 3, 16), torch.randn(4, 5, 8, 8), torch.randn(4, 16)
    weights = per_sample(conv, w)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    fir = (taps[:, None] * taps).expand(7, 1, 4, 4)
    expected = []
    for picture, weight in zip(x, weights, strict=True):
        if up:
            wide = F.conv_transpose2d(picture[None], weight.transpose(0, 1), stride=2)
            expected.append(F.conv2d(wide, fir, padding=1, groups=7))
        else:
            expected.append(F.conv2d(picture[None], weight, padding=1))
    torch.testing.assert_close(conv(x, w, up), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_doubling_is_zero_stuffing_and_the_1331_filter() -> None:
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    stuffed = torch.zeros(2, 3, 10, 12)
    stuffed[:, :, ::2, ::2] = x
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    fir = (taps[:, None] * taps).expand(3, 1, 4, 4)
    expected = F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), fir, groups=3)
    torch.testing.assert_close(_double(x), expected)


def test_doubling_keeps_the_mean_of_a_flat_picture_inside() -> None:
    doubled = _double(torch.ones(1, 3, 8, 8))
    torch.testing.assert_close(doubled[:, :, 2:-2, 2:-2], torch.ones(1, 3, 12, 12))


def test_demodulated_convolution_keeps_unit_variance() -> None:
    torch.manual_seed(3)
    conv = ModulatedConv(64, 64, 3, 16)
    x = torch.randn(8, 64, 24, 24)
    inner = conv(x, 3 * torch.randn(8, 16))[:, :, 2:-2, 2:-2]
    assert float(inner.detach().var()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("image_size", [32, 64, 128, 256, 512, 1024])
def test_every_size_draws_pictures_of_its_size(image_size: int) -> None:
    generator = small(image_size)
    with torch.no_grad():
        image = generator(torch.randn(1, 16))
    assert image.shape == (1, 3, image_size, image_size)
    assert torch.isfinite(image).all()


def test_one_latent_for_all_layers_equals_the_same_latent_for_each() -> None:
    generator = small()
    w = generator.mapping(torch.randn(2, 16))
    ws = w[:, None].repeat(1, generator.config.num_ws, 1)
    torch.testing.assert_close(generator.synthesis(w), generator.synthesis(ws))


def test_latents_lie_on_the_sphere() -> None:
    w = small().mapping(torch.randn(32, 16))
    torch.testing.assert_close(w.norm(dim=1), torch.full((32,), math.sqrt(16)))
    torch.testing.assert_close(to_sphere(5 * w), w)


def test_a_batch_draws_what_its_members_draw_alone() -> None:
    generator = small()
    w = generator.mapping(torch.randn(3, 16))
    alone = torch.cat([generator.synthesis(one[None]) for one in w])
    torch.testing.assert_close(generator.synthesis(w), alone, rtol=1e-4, atol=1e-5)


def test_synthesis_noise_is_part_of_the_weights() -> None:
    generator = small(synthesis_noise=True)
    w = generator.mapping(torch.randn(1, 16))
    before = generator.synthesis(w)
    for layer in generator.synthesis.layers:
        torch.nn.init.ones_(layer.noise_strength)  # type: ignore[arg-type]
    after = generator.synthesis(w)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, generator.synthesis(w))


def test_gradients_reach_every_weight() -> None:
    generator = small()
    generator(torch.randn(4, 16)).square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("draft_size", [4, 16, 32])
def test_a_new_generator_draws_its_draft(draft_size: int) -> None:
    """The layers add nothing until they have learned to: what is drawn is linear in w."""
    generator = small(32, draft_size=draft_size)
    draft = generator.synthesis.draft
    assert draft is not None
    w = to_sphere(torch.randn(3, 16))
    expected = draft.mean + torch.einsum(
        "bd,dchw->bchw", w[:, :-1] * torch.exp(draft.spread * w[:, -1:]), draft.basis
    )
    while expected.shape[-1] < 32:
        expected = _double(expected)
    torch.testing.assert_close(generator.synthesis(w), expected, rtol=1e-4, atol=1e-4)


def test_layers_see_the_draft_and_learn() -> None:
    generator = small(32, draft_size=16)
    for layer in generator.synthesis.to_rgb:
        torch.nn.init.normal_(layer.conv.weight)  # type: ignore[union-attr, arg-type]
    generator(torch.randn(4, 16)).square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("draft_size", [2, 24, 64])
def test_odd_draft_sizes_are_refused_with_the_number(draft_size: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"draft_size {draft_size}.*4\.\.32"):
        GeneratorConfig(32, channels=(8,) * 4, draft_size=draft_size)


def test_discriminator_gives_one_number_a_picture_and_twice_differentiable() -> None:
    torch.manual_seed(4)
    discriminator = Discriminator(32, (8, 8, 8, 8))
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (4,)
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    slope.square().sum().backward()
    assert discriminator.from_rgb.weight.grad is not None


def test_default_channels_follow_the_paper() -> None:
    assert default_channels(1024, 32768, 512) == (512, 512, 512, 512, 512, 256, 128, 64, 32)
    assert default_channels(128, 16384, 512) == (512, 512, 512, 512, 256, 128)


@pytest.mark.parametrize("image_size", [0, 16, 100, 2048])
def test_odd_sizes_are_refused_with_the_number(image_size: int) -> None:
    with pytest.raises(InvalidRequest, match=str(image_size)):
        GeneratorConfig(image_size=image_size)


def test_wrong_latents_are_refused_with_both_shapes() -> None:
    with pytest.raises(InvalidRequest, match=r"\(1, 3, 16\).*\[B, 8, D\]"):
        small().synthesis(torch.randn(1, 3, 16))


@pytest.mark.gpu
def test_cpu_and_cuda_draw_the_same_picture() -> None:
    generator = small(64)
    w = generator.mapping(torch.randn(2, 16))
    on_cpu = generator.synthesis(w)
    on_cuda = generator.cuda().synthesis(w.cuda()).cpu()
    torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-3, atol=1e-3)
