"""Places: any layer's units recorded, attributed and ablated, beside literal twins that change one number at a time."""

import copy
import itertools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sukashi.attributions import attributions
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.files import Arrays, packed
from sukashi.core.types import Mask, Plan, Site
from sukashi.criteria.plans import plan_arrays, plan_of
from sukashi.models.architectures import DigitsCNN, DigitsViT, cifar_resnet18
from sukashi.network import hooks, sites, surgery
from sukashi.network.canonical import canonical
from sukashi.network.layers import explicit_attention
from sukashi.network.sites import place
from supported import randomised


def with_class_token():
    model = VisionTransformer(img_size=8, patch_size=4, in_chans=3, embed_dim=8, depth=2, num_heads=2, num_classes=5)
    explicit_attention(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # as they start they say next to nothing
    return model


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(make().eval()).double().requires_grad_(False)


MODELS = {
    "vit": made(with_class_token),
    "resnet": made(lambda: cifar_resnet18(5, 4)),
    "cnn": made(lambda: DigitsCNN(5, 4)),
}
SHAPES = {"vit": (3, 8, 8), "resnet": (3, 8, 8), "cnn": (1, 8, 8)}
CORE = MODELS["vit"].blocks[1].attn.core


def images(name, n=3):
    return torch.randn(n, *SHAPES[name], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# (network, layer, side, axis, units) -> kind, number of units, name.
PLACES = {
    ("resnet", "conv1", "out", None, None): ("channel", 4, "out[:, :]"),
    ("resnet", "layer2.0.conv1", "in", None, range(2, 4)): ("channel", 2, "in[:, 2:4]"),
    ("resnet", "relu", "in", 1, None): ("channel", 4, "in[:, :]"),
    ("resnet", "relu", "out", 1, None): ("channel", 4, "out[:, :]"),
    ("resnet", "layer1.0.bn1", "out", None, None): ("channel", 4, "out[:, :]"),
    ("resnet", "layer3", "out", 1, range(4, 12)): ("channel", 8, "out[:, 4:12]"),
    ("resnet", "layer2.1", "in", 1, (1, 5)): ("channel", 2, "in[2 units on axis 1, "),
    ("resnet", "fc", "in", None, None): ("hidden", 32, "in[..., :]"),
    ("resnet", "avgpool", "in", -1, None): ("hidden", 1, "in[..., :]"),
    ("resnet", "", "in", None, None): ("pixel", 3, "in[:, :]"),
    ("resnet", "", "out", 1, None): ("hidden", 5, "out[:, :]"),
    ("vit", "patch_embed.proj", "out", None, None): ("channel", 8, "out[:, :]"),
    ("vit", "blocks.0.norm1", "in", None, None): ("hidden", 8, "in[..., :]"),
    ("vit", "blocks.0.norm1", "in", 1, None): ("token", 5, "in[:, :]"),
    ("vit", "blocks.0.mlp.act", "out", -1, None): ("hidden", 32, "out[..., :]"),
    ("vit", "blocks.0", "out", 1, (0,)): ("token", 1, "out[:, 0]"),
    ("vit", "blocks.1", "in", -1, range(4)): ("hidden", 4, "in[..., 0:4]"),
    ("vit", "blocks.1.attn.core", "in", None, CORE.positions("q", 1)): ("head", 4, "in[..., 4:8]"),
    ("vit", "blocks.1.attn.core", "in", None, CORE.positions("v", 0)): ("head", 4, "in[..., 16:20]"),
    ("vit", "blocks.1.attn.core", "out", None, (range(4), range(4, 8))): ("hidden", 2, "out[2 units on axis -1, "),
    ("vit", "head", "in", None, None): ("hidden", 8, "in[..., :]"),
}
# Those that a convolutional network and a transformer take in one pass.
TOGETHER = {name: [key for key in PLACES if key[0] == name and key[1]] for name in ("vit", "resnet")}


def at(key):
    name, layer, side, axis, units = key
    return MODELS[name], place(MODELS[name], layer, images(name), side, axis=axis, units=units)


def altered(model, layer, side, change):
    """A copy in which `change` is applied to what a layer reads or writes, without hooks."""
    model = copy.deepcopy(model)
    module = model.get_submodule(layer)
    forward = module.forward
    module.forward = (lambda x: change(forward(x))) if side == "out" else (lambda x: forward(change(x)))
    return model


def held(key, x):
    """What a place holds, by its very indices."""
    name, layer, side, _, _ = key
    kept = []

    def look(value):
        kept.append(value.clone())
        return value

    altered(MODELS[name], layer, side, look)(x)
    return kept[0]


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_a_place_says_what_it_is_and_is_recorded_as_one_would_index_it(key):
    kind, n_units, name = PLACES[key]
    model, site = at(key)
    x = images(key[0])
    assert (site.layer, site.kind, site.n_units, site.at[: len(name)]) == (key[1], kind, n_units, name)
    with hooks.recorded(model, [site]) as seen:
        model(x)
    found = hooks.gather(site, seen[site]).detach()
    value = held(key, x).movedim(site.axis, 1)
    for u, unit in enumerate(site.members[0].index):
        expected = torch.cat([value[:, p].reshape(len(x), -1) for p in unit], 1)
        assert torch.equal(found[:, u].reshape(len(x), -1), expected)


def removed(key, gate, fill):
    """The literal twin of a mask: every number of a unit replaced, one position after another."""
    _, site = at(key)
    gate = gate.double()

    def change(value):
        value = value.clone()
        for row, u in itertools.product(range(len(value)), range(site.n_units)):
            for r, p in enumerate(site.members[0].index[u]):
                g = gate[row, u] if gate.dim() == 2 else gate[u]
                f = fill if isinstance(fill, float) else fill[u] if fill.dim() == 1 else fill[u, r]
                part = value[row].movedim(site.axis - (site.axis > 0), 0)[p]
                part.copy_(g * part + (1 - g) * f)
        return value

    return altered(MODELS[key[0]], key[1], key[2], change)


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_a_mask_acts_at_every_place_and_fills_with_what_it_is_told(key):
    model, site = at(key)
    x, generator = images(key[0]), torch.Generator().manual_seed(2)
    n_positions = len(site.members[0].index[0])
    gates = [torch.rand(*rows, site.n_units, generator=generator, dtype=x.dtype) for rows in ((), (3,))]
    gates.append((torch.arange(site.n_units) % 2).bool())
    fills = [0.0, 0.7, torch.rand(site.n_units, generator=generator, dtype=x.dtype)]
    fills.append(torch.rand(site.n_units, n_positions, generator=generator, dtype=x.dtype))
    plain = model(x)
    for gate, fill in zip([*gates, gates[0]], fills, strict=True):
        with hooks.ablated(model, {site: gate}, fill if isinstance(fill, float) else {site: fill}):
            found = model(x)
        torch.testing.assert_close(found, removed(key, gate, fill)(x), rtol=1e-9, atol=1e-12)
        assert (found - plain).abs().max() > 1e-6
    with hooks.ablated(model, {site: torch.ones(site.n_units)}):
        torch.testing.assert_close(model(x), plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(model(x), plain)


def test_means_are_those_of_each_position_that_a_unit_is_read_at():
    model, x = MODELS["vit"], images("vit", 7)
    core = "blocks.1.attn.core"
    head = next(
        site for site in sites.find(model, x).sites if site.kind == "head" and site.layer.startswith("blocks.1")
    )
    tokens, whole = place(model, "blocks.0", x, axis=1), place(model, core, x, "out", units=[range(4), range(4, 8)])
    found = hooks.means(model, [head, tokens, whole], x.split(3))
    read, written = held(("vit", core, "in", None, None), x), held(("vit", core, "out", None, None), x)
    block = held(("vit", "blocks.0", "out", None, None), x)
    for c in range(8):
        expected = [sum(float(v) for v in read[:, :, part * 8 + c].flatten()) / 35 for part in range(3)]
        torch.testing.assert_close(found[head][c], torch.tensor(expected, dtype=torch.float64))
        assert found[whole][c // 4, c % 4] == pytest.approx(float(written[:, :, c].mean()))
    for t in range(5):
        assert found[tokens][t, 0] == pytest.approx(float(block[:, t].mean()))
    stage = next(site for site in sites.find(MODELS["resnet"], images("resnet")).sites if len(site.consumers) > 2)
    mean = hooks.means(MODELS["resnet"], [stage], [images("resnet")])[stage]
    for r, member in enumerate(stage.consumers):
        read = held(("resnet", member.module, "in", None, None), images("resnet"))
        for u in range(stage.n_units):
            assert float(mean[u, r]) == pytest.approx(float(read[:, u].mean())), "one reader after another"
    with pytest.raises(UsageError, match="no image to take means of"):
        hooks.means(model, [head], [])
    gone = torch.zeros(8)
    with hooks.ablated(model, {head: gone}, found), hooks.recorded(model, [head]) as seen:
        model(x)
    torch.testing.assert_close(hooks.means(model, [head], [x])[head], found[head])
    assert seen[head][0].std((0, 2)).max() < 1e-12


# Attributions.


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("method", ["saliency", "gradient_x_activation", "internal_influence", "conductance"])
def test_gradients_are_taken_at_places_of_every_kind(name, method):
    model, x, target = MODELS[name], images(name), torch.tensor([0, 3, 1])
    taken = [at(key)[1] for key in TOGETHER[name]]
    found = attributions[method](model, x, target, taken)
    assert list(found) == taken
    if method not in ("saliency", "gradient_x_activation"):
        assert all(values.isfinite().all() and values.abs().max() > 0 for values in found.values())
        return
    step = 1e-5
    for key, site in zip(TOGETHER[name], taken, strict=True):
        for u, row in ((0, 0), (site.n_units - 1, 2)):
            p = site.members[0].index[u][0]
            value = held(key, x).movedim(site.axis, 1)
            flat = found[site][row, u].flatten()
            spot = flat.abs().argmax() % value[0, p].numel()
            logits = []
            for sign in (1, -1):

                def change(v, shift=sign * step, site=site, p=p, row=row, spot=spot):
                    moved = v.movedim(site.axis, 1).clone()
                    moved[row, p].view(-1)[spot] += shift
                    return moved.movedim(1, site.axis)

                logits.append(altered(model, key[1], key[2], change)(x)[row, target[row]])
            slope = (logits[0] - logits[1]) / (2 * step)
            expected = slope.abs() if method == "saliency" else slope * value[row, p].flatten()[spot]
            assert float(flat[spot]) == pytest.approx(float(expected), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", TOGETHER)
def test_a_canonical_form_holds_at_a_place_what_the_model_does(name):
    model, x = MODELS[name], images(name)
    taken = [at(key)[1] for key in TOGETHER[name]]
    form = canonical(model, x, taken)
    with hooks.recorded(model, taken) as plain, hooks.recorded(form, taken) as seen:
        torch.testing.assert_close(form(x), model(x), rtol=1e-10, atol=1e-12)
    for site in taken:
        if site.layer != "conv1":  # its BatchNorm is folded into it
            torch.testing.assert_close(seen[site][0], plain[site][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lrp", "deeplift"])
def test_rules_reach_blocks_norms_and_attention(method):
    """The sum that a block ends with is a layer of the canonical form: the literal twin of the block's own place."""
    model, x, target = MODELS["vit"], images("vit"), torch.tensor([0, 3, 1])
    out, into = place(model, "blocks.0", x, axis=-1), place(model, "blocks.1", x, "in", axis=-1)
    token, norm = place(model, "blocks.0", x, axis=1), place(model, "norm", x)
    v = [place(model, "blocks.1.attn.core", x, "in", units=CORE.positions(part, 1)) for part in ("q", "v")]
    literal = Site("blocks.0.add_1", "hidden", 8, -1)
    found = attributions[method](model, x, target, [out, into, token, norm, literal, *v])
    for site in (out, into):
        torch.testing.assert_close(found[site], found[literal])
    torch.testing.assert_close(found[token], found[literal].transpose(1, 2))
    assert found[norm].shape == (3, 8, 5)
    assert not found[norm][:, :, 1:].any(), "the logits are read off the class token"
    assert all(found[site].shape == (3, 4, 5) and found[site].abs().max() > 0 for site in v)
    if method == "deeplift":
        change = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0]
        for site in (out, into, token, norm):
            torch.testing.assert_close(found[site].flatten(1).sum(1), change, rtol=1e-6, atol=1e-9)
    both = [out, place(model, "blocks.0", x, "in", axis=-1)]
    with pytest.raises(ModelError, match=r"both what block 'blocks.0' reads and what it writes"):
        attributions[method](model, x, target, both)


# Refusals.


class Twice(nn.Module):
    """A layer called twice, one never called, one that gives a pair."""

    def __init__(self):
        super().__init__()
        self.again, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        x = self.again(self.again(x))
        return self.attention(x, x, x)[0].mean(1)


@pytest.mark.parametrize(
    ("layer", "given", "error", "words"),
    [
        (
            "agian",
            {},
            ModelError,
            "no layer 'agian' to look at or to act on, or none that a pass calls exactly once: did you mean 'again'",
        ),
        ("again", {}, ModelError, "'again' is called 2 times"),
        ("never", {}, ModelError, "'never' is called 0 times"),
        ("attention", {"axis": 1}, ModelError, "'attention' holds a tuple"),
        ("attention", {"side": "in"}, UsageError, r"is a MultiheadAttention, whose class .* give axis=1 for channels"),
        ("", {"axis": 0}, UsageError, "axis 0 are the images"),
        ("", {"axis": 2}, UsageError, r"axis 2 of layer '', which holds \(2, 4\)"),
        ("", {"axis": 1, "units": [4]}, UsageError, "one or more of the 4 positions"),
        ("", {"axis": 1, "units": []}, UsageError, "one or more of the 4 positions"),
        ("", {"axis": 1, "units": [[0, 1], [1]]}, UsageError, "share a position"),
    ],
)
def test_a_place_that_is_none_is_refused(layer, given, error, words):
    model = Twice().train()
    with pytest.raises(error, match=words):
        place(model, layer, torch.randn(3, 6, 4), **given)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mask_that_reaches_nothing_is_refused():
    model, x = Twice().eval(), torch.randn(2, 6, 4)
    for site, words in [
        (Site("never", "hidden", 4, -1), "layer 'never' is not called in this pass"),
        (Site("attention", "hidden", 4, -1), "layer 'attention' holds a tuple"),
        (Site("again", "hidden", 5, -1), "'again' has 4 positions on axis -1, and a mask speaks of number 4"),
        (Site("again", "channel", 4, 3), r"shape \(2, 6, 4\), which has no axis 3"),
        (Site("", "pixel", 7, 1), "'' has 6 positions"),
    ]:
        with pytest.raises(ModelError, match=words), hooks.ablated(model, {site: torch.zeros(site.n_units)}):
            model(x)
    with (
        pytest.raises(ModelError, match="no layer 'gone'"),
        hooks.ablated(model, {Site("gone", "hidden", 1): torch.ones(1)}),
    ):
        pass
    weight = Site("again", "weight", 16, 0)
    with pytest.raises(UsageError, match="holds single weights"), hooks.ablated(model, {weight: torch.ones(16)}):
        pass
    site = Site("again", "hidden", 4, -1)
    both = {site: torch.ones(4), Site("again", "hidden", 2, -1): torch.ones(2)}
    with pytest.raises(UsageError, match="two gates act on one position of layer 'again'"), hooks.ablated(model, both):
        pass
    for fill, words in [({}, "a gate and no fill"), ({site: torch.ones(3)}, r"shape \(3,\): give \(4,\) or \(4, 1\)")]:
        with pytest.raises(UsageError, match=words), hooks.ablated(model, {site: torch.ones(4)}, fill):
            pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_mask_acts_on_its_axis_where_sizes_happen_to_fit_another():
    model = made(lambda: DigitsViT(5, 16, depth=1, n_heads=2))  # 16 tokens of 16 features
    x = images("cnn")
    gate = torch.ones(16)
    gate[3] = 0
    for axis in (1, -1):
        site = place(model, "norm", x, "in", axis=axis)
        with hooks.ablated(model, {site: gate}), hooks.recorded(model, [site]) as seen:
            model(x)
        assert not seen[site][0][:, 3].any()
        assert seen[site][0].ne(0).sum() == 3 * 15 * 16


def test_a_place_cannot_be_cut():
    model, x = MODELS["cnn"], images("cnn")
    for side in ("out", "in"):
        site = place(model, "conv2", x, side)
        mask = Mask({site: torch.arange(4) > 0})
        for remove in (surgery.cut, surgery.zero):
            with pytest.raises(UsageError, match="'conv2' is a place to look at or to act on"):
                remove(copy.deepcopy(model), mask)


def test_places_of_one_layer_are_different_sites_and_a_plan_keeps_them_apart(tmp_path):
    x = images("vit")
    given = [
        ("out", None, None),
        ("in", None, None),
        ("out", None, range(4)),
        ("out", None, range(4, 8)),
        ("out", 1, [0]),
    ]
    given += [("out", 1, [1]), ("out", None, [0, 2, 1, 3]), ("out", None, [[0, 1], [2, 3], [4, 5], [6, 7]])]
    made_ = [place(MODELS["vit"], "norm", x, side, axis=axis, units=units) for side, axis, units in given]
    assert len(set(made_)) == len(made_)
    order = [(s, u) for s, site in enumerate(made_) for u in range(site.n_units)]
    content = packed(**plan_arrays(Plan.build(made_, order, method="any")))
    assert plan_of(Arrays(tmp_path, content)).sites == tuple(made_)
