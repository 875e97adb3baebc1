"""Masks and recordings on networks small enough to check by hand."""

import pytest
import torch
from torch import nn

from sukashi import hooks, sites
from sukashi.architectures import CifarResNet, DigitsCNN, DigitsViT
from sukashi.errors import ModelError, UsageError
from sukashi.types import Mask


class Dense(nn.Module):
    """Two convolutions side by side that one consumer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 3, 3)
        self.right = nn.Conv2d(1, 2, 3)
        self.reader = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.reader(x).relu().mean((2, 3)))


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("make", [lambda: DigitsCNN(10, 4), lambda: DigitsViT(10, 8, depth=1, n_heads=2), Dense])
def test_a_zero_gate_makes_the_consumers_read_zero_and_nothing_else_changes(make):
    torch.manual_seed(0)
    model = make().eval()
    found = sites.find(model, images()).sites
    site = found[0]
    keep = torch.ones(site.n_units, dtype=torch.bool)
    keep[1] = False
    with torch.no_grad(), hooks.record(model, [site]) as dense:
        model(images())
    before = {name: x.clone() for name, x in dense[site].items()}
    with torch.no_grad(), hooks.masked(model, Mask({site: keep})), hooks.record(model, [site]) as seen:
        model(images())
    assert set(seen[site]) == {member.module for member in site.consumers}
    reader = site.consumers[0]
    axis = hooks.channel_axis(model.get_submodule(reader.module))
    per_unit = seen[site][reader.module].unflatten(axis, (site.n_units, -1)).movedim(axis - (axis < 0), 0)
    per_unit_before = before[reader.module].unflatten(axis, (site.n_units, -1)).movedim(axis - (axis < 0), 0)
    assert not per_unit[1].any()
    assert per_unit_before[1].any()
    assert torch.equal(per_unit[keep], per_unit_before[keep])


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("make", [lambda: DigitsCNN(10, 2), lambda: DigitsViT(10, 4, depth=1, n_heads=2)])
def test_gates_are_differentiable(make, rows):
    torch.manual_seed(0)
    model = make().double().eval()
    found = sites.find(model, images()).sites
    x = images(2).double()
    values = [torch.rand(*rows, site.n_units, dtype=torch.float64, requires_grad=True) for site in found]
    with torch.no_grad():
        values[0][..., 0] = 0  # where a gate is zero its derivative is not

    def logits(*gates):
        with hooks.masked(model, dict(zip(found, gates, strict=True))):
            return model(x)

    assert torch.autograd.gradcheck(logits, values, fast_mode=True)
    (gradient,) = torch.autograd.grad(logits(*values).square().sum(), values[0])
    assert gradient[..., 0].abs().max() > 0


def test_a_row_of_gates_acts_on_its_own_image():
    torch.manual_seed(0)
    model = CifarResNet(20, 10).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = sites.find(model, x).sites
    gates = {site: torch.rand(3, site.n_units).round() for site in found}
    with torch.no_grad(), hooks.masked(model, gates):
        together = model(x)
    for row in range(3):
        with torch.no_grad(), hooks.masked(model, {site: gate[row] for site, gate in gates.items()}):
            torch.testing.assert_close(model(x[row : row + 1]), together[row : row + 1], rtol=1e-12, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-6


def test_sites_that_share_a_consumer_act_together():
    torch.manual_seed(0)
    model = Dense().eval()
    left, right, _ = sites.find(model, images()).sites
    gates = {left: torch.tensor([0.0, 1.0, 0.5]), right: torch.rand(3, 2)}
    with torch.no_grad():
        x = torch.cat([model.left(images()), model.right(images())], 1).relu()
        whole = torch.cat([gates[left].expand(3, 3), gates[right]], 1)
        expected = model.head(model.reader(x * whole[:, :, None, None]).relu().mean((2, 3)))
        with hooks.masked(model, gates):
            torch.testing.assert_close(model(images()), expected)


def test_hooks_go_even_when_something_fails():
    model = Dense().eval()
    site = sites.find(model, images()).sites[0]
    assert n_hooks(model) == 0
    gate = {site: torch.ones(3)}

    def fail() -> None:
        with hooks.masked(model, gate), hooks.record(model, [site]):
            assert n_hooks(model) == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError):
        hooks.calls(model, torch.zeros(1, 7, 8, 8))
    assert n_hooks(model) == 0


def test_gates_of_another_shape_are_refused():
    model = Dense().eval()
    site = sites.find(model, images()).sites[0]
    with pytest.raises(UsageError, match=r"\(4,\)"), hooks.masked(model, {site: torch.ones(4)}):
        pass
    with pytest.raises(ModelError, match="2 images"), hooks.masked(model, {site: torch.ones(2, 3)}):
        model(images(3))


def test_calls_are_listed_in_order_and_as_often_as_made():
    conv = nn.Conv2d(1, 1, 1)
    model = nn.Sequential(conv, nn.Sequential(nn.ReLU()), conv, nn.Flatten())
    assert hooks.calls(model, images()) == ["0", "1", "1.0", "0", "3"]
