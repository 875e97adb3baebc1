"""Concepts: subspaces found and planted, the virtual layer, parts that add up and what they matter."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.optimize import nnls as one_row
from sklearn.decomposition import NMF
from torch import nn

from sukashi.attributions import attributions
from sukashi.attributions.lrp import factors
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Batch
from sukashi.decompositions import craft, drsa, nmf
from sukashi.decompositions.contrast import contrast
from sukashi.decompositions.matching import matched
from sukashi.decompositions.subspaces import Subspaces, ablated, virtual
from sukashi.decompositions.vectors import vectors
from sukashi.network import hooks, sites
from sukashi.network.behind import behind

RULES = ["epsilon", "gamma", "alpha1beta0"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def net():
    """Convolutions, a ReLU, pooling and a linear layer, float64."""
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
        .double()
        .eval()
        .requires_grad_(False)
    )


@pytest.fixture(scope="module")
def images():
    return double(6, 3, 8, 8, seed=1)


def subspaces(layer="3", size=8, k=4, seed=2, mean=None):
    basis = drsa.orthogonal(size, generator(seed))
    mean = torch.zeros(size, dtype=torch.float64) if mean is None else mean
    return Subspaces(layer, 1, basis, basis, k, size // k, mean)


# ---- DRSA


def planted(n=1500, size=32, k=4, noise=0.0):
    """Vectors that are active, and relevant, in one of k subspaces at a time."""
    basis = drsa.orthogonal(size, generator(5))
    inside = torch.zeros(n, k, size // k, dtype=torch.float64)
    which = torch.randint(k, (n,), generator=generator(6))
    inside[torch.arange(n), which] = double(n, size // k, seed=7)
    h = inside.flatten(1)
    a = (h + noise * double(n, size, seed=8)) @ basis.T
    c = (h + noise * double(n, size, seed=9)) @ basis.T
    return a, c, basis


def overlap(one, other, k):
    """(K, K) cosines of the largest principal angles between the subspaces of two bases."""
    d = len(one) // k
    inside = (one.T @ other).unflatten(0, (k, d)).unflatten(2, (k, d)).transpose(1, 2)
    return torch.linalg.svdvals(inside)[..., -1]


def test_planted_subspaces_are_found():
    a, c, basis = planted()
    found = drsa.drsa(a, c, 4, generator=generator(1), tolerance=1e-9)
    angles = overlap(found.basis, basis, 4).amax(1).clamp(max=1).acos()
    assert angles.max() < 1e-2
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(32, dtype=torch.float64), atol=1e-6, rtol=0)
    assert math.isclose(found.objective, drsa.objective(a, c, found.basis, 4), rel_tol=1e-9)
    assert found.objective == max(max(trial) for trial in found.history) >= drsa.objective(a, c, basis, 4) * (1 - 1e-4)
    share = drsa.relevance(a, c, found.basis, 4).mean(0)
    assert torch.equal(share, share.sort(descending=True).values)


def test_the_gradient_of_the_objective_is_autograds():
    a, c, _ = planted(n=50, noise=0.5)
    basis = drsa.orthogonal(32, generator(1)).requires_grad_()
    r = ((a @ basis) * (c @ basis)).view(50, 4, 8).sum(2).clamp(min=0)
    value = ((r**2).mean(0) ** 0.25).mean() ** 2
    (slope,) = torch.autograd.grad(value, basis)
    torch.testing.assert_close(drsa.gradient(a, c, basis.detach(), 4), slope, rtol=1e-9, atol=1e-12)
    assert math.isclose(drsa.objective(a, c, basis.detach(), 4), value.item(), rel_tol=1e-9)


def test_momentum_gets_where_the_plain_iteration_gets():
    a, c, _ = planted(n=300, noise=0.4)
    scale = [of.square().sum(1).mean().sqrt() for of in (a, c)]
    basis = drsa.orthogonal(32, generator(3))
    for _ in range(500):
        basis = drsa.polar(basis + drsa.gradient(a / scale[0], c / scale[1], basis, 4))
    plain = drsa.objective(a, c, basis, 4)
    found = drsa.drsa(a, c, 4, generator=generator(3), trials=1, tolerance=0)
    n_steps = next(i for i, value in enumerate(found.history[0]) if value >= plain * (1 - 1e-3)) * drsa.EVERY
    assert n_steps <= 100


def test_the_scale_of_activations_decides_nothing():
    a, c, _ = planted(noise=0.3)
    one = drsa.drsa(a, c, 4, generator=generator(), trials=1, steps=20)
    other = drsa.drsa(100 * a, 0.01 * c, 4, generator=generator(), trials=1, steps=20)
    torch.testing.assert_close(other.basis, one.basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "k", "error", "words"),
    [
        (lambda a: a, 5, UsageError, "5 subspaces do not divide 32 features into equal parts: take 2, 4, 8"),
        (lambda a: a, 0, UsageError, "0 subspaces do not divide"),
        (lambda a: a[:8], 4, DataError, "8 vectors are too few for 32 features"),
        (lambda a: a * torch.inf, 4, DataError, "NaN or Inf"),
        (lambda a: a * 0, 4, DataError, "all zero"),
    ],
)
def test_vectors_that_hold_no_subspaces_are_refused(change, k, error, words):
    a, c, _ = planted(n=100)
    with pytest.raises(error, match=words):
        drsa.drsa(change(a), c[: len(change(a))], k, generator=generator())


# ---- The virtual layer


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_virtual_layer_changes_nothing_and_leaves_no_trace(small, name):
    case = small[name]
    layer, axis = {"cnn": ("conv2", 1), "vit": ("blocks.1", -1)}[name]
    site = sites.place(case.model, layer, case.data.x, axis=axis)
    taken = subspaces(layer, site.n_units, 2)
    basis = taken.basis.float()
    taken = Subspaces(layer, axis, basis, basis, 2, site.n_units // 2, taken.mean.float())
    before, names = case.model(case.data.x), list(case.model.state_dict())
    with virtual(case.model, taken) as where:
        assert torch.equal(case.model(case.data.x), before)
        assert where.kind == "subspace"
    assert torch.equal(case.model(case.data.x), before)
    assert list(case.model.state_dict()) == names


@pytest.mark.parametrize("rule", RULES)
def test_relevance_of_subspaces_adds_up_to_that_of_the_layer(net, images, rule):
    """R_k = (U_k'a) . (U_k'c), as the virtual layer has it and as the formula has."""
    taken, target = subspaces(), torch.tensor([0, 1, 2, 0, 1, 2])
    site = sites.place(net, "3", images, axis=1)
    channels = attributions["lrp"](net, images, target, [site], rule=rule)[site]
    with virtual(net, taken) as where:
        found = attributions["lrp"](net, images, target, [where], rule=rule)[where]
    a, c = factors(net, images, target, site, rule=rule)
    torch.testing.assert_close(a * c, channels, rtol=1e-9, atol=1e-12)
    rows = [of.flatten(2).transpose(1, 2).flatten(0, 1) for of in (a, c)]
    expected = drsa.relevance(*rows, taken.basis, 4).view(6, -1, 4).transpose(1, 2)
    shared = found.view(6, 4, 2, 64).sum(2)
    torch.testing.assert_close(shared, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.flatten(1).sum(1), channels.flatten(1).sum(1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_an_ablated_subspace_is_what_the_formula_says(net, images, fill):
    taken = subspaces(mean=double(8, seed=4))
    m = taken.mean if fill == "mean" else torch.zeros(8, dtype=torch.float64)
    a = net[:4](images)
    for k in (1, 3):
        u = taken.block(k)
        a = a - torch.einsum("de,behw->bdhw", u @ u.T, a - m[:, None, None])
    with ablated(net, taken, [1, 3], fill=fill):
        found = net(images)
    torch.testing.assert_close(found, net[4:](a), rtol=1e-9, atol=1e-12)


def test_gradients_find_an_ablated_subspace_irrelevant(net, images):
    taken, target = subspaces(), torch.zeros(6, dtype=torch.long)
    with virtual(net, taken) as where:
        gate = torch.tensor([1.0, 0, 1, 1])
        with hooks.ablated(net, {where: gate}):
            found = attributions["lrp"](net, images, target, [where], rule="epsilon")[where]
    assert (found[:, [0, 2, 3]].flatten(2).abs().sum(2) > 0).all()


@pytest.mark.parametrize(
    ("without", "fill", "words"),
    [
        ([4], "mean", "has subspaces 0 to 3, got 4"),
        ([0, 1, 2, 3], "mean", "all that layer '3' writes would go"),
        ([0], "blue", "fill must be mean or zero, got 'blue'"),
    ],
)
def test_what_cannot_be_ablated_is_refused(net, without, fill, words):
    with pytest.raises(UsageError, match=words), ablated(net, subspaces(), without, fill=fill):
        pass


def test_a_basis_that_is_none_is_refused():
    mean = torch.zeros(4)
    with pytest.raises(UsageError, match="is not its inverse: off by"):
        Subspaces("a", 1, torch.ones(4, 4), torch.ones(4, 4), 2, 2, mean)
    with pytest.raises(UsageError, match="do not fit the 4 features"):
        Subspaces("a", 1, torch.eye(4), torch.eye(4), 3, 2, mean)
    with pytest.raises(UsageError, match=r"must be \(D, D\)"):
        Subspaces("a", 1, torch.eye(4)[:, :2], torch.eye(4), 1, 2, mean)


def test_a_layer_that_there_is_not_is_refused_with_its_neighbours(net):
    with pytest.raises(ModelError, match="no layer '33'"), virtual(net, subspaces("33")):
        pass


# ---- Vectors


def test_vectors_are_drawn_alike_whatever_the_batch(net, images):
    data = Batch(images, torch.tensor([0, 1, 2, 0, 1, 2]), tuple("abcdef"))
    site = sites.place(net, "3", images, axis=1)
    one, other = (
        vectors(net, data, site, positions=5, generator=generator(), batch_size=size, rule="gamma") for size in (2, 6)
    )
    for mine, yours in zip(one, other, strict=True):
        torch.testing.assert_close(mine, yours)
        assert mine.shape == (30, 8)
    # Each row is what its image holds at one place, another for each of the five.
    for values, everywhere in zip(one, factors(net, images, data.target, site, rule="gamma"), strict=True):
        of_image = everywhere.flatten(2).transpose(1, 2)
        found = (values.view(6, 5, 1, 8) - of_image[:, None]).abs().amax(3) < 1e-12
        assert found.any(2).all()
        assert found.any(1).sum(1).ge(5).all()
    assert len(vectors(net, data, site, positions=1000, generator=generator())[0]) == 6 * 64


def test_features_without_positions_have_vectors_too(net, images):
    data = Batch(images, torch.tensor([0, 1, 2, 0, 1, 2]), tuple("abcdef"))
    a, _ = vectors(net, data, sites.place(net, "8", images, axis=-1), positions=3, generator=generator())
    torch.testing.assert_close(a, net[:9](images))


# ---- Contrast


@pytest.fixture(scope="module")
def pairs(net, images):
    """Images with a stamp and without, and what layer 3 holds of both: rows of features."""
    stamped = images.clone()
    stamped[:, :, 2:5, 2:5] = 2.0
    rows = [net[:4](x).permute(0, 2, 3, 1).reshape(-1, 8) for x in (stamped, images)]
    return stamped, rows


def test_a_contrast_is_the_principal_directions_of_differences(net, images, pairs):
    stamped, (marked, plain) = pairs
    found = contrast(net, stamped, images, sites.place(net, "3", images, axis=1), 2, whiten=False, batch_size=4)
    _, values, right = torch.linalg.svd(marked - plain, full_matrices=False)
    u = found.block(0)
    torch.testing.assert_close(u @ u.T, right[:2].T @ right[:2], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.dual, found.basis)
    assert math.isclose(found.facts["share"], float((values[:2] ** 2).sum() / (values**2).sum()), rel_tol=1e-9)
    torch.testing.assert_close(found.mean, plain.mean(0))
    with ablated(net, found, [0]):
        assert (net(stamped) - net(images)).abs().max() < (stamped - images).abs().max()


def test_a_contrast_is_told_by_the_generalised_eigenvectors_and_changes_least(net, images, pairs):
    stamped, (marked, plain) = pairs
    site = sites.place(net, "3", images, axis=1)
    found = contrast(net, stamped, images, site, 2)
    spread = np.cov(plain.T.numpy(), bias=True)
    spread += 1e-3 * np.trace(spread) / 8 * np.eye(8)
    differences = (marked - plain).numpy()
    values, vectors = eigh(differences.T @ differences / len(differences), spread)
    w = torch.from_numpy(vectors[:, ::-1].copy())
    torch.testing.assert_close(found.dual.T @ torch.from_numpy(spread) @ found.dual, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close((found.dual[:, :2].T @ torch.from_numpy(spread) @ w[:, :2]).abs(), torch.eye(2).double())
    assert math.isclose(found.facts["share"], values[-2:].sum() / values.sum(), rel_tol=1e-6)
    # Of all that puts the mean where h says something, the change of `a` is the least in the metric of the spread.
    inverse = torch.from_numpy(np.linalg.inv(spread))
    a = plain - found.mean
    h = a @ found.dual[:, :2]
    change = h @ found.block(0).T
    torch.testing.assert_close((a - change) @ found.dual[:, :2], torch.zeros(len(a), 2, dtype=torch.float64))
    other = change + (a @ found.dual[:, 2:4]) @ found.basis[:, 2:4].T
    size, more = (torch.einsum("nd,de,ne->n", of, inverse, of) for of in (change, other))
    assert (size <= more + 1e-9).all()


def test_relevance_of_a_basis_that_is_not_orthonormal_adds_up_too(net, images, pairs):
    stamped, _ = pairs
    site = sites.place(net, "3", images, axis=1)
    basis = contrast(net, stamped, images, site, 2)
    whole = Subspaces("3", 1, basis.basis, basis.dual, 4, 2, basis.mean)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    with virtual(net, whole) as where:
        assert torch.equal(net(images), net[4:](net[:4](images)))
        found = attributions["lrp"](net, images, target, [site, where], rule="gamma")
    torch.testing.assert_close(found[where].flatten(1).sum(1), found[site].flatten(1).sum(1), rtol=1e-4, atol=1e-9)


def test_pairs_that_are_none_are_refused(net, images):
    site = sites.place(net, "3", images, axis=1)
    with pytest.raises(DataError, match="pairs must be as many images of one size"):
        contrast(net, images, images[:3], site, 2)
    with pytest.raises(DataError, match="the pairs do not differ at layer '3'"):
        contrast(net, images, images, site, 2)
    with pytest.raises(UsageError, match="n_dimensions must be 1 to the 8 features"):
        contrast(net, images, images + 1, site, 9)


# ---- Parts that add up


def parts(n=300, size=20, k=4, seed=0):
    """u and w with zeros, so that they are the only ones."""
    u, w = (double(*shape, seed=seed + i).clamp(min=0) for i, shape in enumerate([(n, k), (k, size)]))
    u[:k], w[:, :k] = torch.eye(k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
    return u, w


def test_planted_parts_are_found():
    u, w = parts()
    found_u, found_w = nmf.nmf(u @ w, 4, steps=5000, tolerance=1e-12)
    assert matched(found_w.T, w.T).likeness.min() > 0.999
    torch.testing.assert_close(found_w.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert found_u.min() >= 0
    assert found_w.min() >= 0
    assert torch.equal(found_u.norm(dim=0), found_u.norm(dim=0).sort(descending=True).values)
    assert (found_u @ found_w - u @ w).abs().max() < 1e-3 * (u @ w).max()


def test_the_error_is_that_of_scikit_learn():
    x = double(400, 30, seed=3).clamp(min=0)
    theirs = NMF(5, init="nndsvda", max_iter=2000, tol=1e-7).fit(x.numpy())
    u, w = nmf.nmf(x, 5, steps=2000, tolerance=1e-8)
    assert float((x - u @ w).norm()) <= theirs.reconstruction_err_ * (1 + 1e-2)


def test_least_squares_that_are_not_negative_are_scipys():
    _, w = parts()
    x = double(40, 20, seed=9)
    expected = np.stack([one_row(w.T.numpy(), row)[0] for row in x.numpy()])
    np.testing.assert_allclose(nmf.nnls(x, w, tolerance=1e-12).numpy(), expected, atol=1e-8)


def test_parts_of_both_signs_reach_what_one_sign_cannot():
    x = double(300, 3, seed=1).abs() @ double(3, 10, seed=2)
    u, w = nmf.semi_nmf(x, 3, steps=3000, tolerance=1e-9)
    assert u.min() >= 0
    assert w.min() < 0
    assert float((x - u @ w).square().sum() / x.square().sum()) < 1e-2


@pytest.mark.parametrize(
    ("x", "k", "error", "words"),
    [
        (-torch.ones(5, 4), 2, DataError, "activations are negative here"),
        (torch.ones(5, 4) * torch.nan, 2, DataError, "NaN or Inf"),
        (torch.ones(5, 4), 5, UsageError, "n_components must be 1 to 4"),
    ],
)
def test_what_has_no_parts_is_refused(x, k, error, words):
    with pytest.raises(error, match=words):
        nmf.nmf(x, k)


# ---- CRAFT


@pytest.fixture(scope="module")
def found(net):
    cut = craft.crops(double(12, 3, 8, 8, seed=1), 4)
    return craft.bank(net, cut, sites.place(net, "6", cut.x, axis=1), 3, batch_size=16)


def test_crops_are_the_official_windows():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    found = craft.crops(x, 4)
    assert len(found) == 2 * 2 * 2  # at 0 and 3
    assert found.box.tolist()[:4] == [[0, 0, 4], [0, 3, 4], [3, 0, 4], [3, 3, 4]]
    assert found.image.tolist() == [0] * 4 + [1] * 4
    expected = nn.functional.interpolate(x[1:, :, 3:7, 0:4], size=(8, 8), mode="bilinear")
    torch.testing.assert_close(found.x[6:7], expected)
    with pytest.raises(UsageError, match="a side of 1 to 8 pixels, got 9"):
        craft.crops(x, 9)


def test_what_lies_behind_a_layer_gives_its_logits(net, images):
    for layer in ("0", "3", "6"):
        rest = behind(net, sites.place(net, layer, images, axis=1), images)
        torch.testing.assert_close(rest(net[: int(layer) + 1](images)), net(images))


def test_a_layer_before_a_batchnorm_is_taken_as_it_is(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    model = model.double().train()
    model(3 * images + 1)  # statistics that are far from none
    model.eval().requires_grad_(False)
    site, target = sites.place(model, "0", images, axis=1), torch.tensor([0, 1, 2, 0, 1, 2])
    a, c = factors(model, images, target, site, rule="epsilon")
    torch.testing.assert_close(a, model[0](images))
    found = attributions["lrp"](model, images, target, [site], rule="epsilon")[site]
    torch.testing.assert_close(a * c, found)
    torch.testing.assert_close(behind(model, site, images)(a), model(images))
    with pytest.raises(UsageError, match="is not what one layer writes"):
        behind(model, sites.place(model, "2", images, "in", axis=1), images)


def test_what_passes_by_a_layer_is_refused(small):
    case = small["vit"]
    site = sites.place(case.model, "blocks.1.fc2", case.data.x)
    with pytest.raises(ModelError, match=r"reads past layer 'blocks\.1\.fc2'"):
        behind(case.model, site, case.data.x)
    block = sites.place(case.model, "blocks.1", case.data.x, axis=-1)
    with torch.no_grad(), hooks.recorded(case.model, [block]) as seen:
        expected = case.model(case.data.x)
        held = hooks.gather(block, seen[block]).movedim(1, -1)
    found = behind(case.model, block, case.data.x)(held)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_concept_maps_are_least_squares_at_each_position(net, images, found):
    maps = craft.concept_maps(net, images, found, batch_size=4)
    a = net[:7](images)
    at = a[3, :, 1, 2]
    np.testing.assert_allclose(maps[3, :, 1, 2], one_row(found.w.T.numpy(), at.numpy())[0], atol=1e-6)


def asked(model, x, found):
    """What importances are of: what lies behind the site, the maps of images, and the concepts."""
    return behind(model, found.site, x[:2]), craft.concept_maps(model, x, found), found


def test_the_exact_importance_is_that_of_a_linear_head(net, images, found):
    given = asked(net, images, found)
    total = craft.importance(*given, 1)
    u = given[1].flatten(2).mean(2)
    effect = u * (found.w @ net[9].weight[1])
    torch.testing.assert_close(total, effect**2 / (effect**2).sum(1, keepdim=True))
    for how, n, off in (("sobol", 256, 0.01), ("compat", 32, 0.3)):
        near = craft.importance(*given, 1, how=how, n_designs=n)
        assert (near - total).abs().max() < off
    torch.testing.assert_close(craft.importance(*given, 1, batch_size=7), total)


def test_a_head_that_is_not_linear_has_no_exact_importance(net, images):
    cut = craft.crops(images, 4)
    early = craft.bank(net, cut, sites.place(net, "3", cut.x, axis=1), 3)
    with pytest.raises(UsageError, match="not linear in the concepts of layer '3'"):
        craft.importance(*asked(net, images, early), 1)
    assert craft.importance(*asked(net, images, early), 1, how="sobol", n_designs=16).isfinite().all()


def test_a_concept_is_taken_apart_at_an_earlier_layer(net, found):
    cut = craft.crops(double(12, 3, 8, 8, seed=1), 4)
    earlier = sites.place(net, "3", cut.x, axis=1)
    inner = craft.recursed(net, cut, found, 0, earlier, 2)
    most = found.u[:, 0].argsort(descending=True)[:5]
    expected = craft.bank(net, cut[most], earlier, 2)
    torch.testing.assert_close(inner.w, expected.w)
    assert len(inner.u) == round(0.1 * len(cut))


def test_concepts_behind_a_gelu_have_both_signs(small):
    case = small["vit"]
    cut = craft.crops(case.data.x, 4)
    place = sites.place(case.model, "blocks.1", cut.x, axis=-1)
    found = craft.bank(case.model, cut, place, 4)
    assert found.w.min() < 0
    assert found.u.min() >= 0
    total = craft.importance(*asked(case.model, case.data.x[:2], found), 1, how="sobol", n_designs=8)
    assert total.shape == (2, 4)


# ---- Matching


def test_concepts_are_matched_by_what_they_find_in_crops():
    one = double(50, 4, seed=1).abs()
    other = one[:, [2, 0, 3]] * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    found = matched(one, other)
    assert found.pairs.tolist() == [[0, 1], [2, 0], [3, 2]]
    torch.testing.assert_close(found.likeness, torch.ones(3, dtype=torch.float64))
    assert matched(one, torch.zeros(50, 2)).likeness.tolist() == [0, 0]
    with pytest.raises(DataError, match="concepts of 50 crops can't be held against those of 49"):
        matched(one, other[:49])
