"""Criteria of the weights alone against loops over single numbers."""

import copy

import pytest
import torch

from sukashi.criteria import criteria


def score(name, case, seed=0, model=None):
    generator = torch.Generator().manual_seed(seed)
    return criteria[name](model or case.model, case.sites, case.data, generator=generator).values


@pytest.mark.parametrize("which", ["cnn", "vit"])
def test_magnitude_is_the_mean_absolute_weight_of_what_produces_a_unit(small, which):
    case = small[which]
    found = score("magnitude", case)
    n_producers = set()
    for site in case.sites:
        for unit in range(site.n_units):
            of_layers = []
            for member in site.members:
                layer = case.model.get_submodule(member.module)
                if member.side != "out" or not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                    continue
                of_rows = []
                for row in member.index[unit]:
                    numbers = layer.weight[row].flatten().tolist()
                    of_rows.append(sum(abs(number) for number in numbers) / len(numbers))
                of_layers.append(sum(of_rows) / len(of_rows))
            n_producers.add((len(of_layers), len(of_rows)))
            assert found[site][unit].item() == pytest.approx(sum(of_layers) / len(of_layers), rel=1e-12)
    # A residual stage has two producers, an inner dimension of attention three rows (q, k, v).
    assert n_producers == ({(2, 1), (1, 1)} if which == "cnn" else {(1, 3), (1, 1)})


def test_magnitude_leaves_normalisation_and_biases_out(small):
    model = copy.deepcopy(small["cnn"].model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(1)
    before, after = score("magnitude", small["cnn"]), score("magnitude", small["cnn"], model=model)
    assert all(torch.equal(before[site], after[site]) for site in before)


def test_random_is_uniform_and_drawn_from_its_generator_alone(small):
    case = small["vit"]
    draws = torch.stack([torch.cat(list(score("random", case, seed).values())) for seed in range(200)])
    assert draws.shape == (200, 72)
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    # 14,400 numbers: standard errors of mean and variance are 0.0024 and 0.0006; of a correlation, 0.07.
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert (torch.corrcoef(draws.T) - torch.eye(72)).abs().max() < 0.4
    torch.manual_seed(0)
    first = score("random", case, 3)
    torch.manual_seed(1)
    again = score("random", case, 3)
    assert all(torch.equal(first[site], again[site]) for site in case.sites)


@pytest.mark.parametrize("which", ["cnn weights", "vit weights"])
def test_magnitude_of_a_single_weight_is_its_size(small, which):
    case = small[which]
    found = score("magnitude", case)
    for site in case.sites:
        weight = case.model.get_submodule(site.layer).weight
        expected = [abs(number) for number in weight.flatten().tolist()]
        assert found[site].shape == weight.shape
        assert found[site].flatten().tolist() == expected
