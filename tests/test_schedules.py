"""What each schedule asks for, in order: networks are told apart by what was done to them."""

import pytest

from sukashi.experiments.schedule.schedules import schedules

EXPECTED = {
    "oneshot": ["train(prune(dense, .2))", "train(prune(dense, .5))"],
    "iterative": ["train(prune(dense, .2))", "train(prune(train(prune(dense, .2)), .5))"],
    "lottery": [
        "train(rewind(prune(dense, .2)))",
        "train(rewind(prune(train(rewind(prune(dense, .2))), .5)))",
    ],
}


def walked(name, kept=()):
    done = []

    def level(ratio, make):
        done.append(f"kept {ratio}" if ratio in kept else f"train({make()})")
        return done[-1]

    schedules[name](
        "dense",
        [0.2, 0.5],
        prune=lambda network, ratio: f"prune({network}, {str(ratio)[1:]})",
        rewind=lambda network: f"rewind({network})",
        level=level,
    )
    return done


def test_all_are_told():
    assert schedules.names() == list(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_levels_in_order(name):
    assert walked(name) == EXPECTED[name]


@pytest.mark.parametrize("name", ["iterative", "lottery"])
def test_a_kept_level_is_not_made_again_and_the_next_one_starts_from_it(name):
    first, second = walked(name, kept=(0.2,))
    assert first == "kept 0.2"
    assert "prune(kept 0.2, .5)" in second
