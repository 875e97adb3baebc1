"""Sparse autoencoders: gradients against autograd, what a batch keeps, planted dictionaries, latents as units."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sukashi import models
from sukashi.core.errors import DataError, UsageError
from sukashi.decompositions.sae import AUXILIARY, IDLE, SparseAutoencoder, largest, latents, quality
from sukashi.models.architectures import DigitsCNN, DigitsViT
from sukashi.network import hooks, sites
from sukashi.training.autoencoder import fit_autoencoder


def a_sae(n_features=6, n_latents=20, k=3, seed=0, dtype=torch.float64):
    return SparseAutoencoder(n_features, n_latents, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(n=40, d=6, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def literal_loss(sae, x, dead):
    """By dense autograd, as it is written."""
    z = (x - sae.mean) / sae.scale
    pre = z @ sae.encoder.T + sae.encoder_bias

    def kept(values, n):
        flat = values.clamp(min=0).flatten()
        order = flat.argsort(descending=True, stable=True)[:n]
        return torch.zeros_like(flat).index_copy(0, order, flat[order]).view_as(values)

    left = kept(pre, sae.k * len(x)) @ sae.decoder + sae.decoder_bias - z
    loss = left.square().mean()
    if dead.any():
        some = kept(pre.where(dead, 0), max(1, x.shape[1] // 2) * len(x))
        loss = loss + AUXILIARY * (left.detach() + some @ sae.decoder).square().mean()
    return loss


@pytest.mark.parametrize("dead", [False, True])
def test_a_step_has_the_gradients_of_dense_autograd(dead):
    sae, x = a_sae(), rows()
    with torch.no_grad():
        sae.decoder_bias += rows(1)[0]
        sae.encoder_bias += rows(1, 20)[0] / 10
    sae.standardise(x)
    sae.idle[4:9] = IDLE if dead else IDLE - 1
    twin = copy.deepcopy(sae)
    loss = literal_loss(twin, x, sae.idle >= IDLE)
    wanted = dict(zip(dict(twin.named_parameters()), torch.autograd.grad(loss, list(twin.parameters())), strict=True))
    wanted["decoder"] -= (wanted["decoder"] * twin.decoder).sum(1, keepdim=True) * twin.decoder
    found = sae.step(x)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
def test_the_largest_are_those_of_a_sort(n):
    pre = torch.randn(50, 60, generator=torch.Generator().manual_seed(n)).mul(8).round()  # with ties
    active = largest(pre, n)
    flat = pre.clamp(min=0).flatten()
    order = flat.argsort(descending=True, stable=True)[:n]
    order = order[flat[order] > 0].sort().values
    assert torch.equal(active.rows * 60 + active.columns, order)
    assert torch.equal(active.values, flat[order])


def test_nothing_positive_is_nothing_active():
    sae = a_sae()
    with torch.no_grad():
        sae.encoder_bias -= 100
    assert sae.step(rows()).isfinite()
    assert sae.encoder.grad.abs().max() == 0
    assert sae.threshold == -1


def trained(x, n_latents, k, n_steps=600, size=256, rate=3e-3):
    sae = a_sae(x.shape[1], n_latents, k, dtype=x.dtype)
    sae.standardise(x)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(sae.parameters(), lr=rate)
    for _ in range(n_steps):
        sae.step(x[torch.randint(len(x), (size,), generator=generator)])
        optimiser.step()
        sae.settle()
    return sae


def planted(n=6000, d=24, n_atoms=32, n_active=3):
    generator = torch.Generator().manual_seed(3)
    atoms = F.normalize(torch.randn(n_atoms, d, generator=generator), dim=1)
    at = torch.rand(n, n_atoms, generator=generator).argsort(1)[:, :n_active]
    code = torch.zeros(n, n_atoms).scatter_(1, at, 0.5 + torch.rand(n, n_active, generator=generator))
    return code @ atoms, atoms


def test_a_planted_dictionary_is_recovered_and_held_out_rows_are_explained():
    x, atoms = planted()
    sae = trained(x[:5000], 64, 3, n_steps=3000)
    cosine = atoms @ sae.decoder.T
    assert cosine.amax(1).min() > 0.99
    found = quality(sae, x[5000:])
    assert found.explained > 0.97
    assert 2 < found.active < 4
    with torch.no_grad():
        off = (sae(x[5000:]) - x[5000:]).square().sum() / (x[5000:] - x[5000:].mean(0)).square().sum()
        fires = (sae.encode(x[5000:]) > 0).any(0)
    assert found.nmse == pytest.approx(float(off), rel=1e-5)
    assert found.dead == pytest.approx(1 - float(fires.double().mean()))
    assert torch.allclose(sae.decoder.norm(dim=1), torch.ones(64))


def test_what_a_row_is_does_not_depend_on_others():
    x, _ = planted(500)
    sae = trained(x, 64, 3, n_steps=50)
    whole = sae.encode(x)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in x[:20]]), whole[:20])
    assert sae.threshold > 0


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_latents_are_units_and_nothing_changes_by_itself(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (DigitsCNN(3, 8) if kind == "cnn" else DigitsViT(3, 16)).eval()
    layer, axis, size = ("bn2", 1, 8) if kind == "cnn" else ("blocks.1", -1, 16)
    sae = a_sae(size, 24, 2, dtype=torch.float32).requires_grad_(False)
    sae.threshold.fill_(0.3)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(x)
    with latents(model, layer, axis, sae) as site:
        assert torch.equal(model(x).detach(), plain)
        gate = torch.ones(24)
        gate[:12] = 0
        with hooks.recorded(model, [site]) as seen:
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), seen[site])
        assert slope.abs().max() > 0
        with torch.no_grad(), hooks.ablated(model, {site: gate}):
            cut = model(x)
    held = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: held.update(x=out))
    with torch.no_grad():
        model(x)
        handle.remove()
        features = held["x"].movedim(axis, -1)
        f = sae.encode(features)
        changed = features - (f[..., :12] @ sae.decoder[:12]) * sae.scale
        handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: changed.movedim(-1, axis))
        torch.testing.assert_close(model(x), cut)
        handle.remove()
    assert not torch.allclose(cut, plain)
    with torch.no_grad():
        assert torch.equal(model(x), plain)


def test_latents_may_be_those_of_the_class_token_alone():
    model = models.load("sukashi:small_vit", n_classes=3, width=16).model.eval()
    sae = a_sae(16, 24, 2, dtype=torch.float32).requires_grad_(False)
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    place = sites.place(model, "blocks.5", x, axis=-1)
    with torch.no_grad():
        plain = model(x)
    with latents(model, "blocks.5", -1, sae, slice(0, 1)) as site, torch.no_grad():
        assert torch.equal(model(x), plain)
        with hooks.recorded(model, [site, place]) as seen:
            model(x)
        assert seen[site][0].shape == (3, 24, 1)
        whole = seen[place][0]
        with hooks.ablated(model, {site: torch.zeros(24)}):
            changed = model(x)
    held = whole.movedim(1, -1).clone()  # (B, T, D)
    held[:, 0] -= sae.encode(held[:, 0]) @ sae.decoder * sae.scale
    handle = model.blocks[5].register_forward_hook(lambda m, a, out: held)
    with torch.no_grad():
        torch.testing.assert_close(model(x), changed)
    handle.remove()


def test_what_means_nothing_is_refused():
    with pytest.raises(UsageError, match="k must be 1 to the 20 latents, got 21"):
        a_sae(k=21)
    for x in (torch.ones(5, 6), torch.full((5, 6), torch.nan)):
        with pytest.raises(DataError, match="the same for all images, or not finite"):
            a_sae(dtype=torch.float32).standardise(x)
    with pytest.raises(DataError, match="nothing can be explained"):
        quality(a_sae(), rows(1).expand(4, -1))


def test_a_killed_training_ends_in_the_same_bits(tmp_path, monkeypatch):
    x, _ = planted(300)
    given = {"n_latents": 40, "k": 2, "epochs": 4, "batch_size": 64, "about": {"rows": "planted"}, "seconds": 0.0}
    whole = fit_autoencoder(x, **given, out=tmp_path / "whole")
    step, n_left = SparseAutoencoder.step, [7]

    def killed(self, rows):
        n_left[0] -= 1
        if not n_left[0]:
            raise KeyboardInterrupt
        return step(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoder, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_autoencoder(x, **given, out=tmp_path / "killed")
    resumed = fit_autoencoder(x, **given, out=tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(UsageError, match="rows"):
        fit_autoencoder(x, **{**given, "about": {"rows": "others"}}, out=tmp_path / "killed")
    with pytest.raises(DataError, match="two rows"):
        fit_autoencoder(x[:1], **given, out=tmp_path / "one")
