"""OBS beside its oracle: the other error, what it refuses, and that it counts on a repair."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from oracles import ORACLES
from sukashi.core.errors import ModelError, UsageError
from sukashi.criteria import criteria
from sukashi.repairs import elimination


def ranked(model, sites, data, **options):
    return criteria["obs"](model, sites, data, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("rounds", [1, 3])
def test_errors_of_layers_are_shares_of_what_their_readers_write(sequence64, rounds):
    case, data = sequence64, sequence64.data[slice(0, None, 16)]
    found = ranked(case.model, case.sites, data, error="layer", rounds=rounds, positions=64)
    expected = ORACLES["criteria", "obs"](
        case.model, case.sites, data, generator=torch.Generator().manual_seed(0), error="layer", rounds=rounds
    )
    np.testing.assert_array_equal(found.site, expected.site)
    np.testing.assert_array_equal(found.unit, expected.unit)
    np.testing.assert_allclose(found.effect, expected.effect, rtol=1e-5, atol=1e-9)


def test_what_is_put_off_changes_nothing(sequence64, monkeypatch):
    found = ranked(sequence64.model, sequence64.sites, sequence64.data[slice(0, None, 16)])
    for rows in (1, 10):
        monkeypatch.setattr(elimination, "_PUT_OFF", rows)
        again = ranked(sequence64.model, sequence64.sites, sequence64.data[slice(0, None, 16)])
        np.testing.assert_array_equal(again.unit, found.unit)
        np.testing.assert_allclose(again.effect, found.effect, rtol=1e-9)


def test_a_network_whose_answers_depend_on_nothing_has_free_units(sequence64):
    deaf = copy.deepcopy(sequence64.model)
    deaf[-1].weight.data.zero_()
    plan = ranked(deaf, sequence64.sites, sequence64.data[slice(0, None, 16)], rounds=1)
    np.testing.assert_allclose(plan.effect, 0, atol=1e-12)


def test_a_unit_that_another_makes_up_for_costs_next_to_nothing(sequence64):
    model, data = copy.deepcopy(sequence64.model), sequence64.data[slice(0, None, 16)]
    with torch.no_grad():  # channel 4 is twice channel 2, loud as they are
        model[0].weight[2] *= 3
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[2], 2 * model[0].bias[2]
    plan = ranked(model, sequence64.sites[:1], data, rounds=1, positions=64)
    price = dict(zip(plan.unit.tolist(), plan.effect.tolist(), strict=True))
    assert min(price[2], price[4]) < 1e-2 * max(price[2], price[4]), "of the two the second is missed"


def test_what_cannot_be_priced_is_refused_by_name(sequence64):
    data = sequence64.data[slice(0, None, 16)]
    broken = copy.deepcopy(sequence64.model)
    broken[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="logits hold NaN or Inf on calibration images: check weights"):
        ranked(broken, sequence64.sites, data)
    with pytest.raises(UsageError, match="refit needs at least 5 images"):
        ranked(sequence64.model, sequence64.sites, data[slice(0, 4)])

    first, *others = sequence64.sites
    unread = replace(first, members=first.producers)
    with pytest.raises(ModelError, match=r"what reads the units of '0' is neither a linear .* exclude it"):
        ranked(sequence64.model, [unread, *others], data)
