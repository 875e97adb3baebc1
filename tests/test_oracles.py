"""Every registered method against its oracle, on a small sequence of layers that has learned the digits, in float64."""

import numpy as np
import pytest
import torch

from oracles import ORACLES
from sukashi.attributions import attributions
from sukashi.core.types import Maps, Scores
from sukashi.criteria import criteria
from sukashi.measures import measures
from sukashi.measures.inputs import measured
from sukashi.network import sites as finder
from sukashi.repairs import repairs

REGISTRIES = {"attributions": attributions, "criteria": criteria, "measures": measures, "repairs": repairs}


def names(registry):
    """The methods of a registry that have an oracle."""
    return [name for name in REGISTRIES[registry].names() if (registry, name) in ORACLES]


def test_every_method_has_an_oracle_and_every_oracle_a_method():
    assert {(key, name) for key, registry in REGISTRIES.items() for name in registry.names()} == set(ORACLES)


@pytest.mark.parametrize("name", names("attributions"))
def test_an_attribution_is_its_oracle(sequence64, small64, name):
    method, expected = attributions[name], ORACLES["attributions", name]
    case = small64["vit"] if "attention" in method.facts.get("needs", ()) else sequence64
    data = case.data[slice(0, None, 27)]
    kinds = method.facts.get("kinds")
    sites = [s for s in (*case.sites, finder.input_site(data.x)) if kinds is None or s.kind in kinds]
    found = method(case.model, data.x, data.target, sites, **expected.given)
    for site in sites:
        literals = [
            expected(case.model, image, target, site) for image, target in zip(data.x, data.target, strict=True)
        ]
        assert torch.stack(literals).abs().max() > 1e-4, "the case must say something"
        for row, literal in zip(found[site], literals, strict=True):
            values = row.reshape(site.n_units, -1)
            torch.testing.assert_close(values, literal, rtol=expected.rtol, atol=expected.atol)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in names("criteria")
        for kind in ("channel", "weight")
        if kind in criteria[name].facts["kinds"]
    ],
)
def test_a_criterion_is_its_oracle(sequence64, small64, name, kind):
    method, expected = criteria[name], ORACLES["criteria", name]
    # Those that try units one after the other need a network in which units do more, and less, than noise.
    case = small64["vit"] if method.keeps_journal else sequence64
    sites = finder.weights(case.model) if kind == "weight" else case.sites
    data = case.data if method.keeps_journal else case.data[slice(0, None, 16)]
    found = method(case.model, sites, data, generator=torch.Generator().manual_seed(0), **expected.given)
    literal = expected(case.model, sites, data, generator=torch.Generator().manual_seed(0))
    assert type(found) is type(literal)
    assert (found.method, found.n_images) == (name, literal.n_images)
    if isinstance(found, Scores):
        assert list(found.values) == list(literal.values)
        for site, values in literal.values.items():
            torch.testing.assert_close(found.values[site], values, rtol=expected.rtol, atol=expected.atol)
        return
    assert found.passes == literal.passes
    n = found.n_removable
    for field in ("site", "unit", "category"):
        np.testing.assert_array_equal(getattr(found, field)[:n], getattr(literal, field)[:n])
    np.testing.assert_allclose(found.effect[:n], literal.effect[:n], rtol=expected.rtol, atol=expected.atol)


@pytest.mark.parametrize("name", names("measures"))
def test_a_measure_is_its_oracle(sequence64, name):
    expected = ORACLES["measures", name]
    draw = torch.Generator().manual_seed(0)
    data = sequence64.data[slice(0, None, 8)]
    maps = (data.x[:, 0] * 4).round() + torch.randint(0, 3, data.x[:, 0].shape, generator=draw)  # with ties
    plain = {
        "model": sequence64.model,
        "batch": data,
        "maps": maps,
        "masks": torch.rand(maps.shape, generator=draw) < 0.3,
    }
    plain["reference_maps"] = torch.randn(maps.shape, generator=draw, dtype=maps.dtype)
    given = plain | {what: Maps(plain[what], data.image_id) for what in ("maps", "reference_maps", "masks")}
    given |= {"masks": {"there": given["masks"]}, "generator": draw}
    found = measured([name], given, {name: expected.given})
    literal = expected(**{what: plain[what] for what in expected.asks})
    parts = literal if isinstance(literal, dict) else {"there" if "masks" in expected.asks else "": literal}
    assert list(found) == [f"{name}/{part}" if part else name for part in parts]
    for measurement, values in zip(found.values(), parts.values(), strict=True):
        assert len(set(values)) > 1, "the case must say something"
        assert measurement.values.tolist() == pytest.approx(values, rel=expected.rtol, abs=expected.atol)
