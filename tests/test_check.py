"""Check: what would happen, told without writing anything."""

import json

import pytest

import sukashi
from sukashi.core.errors import ModelError
from sukashi.criteria import criteria

SPEC = "sukashi:digits_cnn"


def test_check_says_what_would_happen(cnn_weights, tmp_path, monkeypatch, digits_split):
    monkeypatch.chdir(tmp_path)
    found = sukashi.check(SPEC, "digits", weights=cnn_weights, width=8, calibration=8)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()
    assert found.model == SPEC
    assert found.sites == [
        {"layer": "conv1", "kind": "channel", "units": 8},
        {"layer": "conv3", "kind": "channel", "units": 8},
        {"layer": "fc1", "kind": "hidden", "units": 16},
    ]
    assert found.table() == [{"model": SPEC, **site} for site in found.sites]
    assert (found.units, found.parameters) == (32, 3506)
    assert list(found.refused) == ["fc2"]
    assert found.class_names == list("0123456789")
    assert found.class_counts == {s.name: s.counts.tolist() for s in (digits_split.train, digits_split.test)}
    (read,) = found.notes
    assert read.startswith(f"images are read as {found.reads}: ")
    assert "359 images; the weights come from elsewhere" in found.warnings[0]
    assert 0.8 * found.n_images < found.n_right <= found.n_images == 200
    # Every criterion has an estimate: one that asks about single units must be given its number of visits.
    assert set(found.estimated_seconds) == set(criteria.names())
    assert (found.unmeasured, found.cannot) == ([], {})
    assert all(seconds >= 0 for seconds in found.estimated_seconds.values())
    assert list(tmp_path.iterdir()) == []
    text = found.text()
    assert text.splitlines()[0].startswith(
        "read as 8 x 8, mean 0, std 1, whole images resized, aspect ratio not kept (sukashi's defaults for digits_cnn)"
        f"; right on {found.n_right} of 200 test images ("
    )
    for said in (
        "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "3 sites, 32 units, 3,506 parameters",
        f"not cut: fc2: {found.refused['fc2']}",
        "test: 359 images",
    ):
        assert said in text
    assert all(f"\n{name} " in text for name in criteria.names())


def test_check_keeps_its_limit(cnn_weights):
    found = sukashi.check(SPEC, "digits", weights=cnn_weights, width=8, calibration=8, limit=0)
    assert found.estimated_seconds == {"random": 0.0, "magnitude": 0.0}
    assert set(found.unmeasured) == set(criteria.names()) - {"random", "magnitude"}
    assert "cswap: not estimated within 0 s; give a larger `limit`" in found.text()


@pytest.mark.filterwarnings("ignore:.*has random weights")
def test_check_says_a_reason_once_for_all_that_have_it(monkeypatch):
    class Refused:
        def __init__(self, *args, **options):
            raise ModelError("no such form: use another")

    monkeypatch.setattr("sukashi.experiments.check.run.Engine", Refused)
    found = sukashi.check(SPEC, "digits", width=8, calibration=8)
    assert found.cannot == dict.fromkeys(("cswap", "cbp", "amp", "drift"), "no such form: use another")
    assert found.text().count("no such form") == 1
    assert "\ncswap, cbp, amp, drift: no such form: use another" in found.text()
