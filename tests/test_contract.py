"""What every registered method must keep, old or new: a loop over the registries."""

import ast
import copy
import inspect
import json
import math
from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from sukashi.attributions import attributions
from sukashi.core.errors import ModelError, UsageError
from sukashi.core.objective import CLASSIFICATION, Classification
from sukashi.core.types import Kind, Maps, Measurement, Plan, Scores, rank
from sukashi.criteria import criteria
from sukashi.criteria.engine import Engine
from sukashi.measures import measures
from sukashi.measures.inputs import INPUTS, Inputs, measured
from sukashi.network import hooks
from sukashi.network import sites as finder
from sukashi.network.layers import AttentionCore

NETS = ("cnn", "vit")
KINDS = {"cnn": {"channel", "hidden"}, "vit": {"hidden", "head"}, "cnn weights": {"weight"}, "vit weights": {"weight"}}
# A method scores sites of its own kinds and refuses others.
UNFIT = [(method.name, net) for method in criteria for net in KINDS if not KINDS[net] <= set(method.facts["kinds"])]
# A method without rules for attention says so, and refuses it.
REFUSED = [(method.name, "vit") for method in criteria if "attention" in method.facts.get("refuses", ())]
CASES = [(name, net) for name in criteria.names() for net in KINDS if (name, net) not in REFUSED + UNFIT]
FIRST = dict(reversed(CASES))
SAYS_NO = [
    (method.name, net)
    for method in attributions
    for net, fact in (("vit", "refuses"), ("cnn", "needs"))
    if "attention" in method.facts.get(fact, ())
]
EXPLAINED = [(name, net) for name in attributions.names() for net in NETS if (name, net) not in SAYS_NO]
JOURNALED = [method.name for method in criteria if method.keeps_journal]


def alone_and_together(said):
    return f"an image has other values among other images: read no statistics of a batch, sum in float64. {said}"


def moved_along(said):
    return f"scores of weights do not move with them when units change places: score each by what it is. {said}"


FIELDS = ("site", "unit", "category", "effect", "p_values")
# What a method does again and again it does seldom here; its defaults are tried once.
SELDOM = {"n_samples": 3, "n_masks": 8, "steps": 3, "rounds": 3}


def seldom(method):
    return {option: n for option, n in SELDOM.items() if option in method.options}


def run(name, case, *, seed=0, **options):
    given, method = torch.Generator().manual_seed(seed), criteria[name]
    return method(case.model, case.sites, case.data, generator=given, **{**seldom(method), **options})


def as_plan(outcome):
    if not isinstance(outcome, Scores):
        return outcome
    return rank(replace(outcome, values={site: values.flatten() for site, values in outcome.values.items()}))


def pairs(plan):
    return list(zip(plan.site.tolist(), plan.unit.tolist(), strict=True))


def found_out(outcome):
    """{(position of the site, unit): (effect or score, category)}."""
    plan = as_plan(outcome)
    return dict(zip(pairs(plan), zip(plan.effect.tolist(), plan.category.tolist(), strict=True), strict=True))


def assert_same_bits(one, other):
    assert type(one) is type(other), "it gives Scores in one run and a Plan in another: return one of them, always"
    one, other = as_plan(one), as_plan(other)
    for field in FIELDS:
        np.testing.assert_array_equal(
            getattr(one, field),
            getattr(other, field),
            f"the same call gives another `{field}`: nothing may be drawn but by generator=generator, or kept",
        )
    assert (one.passes, one.n_images, one.method) == (other.passes, other.n_images, other.method), (
        "passes, number of images or name differ between two runs: return what the arguments say alone"
    )


