"""Plans as arrays and files: what comes back, on which model, and nothing that runs."""

from pathlib import Path

import numpy as np
import pytest

from sukashi.core import files
from sukashi.core.errors import DataError, ModelError
from sukashi.core.types import Member, Plan, Site
from sukashi.criteria.plans import plan_arrays, read_plan

SITES = (Site("conv1", "channel", 5), Site("blocks.0.heads", "head", 3, axis=2))


def a_plan():
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


@pytest.fixture
def path(tmp_path):
    (tmp_path / "plan.npz").write_bytes(files.packed(**plan_arrays(a_plan())))
    return tmp_path / "plan.npz"


def test_a_plan_comes_back_on_the_sites_found_again(path):
    plan = a_plan()
    member = Member("fc", "in", ((0,), (1,), (2,)))
    found = (Site("blocks.0.heads", "head", 3, axis=2, members=(member,)), Site("conv1", "channel", 5))
    back = read_plan(path, found)
    assert back.sites == plan.sites
    assert back.sites[1].members == (member,)
    for name in ("site", "unit", "category", "effect", "p_values"):
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))
    assert (back.method, back.params, back.passes, back.n_images) == ("cswap", {"alpha": 0.05}, (2, 4), 30)
    assert read_plan(path).sites == plan.sites


@pytest.mark.parametrize(
    "other",
    [
        (Site("conv1", "channel", 6), SITES[1]),
        (SITES[0],),
        (*SITES, Site("fc", "hidden", 4)),
        (Site("conv1", "hidden", 5), SITES[1]),
    ],
)
def test_a_plan_of_another_model_is_refused(path, other):
    with pytest.raises(ModelError, match="made for another model"):
        read_plan(path, other)


def test_a_pickle_in_a_plan_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    np.savez(tmp_path / "plan.npz", about=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"plan\.npz can't be read"):
        read_plan(tmp_path / "plan.npz")
    assert not (tmp_path / "exploded").exists()
