"""What every test shares: how many threads, where the data and the shipped bundle are."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, here and in every process a test starts: more threads than cores, or two
# test processes that both take all of them, cost several times the work itself.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The pictures and labels to train and test with, which may not be redistributed.

    Looked for at `EDSC_DATA`, then at `../shared/data`; a test that wants them skips without.
    """
    folder = Path(os.environ.get("EDSC_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "celeba128").is_dir():
        pytest.skip(f"no data: {folder} has no celeba128 (set EDSC_DATA)")
    return folder


@pytest.fixture(scope="session")
def bundle_folder() -> Path:
    """The bundle that the services load: `EDSC_WEIGHTS`, then the shipped one."""
    folder = Path(os.environ.get("EDSC_WEIGHTS") or ROOT / "weights" / "celeba-128")
    if not (folder / "bundle.json").is_file():
        pytest.skip(f"no bundle: {folder} has no bundle.json (set EDSC_WEIGHTS, or train one)")
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness: every draw in a test comes from one like this."""
    return torch.Generator().manual_seed(20240531)