class Once(dict):
    """{arguments: make(*arguments)}, each made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, arguments):
        self[arguments] = self.make(*arguments)
        return self[arguments]


@pytest.fixture(scope="module")
def outcomes(small):
    """Every criterion on both networks with seed 0, as the other tests compare with it."""
    return Once(lambda name, net: run(name, small[net]))


@pytest.fixture(scope="module")
def outcomes64(small64):
    """The same in float64."""
    return Once(lambda name, net: run(name, small64[net]))


# Criteria.


@pytest.mark.parametrize(("name", "net"), CASES)
def test_a_criterion_speaks_of_every_unit_of_the_given_sites(outcomes, small, name, net):
    case, outcome = small[net], outcomes[name, net]
    assert outcome.method == name, (
        f"return Scores(..., {name!r}) or Plan.build(..., method={name!r}): by the name it is registered under"
    )
    if isinstance(outcome, Scores):
        assert list(outcome.values) == list(case.sites), (
            "score every site that was given, and in the order given: {site: ... for site in sites}"
        )
        for site, values in outcome.values.items():
            weights = site.kind == "weight"
            assert values.shape == (
                case.model.get_submodule(site.layer).weight.shape if weights else (site.n_units,)
            ), "a score for each unit, (site.n_units,); of kind weight for each weight, in its shape"
            assert values.isfinite().all(), (
                "a score is NaN or Inf: look for a division by 0, and say what a unit without a value is worth"
            )
            assert len(values.unique()) > 1, (
                "a constant says nothing: every unit has the same score, so the method measured nothing here"
            )
    else:
        assert isinstance(outcome, Plan), f"return Scores or a Plan, not {type(outcome).__name__}"
        assert outcome.sites == tuple(case.sites), (
            "a plan is of the sites that were given, in this order: Plan.build(sites, ...)"
        )
        assert all(site.members for site in outcome.sites), (
            "a plan's sites can be cut: give Plan.build the sites as they came, with their members"
        )
        assert np.isfinite(outcome.effect).all(), (
            "an effect is NaN or Inf: give Plan.build an effect of every unit, critical ones too"
        )
        assert len(np.unique(outcome.effect)) > outcome.n_units / 2, (
            "most effects are one number: give Plan.build what each unit does"
        )
        assert set(outcome.category.tolist()) <= {"", "detrimental", "neutral", "critical"}, (
            "a category is detrimental, neutral, critical, or empty"
        )
        known = outcome.p_values[~np.isnan(outcome.p_values)]
        assert ((known >= 0) & (known <= 1)).all(), "a p-value is outside [0, 1]: where there is none it is NaN"
        assert bool(outcome.passes) == criteria[name].facts.get("progressive", False), (
            "with progressive=True in register Plan.build is given its passes, without it none"
        )
        assert list(outcome.passes) == sorted(outcome.passes), (
            "passes ascend: they are numbers of units gone after each pass"
        )
        assert all(0 <= n_removed <= outcome.n_removable for n_removed in outcome.passes), (
            "a pass says more units gone than a mask may take: one of each site stays"
        )
    everything = [(s, u) for s, site in enumerate(case.sites) for u in range(site.n_units)]
    assert sorted(pairs(as_plan(outcome))) == everything, (
        "a unit is missing or there twice: every unit of every site goes exactly once"
    )


@pytest.mark.parametrize(("name", "net"), REFUSED)
def test_a_criterion_that_has_no_rule_for_a_network_refuses_it_by_name(small, name, net):
    with pytest.raises(ModelError, match=f"{name} has no rule for"):
        run(name, small[net])


@pytest.mark.parametrize(("name", "net"), UNFIT)
def test_a_criterion_refuses_sites_of_a_kind_it_does_not_score(small, name, net):
    with pytest.raises(UsageError, match=f"{name} scores sites of kind .*, not '({'|'.join(KINDS[net])})'"):
        run(name, small[net])


def test_single_weights_and_units_have_criteria():
    assert {net for _, net in CASES} == set(KINDS), (
        "no criterion is left for one of the networks and kinds of site: see `kinds` in register"
    )


@pytest.mark.parametrize(("name", "net"), [case for case in CASES if case[1] in ("vit", "vit weights")])
def test_a_criterion_speaks_of_the_given_sites_only(small, name, net):
    case = copy.copy(small[net])
    case.sites = case.sites[1:4:2]
    outcome = run(name, case)
    assert as_plan(outcome).sites == tuple(case.sites), (
        "a criterion scores the sites it is given and no others: do not look for sites in the model"
    )
    assert as_plan(outcome).n_units == (32 if net == "vit" else sum(site.n_units for site in case.sites)), (
        "units of sites that were not given are scored: loop over `sites`"
    )


@pytest.mark.parametrize(("name", "net"), CASES)
def test_a_criterion_says_how_many_images_it_used(outcomes, small, name, net):
    case = small[net]
    with torch.no_grad():
        n_right = int((case.model(case.data.x).argmax(1) == case.data.target).sum())
    assert n_right < len(case.data), "the case must tell right images from all"
    if not criteria[name].facts.get("needs_data", True):
        assert outcomes[name, net].n_images == 0, "registered with needs_data=False it returns Scores(values, 0, name)"
    elif criteria[name].options.get("samples") == "correct":
        assert outcomes[name, net].n_images == n_right, (
            "of samples=correct: return the number of images that the network gets right, Scores(values, n_right, name)"
        )
    else:
        assert outcomes[name, net].n_images == len(case.data), (
            "return the number of images it looked at: Scores(values, len(data), name)"
        )


@pytest.mark.parametrize(("name", "net"), CASES)
def test_the_same_seed_gives_the_same_bits_and_no_other_randomness_is_used(outcomes, small, name, net):
    torch.manual_seed(12345)
    np.random.seed(12345)
    state = torch.get_rng_state()
    again = run(name, small[net])
    assert_same_bits(again, outcomes[name, net])
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's own random numbers were drawn: draw with generator=generator"
    )
    assert np.random.get_state()[1].tolist() == np.random.RandomState(12345).get_state()[1].tolist(), (
        "NumPy's own random numbers were drawn: draw with torch and generator=generator"
    )


@pytest.mark.parametrize(("name", "net"), CASES)
def test_a_criterion_leaves_model_and_images_as_found(outcomes, small, name, net):
    case = copy.copy(small[net])
    model = case.model = copy.deepcopy(case.model)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, 2.0) if number % 2 else None
    last = list(model.modules())[-1]
    last.training = True  # nothing to a linear layer, but somebody's choice
    last.register_forward_hook(_nothing)
    x, target = case.data.x, case.data.target
    kept = x.clone(), target.clone(), case.data.image_id
    before = _state(model)
    outcome = run(name, case)
    after = _state(model)
    assert before.keys() == after.keys(), f"{before.keys() ^ after.keys()} came or went: take out again what you put in"
    for key, (identity, value) in before.items():
        assert after[key][0] == identity, (
            f"{key} was replaced: work on copy.deepcopy(model), or put it back in a finally"
        )
        assert _equal(after[key][1], value), (
            f"{key} was changed: work on a copy, take gradients with torch.autograd.grad, let `hooks` hook"
        )
    assert case.data.x is x, "data.x was replaced: batches are read, not written"
    assert torch.equal(x, kept[0]), "the images were changed in place: no x.add_(...), work on x.clone()"
    assert torch.equal(target, kept[1]), "the targets were changed in place: work on a clone"
    assert case.data.image_id == kept[2], "the ids of the images were changed: batches are read, not written"
    assert_same_bits(outcome, outcomes[name, net])  # a frozen model is the same model


def _nothing(*_):
    pass


def _state(model):
    """{what: (its identity, its value)} of all that a method might leave changed."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"{name}"] = id(parameter), parameter.detach().clone()
        found[f"{name}.grad"] = id(parameter.grad), None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}.requires_grad"] = 0, parameter.requires_grad
    for name, buffer in model.named_buffers():
        found[f"{name}"] = id(buffer), buffer.clone()
    for name, module in model.named_modules():
        found[f"{name}: layer"] = id(module), type(module).__name__
        found[f"{name}: training"] = 0, module.training
        hooks = [list(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        found[f"{name}: hooks"] = 0, hooks
        found[f"{name}: attributes"] = 0, sorted(vars(module))
    return found


def _equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("name", "net"), CASES)
def test_chunks_and_budgets_do_not_matter(outcomes64, small64, monkeypatch, name, net):
    case, whole = small64[net], outcomes64[name, net]
    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "chunk", 23)
    method, smaller = criteria[name], {"batch_size": 7, "budget": 0}
    free = method.options.keys() - method.deciding(method.options).keys()
    assert free == method.options.keys() & smaller.keys(), (
        "annotate with BatchSize (or FREE) what bounds memory alone, batch_size and budget, and nothing else"
    )
    asks = {"cswap", "cbp", "amp", "drift"}
    assert (as_plan(whole).n_evaluations > 0) == (name in asks), (
        "what it asked the engine is counted in Plan.build(n_evaluations=...), 0 for what never asks: see `asks`"
    )
    parts = run(name, case, **{key: smaller[key] for key in free})
    assert_close(parts, whole)
    assert as_plan(parts).passes == as_plan(whole).passes, (
        "passes depend on batch_size: decide by sums over all images, in float64"
    )


