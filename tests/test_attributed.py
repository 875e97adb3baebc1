"""Criteria made of attributions, in float64.

Taylor against finite differences: each unit made a little louder, in the weights of what reads it. The adapter against
its formula, image by image and class by class.
"""

import copy

import pytest
import torch

from oracles import ORACLES
from oracles.attributed import REDUCED, aggregated
from sukashi.attributions import attributions
from sukashi.core import progress
from sukashi.core.errors import DataError, UsageError
from sukashi.core.types import Batch, Site
from sukashi.criteria import criteria
from sukashi.network import sites as finder


@pytest.fixture(scope="module", params=["cnn", "vit"])
def case(request, small64):
    """A network in float64 and an image of each class."""
    found = small64[request.param]
    return found.model, found.sites, found.data[slice(0, None, 8)]


@pytest.mark.slow
def test_taylor_is_the_mean_absolute_slope_of_the_loss(case):
    model, sites, data = case
    found = criteria["taylor"](model, sites, data, generator=torch.Generator())
    assert found.n_images == len(data)
    expected = ORACLES["criteria", "taylor"](model, sites, data, generator=None)
    for site in sites:
        assert found.values[site].max() > 1e-3, "the case must say something"
        torch.testing.assert_close(found.values[site], expected.values[site], rtol=1e-5, atol=1e-8)


def test_images_do_not_cancel_each_other(case):
    """The mean of absolute values, not the absolute value of the mean."""
    model, sites, data = case
    whole = criteria["taylor"](model, sites, data, generator=torch.Generator()).values
    single = [criteria["taylor"](model, sites, part, generator=torch.Generator()).values for part in data.split(1)]
    for site in sites:
        torch.testing.assert_close(whole[site], sum(values[site] for values in single) / len(data))


def scored(name, model, sites, data, **options):
    return criteria[name](model, sites, data, generator=torch.Generator(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", REDUCED)
@pytest.mark.parametrize("classes", ["true", "each"])
@pytest.mark.parametrize("normalise", ["none", "layer"])
def test_the_adapter_is_its_formula(case, reduce, classes, normalise):
    model, sites, data = case
    data, options = data[slice(0, 3)], {"steps": 2, "baseline": 0.1}
    found = scored(
        "conductance", model, sites, data, reduce=reduce, classes=classes, normalise=normalise, batch_size=2, **options
    )
    assert (found.method, found.n_images) == ("conductance", 3)

    def attribution(image, target, site):
        return attributions["conductance"](model, image[None], target[None], [site], **options)[site][0]

    expected = aggregated(attribution, sites, data, 10, reduce=reduce, classes=classes, normalise=normalise)
    for site in sites:
        torch.testing.assert_close(found.values[site], expected[site], rtol=1e-9, atol=1e-12)


def test_a_site_without_any_attribution_stays_at_zero_when_normalised(case):
    model, sites, data = case
    model = copy.deepcopy(model)
    for member in sites[-1].consumers:
        module = model.get_submodule(member.module)
        if hasattr(module, "weight"):
            module.weight.data.zero_()
    found = scored("saliency", model, sites, data, normalise="layer")
    assert not found.values[sites[-1]].any()
    assert found.values[sites[0]].norm() == pytest.approx(1) or not found.values[sites[0]].any()


def test_the_options_of_an_attribution_are_those_of_its_criterion():
    for method in (m for m in attributions if m.name in criteria):
        own, passed = criteria[method.name].options, method.options
        assert passed.items() <= own.items()
        assert ("reduce" in own) == method.facts.get("signed", True)
        assert {"classes", "normalise", "batch_size"} <= set(own)


def test_progress_counts_images_and_classes(case):
    model, sites, data = case
    counted = []

    class Task:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, n=1, note=""):
            counted.append(n)

    def listener(title, total):
        counted.append((title, total))
        return Task()

    with progress.listening(listener):
        scored("saliency", model, sites, data[slice(0, 5)], classes="each", batch_size=2)
    assert counted[0] == ("saliency", 50)
    assert sum(counted[1:]) == 50
    assert len(counted) == 31


def test_what_an_attribution_cannot_score_is_refused(case):
    model, sites, data = case

    def refuse(error, words, *, sites=sites, data=data, **options):
        with pytest.raises(error, match=words):
            scored("conductance", model, sites, data, **options)

    weight = Site(sites[0].layer, "weight", 4)
    refuse(UsageError, "conductance scores sites of kind channel, hidden, head, not 'weight'", sites=[weight])
    refuse(UsageError, "conductance scores sites of .*, not 'pixel'", sites=[finder.input_site(data.x)])
    segmented = Batch(data.x, torch.zeros(len(data), 8, 8, dtype=torch.long), data.image_id)
    refuse(DataError, r"target has shape \(\d+, 8, 8\)", data=segmented)
    refuse(UsageError, "baseline has 2 rows", baseline=torch.zeros(2, *data.x.shape[1:], dtype=data.x.dtype))
    refuse(UsageError, "conductance has no option 'stpes': did you mean 'steps'", stpes=3)
    refuse(UsageError, "reduce of conductance must be 'abs_sum', 'sum_abs' or 'sum', got 'max'", reduce="max")
    refuse(UsageError, "steps of conductance must be greater than or equal to 1, got 0", steps=0)
