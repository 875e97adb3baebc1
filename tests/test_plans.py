"""Plans as files: they come back as they were, on the sites found again, and none of another model."""

import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sukashi.core.errors import DataError, ModelError
from sukashi.core.files import Arrays, packed
from sukashi.core.types import Member, Plan, Site
from sukashi.criteria.plans import plan_arrays, plan_of

SITES = (Site("conv1", "channel", 5), Site("blocks.0.heads", "head", 3, axis=2))
FIELDS = ("site", "unit", "category", "effect", "p_values")


@pytest.fixture
def plan():
    rng = np.random.default_rng(0)
    order = [(s, u) for s, site in enumerate(SITES) for u in range(site.n_units)]
    order = [order[i] for i in rng.permutation(len(order))]
    return Plan.build(
        SITES,
        order,
        method="cswap",
        params={"alpha": 0.05},
        category={order[0]: "detrimental", order[1]: "critical"},
        effect={pair: float(value) for pair, value in zip(order, rng.normal(size=8), strict=True)},
        p_values={order[2]: rng.random(3)},
        passes=(2, 4),
        n_images=30,
    )


def kept(folder, plan):
    path = folder / "plan.npz"
    path.write_bytes(packed(**plan_arrays(plan)))
    return path


def read(path, sites=None):
    return plan_of(Arrays(path, path.read_bytes()), sites)


def test_a_plan_comes_back_on_the_sites_found_again(tmp_path, plan):
    path = kept(tmp_path, plan)
    member = Member("fc", "in", ((0,), (1,), (2,)), -1)
    found = (Site("blocks.0.heads", "head", 3, axis=2, members=(member,)), Site("conv1", "channel", 5))
    back = read(path, found)
    assert back.sites == plan.sites
    assert back.sites[1].members == (member,)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))
    assert (back.method, back.params, back.passes, back.n_images) == ("cswap", {"alpha": 0.05}, (2, 4), 30)
    alone = read(path)
    assert alone.sites == plan.sites
    assert not any(site.members for site in alone.sites), "which follow from the model"
    assert [(~keep).tolist() for keep in alone.mask(0.5).keep.values()] == [
        (~keep).tolist() for keep in plan.mask(0.5).keep.values()
    ]


@pytest.mark.parametrize(
    ("other", "whose"),
    [
        ((Site("conv1", "channel", 6), SITES[1]), "'conv1' with . channel units"),
        ((SITES[0],), "plan has a site at 'blocks.0.heads' with 3 head units"),
        ((*SITES, Site("fc", "hidden", 4)), "model has a site at 'fc' with 4 hidden units"),
        ((Site("conv1", "hidden", 5), SITES[1]), "'conv1' with 5 "),
        ((SITES[0], Site("blocks.0.heads", "head", 3, axis=1)), "'blocks.0.heads' with 3 head units"),
    ],
)
def test_a_plan_of_another_model_is_refused(tmp_path, plan, other, whose):
    path = kept(tmp_path, plan)
    with pytest.raises(ModelError, match=f"^the plan was made for another model: only the .*{whose}"):
        read(path, other)


def test_a_pickle_in_a_plan_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    np.savez(tmp_path / "plan.npz", about=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"plan\.npz can't be read"):
        read(tmp_path / "plan.npz")
    assert not (tmp_path / "exploded").exists()


def test_equal_plans_are_equal_bytes_whenever_they_are_written(tmp_path, plan, monkeypatch):
    path = kept(tmp_path, plan)
    before = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert kept(tmp_path, read(path)).read_bytes() == before