def assert_close(one, other, renamed=None):
    """Equal but for rounding; `renamed(position, unit)` is a unit's name in the other."""
    one, other = found_out(one), found_out(other)
    scale = max(abs(effect) for effect, _ in other.values())
    for pair, (effect, category) in one.items():
        expected, expected_category = other[renamed(*pair) if renamed else pair]
        assert effect == pytest.approx(expected, rel=1e-9, abs=1e-11 * scale), (
            f"{pair}: another effect by another batch size or order of units: sum in float64 over all images"
        )
        assert category == expected_category, (
            f"{pair}: another category by another batch size or order of units: break no tie by place"
        )


@pytest.mark.parametrize(("name", "net"), [(name, net) for name, net in CASES if name != "random" and net in NETS])
def test_permuting_units_permutes_what_is_found_out_about_them(outcomes64, small64, name, net):
    case = copy.copy(small64[net])
    case.model, orders = permuted(case.model, case.sites, torch.Generator().manual_seed(1))
    assert any(order != sorted(order) for order in orders), "the case must put some unit in another place"
    with torch.no_grad():
        torch.testing.assert_close(case.model(case.data.x), small64[net].model(case.data.x))
    assert_close(run(name, case), outcomes64[name, net], lambda position, unit: (position, orders[position][unit]))


