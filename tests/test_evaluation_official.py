"""The published metrics on random weights: against torchmetrics, and their files' layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from torch import nn

from evaluation.official import FILES, Backbone, FidInception, Lpips, Official, _alexnet, _vgg16
from shared.errors import InvalidRequest


def _random_backbone(make: Callable[[], tuple[nn.Sequential, tuple[int, ...]]]) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make()[0]


def _write(net: nn.Sequential, path: Path) -> Path:
    tensors = {f"features.{key}": value for key, value in net.state_dict().items()}
    torch.save({**tensors, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


@pytest.mark.parametrize("name", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_lpips_agrees_with_torchmetrics(
    name: Backbone, tmp_path: Path, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same random backbone, same heads: torchmetrics takes its backbone from torchvision."""
    net = _random_backbone(_alexnet if name == "alex" else _vgg16)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_, **__: net)
    theirs = reference._LPIPS(pretrained=True, net=name).eval()
    path = _write(net, tmp_path / FILES[f"lpips_{name}"])
    ours = Official.open(tmp_path).lpips[f"lpips_{name}"]
    assert path.is_file()
    a, b = torch.rand(2, 2, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = theirs(a, b).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-3, atol=1e-6)
    assert float(ours(a, a).abs().max()) == 0


def test_inception_has_the_parameters_of_the_published_one() -> None:
    """23,834,568 of torchvision's Inception v3 without its auxiliary head, and 8 more classes."""
    with torch.device("meta"):
        net = FidInception()
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == 23_834_568 + 8 * (2048 + 1)
    names = set(net.state_dict())
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_6e.branch7x7dbl_5.bn.running_var", "fc.bias"} <= (
        names
    )


@pytest.mark.slow
def test_inception_reads_its_file_and_embeds(tmp_path: Path, generator: torch.Generator) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(FidInception().state_dict(), tmp_path / FILES["inception"])
    found = Official.open(tmp_path)
    assert found.inception is not None
    assert found.absent == ("lpips_alex", "lpips_vgg")
    embedded = found.inception(torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1)
    assert embedded.shape == (2, 2048)
    assert bool(torch.isfinite(embedded).all())


def test_pooling_leaves_the_padding_out() -> None:
    from evaluation.official import _pooled

    torch.testing.assert_close(_pooled(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


def test_without_files_there_are_no_such_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDSC_METRIC_WEIGHTS", raising=False)
    found = Official.open()
    assert found.lpips == {}
    assert found.inception is None
    assert set(found.absent) == set(FILES)


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / FILES["lpips_alex"])
    with pytest.raises(InvalidRequest, match=r"alexnet.*does not fit"):
        Official.open(tmp_path)
    torch.save([1, 2], tmp_path / FILES["lpips_alex"])
    with pytest.raises(InvalidRequest, match="holds a list"):
        Lpips.open("alex", tmp_path / FILES["lpips_alex"])
    with pytest.raises(InvalidRequest, match="absent is no folder"):
        Official.open(tmp_path / "absent")
