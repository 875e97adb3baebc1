"""Fixtures every test file shares."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; skips where there is none."""
    folder = Path(os.environ.get("SUKASHI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set SUKASHI_DATA")
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """The folder of trained weights beside the real images."""
    return real_data.parent / "weights"
