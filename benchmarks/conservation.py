"""What attributions of a complete cut sum to, method by model, in float64: conservation or completeness error.

    python benchmarks/conservation.py [--markdown docs/conservation.md] [--only MODEL ...] [--methods NAME ...]

Networks have random weights and BatchNorm statistics near those of noise, each off by its own share; images are noise,
64 pixels wide where the architecture allows, 2 of them. The cuts are the pixels and what the last linear layer reads.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from sukashi import models
from sukashi.attributions import attributions
from sukashi.core.errors import ModelError
from sukashi.core.types import Member, Site
from sukashi.network.layers import explicit_attention

CNNS = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "cifar_resnet20")
MODELS = ("resnet18", "resnet50", "vgg16", "mobilenet_v2", "vit_b_16", "deit3_small", "cifar_resnet20")

# Methods that keep a law, and which: the sum is the logit's difference from the baseline, or the logit.
DIFFERENCE = ("integrated_gradients", "conductance", "deeplift")
LOGIT = ("lrp", "backtrace")
VARIANTS = {
    # More steps for networks with kinks only: smooth ones are done with the default.
    "integrated_gradients": ({}, {"steps": 128}),
    "conductance": ({}, {"steps": 128}),
    "lrp": (
        *({"rule": rule} for rule in ("epsilon_plus", "epsilon", "gamma", "alpha1beta0")),
        *({"rule": rule, "attention": "cp"} for rule in ("epsilon", "gamma")),
    ),
    "backtrace": ({"mode": "default"}, {"mode": "contrastive"}),
}
TEXT = """# Conservation and completeness

Printed by `python benchmarks/conservation.py`, in float64. A cell is an error, over two images and two cuts that all
of the network's computation goes through: the pixels, and what the last linear layer reads.

- *difference*: |sum of attributions / (F(x) - F(b)) - 1|, F the target's logit and b a baseline of noise. DeepLIFT is
  exact; path methods leave the error of their quadrature at their default number of steps, which is large where slopes
  jump (ReLU networks with random weights) and falls with more steps (conductance on cifar_resnet20: 1.9, 1.2 and 0.02
  with 16, 128 and 1024).
- *logit*: |sum of attributions / F(x) - 1| on a copy of the network without biases (BatchNorm shifts, position and
  class embeddings are biases too) and with epsilon = 1e-12, where nothing may be lost. In brackets the sum at the
  pixels as a share of the logit, in the network as it is and with the default epsilon: the rest is the biases' share,
  by the rule (beyond 1 or below 0 where biases speak against the logit, or many times over).
- *no law*: a slope, or a slope times an activation, sums to nothing in particular; DL-Backtrace's contrastive mode is
  two streams subtracted, which has no total to keep.
- `chefer` has no row: its map is made of the positive parts of slopes times relevance and sums to nothing in
  particular. The relevance it carries stays 1 in sum over the tokens at every residual sum, to 1e-6 with its default
  `layer_scale=identity`; the paper's LayerScale rule is off by more than a tenth (tests/test_transformer.py).
- *refused*: the method says so before any work; the reasons stand below the table.

What is not near zero, and why: AttnLRP (`attention=attn`, the default on transformers) halves products and takes
softmax by its slope, which does not conserve in sum; CP-LRP (`attention=cp`) does. `alpha1beta0` and `epsilon_plus`
lose relevance at an output without positive contributions.

