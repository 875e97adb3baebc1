"""Images for training: the same from memory, from threads and from none, and the same numbers as elsewhere."""

import numpy as np
import pytest
import torch
from PIL import Image

from sukashi import data
from sukashi.core.types import Preprocess
from sukashi.data.frames import Frames, unit

PLAIN = Preprocess(12, 10, 3, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split, n in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (20, 15, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def deep(folder, tmp_path_factory):
    """The same images, one of them of 16 bits."""
    import shutil

    root = tmp_path_factory.mktemp("deep") / "images"
    shutil.copytree(folder, root)
    grey = np.random.default_rng(1).integers(0, 65536, (20, 15)).astype(np.uint16)
    Image.fromarray(grey).save(root / "train" / "b" / "3.png")
    return root


@pytest.mark.parametrize(("which", "kind"), [("folder", torch.uint8), ("deep", torch.float32)])
def test_frames_are_the_same_however_they_come(which, kind, request):
    train = data.load(request.getfixturevalue(which)).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split(5)
    expected = train.whole(PLAIN).x
    kept = Frames.read(train, PLAIN, 2**20, 0)
    assert kept.kept is not None
    assert kept.kept.dtype == kind
    for memory, workers in ((2**20, 0), (2**20, 2), (0, 0), (0, 3)):
        frames = Frames.read(train, PLAIN, memory, workers)
        assert (frames.kept is None) == (memory == 0)
        for rows, pixels in zip(order, frames.batches(order), strict=True):
            assert torch.equal(unit(pixels), expected[rows])


def test_digits_keep_their_sixteen_steps(digits_split):
    grey = Preprocess(8, 8, 1, (0.0,), (1.0,))
    frames = Frames.read(digits_split.train, grey, 2**24, 0)
    assert torch.equal(frames.kept, digits_split.train.whole(grey).x)


def test_validation_images_are_held_out_by_class_and_nested(digits_split):
    train = digits_split.train
    fit, held = train.validation(0.2)
    assert sorted(fit.image_ids + held.image_ids) == sorted(train.image_ids)
    assert held.counts.tolist() == [int(0.2 * n + 0.5) for n in train.counts.tolist()]
    assert set(train.validation(0.1)[1].image_ids) < set(held.image_ids)
    assert set(fit.validation(0.0)[0].image_ids) == set(fit.image_ids)


def test_kept_images_fit_the_memory_also_where_one_is_deep(deep):
    train = data.load(deep).train
    in_8_bits = len(train) * 3 * 10 * 12
    for memory in (in_8_bits, 4 * in_8_bits, 5 * in_8_bits):  # while bytes become floats both are there
        frames = Frames.read(train, PLAIN, memory, 0)
        assert (frames.kept is not None) == (memory == 5 * in_8_bits)
    (shown,) = frames.batches([torch.arange(len(train))])
    assert torch.equal(shown, next(Frames(train, PLAIN, 0, None).batches([torch.arange(len(train))])))