@pytest.mark.parametrize(("name", "net"), [(name, net) for name, net in CASES if name != "random" and net not in NETS])
def test_permuting_units_permutes_what_is_found_out_about_weights(small64, name, net):
    case, units = copy.copy(small64[net]), small64[net.removesuffix(" weights")].sites
    # The scores, put where the weights are, change places as they do.
    expected = copy.deepcopy(case.model)
    for site, values in run(name, case).values.items():
        expected.get_submodule(site.layer).weight.data.copy_(values)
    expected, _ = permuted(expected, units, torch.Generator().manual_seed(1))
    case.model, orders = permuted(case.model, units, torch.Generator().manual_seed(1))
    assert any(order != sorted(order) for order in orders), "the case must put some unit in another place"
    for site, values in run(name, case).values.items():
        torch.testing.assert_close(
            values, expected.get_submodule(site.layer).weight.data, rtol=1e-9, atol=1e-12, msg=moved_along
        )


def permuted(model, sites, generator):
    """The same function with the units of each site in another order: unit u is what unit orders[site][u] was."""
    model = copy.deepcopy(model)
    orders = []
    for site in sites:
        cores = [model.get_submodule(m.module) for m in site.members]
        n_heads = next((len(core.widths) for core in cores if isinstance(core, AttentionCore)), 1)
        # Whole heads change places, and dimensions within a head; in any other site all units are one head.
        heads = torch.arange(site.n_units).view(n_heads, -1)[torch.randperm(n_heads, generator=generator)]
        order = torch.cat([head[torch.randperm(len(head), generator=generator)] for head in heads]).tolist()
        orders.append(order)
        for member in site.members:
            module, axis = model.get_submodule(member.module), int(member.side == "in")
            there = torch.tensor([position for positions in member.index for position in positions])
            here = torch.tensor([position for unit in order for position in member.index[unit]])
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if tensor.ndim > axis:
                    tensor.data.index_copy_(axis, there, tensor.data.index_select(axis, here))
    return model, orders


