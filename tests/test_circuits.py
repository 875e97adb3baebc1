"""Circuits: nodes and edges counted by hand, planted circuits found, classes in one batch as one by one."""

import pytest
import torch
from torch import nn

from sukashi import models
from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.core.types import Batch
from sukashi.decompositions import circuits
from sukashi.decompositions.circuits import accuracy, balanced, edges, find_circuits, random_masks
from sukashi.decompositions.nodes import nodes_of
from sukashi.models.architectures import DigitsCNN, DigitsViT
from sukashi.network import hooks


def a_model(kind, n_classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (DigitsCNN(n_classes, 8) if kind == "cnn" else DigitsViT(n_classes, 16)).eval().requires_grad_(False)


def a_batch(n=60, n_classes=3, seed=1, dtype=torch.float32):
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Batch(x, torch.arange(n) % n_classes, tuple(map(str, range(n))))


def test_the_eight_places_of_every_block():
    model, x = a_model("vit"), a_batch().x
    nodes = nodes_of(model, x)
    assert nodes.kinds == ("norm1", "q", "k", "v", "attn_out", "norm2", "mlp_act", "mlp_out") * 3
    assert [place.n_units for place in nodes.places] == [16, 4, 4, 4, 16, 16, 32, 16] * 3
    assert nodes.n_nodes == 3 * (4 * 16 + 3 * 4 + 32)
    assert [layer.name for layer in nodes.layers] == [
        f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "fc1", "fc2")
    ]
    # A DeiT-B's would be 12 (4 768 + 3072 + 36).
    timm = models.load("sukashi:small_vit", n_classes=3, width=16).model.eval()
    assert nodes_of(timm, torch.randn(2, 3, 64, 64)).n_nodes == 6 * (4 * 16 + 3 * 4 + 32)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_all_on_is_the_network_bit_for_bit_and_all_off_is_a_constant(kind):
    model, data = a_model(kind), a_batch()
    nodes = nodes_of(model, data.x)
    means = hooks.means(model, nodes.places, data.x.split(16))
    with torch.no_grad():
        plain = model(data.x)
        whose = torch.zeros(len(data), dtype=torch.long)
        with hooks.ablated(model, circuits.gated(nodes, torch.ones(1, nodes.n_nodes), whose), means):
            assert torch.equal(model(data.x), plain)
        with hooks.ablated(model, circuits.gated(nodes, torch.zeros(1, nodes.n_nodes), whose), means):
            off = model(data.x)
    if kind == "cnn":
        torch.testing.assert_close(off, off[:1].expand_as(off))
    whole = accuracy(model, nodes, data, [0, 2], None, means)
    assert torch.equal(
        accuracy(model, nodes, data, [0, 2], torch.ones(2, nodes.n_nodes, dtype=torch.bool), means), whole
    )


def inside(mask, model, kind):
    """{layer: (which of its inputs, which of its outputs are active)}, by the order of nodes, written out by hand."""
    on = mask.tolist()
    if kind == "cnn":  # two residual convolutions share 8 channels, then 8 channels, then 16 hidden units
        a, b, c = on[:8], on[8:16], on[16:]
        pixels = [channel for channel in b for _ in range(16)]
        return {"conv1": ([True], a), "conv2": (a, a), "conv3": (a, b), "fc1": (pixels, c), "fc2": (c, [True] * 3)}
    if kind == "grouped":  # 6 channels of a depthwise convolution and of the one before it, then 4
        a, b = on[:6], on[6:]
        return {"a": ([True], a), "b": (a, a), "c": (a, b), "head": (b, [True] * 3)}
    found = {}
    for i in range(3):
        start = iter(on[108 * i : 108 * (i + 1)])
        norm1, q, k, v, out, norm2, act, mlp = ([next(start) for _ in range(n)] for n in (16, 4, 4, 4, 16, 16, 32, 16))
        heads = [[head for head in of for _ in range(4)] for of in (q, k, v)]
        found[f"blocks.{i}.attn.qkv"] = norm1, [*heads[0], *heads[1], *heads[2]]
        found[f"blocks.{i}.attn.proj"] = heads[2], out
        found[f"blocks.{i}.fc1"] = norm2, act
        found[f"blocks.{i}.fc2"] = act, mlp
    return found


