"""Bundles: what is written is read, what is damaged is refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.bundle import Bundle, write_net, write_scores
from shared.errors import BundleError


def write(folder: Path, net: str = "toy", half: bool = True, value: float = 0.5) -> None:
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    write_net(
        folder,
        net,
        config={"width": 3},
        tensors=layer.state_dict(),
        provenance={"recipe": "none"},
        half=half,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, half=False)
    write_scores(tmp_path, {"psnr": 20.0})
    bundle = Bundle.open(tmp_path)
    layer = bundle.load_into("toy", nn.Linear(3, 2))
    assert float(layer.weight[0, 0]) == 0.5
    assert not layer.weight.requires_grad
    assert not layer.training
    assert bundle.config("toy") == {"width": 3}
    assert bundle.provenance("toy") == {"recipe": "none"}
    assert bundle.scores == {"psnr": 20.0}
    assert bundle.name == tmp_path.name


def test_half_precision_comes_back_as_float32(tmp_path: Path) -> None:
    write(tmp_path)
    assert {value.dtype for value in Bundle.open(tmp_path).tensors("toy").values()} == {
        torch.float32
    }


def test_what_is_kept_in_a_byte_comes_back_to_a_part_of_its_row(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 50, generator=draws) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    weight[0, 0] = 0
    tensors = {"weight": weight, "bias": weight[..., 0]}
    write_net(
        tmp_path, "n", config={}, tensors=tensors, provenance={}, bytewise=["weight"], half=False
    )
    back = Bundle.open(tmp_path).tensors("n")
    assert set(back) == set(tensors)
    assert torch.equal(back["bias"], tensors["bias"])
    off = (back["weight"] - weight).abs()
    assert (off <= weight.abs().amax(-1, keepdim=True) / 253).all()
    stored = (tmp_path / "n.safetensors").stat().st_size
    assert stored < weight.numel() + 4 * (12 + 12) + 400  # bytes, scales, bias, header


def test_bytes_are_for_tensors_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="weigth"):
        write_net(
            tmp_path,
            "n",
            config={},
            tensors={"weight": torch.zeros(2, 2)},
            provenance={},
            bytewise=["weigth"],
        )


def test_whole_numbers_keep_their_type(tmp_path: Path) -> None:
    tensors = {"count": torch.tensor([70000])}
    write_net(tmp_path, "n", config={}, tensors=tensors, provenance={})
    assert Bundle.open(tmp_path).tensors("n")["count"].tolist() == [70000]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "toy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(tmp_path)


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "toy.safetensors").unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(tmp_path)


def test_no_bundle_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.open(tmp_path / "nowhere")


def test_an_unknown_net_names_those_there(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(BundleError, match="toy"):
        Bundle.open(tmp_path).tensors("fields")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(BundleError, match="size mismatch"):
        Bundle.open(tmp_path).load_into("toy", nn.Linear(4, 2))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_what_fp16_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(BundleError, match="not finite"):
        write(tmp_path, value=value)


def test_the_digest_is_that_of_the_weights_not_of_the_scores(tmp_path: Path) -> None:
    write(tmp_path)
    first = Bundle.open(tmp_path).digest
    write_scores(tmp_path, {"psnr": 1.0})
    assert Bundle.open(tmp_path).digest == first
    write(tmp_path, value=0.25)
    assert Bundle.open(tmp_path).digest != first


def test_recipes_may_write_at_the_same_time(tmp_path: Path) -> None:
    names = [f"net{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: write(tmp_path, name), names))
    assert set(Bundle.open(tmp_path).nets) == set(names)


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"format": 99}')
    with pytest.raises(BundleError, match="99"):
        Bundle.open(tmp_path)
