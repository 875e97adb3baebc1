"""Fixtures every test file shares."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def digits_split():
    from sukashi import data

    return data.load("digits")


@pytest.fixture(scope="session")
def trained_cnn(digits_split):
    """A small CNN that has learned the digits; tests must not change it."""
    return _trained("sukashi:digits_cnn", digits_split)


@pytest.fixture(scope="session")
def trained_vit(digits_split):
    """A small ViT that has learned the digits; tests must not change it."""
    return _trained("sukashi:digits_vit", digits_split)


def _trained(spec, digits):
    from sukashi import demo, models

    preprocess = models.load(spec).preprocess
    return demo.train_digits(spec, digits.train.whole(preprocess, 0), epochs=8)


@pytest.fixture(scope="session")
def digits_calibration(digits_split, trained_cnn):
    """Twelve training digits a class, sorted by class."""
    return digits_split.train.calibration(12, 0).whole(trained_cnn.preprocess, 0).by_class()