def literal_edges(model, mask, ends, kind):
    """Weight by weight."""
    kept = total = 0
    for name, (reads, writes) in inside(mask, model, kind).items():
        module = model.get_submodule(name)
        groups = getattr(module, "groups", 1)
        for o, row in enumerate(module.weight):
            for i, entry in enumerate(row):
                at = (o // (len(module.weight) // groups)) * len(row) + i
                active = writes[o] and (ends == "out" or reads[at])
                kept += int((entry != 0).sum()) * active
                total += entry.numel()
    return kept / total


class Grouped(nn.Module):
    """A depthwise convolution between two others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ["cnn", "vit", "grouped"])
@pytest.mark.parametrize("ends", ["both", "out"])
def test_edges_are_counted_weight_by_weight(kind, ends):
    torch.manual_seed(0)
    model = Grouped().eval() if kind == "grouped" else a_model(kind)
    nodes = nodes_of(model, a_batch().x)
    with torch.no_grad():
        for layer in nodes.layers:
            weight = model.get_submodule(layer.name).weight
            weight.mul_(torch.rand(weight.shape) < 0.6)
    masks = torch.rand(3, nodes.n_nodes) < 0.5
    masks[2] = True
    found = edges(model, nodes, masks, ends=ends)
    for k in range(3):
        assert found[k].item() == pytest.approx(literal_edges(model, masks[k], ends, kind), abs=1e-12)


def test_v_of_a_head_is_what_the_output_layer_reads_of_it():
    model = a_model("vit")
    nodes = nodes_of(model, a_batch().x)
    norm1, q, _, v = (4 * 16 + 3 * 4 + 32 + at for at in (0, 16, 20, 24))  # where those of the second block begin
    proj = next(layer for layer in nodes.layers if layer.name == "blocks.1.attn.proj")
    assert proj.reads == tuple(v + i // 4 for i in range(16))
    qkv = next(layer for layer in nodes.layers if layer.name == "blocks.1.attn.qkv")
    assert qkv.writes == tuple(q + 4 * part + i // 4 for part in range(3) for i in range(16))
    assert qkv.reads == tuple(norm1 + i for i in range(16))


def test_a_planted_circuit_is_found_exactly():
    """Of each of three parts of a hidden layer one class is read; the rest is read by nobody."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].weight.copy_(0.05 * torch.randn(24, 64, generator=generator))
        model[1].bias.zero_()
        model[3].weight.zero_()
        model[3].bias.zero_()
        for k in range(3):
            model[1].weight[4 * k] = 0
            model[1].weight[4 * k, k] = 5.0  # pixel k says class k
            model[3].weight[k, 4 * k] = 4.0
    x = torch.zeros(120, 1, 8, 8)
    target = torch.arange(120) % 3
    x.flatten(1)[torch.arange(120), target] = 1
    x += 0.01 * torch.randn(x.shape, generator=generator)
    data = Batch(x, target, tuple(map(str, range(120))))
    nodes = nodes_of(model, data.x)
    assert nodes.n_nodes == 24
    means = hooks.means(model, nodes.places, [data.x])
    found = find_circuits(model, nodes, data, [0, 1, 2], means, penalty=0.02, epochs=60, lr=0.05)
    assert [of.nonzero()[:, 0].tolist() for of in found] == [[0], [4], [8]]
    assert accuracy(model, nodes, data, [0, 1, 2], found, means).all()


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_classes_in_one_batch_are_as_one_by_one(kind):
    model, data = a_model(kind).double(), a_batch(dtype=torch.float64)
    nodes = nodes_of(a_model(kind), a_batch().x)
    means = hooks.means(model, nodes.places, data.x.split(16))
    given = {"penalty": 1e-4, "epochs": 3, "lr": 0.1, "batch_size": 8}
    together = find_circuits(model, nodes, data, [0, 1, 2], means, **given)
    assert 0 < together.double().mean() < 1
    for k in range(3):
        assert torch.equal(find_circuits(model, nodes, data, [k], means, **given)[0], together[k])
    assert torch.equal(find_circuits(model, nodes, data, [0, 1, 2], means, **given, rows=5), together)


def test_a_step_descends_the_loss_as_written():
    """The slope of the masks against one by one, literally."""
    model, data = a_model("cnn").double(), a_batch(12, dtype=torch.float64)
    nodes = nodes_of(a_model("cnn"), a_batch().x)
    means = hooks.means(model, nodes.places, [data.x])
    logits = torch.linspace(-1, 1, nodes.n_nodes, dtype=torch.float64)[None].clone().requires_grad_()
    images = balanced(data.target, 1, 4, 0)
    told, found = circuits._slope(model, nodes, data, [1], means, logits, images[None], 512)
    gate = (logits.detach() > 0).double()[0].requires_grad_()
    parts = gate.split([place.n_units for place in nodes.places])
    with hooks.ablated(model, dict(zip(nodes.places, parts, strict=True)), means):
        p = model(data.x[images]).softmax(1)[:, 1]
    has = (data.target[images] == 1).double()
    loss = -(has * p.log() + (1 - has) * (1 - p).log()).mean()
    (slope,) = torch.autograd.grad(loss, gate)
    share = logits.detach()[0].sigmoid()
    torch.testing.assert_close(found[0], slope * share * (1 - share), atol=1e-12, rtol=1e-8)
    assert told == pytest.approx(loss.item())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tasks_are_balanced_and_random_masks_as_large():
    target = torch.arange(40) % 4
    rows = balanced(target, 2, 10, 0)
    assert (target[rows[:10]] == 2).all()
    assert (target[rows[10:]] != 2).all()
    assert len(rows.unique()) == 20
    with pytest.raises(DataError, match="class 2 has 10 images and 30 others, a circuit needs 11"):
        balanced(target, 2, 11, 0)
    nodes = nodes_of(a_model("vit"), a_batch().x)
    masks = torch.rand(3, nodes.n_nodes, generator=torch.Generator().manual_seed(0)) < 0.3
    drawn = random_masks(nodes, masks, torch.Generator().manual_seed(1))
    sizes = [place.n_units for place in nodes.places]
    for one, other in zip(masks.split(sizes, 1), drawn.split(sizes, 1), strict=True):
        assert torch.equal(one.sum(1), other.sum(1))
    assert not torch.equal(masks, drawn)


def test_what_means_nothing_is_refused():
    model, data = a_model("cnn"), a_batch()
    nodes = nodes_of(model, data.x)
    means = hooks.means(model, nodes.places, [data.x])
    with pytest.raises(UsageError, match="penalty must be 0 or more, got -1"):
        find_circuits(model, nodes, data, [0], means, penalty=-1)
    with pytest.raises(DataError, match="class 7 has 0 images"):
        accuracy(model, nodes, data, [0, 7], None, means)
    cut = DigitsViT(3, 16).eval()
    core = cut.blocks[1].attn.core
    core.widths = (4, 4, 4, 3)
    cut.blocks[1].attn.qkv, cut.blocks[1].attn.proj = nn.Linear(16, 45), nn.Linear(15, 16)
    with pytest.raises(ModelError, match="several widths, 4, 4, 4, 3"):
        nodes_of(cut, data.x)
    with pytest.raises(ModelError):
        nodes_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), data.x)
