"""What each schedule asks for, in order: networks are told apart by what was done to them."""

import pytest

from sukashi.core.errors import UsageError
from sukashi.core.schema import checked
from sukashi.experiments.schedule import run
from sukashi.experiments.schedule.levels import Seed
from sukashi.experiments.schedule.schedules import SCHEDULES
from sukashi.experiments.schedule.settings import Course

EXPECTED = {
    "oneshot": ["train(start)", "train(prune(dense, .2))", "train(prune(dense, .5))"],
    "iterative": ["train(start)", "train(prune(dense, .2))", "train(prune(level .2, .5))"],
    "lottery": [
        "train(start)",
        "train(rewind(prune(dense, .2), start))",
        "train(rewind(prune(level .2, .5), start))",
    ],
    "lottery from epoch 1": [
        "train(start)",
        "train(start until 1)",
        "train(rewind(prune(dense, .2), early))",
        "train(rewind(prune(level .2, .5), early))",
    ],
}


class Told(Seed):
    """A seed whose networks are words: what would be done to them."""

    def __init__(self, course):
        super().__init__(None, None, course, 0, 0)
        self.done, self.names = [], {}

    start = "start"

    def network(self, key, desk):
        assert key in desk.needs, "a trial reads none but those it needs"
        return self.names[key]

    def pruned(self, criterion, network, ratio):
        return f"prune({network}, {str(ratio)[1:]})"

    def rewound(self, network, early):
        return f"rewind({network}, {early})"

    def run(self, level, make, desk):
        until = f" until {level.until}" if level.until else ""
        self.done.append(f"train({make(desk)}{until})")
        early = "early" if level.until else "dense"
        self.names[desk.key] = f"level {str(level.ratio)[1:]}" if level.criterion else early


def course(name, **changes):
    rewinds = name.startswith("lottery")
    given = {"schedule": name.split()[0], "criteria": ["magnitude"], "ratios": [0.2, 0.5], **changes}
    return checked(Course, given | ({"rewind": 1} if rewinds and "epoch" in name else {}))


def trials(chosen, seed):
    return list(run._trials(seed, chosen, False, {}))


@pytest.mark.parametrize("name", EXPECTED)
def test_levels_in_order(name):
    chosen = course(name)
    seed = Told(chosen)
    for trial in trials(chosen, seed):
        trial.run(trial)  # in place of a desk: it knows what the trial needs
    assert seed.done == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_trial_needs_what_it_reads_and_is_done_together(name):
    chosen = course(name, criteria=["magnitude", "random"])
    found = trials(chosen, Told(chosen))
    keys = [trial.key for trial in found]
    assert len(set(keys)) == len(keys)
    for number, trial in enumerate(found):
        assert set(trial.needs) <= set(keys[:number]), "made before"
        assert trial.together
    places = {trial.key: trial.place for trial in found}
    needs = {trial.place: [places[key] for key in trial.needs] for trial in found}
    early = ["dense/0-epoch-1"] if "epoch" in name else []
    for criterion in ("magnitude", "random"):
        parent = "dense/0" if name == "oneshot" else f"{criterion}/0/0.20"
        assert needs[f"{criterion}/0/0.20"] == ["dense/0", *early]
        assert needs[f"{criterion}/0/0.50"] == [parent, *early]


def test_what_was_asked_for_beside_it_changes_no_level():
    """A course may grow: the trials that are there keep their keys."""
    few, more = course("lottery"), course("lottery", criteria=["random", "magnitude"], ratios=[0.2, 0.5, 0.7])
    kept, grown = ({t.place: t.key for t in trials(chosen, Told(chosen))} for chosen in (few, more))
    assert {place: grown[place] for place in kept} == kept
    other = course("lottery", training={"epochs": 3})
    assert not {t.key for t in trials(other, Told(other))} & set(kept.values())


def test_a_level_keeps_the_key_of_its_parent():
    """Iterative networks of 50 % that went through others are not the same."""
    one, other = course("iterative"), course("iterative", ratios=[0.3, 0.5])
    half = [next(t.key for t in trials(chosen, Told(chosen)) if t.place.endswith("0.50")) for chosen in (one, other)]
    assert half[0] != half[1]
    one, other = course("oneshot"), course("oneshot", ratios=[0.3, 0.5])
    half = [next(t.key for t in trials(chosen, Told(chosen)) if t.place.endswith("0.50")) for chosen in (one, other)]
    assert half[0] == half[1]


def test_names():
    assert [schedule.name for schedule in SCHEDULES] == ["oneshot", "iterative", "lottery"]
    with pytest.raises(UsageError, match="unknown schedule 'lotery': did you mean 'lottery'"):
        SCHEDULES["lotery"]
