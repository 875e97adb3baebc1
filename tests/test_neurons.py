"""What is measured of single units, against literal loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from sukashi.attributions.gradient import gradient_x_activation
from sukashi.attributions.patching import patching
from sukashi.core.errors import DataError
from sukashi.core.types import Batch
from sukashi.measures.neurons import ablation_impact, class_variance, higher, label_entropy, selectivity
from sukashi.models.architectures import DigitsCNN, DigitsViT
from sukashi.network import hooks, sites


@pytest.mark.parametrize("ties", [False, True])
def test_selectivity_is_scikit_learns_area_for_each_unit_and_class(ties):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 7, generator=generator)
    a = a.mul(2).round() if ties else a
    target = torch.randint(0, 5, (200,), generator=generator)
    found = selectivity(a, target, 6)
    for unit in range(7):
        for k in range(5):
            assert found[unit, k] == pytest.approx(roc_auc_score(target == k, a[:, unit]), abs=1e-12)
    assert found[:, 5].isnan().all()
    assert selectivity(a[:3], torch.zeros(3, dtype=torch.long), 2).isnan().all()


def test_a_unit_that_is_low_in_a_class_tells_it_too():
    target = torch.arange(40) % 2
    a = torch.stack([target, 1 - target, torch.zeros(40)], 1).float()
    found, up = selectivity(a, target, 2), higher(a, target, 2)
    assert found.tolist() == [[0, 1], [1, 0], [0.5, 0.5]]
    assert found.where(up, 1 - found).tolist() == [[1, 1], [1, 1], [0.5, 0.5]]


def test_variance_and_entropy_are_literal_loops():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=generator) + torch.tensor([3.0, 0.5, 0.0, -5.0, 100.0])
    target = torch.randint(0, 3, (60,), generator=generator)
    target[0] = 3  # a class of one image
    variance, entropy = class_variance(a, target, 4), label_entropy(a, target, 4)
    for unit in range(5):
        of_class = [a[target == k, unit].double().numpy() for k in range(4)]
        for k, values in enumerate(of_class[:3]):
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
            literal = spread / mean if mean > 0 else math.nan
            assert variance[unit, k].item() == pytest.approx(literal, rel=1e-12, nan_ok=True)
        means = [np.mean([max(value, 0) for value in values]) for values in of_class]
        shares = [mean / sum(means) for mean in means] if sum(means) else [math.nan]
        literal = -sum(share * math.log(share) if share > 0 else 0 * share for share in shares)
        assert entropy[unit].item() == pytest.approx(literal, abs=1e-12, nan_ok=True)
    assert variance[:, 3].isnan().all()
    assert variance[3].isnan().all()
    assert entropy[3].isnan()


def test_small_variances_of_large_activations_are_not_lost():
    a = 1000 + 1e-3 * torch.tensor([0.0, 1.0, 2.0, 3.0] * 8)[:, None]
    found = class_variance(a, torch.zeros(32, dtype=torch.long), 1)
    values = a[:, 0].double().numpy()
    assert found.item() == pytest.approx(values.std(ddof=1) / values.mean(), rel=1e-9)
    assert found.item() > 0


def test_entropy_does_not_grow_with_the_number_of_images_of_a_class():
    a, target = torch.tensor([1.0, 1, 1, 1, 3])[:, None], torch.tensor([0, 0, 0, 0, 1])
    share = 1 / 4
    assert label_entropy(a, target, 2).item() == pytest.approx(
        -share * math.log(share) - (1 - share) * math.log(1 - share)
    )


def test_what_is_not_finite_is_refused():
    a = torch.tensor([[1.0], [math.nan]])
    for measure in (selectivity, class_variance, label_entropy):
        with pytest.raises(DataError, match="NaN"):
            measure(a, torch.tensor([0, 1]), 2)


def a_batch(n=12, channels=1, side=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, side, side, generator=generator)
    return Batch(x, torch.arange(n) % 3, tuple(map(str, range(n))))


@pytest.fixture(params=["cnn", "vit"])
def placed(request):
    """A network, and places in it: channels, hidden units, heads of several positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (DigitsCNN(3, 8) if request.param == "cnn" else DigitsViT(3, 16)).eval()
    x = a_batch().x
    if request.param == "cnn":
        return model, [sites.place(model, "bn1", x), sites.place(model, "fc1", x)]
    heads = [range(4 * head, 4 * head + 4) for head in range(4)]
    return model, [
        sites.place(model, "blocks.1.fc2", x, "in"),
        sites.place(model, "blocks.0.attn.core", x, units=heads),
        sites.place(model, "blocks.2.attn.core", x, "in", units=[[3, 5, 17], [1, 40, 47]]),
    ]


def test_patching_is_the_slope_towards_the_mean(placed):
    model, places = placed
    batch, model = a_batch(), model.double()
    batch = Batch(batch.x.double(), batch.target, batch.image_id)
    means = hooks.means(model, places, batch.x.split(5))
    found = patching(model, batch.x, batch.target, places, means, batch_size=5)
    for site in places:
        for unit in range(site.n_units):
            off = []
            for step in (1e-6,) if model.__class__ is DigitsCNN else (0.02, 0.01):
                gate = torch.ones(site.n_units, dtype=torch.float64)
                gate[unit] -= step
                with torch.no_grad(), hooks.ablated(model, {site: gate}, {site: means[site]}):
                    moved = model(batch.x)
                with torch.no_grad():
                    fall = model(batch.x) - moved
                off.append(fall[torch.arange(len(batch)), batch.target] / step - found[site][:, unit])
            # The first-order error halves with the step; a ReLU has kinks between, or no error at all.
            assert off[-1].abs().sum() <= 0.6 * off[0].abs().sum() + 1e-9 or len(off) == 1
            assert off[-1].abs().max() < (0.05 if len(off) == 2 else 1e-6) * found[site].abs().max() + 1e-9
    zero = {site: torch.zeros_like(means[site]) for site in places}
    plain = gradient_x_activation(model, batch.x, batch.target, places)
    for site, of in patching(model, batch.x, batch.target, places, zero).items():
        torch.testing.assert_close(of, plain[site].flatten(2).sum(2) if plain[site].dim() > 2 else plain[site])


def test_impact_is_that_of_all_units_of_a_class_at_once(placed):
    model, (site, *_) = placed
    batch = a_batch()
    means = hooks.means(model, [site], batch.x.split(5))[site]
    without = torch.zeros(3, site.n_units, dtype=torch.bool)
    without[0, :3] = without[1, 2:4] = True
    found = ablation_impact(model, batch, site, without, means)
    for row in range(len(batch)):
        x, k = batch.x[row : row + 1], int(batch.target[row])
        with torch.no_grad():
            whole = model(x)[0].double()
            with hooks.ablated(model, {site: ~without[k]}, {site: means}):
                left = model(x)[0].double()
        assert found[row].item() == pytest.approx(float((whole[k] - left[k]) / whole.norm()), abs=1e-6)
    assert found[batch.target == 2].abs().max() == 0


def test_a_dead_network_is_no_cause_for_a_crash():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    for layer in (1, 3):
        nn.init.zeros_(model[layer].weight)
        nn.init.zeros_(model[layer].bias)
    batch = a_batch()
    site = sites.place(model, "1", batch.x)
    found = ablation_impact(model, batch, site, torch.ones(3, 4, dtype=torch.bool), torch.zeros(4, 1))
    assert found.isnan().all()