"""


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "cifar_resnet20":
        model, shape = models.load("sukashi:cifar_resnet20").model, (3, 32, 32)
    elif name == "deit3_small":
        model, shape = timm.create_model("deit3_small_patch16_224"), (3, 224, 224)
    else:
        model, shape = torchvision.models.get_model(name), (3, 224, 224) if name == "vit_b_16" else (3, 64, 64)
    explicit_attention(model)
    return randomised(model.double().eval(), torch.randn(8, *shape, dtype=torch.float64)), shape


@torch.no_grad()
def randomised(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Statistics of noise, each off by its own share, random affine parts, and no parameter left at zero."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.train().momentum = 1.0
        model(x)
    for norm in norms:
        norm.eval()
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.3 * spread * torch.randn_like(spread)
        norm.running_var *= 0.5 + torch.rand_like(spread)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.2, 1)  # LayerScale starts so small that the blocks would have no say
        elif not parameter.any():
            parameter.normal_(0, 0.05)
    return model


@torch.no_grad()
def without_biases(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("bias", "pos_embed", "pos_embedding", "cls_token", "class_token"):
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    return model


def cuts(model: nn.Module) -> tuple[Site, Site]:
    name, head = [pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear)][-1]
    member = Member(name, "in", tuple((u,) for u in range(head.in_features)), -1)
    return Site("", "pixel", 3), Site(name, "hidden", head.in_features, -1, (member,))


def sums(method, model, x, target, **options) -> list[torch.Tensor]:
    found = method(model, x, target, cuts(model), **options)
    return [values.flatten(1).sum(1) for values in found.values()]


@torch.no_grad()
def logit(model, x, target):
    return model(x).gather(1, target[:, None])[:, 0]


def error(parts, whole) -> float:
    return max(float((part / whole - 1).abs().max()) for part in parts)


def cell(method, options, model, bare, shape) -> tuple[float | None, str]:
    x, base = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        target, bare_target = model(x).argmax(1), bare(x).argmax(1)
    try:
        if method.name in DIFFERENCE:
            whole = logit(model, x, target) - logit(model, base, target)
            parts = sums(method, model, x, target, baseline=base, **options)
            # Integrated gradients follow the inputs' path: complete at the pixels only.
            value = error(parts[:1] if method.name == "integrated_gradients" else parts, whole)
            return value, f"{value:.0e}"
        exact = {"epsilon": 1e-12} if "epsilon" in method.options else {}
        value = error(sums(method, bare, x, bare_target, **options, **exact), logit(bare, x, bare_target))
        if options.get("mode") == "contrastive":
            return None, "no law"
        share = sums(method, model, x, target, **options)[0] / logit(model, x, target)
        return value, f"{value:.0e} ({share.mean():.2f})"
    except ModelError as refusal:
        return None, f"refused: {refusal}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="these models only")
    # A map of pixels alone has no second cut to sum over.
    of_units = [method.name for method in attributions if "kinds" not in method.facts]
    parser.add_argument("--methods", nargs="+", default=of_units, help="these methods only")
    given = parser.parse_args()
    rows = [
        (method, options)
        for method in map(attributions.__getitem__, given.methods)
        for options in VARIANTS.get(method.name, ({},))
    ]
    titles = [
        f"{method.name} {', '.join(f'{key}={value}' for key, value in options.items())}".strip()
        for method, options in rows
    ]
    table: dict[str, dict[str, str]] = {title: {} for title in titles}
    values: dict[str, dict[str, float | None]] = {title: {} for title in titles}
    reasons: dict[str, str] = {}
    for name in given.only:
        model, shape = built(name)
        bare = without_biases(model)
        for title, (method, options) in zip(titles, rows, strict=True):
            start = time.perf_counter()
            if method.name not in (*DIFFERENCE, *LOGIT):
                table[title][name] = "no law"
                continue
            if ("attention" if name in CNNS else "steps") in options:
                table[title][name] = "no attention" if name in CNNS else "no kinks"
                continue
            values[title][name], text = cell(method, options, model, bare, shape)
            if text.startswith("refused: "):
                reasons[f"{title}, {name}"] = text.removeprefix("refused: ")
                text = "refused"
            table[title][name] = text
            print(f"{name:16} {title:34} {text:18} {time.perf_counter() - start:6.1f} s", file=sys.stderr, flush=True)
    lines = [f"| method | sums to | {' | '.join(given.only)} |", f"|{' --- |' * (len(given.only) + 2)}"]
    for title, (method, _) in zip(titles, rows, strict=True):
        law = "difference" if method.name in DIFFERENCE else "logit" if method.name in LOGIT else "-"
        lines.append(f"| {title} | {law} | {' | '.join(table[title][name] for name in given.only)} |")
    lines += ["", *(f"- {where}: {reason}" for where, reason in reasons.items())]
    print("\n".join(lines))
    if given.markdown:
        given.markdown.write_text(TEXT + "\n".join(lines) + "\n")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
