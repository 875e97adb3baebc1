"""Masks and recordings on networks small enough to check by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sukashi.core.errors import ModelError, UsageError
from sukashi.core.types import Mask, Member, Site
from sukashi.models.architectures import CifarResNet, DigitsCNN, DigitsViT
from sukashi.network import hooks, sites


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
    first = replace(site, members=site.consumers[:1])  # what a later reader sees depends on the first
    with torch.no_grad(), hooks.recorded(model, [first]) as dense:
        model(images())
    with torch.no_grad(), hooks.ablated(model, Mask({site: keep})), hooks.recorded(model, [first]) as seen:
        model(images())
    before, after = hooks.gather(first, dense[first]), hooks.gather(first, seen[first])
    assert not after[:, 1].any()
    assert before[:, 1].any()
    assert torch.equal(after[:, keep], before[:, keep])


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
        with hooks.ablated(model, dict(zip(found, gates, strict=True))):
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
    with torch.no_grad(), hooks.ablated(model, gates):
        together = model(x)
    for row in range(3):
        with torch.no_grad(), hooks.ablated(model, {site: gate[row] for site, gate in gates.items()}):
            torch.testing.assert_close(model(x[row : row + 1]), together[row : row + 1], rtol=1e-12, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-6


class Inplace(nn.Module):
    """What is written and what is read is overwritten right after."""

    def __init__(self) -> None:
        super().__init__()
        self.overwrites = False
        self.first = nn.Conv2d(1, 3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(3, 2, 3)
        self.beside = nn.Conv2d(3, 2, 3)
        self.head = nn.Linear(2 * 16, 3)

    def forward(self, x):
        x = F.gelu(self.first(x).add_(1))
        out = self.second(x) + self.beside(x)
        x = x.mul_(2) if self.overwrites else x * 2
        return self.head((self.relu(out) + x.mean()).flatten(1))


def members(name: str, n_units: int, side: str, n_positions: int = 1) -> Member:
    index = tuple(tuple(range(u * n_positions, (u + 1) * n_positions)) for u in range(n_units))
    return Member(name, side, index, -1 if name == "head" else 1)


READ = Site("first", "channel", 3, 1, tuple(members(name, 3, "in") for name in ("second", "beside")))
FLAT = Site("second", "channel", 2, 1, (members("second", 2, "out"), members("head", 2, "in", 16)))


@pytest.mark.parametrize("frozen", [False, True])
def test_taps_keep_what_layers_that_work_in_place_overwrite_and_the_gradient_there(frozen):
    torch.manual_seed(0)
    model = Inplace().double().eval().requires_grad_(not frozen)
    x = images().double()
    written, pixels = sites.place(model, "first", x), sites.input_site(x)

    def taken(*places):
        """Values and slopes of the first logits at each site, as units."""
        with hooks.recorded(model, places) as seen:
            total = model(x)[:, 0].sum()
        tensors = [tensor for site in places for tensor in seen[site]]
        slopes = dict(zip(tensors, torch.autograd.grad(total, tensors), strict=True))
        assert torch.equal(total, plain)
        return [
            (hooks.gather(site, seen[site]), hooks.gather(site, [slopes[t] for t in seen[site]])) for site in places
        ]

    # The same network in steps that overwrite nothing.
    plain = model(x)[:, 0].sum()
    given = x.clone().requires_grad_()
    before = model.first(given)
    a = F.gelu(before + 1)
    one, two = a.clone(), a.clone()
    sum_ = model.second(one) + model.beside(two)
    out = sum_.relu() + 2 * a.mean()
    values = [given, before, one, two, out]
    slopes = torch.autograd.grad(model.head(out.flatten(1))[:, 0].sum(), values)

    (output,) = taken(written)
    reads, flat, input_ = taken(READ, FLAT, pixels)
    model.overwrites = True
    with pytest.raises(ModelError, match="what layer 'second' reads is overwritten"):
        taken(READ)
    for found, expected in [(output, (before, slopes[1])), (input_, (given, slopes[0]))]:
        torch.testing.assert_close(found, expected)
    for found, expected in zip(reads, [(one, two), slopes[2:4]], strict=True):
        torch.testing.assert_close(found, torch.cat([part.flatten(2) for part in expected], 2))
    for found, expected in zip(flat, [out, slopes[4]], strict=True):
        torch.testing.assert_close(found, expected.flatten(2))
    with pytest.raises(UsageError, match="'first' is given twice"), hooks.recorded(model, [READ, READ]):
        pass


class Twice(nn.Module):
    """A layer called twice, one that hooks never see, one that gives a pair, and one that folds images into rows."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.windows = nn.Linear(4, 4)

    def forward(self, x):
        x = self.again(self.again(x))
        x = self.attention(x, x, x)[0]
        return self.windows(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


@pytest.mark.parametrize(
    ("site", "error", "words"),
    [
        (Site("again", "hidden", 4, -1), ModelError, "'again' is called 2 times in one pass"),
        (Site("attention.out_proj", "hidden", 4, -1), ModelError, "'attention.out_proj' is called 0 times"),
        (Site("attention", "hidden", 4, -1), ModelError, "'attention' holds a tuple"),
        (Site("windows", "hidden", 4, -1), ModelError, "'windows' holds 6 rows for 2 images"),
        (Site("again", "weight", 4, -1), UsageError, "holds single weights, not activations"),
    ],
)
def test_what_a_tap_would_get_wrong_is_refused(site, error, words):
    model, x = Twice().eval(), torch.randn(2, 3, 4)
    with pytest.raises(error, match=words), hooks.recorded(model, [site]):
        model(x)
    assert n_hooks(model) == 0
    model(x)


class Windows(nn.Module):
    """Layers that read rows of an image in a batch, and one that reads images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.windows = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        folded = self.first(x).flatten(0, 1)
        for layer in self.windows:
            folded = layer(folded)
        return folded.unflatten(0, x.shape[:2]).mean(1)


@pytest.mark.parametrize("acts", [False, True])
def test_all_layers_in_which_images_are_not_apart_are_refused_at_once(acts):
    model, x = Windows().eval(), torch.randn(2, 3, 4)
    readers = [Member(f"windows.{i}", "in", tuple((u,) for u in range(4)), -1) for i in range(3)]
    sites = [Site(reader.module, "hidden", 4, -1, (replace(reader, side="out"), reader)) for reader in readers]
    good = Site("first", "hidden", 4, -1)
    words = (
        r"layer 'windows\.0' holds 6 rows for 2 images: single images .* such layers \(`exclude=\['windows\.\*'\]`\)$"
    )
    inside = (
        (lambda sites: hooks.ablated(model, {site: torch.ones(2, 4) for site in sites}))
        if acts
        else (lambda sites: hooks.recorded(model, sites))
    )
    with pytest.raises(ModelError, match=words), inside([good, *sites]):
        model(x)
    with inside([good]):
        model(x)


def test_a_tap_of_a_layer_that_is_not_there_or_is_called_by_keyword_is_refused():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(input=x)

    model = ByKeyword()
    with (
        pytest.raises(ModelError, match="'conv' is called by keyword"),
        hooks.recorded(model, [Site("conv", "channel", 2)]),
    ):
        model(images())
    with pytest.raises(ModelError, match="no layer 'gone'"), hooks.recorded(model, [Site("gone", "channel", 2)]):
        pass
    assert n_hooks(model) == 0


def test_sites_that_share_a_consumer_act_together():
    torch.manual_seed(0)
    model = Dense().eval()
    left, right, _ = sites.find(model, images()).sites
    gates = {left: torch.tensor([0.0, 1.0, 0.5]), right: torch.rand(3, 2)}
    with torch.no_grad():
        x = torch.cat([model.left(images()), model.right(images())], 1).relu()
        whole = torch.cat([gates[left].expand(3, 3), gates[right]], 1)
        expected = model.head(model.reader(x * whole[:, :, None, None]).relu().mean((2, 3)))
        with hooks.ablated(model, gates):
            torch.testing.assert_close(model(images()), expected)


def test_hooks_go_even_when_something_fails():
    model = Dense().eval()
    site = sites.find(model, images()).sites[0]
    assert n_hooks(model) == 0
    gate = {site: torch.ones(3)}

    def fail() -> None:
        with hooks.ablated(model, gate), hooks.recorded(model, [site]):
            assert n_hooks(model) == 6
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
    with pytest.raises(UsageError, match=r"\(4,\)"), hooks.ablated(model, {site: torch.ones(4)}):
        pass
    with pytest.raises(ModelError, match="2 images"), hooks.ablated(model, {site: torch.ones(2, 3)}):
        model(images(3))


def test_a_visitor_is_shown_every_call_and_leaves_with_the_context():
    layer = nn.Linear(3, 3)
    model, seen = nn.Sequential(layer, nn.ReLU(), layer), []
    x = torch.randn(2, 3, requires_grad=True)
    with hooks.visited(model, {"0": seen.append}):
        y = model(x)
    model(x)
    assert len(seen) == 2
    assert torch.equal(seen[0], x)
    assert torch.equal(layer(seen[1]), y)
    assert not any(read.requires_grad for read in seen)


def test_calls_are_listed_in_order_and_as_often_as_made():
    conv = nn.Conv2d(1, 1, 1)
    model = nn.Sequential(conv, nn.Sequential(nn.ReLU()), conv, nn.Flatten())
    assert hooks.calls(model, images()) == ["0", "1", "1.0", "0", "3"]
