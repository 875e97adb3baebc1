"""A small share of the scripts under tests/fuzz, which try thousands."""

import random
import sys
from pathlib import Path

import pytest
import torch

from sukashi.measures import cost

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import folders
import options


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of several would wait for those that it does not have
    yield
    torch.set_num_threads(before)


def test_altered_folders_are_refused_in_a_sentence_or_are_what_they_say(tmp_path):
    for told, ended in folders.tries(random.Random(1), 20, tmp_path):
        assert not ended.fault, f"{told}: {ended.said}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_odd_options_are_refused_in_a_sentence_or_work(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "latency", lambda models, batch, **how: [[2.0] * 6, *([[1.0] * 6] * (len(models) - 1))])
    for told, ended in options.tries(random.Random(2), 14, tmp_path):
        assert not ended.fault, f"{told}: {ended.said}"


def test_what_no_call_may_do_is_told():
    right = options.Ended(2, "sukashi: no", 0.1, 0.5)
    assert not right.fault
    faulty = [
        options.Ended(1, "", 0.1, 0.5),
        options.Ended(2, "Traceback (most recent call last):", 0.1, 0.5),
        options.Ended(-9, "", 60.0, 0.5),
        options.Ended(0, "", 1.0, 5.0),
        options.Ended(2, "x" * 20_000, 0.1, 0.5),
        options.Ended(2, "sukashi: no", 0.1, 0.5, ("draft.tmp",)),
    ]
    assert all(one.fault for one in faulty)
    at_work = options.Ended(-9, "sukashi: training 1/5, about 5 min left", 60.0, 0.5)
    assert not at_work.fault