@pytest.mark.parametrize("name", criteria.names())
def test_defaults_and_every_choice_of_an_option_work(outcomes, small, name):
    method, case = criteria[name], small[FIRST[name]]
    method.check_options(method.options)
    given = {option: value for option, value in method.options.items() if option not in SELDOM}
    assert_same_bits(run(name, case, **given), outcomes[name, FIRST[name]])
    if seldom(method):
        plain = method(case.model, case.sites, case.data, generator=torch.Generator().manual_seed(0))
        assert_same_bits(run(name, case, **method.options), plain)
    kinds = {option: kind for option, kind in get_type_hints(method.fn).items() if option in method.options}
    choices = {option: get_args(kind) for option, kind in kinds.items() if get_origin(kind) is Literal}

    def changes(choice, beside):
        one, other = (as_plan(run(name, case, **options)) for options in ({**beside, **choice}, beside))
        return not all(np.array_equal(getattr(one, field), getattr(other, field)) for field in ("unit", "effect"))

    for option, values in choices.items():
        assert method.options[option] in values, (
            f"the default of {option} is none of its choices: put it into its Literal"
        )
        # An option may matter beside one choice of another only.
        besides = [{}, *({other: value} for other in choices if other != option for value in choices[other])]
        for value in values:
            method.check_options({option: value})
            if value == method.options[option]:
                assert not changes({option: value}, {}), (
                    f"{option} has another default: what its default does and what is done without it differ"
                )
            else:
                assert any(changes({option: value}, beside) for beside in besides), (
                    f"{option}={value} changes nothing beside any other choice: read it, or take it out"
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", JOURNALED)
@pytest.mark.parametrize("net", NETS)
def test_a_method_goes_on_from_any_prefix_of_its_journal(outcomes, small, monkeypatch, name, net):
    case, whole = small[net], outcomes[name, net]
    journal = {}
    assert_same_bits(run(name, case, _journal=journal), whole)
    lines = json.loads(json.dumps(list(journal.items())))
    assert len(lines) >= len(case.sites), "write each decision down: _journal[key] = value, at least one a site"
    for n_lines in range(0, len(lines), -(-len(lines) // 8)):
        resumed = dict(lines[:n_lines])
        assert_same_bits(run(name, case, _journal=resumed), whole)
        assert json.dumps(resumed) == json.dumps(journal), (
            "a resumed run writes another journal: what is in it is taken from it and not decided again"
        )
    # With all of it nothing is asked again.
    monkeypatch.setattr(Engine, "open", None)
    assert_same_bits(run(name, case, _journal=dict(lines)), whole)


# Attributions.


def sites_of(name, case):
    """All sites of a case that an attribution can take, and its input."""
    kinds = attributions[name].facts.get("kinds", get_args(Kind))
    return [site for site in (*case.sites, finder.input_site(case.data.x)) if site.kind in kinds]


def attributed(name, case, sites=None, rows=slice(None), **options):
    """An attribution at all sites of a case and at its input, of twelve images or some of them."""
    data = case.data[slice(0, None, 7)][rows]
    sites = sites_of(name, case) if sites is None else sites
    method = attributions[name]
    return method(case.model, data.x, data.target, sites, **{**seldom(method), **options})


@pytest.fixture(scope="module")
def explanations(small64):
    """Every attribution on both networks, as the other tests compare with it."""
    return Once(lambda name, net: attributed(name, small64[net]))


def test_every_attribution_of_units_is_a_criterion_and_no_other():
    of_units = [
        m.name for m in attributions if {"channel", "hidden", "head"} <= set(m.facts.get("kinds", get_args(Kind)))
    ]
    assert [name for name in criteria.names() if name in attributions] == of_units, (
        "an attribution that takes channels is a criterion: leave `kinds` out of register, or name those it can take"
    )


@pytest.mark.parametrize("method", attributions, ids=lambda method: method.name)
def test_an_attribution_refuses_sites_of_a_kind_it_cannot_take(small, method):
    case = small["vit"]
    for site in case.sites:
        if site.kind not in method.facts.get("kinds", get_args(Kind)):
            with pytest.raises(UsageError, match=f"{method.name} explains .* not site {site.layer!r}"):
                attributed(method.name, case, [site])


@pytest.mark.parametrize("name", attributions.names())
def test_an_attribution_refuses_images_that_the_network_cannot_take(small, name):
    x = torch.zeros(2, 1, 12, 12)
    with pytest.raises(
        ModelError, match=r"this DigitsViT fails on images of shape \(1, 12, 12\) \(RuntimeError: .*size"
    ):
        attributions[name](small["vit"].model, x, torch.zeros(2, dtype=torch.int64), [finder.input_site(x)])


@pytest.mark.parametrize(("name", "net"), SAYS_NO)
def test_an_attribution_refuses_a_network_it_cannot_explain_by_name(small, name, net):
    with pytest.raises(ModelError, match=f"^{name} "):
        attributed(name, small[net])


@pytest.mark.parametrize(("name", "net"), EXPLAINED)
def test_an_attribution_says_something_about_every_position_of_every_unit(explanations, small64, name, net):
    case, found = small64[net], explanations[name, net]
    x = case.data.x[::7]
    sites = sites_of(name, case)
    assert list(found) == sites, "explain every site that was given, in the order given: {site: ... for site in sites}"
    with torch.no_grad(), hooks.recorded(case.model, sites) as seen:
        case.model(x)
    for site, values in found.items():
        assert values.shape == hooks.gather(site, seen[site]).shape, (
            "give values in the axes of hooks.gather(site, seen[site]): (images, units, positions...)"
        )
        assert values.shape[:2] == (12, site.n_units), "give a row for each image and a column for each unit"
        assert (values.dtype, values.device, values.requires_grad) == (x.dtype, x.device, False), (
            "give values detached, in the dtype and on the device of x"
        )
        assert values.isfinite().all(), (
            "a value is NaN or Inf: look for a division by 0, and say what is explained there"
        )
        assert len(values.unique()) > 1, "a constant says nothing: every position has the same value"
    signed = any((values < 0).any() for values in found.values())
    assert signed == attributions[name].facts.get("signed", True), (
        "register what is never negative with signed=False, and nothing else"
    )


@pytest.mark.parametrize(("name", "net"), EXPLAINED)
def test_an_attribution_leaves_model_and_images_as_found_and_gives_the_same_bits(explanations, small64, name, net):
    case = copy.copy(small64[net])
    case.model = copy.deepcopy(case.model)
    for number, parameter in enumerate(case.model.parameters()):
        parameter.grad = torch.full_like(parameter, 2.0) if number % 2 else None
    last = list(case.model.modules())[-1]
    last.training = True  # nothing to a linear layer, but somebody's choice
    last.register_forward_hook(_nothing)
    kept = case.data.x.clone(), case.data.target.clone()
    before, state = _state(case.model), torch.get_rng_state()
    found = attributed(name, case)
    after = _state(case.model)
    assert before.keys() == after.keys(), f"{before.keys() ^ after.keys()} came or went: take out again what you put in"
    for key, (identity, value) in before.items():
        assert after[key][0] == identity, f"{key} was replaced: work on a copy, or put it back in a finally"
        assert _equal(after[key][1], value), (
            f"{key} was changed: take gradients with torch.autograd.grad, let `hooks` hook"
        )
    assert torch.equal(case.data.x, kept[0]), "the images were changed in place: work on x.clone()"
    assert torch.equal(case.data.target, kept[1]), "the targets were changed in place: work on a clone"
    assert not case.data.x.requires_grad, (
        "x was left with requires_grad: ask for gradients of x.detach().requires_grad_()"
    )
    assert torch.equal(torch.get_rng_state(), state), (
        "torch's own random numbers were drawn: draw with a generator of your own, seeded"
    )
    for site, values in explanations[name, net].items():
        assert torch.equal(found[site], values), (
            f"another run explains {site.layer!r} by other numbers: nothing may be drawn or kept between calls"
        )


@pytest.mark.parametrize(("name", "net"), EXPLAINED)
def test_one_pass_over_all_sites_gives_what_a_pass_for_each_gives(explanations, small64, name, net):
    for site, values in explanations[name, net].items():
        assert torch.equal(attributed(name, small64[net], [site])[site], values), (
            f"{site.layer!r} alone is explained otherwise than among others: each site by itself"
        )


@pytest.mark.parametrize(("name", "net"), EXPLAINED)
def test_images_are_explained_each_on_its_own_whatever_the_batch(explanations, small64, name, net):
    whole = explanations[name, net]
    parts = [attributed(name, small64[net], rows=rows) for rows in (slice(0, 5), slice(5, 6), slice(6, None))]
    runs = [{site: torch.cat([part[site] for part in parts]) for site in whole}]
    if "batch_size" in attributions[name].options:
        runs += [attributed(name, small64[net], batch_size=size) for size in (1, 5, 40)]
    for found in runs:
        for site, values in whole.items():
            torch.testing.assert_close(
                found[site], values, rtol=1e-9, atol=1e-11 * float(values.abs().max()), msg=alone_and_together
            )


# Methods.


@pytest.mark.parametrize(("name", "net"), CASES)
def test_no_method_lets_a_gpu_round_float32(small, name, net):
    case = copy.copy(small[net])
    case.model, seen = copy.deepcopy(case.model), []
    before = torch.backends.cudnn.allow_tf32
    assert before, "torch allows it unless told otherwise"
    list(case.model.modules())[-1].register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    )
    run(name, case)
    assert not any(seen), (
        "a GPU would round to TF32 in here: run the model inside without_tf32() or exact() of sukashi.core.precision"
    )
    reads = criteria[name].facts.get("needs_data", True)
    assert bool(seen) == reads, "register what never runs the model with needs_data=False"
    assert torch.backends.cudnn.allow_tf32 == before, (
        "the setting was left changed: `with without_tf32():` puts it back"
    )


# Measures.


def given(case, rows=slice(None)):
    """All that measures may ask for, of some images of a case."""
    draw = torch.Generator().manual_seed(0)
    shape = case.data.x[:, 0].shape
    reference, *masks = torch.randn(shape, generator=draw), *(torch.rand(2, *shape, generator=draw) < 0.3)
    found = {"model": copy.deepcopy(case.model), "batch": case.data[rows], "generator": draw}
    ids = found["batch"].image_id
    found["maps"] = Maps(case.data.x.sum(1).sin()[rows], ids)
    found["reference_maps"] = Maps(reference[rows], ids)
    found["masks"] = {concept: Maps(mask[rows], ids) for concept, mask in zip("ab", masks, strict=True)}
    assert set(found) == set(INPUTS), "a new input of measures goes into `given` of this file too"
    return found


def tensors(inputs):
    """Every tensor in what measures are given, but for the model's."""
    of_maps = [inputs["maps"], inputs["reference_maps"], *inputs["masks"].values()]
    return [inputs["batch"].x, inputs["batch"].target, inputs["generator"].get_state(), *(m.values for m in of_maps)]


@pytest.mark.parametrize("method", [*measures, *measures.providers.values()], ids=lambda method: method.name)
def test_a_measure_asks_for_what_is_known_and_reads_it(method):
    kinds = get_type_hints(method.fn)
    known = INPUTS | {name: get_type_hints(provider.fn)["return"] for name, provider in measures.providers.items()}
    for name in method.asks:
        assert kinds[name] == known[name], f"annotate {name} as it is: {known[name]}"
    assert method.inputs <= set(INPUTS), (
        f"{method.inputs - set(INPUTS)} is no input and nobody provides it: one of INPUTS, or an option after a *"
    )
    read = {node.id for node in ast.walk(ast.parse(inspect.getsource(method.fn))) if isinstance(node, ast.Name)}
    assert set(inspect.signature(method.fn).parameters) <= read, (
        f"nobody reads {set(inspect.signature(method.fn).parameters) - read}: take it out"
    )
    of_providers = [option for provider in method.providers for option in provider.options]
    assert len(method.options) == len(method.own_options) + len(of_providers), (
        "an option is of one function: rename the one that has the name of a provider's"
    )
    method.check_options(method.options)


@pytest.mark.parametrize("name", measures.names())
@pytest.mark.parametrize("net", NETS)
def test_a_measure_gives_one_number_an_image_never_averaged(small, name, net):
    case, method = small[net], measures[name]
    inputs = given(case)
    before, kept = _state(inputs["model"]), [tensor.clone() for tensor in tensors(inputs)]
    found = measured([name], inputs)
    assert {key.partition("/")[0] for key in found} == {name}, (
        'several measurements go by the names of their parts: {"": ..., "part": ...}'
    )
    again = measured([name], {what: inputs[what] for what in method.inputs})
    parts = [measured([name], given(case, slice(start, start + 7))) for start in range(0, len(case.data), 7)]
    for key, measurement in found.items():
        values = measurement.values
        assert (measurement.axis, measurement.ids) == ("image", case.data.image_id), (
            "return Measurement(values, batch.image_id, unit): a value for each image, in the order of the batch"
        )
        assert measurement.unit, 'say what one is of: Measurement(..., unit="share")'
        assert values.shape == (len(case.data),), "a value for each image, never averaged over them"
        assert values.is_floating_point(), "values are floats: .float() or .double()"
        assert values.isfinite().all(), "a value is NaN or Inf: look for a division by 0"
        assert len(values.unique()) > 1, "a constant says nothing: every image has the same value"
        assert torch.equal(again[key].values, values), (
            "asked again it gives other numbers: draw with the input `generator`, and keep nothing between calls"
        )
        # A network itself rounds otherwise in another batch.
        together = torch.cat([part[key].values for part in parts])
        torch.testing.assert_close(together, values, rtol=1e-6, atol=1e-6, msg=alone_and_together)
    assert all(map(torch.equal, tensors(inputs), kept)), "an input was changed in place: work on a clone"
    after = _state(inputs["model"])
    assert all(
        _equal(after[key][1], value) and after[key][0] == identity for key, (identity, value) in before.items()
    ), "the model was changed: work on a copy, take gradients with torch.autograd.grad, and let `hooks` hook"


@pytest.mark.parametrize("name", measures.names())
def test_a_measure_that_lacks_something_says_what_before_any_is_measured(small, name, monkeypatch):
    inputs = given(small["cnn"])
    monkeypatch.setattr(Inputs, "call", None)
    for what in sorted(measures[name].inputs):
        with pytest.raises(UsageError, match=f"{name} asks for what is not given: {what}$"):
            measured([name], {key: value for key, value in inputs.items() if key != what})


def test_a_measurement_has_as_many_values_as_ids():
    with pytest.raises(AssertionError, match=r"a value for each of its 2 images, .* got values of shape \(2, 2\)"):
        Measurement(torch.zeros(2, 2), ("a", "b"), "share")


# Objectives.


class Other(Classification):
    """An objective whose every answer is another."""

    def loss(self, output, target, **options):
        return super().loss(output, target, **options) + super().score(output, target).to(output).sum()

    def outcome(self, output, target):
        return torch.ones_like(super().outcome(output, target))

    def score(self, output, target):
        return super().score(output, target) ** 2

    def explained(self, output, target):
        return super().explained(output, target) - super().explained(output, (target + 1) % output.shape[1])


# What goes by activations, or how far the output distribution moves, reads images and no targets.
UNLABELLED = {"wanda", "amp", "drift", "obs"}


@pytest.mark.parametrize("name", criteria.names())
def test_what_a_criterion_makes_of_targets_is_what_the_objective_says(small, name):
    case, other = small[FIRST[name]], copy.copy(small[FIRST[name]])
    other.data = replace(case.data, objective=Other())
    # The same images, whichever are right.
    options = {"samples": "all"} if "samples" in criteria[name].options else {}
    plans = [as_plan(run(name, each, **options)) for each in (case, other)]
    same = all(np.array_equal(*(getattr(plan, field) for plan in plans)) for field in FIELDS)
    unlabelled = name in UNLABELLED or not criteria[name].facts.get("needs_data", True)
    assert same == unlabelled, f"{name} must read targets through data.objective, or be named in UNLABELLED"
    if options:
        assert run(name, other).n_images == len(case.data) > run(name, case).n_images, (
            "with samples=correct the images it uses are those the objective's outcome calls right"
        )


@pytest.mark.parametrize(("name", "net"), EXPLAINED)
def test_what_an_attribution_explains_is_what_the_objective_says(small64, name, net):
    case = small64[net]
    (site,) = sites_of(name, case)[-1:]
    one, other = (
        attributions[name](case.model, case.data.x[:3], case.data.target[:3], [site], objective)[site]
        for objective in (CLASSIFICATION, Other())
    )
    assert not torch.allclose(one, other), (
        f"{name} must explain objective.explained(output, target), and not a logit that it picks itself"
    )


@pytest.mark.parametrize("name", [method.name for method in measures if "model" in method.inputs])
def test_what_a_measure_makes_of_answers_is_what_the_objective_says(small, name):
    inputs = given(small["cnn"])
    other = inputs | {"batch": replace(inputs["batch"], objective=Other())}
    before, after = measured([name], inputs), measured([name], other)
    for key, measurement in before.items():
        same = torch.equal(measurement.values, after[key].values)
        assert not same, f"{name} must read targets through batch.objective, and not from batch.target itself"


# All.


@pytest.mark.parametrize("method", [*criteria, *attributions, *measures], ids=lambda method: method.name)
def test_a_method_says_in_a_line_what_it_gives_and_where_it_comes_from(method):
    assert 20 < len(method.summary) < 120, (
        f"the first line of its docstring says what it gives, in 20 to 120 characters, got {len(method.summary)}"
    )
    assert method.summary.endswith((".", ":")), (
        "the first line of its docstring is a sentence: it ends with a full stop or a colon"
    )
    assert len(method.source) > 5, "register(..., source=...) cites the paper, its equation and how it differs"
    for default in method.options.values():
        assert not (isinstance(default, float) and math.isnan(default)), (
            "an option has a default that nobody can write down: NaN"
        )
        assert callable(default) or json.loads(json.dumps(default)) == default, (
            "an option can be given as JSON: numbers, words, lists, null"
        )
