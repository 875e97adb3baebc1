"""Settings of a training: what follows from them, and which images they take."""

from dataclasses import replace

import pytest

from sukashi.core.errors import DataError
from sukashi.training.inputs import splits
from sukashi.training.settings import Finetuning, Training


def test_rates():
    given = Training(epochs=4, warmup=1, lr=0.8)
    assert [given.rate(step, 4) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert given.rate(4, 4) == pytest.approx(0.8)
    assert given.rate(10, 4) == pytest.approx(0.4)
    assert 0 < given.rate(15, 4) < 0.02
    steps = Training(epochs=4, schedule="step", lr=0.8)
    assert [steps.rate(step, 1) for step in range(4)] == pytest.approx([0.8, 0.8, 0.08, 0.008])


def test_rate_and_decay_follow_the_optimiser():
    assert (Training().lr, Training().weight_decay) == (0.05, 5e-4)
    assert (Training(optimizer="adamw").lr, Training(optimizer="adamw").weight_decay) == (1e-3, 0.05)
    assert Training(optimizer="adamw", lr=0.3, weight_decay=0.0).weight_decay == 0


def test_finetuning_has_a_tenth_of_the_rate():
    assert [Finetuning(optimizer=name).lr for name in ("sgd", "adamw")] == pytest.approx([0.005, 1e-4])
    assert Finetuning(lr=0.3).lr == 0.3


def test_how_validation_images_were_made_is_said(digits_split):
    few = replace(digits_split, train=digits_split.train.limit(220), test=None)
    _, held, (note,) = splits(few, Training())
    assert f"{len(held)} images" in note
    assert "no validation split" in note
    assert splits(replace(few, val=digits_split.test), Training()) == (few.train, digits_split.test, ())
    _, none, (note,) = splits(few, Training(validation=0.0))
    assert none is None
    with pytest.raises(DataError, match="hold out more"):
        splits(few, Training(validation=0.001))
