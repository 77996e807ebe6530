"""The learned codec before any training: a closed form, with the right power and bandwidth."""

import pytest
import torch
from torch import Tensor

from baselines.deepsc import NET, Deepsc, DeepscConfig, PatchCode
from shared.adapters import water_fill
from shared.bundle import Bundle, write_net
from shared.errors import BundleError, InvalidRequest
from shared.symbols import average_power, cbr, to_real

SMALL = DeepscConfig(components=16, wide=16, narrow=8, blocks=1)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    """Smooth pictures [6, 3, 32, 32] in [-1, 1]."""
    small = torch.randn(6, 3, 6, 6, generator=generator) * 0.4
    return torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(-1, 1)


def test_4096_reals_for_128_px_are_cbr_one_twelfth() -> None:
    uses = Deepsc().uses(128)
    assert 2 * uses == 4096
    assert cbr(uses, 128, 128).paper == pytest.approx(0.0833, abs=5e-5)
    assert Deepsc().uses(1024) == 64 * uses
    with pytest.raises(InvalidRequest, match="multiple of 8"):
        Deepsc().uses(100)


def test_the_shipped_size_is_at_most_4_mb() -> None:
    assert 2 * sum(tensor.numel() for tensor in Deepsc().state_dict().values()) <= 4e6


@pytest.mark.parametrize("snr_db", [-6.0, 18.0])
def test_every_message_has_unit_power(images: Tensor, snr_db: float) -> None:
    net = Deepsc(SMALL, PatchCode.fit(images, 16))
    with torch.no_grad():
        x = net.encode(images * torch.tensor([0.1, 0.3, 1, 1, 1, 1]).view(-1, 1, 1, 1), snr_db)
    assert x.shape == (6, net.uses(32))
    assert average_power(x).tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    with torch.no_grad():  # a message does not depend on its neighbours
        assert torch.allclose(net.encode(images[2:3], snr_db), x[2:3], atol=1e-5)


def test_components_are_the_eigenvectors_of_the_patches(images: Tensor) -> None:
    code = PatchCode.fit(images, 16)
    flat = code.basis.flatten(1)  # [16, 192]
    assert torch.allclose(flat @ flat.T, torch.eye(16), atol=1e-5)
    patches = (
        (images - code.mean[:, None, None])
        .unfold(2, 8, 8)
        .unfold(3, 8, 8)
        .permute(0, 2, 3, 1, 4, 5)
        .reshape(-1, 192)
    )
    energies = (patches @ flat.T).square().mean(0)
    assert torch.allclose(energies, code.spectrum, rtol=1e-3, atol=1e-6)
    assert code.spectrum.tolist() == sorted(code.spectrum.tolist(), reverse=True)


def test_untrained_and_undisturbed_it_is_the_projection_on_the_components(images: Tensor) -> None:
    """All that noise-free transform coding can do, but for the message's scale."""
    code = PatchCode.fit(images, 16)
    net = Deepsc(SMALL, code)
    centred = images - code.mean[:, None, None]
    components = torch.nn.functional.conv2d(centred, code.basis, stride=8)
    expected = torch.nn.functional.conv_transpose2d(components, code.basis, stride=8)
    with torch.no_grad():
        x = net.encode(images, 40.0)
        decoded = net.decode(x, 80.0, 40.0, 32) - code.mean[:, None, None]
    for got, wanted in zip(decoded, expected, strict=True):
        cosine = torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)
        # The offset is a constant of the message, so its scale shows as a little of component 15.
        assert cosine > 0.98


def test_power_goes_where_water_filling_puts_it(images: Tensor) -> None:
    code = PatchCode.fit(images, 16)
    net = Deepsc(SMALL, code)
    net.offset.data.zero_()
    with torch.no_grad():
        reals = to_real(net.encode(images, 0.0)).unflatten(1, (16, 4, 4))
    found = reals.square().mean((0, 2, 3))
    expected = water_fill(code.spectrum, torch.ones(1))[0]
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.95
    assert float(found[expected == 0].sum()) == pytest.approx(0, abs=1e-6)


def test_it_comes_back_from_a_bundle(tmp_path: object, images: Tensor) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "bundle"
    net = Deepsc(SMALL, PatchCode.fit(images, 16))
    write_net(
        folder, NET, config=SMALL.to_json(), tensors=net.state_dict(), provenance={}, half=False
    )
    again = Deepsc.from_bundle(Bundle.open(folder))
    assert again.config == SMALL
    with torch.no_grad():
        assert torch.equal(again.encode(images, 3.0), net.encode(images, 3.0))
    write_net(folder, "other", config={}, tensors={}, provenance={})
    (folder / "bundle.json").write_text(
        (folder / "bundle.json").read_text().replace(f'"{NET}": {{', '"another": {')
    )
    with pytest.raises(BundleError, match=NET):
        Deepsc.from_bundle(Bundle.open(folder, verify=False))


def test_wrong_shapes_name_both_numbers(images: Tensor) -> None:
    net = Deepsc(SMALL)
    with pytest.raises(InvalidRequest, match=r"\[B, 3, S, S\]"):
        net.encode(images[:, :2], 0.0)
    with pytest.raises(InvalidRequest, match="128"):
        net.decode(torch.ones(1, 100, dtype=torch.complex64), 0.0, 0.0, 32)
    with pytest.raises(InvalidRequest, match="snr_db"):
        net.encode(images, 99.0)
    with pytest.raises(InvalidRequest, match="even"):
        DeepscConfig(components=3)
