"""Masks of single weights: every scope against a literal loop, counts to the weight, ties, patterns, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from sukashi.core.errors import ModelError, ResourceError, UsageError
from sukashi.core.types import Mask, Scores, Site
from sukashi.criteria import criteria
from sukashi.network import sites, sparsity


def scores_of(*tensors):
    return Scores({Site(f"l{i}", "weight", t.numel(), 0): t for i, t in enumerate(tensors)}, 0, "any")


def slow(scores, ratio, scope):
    """{layer: kept}: groups as lists of places, each sorted in Python; of equal scores the earlier place goes first."""
    places = [(site, at) for site, values in scores.values.items() for at in range(values.numel())]
    groups = {}
    for site, at in places:
        n_inputs = math.prod(scores.values[site].shape[1:])
        match scope:
            case "global":
                name = ()
            case "layer":
                name = site
            case "row":
                name = site, at // n_inputs
            case _:
                name = site, at // int(scope.split(":")[1])
        groups.setdefault(name, []).append((site, at))
    keep = {site: torch.ones(values.numel(), dtype=torch.bool) for site, values in scores.values.items()}
    for group in groups.values():
        ranked = sorted(group, key=lambda place: scores.values[place[0]].flatten()[place[1]].item())  # stable
        k = int(len(group) * ratio) if ":" not in scope else len(group) - int(scope.split(":")[0])
        for site, at in ranked[:k]:
            keep[site][at] = False
    return {site: kept.view(scores.values[site].shape) for site, kept in keep.items()}


@st.composite
def scored(draw):
    """Scores of a linear layer and a convolution, a whole number of eights wide, often with equal ones."""
    shapes = [(draw(st.integers(1, 5)), 8 * draw(st.integers(1, 2))), (draw(st.integers(1, 3)), 2, 2, 2)]
    levels = draw(st.sampled_from([1, 2, 4, 1000]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return scores_of(*(torch.randint(levels, shape, generator=generator).double() / levels - 0.3 for shape in shapes))


@settings(deadline=None, max_examples=150)
@given(scored(), st.floats(0, 0.999), st.sampled_from(sparsity.SCOPES))
def test_a_scope_is_its_literal_loop(scores, ratio, scope):
    found, expected = sparsity.mask_of(scores, ratio, scope), slow(scores, ratio, scope)
    assert list(found.keep) == list(expected)
    assert all(torch.equal(found.keep[site], expected[site]) for site in expected)


@settings(deadline=None, max_examples=60)
@given(scored(), st.sampled_from(["2:4", "1:4", "1:2", "3:8", "7:8"]))
def test_a_pattern_is_its_literal_loop(scores, pattern):
    n, m = map(int, pattern.split(":"))
    found, expected = sparsity.mask_of(scores, 1 - n / m, pattern), slow(scores, 1 - n / m, pattern)
    assert all(torch.equal(found.keep[site], expected[site]) for site in expected)
    assert all((keep.reshape(-1, m).sum(1) == n).all() for keep in found.keep.values())


def test_a_pattern_of_ten_takes_its_exact_count():
    # 10 * (1 - 0.7) is 3.0000000000000004 or 2.9999999999999996 by how it is written.
    for n in range(1, 10):
        mask = sparsity.mask_of(scores_of(torch.rand(3, 20)), 1 - n / 10, f"{n}:10")
        assert mask.n_removed == 6 * (10 - n)


def test_global_magnitude_is_that_of_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 20), nn.Linear(20, 5))
    found = sites.weights(model)
    scores = criteria["magnitude"](model, found, None, generator=torch.Generator())
    mask = sparsity.mask_of(scores, 0.6, "global")
    prune.global_unstructured(
        [(model[i], "weight") for i in (0, 2, 3)], prune.L1Unstructured, amount=int(0.6 * mask.n_units)
    )
    for site in found:
        assert torch.equal(mask.keep[site], model.get_submodule(site.layer).weight_mask.bool())


def test_types_of_scores_are_compared_by_value():
    wide, narrow = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[1.5, 0.5]])
    mask = sparsity.mask_of(scores_of(wide, narrow), 0.5, "global")
    assert [keep.tolist() for keep in mask.keep.values()] == [[[False, True]], [[True, False]]]


@settings(deadline=None, max_examples=60)
@given(scored(), st.sampled_from(sparsity.SCOPES), st.floats(0, 0.9), st.floats(0, 0.09))
def test_what_is_gone_stays_gone_and_counts(scores, scope, ratio, more):
    first = sparsity.mask_of(scores, ratio, scope)
    generator = torch.Generator().manual_seed(0)
    other = Scores({s: torch.rand(v.shape, generator=generator) for s, v in scores.values.items()}, 0, "any")
    second = sparsity.mask_of(other, ratio + more, scope, within=first)
    assert all(not (second.keep[site] & ~first.keep[site]).any() for site in first.keep)
    assert second.n_removed == sparsity.mask_of(other, ratio + more, scope).n_removed


def test_a_mask_is_not_given_back():
    scores = scores_of(torch.rand(4, 8))
    half = sparsity.mask_of(scores, 0.5, "row")
    with pytest.raises(
        UsageError, match=r"layer 'l0' has lost more weights already, 50.0%, than ratio 0.25 in scope row"
    ):
        sparsity.mask_of(scores, 0.25, "row", within=half)


@pytest.mark.parametrize(
    ("ratio", "scope", "words"),
    [
        (0.5, "rows", "scope must be global, layer, row or N:M .* got 'rows'"),
        (0.5, "4:2", "scope must be .* got '4:2'"),
        (0.5, "0:4", "scope must be .* got '0:4'"),
        (0.7, "2:4", "`scope='2:4'` keeps 2 of every 4 weights: give `ratio=0.5`, got 0.7"),
        (1.0, "row", r"ratio must be in \[0, 1\), got 1.0"),
        (0.5, "2:4", "layer 'l1' reads 27 inputs, which scope 2:4 cannot group by 4: exclude it"),
    ],
)
def test_scopes_without_meaning(ratio, scope, words):
    with pytest.raises(UsageError, match=words):
        sparsity.mask_of(scores_of(torch.rand(2, 8), torch.rand(2, 3, 3, 3)), ratio, scope)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers(bad):
    with pytest.raises(UsageError, match="scores of any at 'l0' hold NaN or Inf"):
        sparsity.mask_of(scores_of(torch.tensor([[1.0, bad]])), 0.5)


# Masks on models.


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 2))


def masked_net(ratio=0.5, scope="row"):
    model = net()
    scores = criteria["magnitude"](model, sites.weights(model), None, generator=torch.Generator())
    return model, sparsity.mask_of(scores, ratio, scope)


def test_density_and_zeros_say_what_is_there():
    model, mask = masked_net(0.3)
    assert sparsity.density(mask) == {"0": 3 / 4, "2": 26 / 36, "4": 6 / 8}
    assert sparsity.zeros(model, mask) == {"sparsity": 0, "zeros": 0}
    sparsity.enforce(model, mask)
    n_zero = 4 * 1 + 8 * 10 + 2 * 2
    n_biases = 4 + 8 + 2
    assert sparsity.zeros(model, mask) == {"sparsity": n_zero / 320, "zeros": n_zero / (320 + n_biases)}
    with torch.no_grad():
        model[4].weight.fill_(1)
    assert sparsity.zeros(model, mask)["sparsity"] == (n_zero - 4) / 320


def test_bits_come_back():
    _, mask = masked_net(0.37, "global")
    packed = sparsity.pack(mask)
    assert {layer: bits.numel() for layer, bits in packed.items()} == {"0": 2, "2": 36, "4": 2}
    back = sparsity.unpack(packed, {site.layer: tuple(keep.shape) for site, keep in mask.keep.items()})
    assert list(back.keep) == list(mask.keep)
    assert all(torch.equal(back.keep[site], mask.keep[site]) for site in mask.keep)


def test_a_mask_of_another_architecture():
    _, mask = masked_net()
    other = nn.Sequential(nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(ModelError, match=r"layer '2' has shape \(8, 36\) in it and \(9, 36\) in the Sequential"):
        sparsity.check_fits(other, mask)
    with pytest.raises(ModelError, match=r"another architecture: it has a layer '4' of shape \(2, 8\)"):
        sparsity.check_fits(net()[:4], mask)


def test_semi_structured_layers_are_refused_where_there_is_nothing_that_runs_them():
    model, mask = masked_net(0.5, "2:4")
    with pytest.raises(
        ResourceError, match=r"need an NVIDIA GPU of compute capability 8.0 or newer, the model is on cpu"
    ):
        sparsity.semi_structured(model, mask)
    _, rows = masked_net(0.5, "row")
    with pytest.raises(UsageError, match=r"the mask of layer '.' is not 2:4: prune with `scope='2:4'`"):
        sparsity.semi_structured(model, rows)
    convolution = Mask({site: keep for site, keep in mask.keep.items() if site.layer == "0"})
    with pytest.raises(UsageError, match="the mask has no linear layer"):
        sparsity.semi_structured(model, convolution)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU that skips zeros"
)
def test_semi_structured_layers_give_the_masked_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).half().cuda()
    scores = criteria["magnitude"](model.float(), sites.weights(model), None, generator=torch.Generator())
    mask = sparsity.mask_of(scores, 0.5, "2:4")
    sparse = sparsity.semi_structured(model.half(), mask)
    sparsity.enforce(model, mask)
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-2, atol=1e-2)
