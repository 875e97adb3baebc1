"""Trials and results: what a key says, what a result prints."""

import math
from typing import ClassVar

import pytest

from sukashi.core.experiment import Result, Trial

ABOUT = {"model": {"spec": "m", "width": None}, "seed": 3, "ratios": [0.0, 0.5]}


def trial(about):
    return Trial(about, lambda desk: None)


def test_the_key_of_a_trial_never_changes():
    """Finished trials on people's disks are found by it."""
    assert trial(ABOUT).json == '{"model":{"spec":"m","width":null},"ratios":[0.0,0.5],"seed":3}'
    assert trial(ABOUT).key == "4a254d3d54618215"
    assert trial(ABOUT).folder == "trials/4a254d3d54618215"


def test_the_key_does_not_depend_on_the_order_of_a_dictionary_nor_on_what_is_run():
    turned = Trial(dict(reversed(ABOUT.items())), print, needs=("a",), place="b", label="c")
    assert turned.key == trial(ABOUT).key
    assert turned.folder == "b"


@pytest.mark.parametrize("change", [{"seed": 4}, {"model": {"spec": "n"}}, {"ratios": [0.5, 0.0]}, {"more": 1}])
def test_all_that_it_is_about_is_in_the_key(change):
    assert trial(ABOUT | change).key != trial(ABOUT).key


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trial_of_nan_has_no_key(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = trial({"alpha": value}).key


class Told(Result):
    kind: ClassVar[str] = "told"
    values: dict[str, list[float]]

    def text(self):
        return f"{len(self.values)} values"


def test_a_result_is_json_and_prints_itself():
    told = Told(values={"a": [1.0, math.nan, -math.inf]}, out="here")
    assert told.to_json() == {
        **{"out": "here", "report": "", "finished": False, "warnings": [], "notes": [], "versions": []},
        "values": {"a": [1.0, None, None]},
    }
    assert (repr(told), str(told)) == ("1 values", "1 values")
