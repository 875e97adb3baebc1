"""Taylor against finite differences: each unit made a little louder, in the weights of what reads it, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sukashi.criteria import criteria
from sukashi.layers import AttentionCore


@pytest.fixture(scope="module", params=["cnn", "vit"])
def case(request, small64):
    """A network in float64 and an image of each class."""
    found = small64[request.param]
    return found.model, found.sites, found.data[slice(0, None, 8)]


def losses(model, site, unit, gate, data):
    """Cross entropy (B,) with the unit multiplied by `gate` wherever it is read."""
    model = copy.deepcopy(model)
    readers = {member.module: member for member in site.consumers}
    with torch.no_grad():
        core = any(isinstance(model.get_submodule(name), AttentionCore) for name in readers)
        # The core has no weights: what it reads is what qkv writes, and proj then reads what v became.
        members = site.producers if core else site.consumers
        for member in members:
            layer, index = model.get_submodule(member.module), list(member.index[unit])
            if core:
                layer.weight[index] *= gate
                layer.bias[index] *= gate
            else:
                layer.weight[:, index] *= gate
        return F.cross_entropy(model(data.x), data.target, reduction="none")


def test_taylor_is_the_mean_absolute_slope_of_the_loss(case):
    model, sites, data = case
    found = criteria["taylor"](model, sites, data, generator=torch.Generator())
    assert found.n_images == len(data)
    step = 1e-6  # small, so that no ReLU changes sides
    for site in sites:
        assert found.values[site].max() > 1e-3, "the case must say something"
        for unit in range(site.n_units):
            slope = losses(model, site, unit, 1 + step, data) - losses(model, site, unit, 1 - step, data)
            expected = (slope / (2 * step)).abs().mean().item()
            assert found.values[site][unit].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_images_do_not_cancel_each_other(case):
    """The mean of absolute values, not the absolute value of the mean."""
    model, sites, data = case
    whole = criteria["taylor"](model, sites, data, generator=torch.Generator()).values
    single = [criteria["taylor"](model, sites, part, generator=torch.Generator()).values for part in data.split(1)]
    for site in sites:
        torch.testing.assert_close(whole[site], sum(values[site] for values in single) / len(data))
