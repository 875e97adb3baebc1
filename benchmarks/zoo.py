"""What of the networks of torchvision and timm can be cut, is the cut right, and how long does the search take?

Each network runs in a process of its own, with random weights, random BatchNorm statistics and images as small as it
takes, and leaves one JSON file in the folder; several runs with other names may share a folder. The table is of the
folder and of the rows beside it in docs/models.json. What is in either is not run again: names as arguments run those
anew.

    python benchmarks/zoo.py                          all networks, and the table of what the folder holds
    python benchmarks/zoo.py timm:levit_128           one
    python benchmarks/zoo.py --table                  writes the table of docs/models.md, and its rows
    python benchmarks/zoo.py --onnx --criteria        exports each cut network too, and tries every criterion

criteria: one that scores all units in one pass is given all sites, one that eliminates them in rounds the first units
of each. One that asks about units one by one (the registry
says how often it `visits` them) takes a site or not for the layers it goes through: the engine is asked about all sites
of a kind, and the criterion itself is tried on the last of them, behind which little lies, and on its first units.
share: parameters that go when each site keeps one unit. off: the largest difference between the logits of the cut and
of the masked network, float64, three random masks, over the largest logit. seconds: processor time of the search.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sukashi import models
from sukashi.core.errors import SukashiError
from sukashi.core.registry import Method
from sukashi.core.types import Batch, Mask, Site
from sukashi.criteria import criteria as registry
from sukashi.criteria.engine import Engine
from sukashi.models.onnx import onnx_file
from sukashi.network import hooks, surgery
from sukashi.network import sites as finder

DOCS = Path(__file__).resolve().parent.parent / "docs" / "models.md"
FORK = multiprocessing.get_context("fork")  # what is imported here, no process imports again
ROWS = DOCS.with_suffix(".json")
MARKS = "<!-- zoo -->", "<!-- end of zoo -->"
SEARCH_CAP = 60.0  # seconds of processor time a search may take
WRONG = 1e-10  # of float64 logits that should be equal
FIRST = 2  # units that a criterion which asks about them one by one is tried on
COLUMNS = ("network", "images", "sites", "units", "share", "off", "saved", "onnx", "criteria", "seconds", "not cut")

# Images of 64 x 64 pixels, but for those that are built for one size.
SMALL = 64
TORCHVISION = """alexnet vgg16_bn resnet18 resnet50 resnext50_32x4d squeezenet1_1 densenet121
    mobilenet_v2 mobilenet_v3_small efficientnet_b0 efficientnet_v2_s regnet_y_400mf regnet_x_400mf
    shufflenet_v2_x0_5 convnext_tiny"""
TORCHVISION_SIZED = """googlenet:96 inception_v3:128 swin_t:64 swin_v2_t:64 vit_b_16:224
    maxvit_t:224"""
TIMM = """convformer_s18 convnext_atto convnextv2_atto cspdarknet53 cspresnet50 davit_tiny densenet121
    dla34 dla46x_c dpn68 eca_vovnet39b ecaresnet26t edgenext_xx_small efficientnet_b0 efficientnet_b0_gn
    efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0 fastvit_t8 fbnetc_100 gcresnet33ts gernet_s
    ghostnet_050 hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 legacy_seresnet18
    mambaout_femto mixnet_s mnasnet_small mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small
    mobilenetv4_hybrid_medium mobileone_s0 mobilevitv2_050 nf_resnet26 nfnet_l0 poolformer_s12 pvt_v2_b0
    regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet26t resnetv2_50
    resnetv2_50x1_bit resnext26ts rexnet_100 selecsls42b seresnet18 seresnext26d_32x4d
    skresnet18 starnet_s050 tf_mobilenetv3_small_minimal_100 vovnet39a
    xception41 caformer_s18"""
TIMM_SIZED = """bat_resnext26ts:256 beit_base_patch16_224:224 beitv2_base_patch16_224:224 cait_xxs24_224:224
    coat_lite_tiny:224 convit_tiny:224
    crossvit_9_240:240 deit3_small_patch16_224:224 deit_tiny_patch16_224:224 deit_tiny_distilled_patch16_224:224
    efficientformer_l1:224 efficientvit_m0:224 eva02_tiny_patch14_224:224 focalnet_tiny_srf:224 gmlp_ti16_224:224
    inception_v4:128 levit_128:224 levit_128s:224 maxvit_pico_rw_256:256 maxvit_tiny_tf_224:224 mixer_s32_224:224
    resmlp_12_224:224 swin_tiny_patch4_window7_224:224 swinv2_tiny_window8_256:256 tiny_vit_5m_224:224
    twins_svt_small:224 vit_base_patch32_clip_224:224 vit_base_patch32_siglip_256:256
    vit_small_patch14_reg4_dinov2:518 vit_small_patch16_dinov3:256 vit_tiny_patch16_224:224 xcit_nano_12_p16_224:224"""


def networks() -> dict[str, int]:
    """Name and size of the images of every network."""
    small = [("torchvision", TORCHVISION), ("timm", TIMM)]
    sized = [("torchvision", TORCHVISION_SIZED), ("timm", TIMM_SIZED)]
    found = {f"{source}:{name}": SMALL for source, names in small for name in names.split()}
    for source, names in sized:
        found |= {f"{source}:{name}": int(size) for name, size in (pair.split(":") for pair in names.split())}
    return found


# One network, in a process of its own.


def tried(name: str, size: int, onnx: bool, criteria: bool) -> dict[str, Any]:
    """What becomes of one network: the row of the table, as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: dict[str, Any] = {"network": name, "images": size}
    try:
        loaded = models.load(name, n_classes=10)
        randomise(loaded.model)
        loaded = replace(loaded, preprocess=replace(loaded.preprocess, height=size, width=size))
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        start = time.process_time()
        try:
            found = finder.find(loaded.model, x)
        finally:
            row["seconds"] = round(time.process_time() - start, 1)
    except SukashiError as error:
        return row | {"refused": str(error)}
    row |= {"sites": len(found.sites), "units": sum(site.n_units for site in found.sites)}
    row |= {"reasons": dict(found.refused), "share": round(share(loaded, found.sites), 3)}
    row["off"] = max(off(loaded.model, found.sites, x, seed) for seed in range(3))
    row |= kept(loaded, found.sites, x, onnx)
    if criteria:
        row["criteria"] = those_that_run(loaded.model, found.sites, x)
    return row


def randomise(model: Any) -> None:
    """Statistics, affine parameters and scales far from 0 and 1, where a wrong cut could hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)


def drawn(sites: Any, seed: int, ratio: float = 0.5) -> Any:
    """A random mask in which each site keeps one unit at least."""
    generator = torch.Generator().manual_seed(seed)
    keep = {site: torch.rand(site.n_units, generator=generator) >= ratio for site in sites}
    for site in sites:
        keep[site][seed % site.n_units] = True
    return Mask(keep)


def share(loaded: Any, sites: Any) -> float:
    """Which share of the parameters goes when each site keeps one unit."""
    small = copy.deepcopy(loaded.model)
    surgery.cut(small, drawn(sites, 0, ratio=1.0))
    left, whole = (sum(p.numel() for p in model.parameters()) for model in (small, loaded.model))
    return 1 - left / whole


def off(model: Any, sites: Any, x: Any, seed: int) -> float:
    """How far cut and masked logits are apart in float64, over the largest."""
    mask, double = drawn(sites, seed), copy.deepcopy(model).double()
    with torch.no_grad():
        with hooks.ablated(double, mask):
            masked = double(x.double())
        surgery.cut(double, mask)
        return float((double(x.double()) - masked).abs().max() / masked.abs().max())


def kept(loaded: Any, sites: Any, x: Any, onnx: bool) -> dict[str, Any]:
    """Whether a saved cut gives the same logits when it is loaded, and can be exported."""
    small = copy.deepcopy(loaded.model)
    table = surgery.cut(small, drawn(sites, 0))
    network, row = replace(loaded, model=small, cuts=(table,)), {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            models.save(Path(folder, "cut"), network, provenance={})
            row["saved"] = bool(torch.equal(models.load(str(Path(folder, "cut"))).model(x), small(x)))
        except SukashiError as error:
            row |= {"saved": False, "save_refused": str(error)}
        if onnx:
            try:
                onnx_file(network)
                row["onnx"] = "yes"
            except SukashiError as error:
                row["onnx"] = str(error)
    return row


def those_that_run(model: Any, sites: Any, x: Any) -> dict[str, dict[str, str]]:
    """{criterion: {kind of site: why it does not run there}}; one that runs on all has no reasons.

    The images are one image twice, as what the network takes it for: a class needs two that are right.
    """
    twice = x[:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        batch = Batch(twice, model(twice).argmax(1), ("a", "b"))
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        whole = any(surgery.heads(model.get_submodule(member.module)) for member in site.producers)
        kinds.setdefault("whole heads" if whole else site.kind, []).append(site)
    unfit = {kind: refusal(partial(Engine, model, own, batch)) for kind, own in kinds.items()}
    few = [little(own[-1]) for kind, own in kinds.items() if not unfit[kind]]
    said = {}
    for method in registry:
        reasons, own = (unfit, few) if "visits" in method.facts else ({}, sites)
        if "rounds" in method.options:
            own = [little(site) for site in sites]
        found = reasons | {"sites": refusal(partial(run, method, model, own, batch))}
        said[method.name] = {kind: reason for kind, reason in found.items() if reason}
    return said


def run(method: Method, model: Any, sites: Any, batch: Batch) -> None:
    """Call a criterion, in as few steps as it takes; one of single weights on those."""
    own = sites if "channel" in method.facts["kinds"] else finder.weights(model)
    fewest = {"steps": 2, "n_samples": 2, "rounds": 1}
    few = {name: n for name, n in fewest.items() if name in method.options}
    method(model, own, batch, generator=torch.Generator().manual_seed(0), **few)


def refusal(call: Callable[[], object]) -> str:
    """Why a call is refused, or how it crashes, or ""."""
    try:
        call()
    except SukashiError as error:
        return str(error)
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"[:300]
    return ""


def little(site: Site) -> Site:
    """The first units of a site."""
    members = tuple(replace(member, index=member.index[:FIRST]) for member in site.members)
    return replace(site, n_units=min(site.n_units, FIRST), members=members)


# All of them.


def ran(name: str, size: int, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one network; a process that dies or takes too long is a row too."""
    receiver, sender = FORK.Pipe(False)
    process = FORK.Process(target=send, args=(sender, name, size, given.onnx, given.criteria))
    process.start()
    sender.close()
    row: dict[str, Any] = {"network": name, "images": size}
    try:
        row = receiver.recv() if receiver.poll(given.limit) else row | {"slow": f"not done in {given.limit} s"}
    except EOFError:
        row |= {"crashed": "killed"}
    process.kill()
    process.join()
    return row


def send(sender: Connection, name: str, size: int, onnx: bool, criteria: bool) -> None:
    try:
        sender.send(tried(name, size, onnx, criteria))
    except Exception as error:
        sender.send({"network": name, "images": size, "crashed": f"{type(error).__name__}: {error}"[:300]})


def verdict(row: dict[str, Any]) -> str:
    """One of crashed, slow, refused, wrong and cut."""
    if "crashed" in row:
        return "crashed"
    if "slow" in row or row.get("seconds", 0) > SEARCH_CAP:
        return "slow"
    if "refused" in row:
        return "refused"
    return "cut" if row["off"] <= WRONG and row["saved"] else "wrong"


class Footnotes(list[str]):
    """Reasons, each said once below the table; a number in a cell stands for one."""

    def mark(self, reason: str) -> str:
        said = plain(reason)
        if said not in self:
            self.append(said)
        return f"({1 + self.index(said)})"


def cells(row: dict[str, Any], notes: Footnotes) -> list[str]:
    """What the table says of a network, column by column."""
    why = row.get("refused") or row.get("slow") or row.get("crashed") or grouped(row.get("reasons", {}))
    shown = row | {"not cut": why.replace("|", "/"), "images": str(row["images"])}
    if "off" in row:
        shown |= {"share": f"{row['share']:.2f}", "off": f"{row['off']:.0e}", "saved": "yes" if row["saved"] else "NO"}
    if "onnx" in row:
        shown["onnx"] = row["onnx"] if row["onnx"] == "yes" else f"no {notes.mark(row['onnx'])}"
    if "criteria" in row:
        shown["criteria"] = criteria_of(row["criteria"], notes)
    return [str(shown.get(column, "")) for column in COLUMNS]


def criteria_of(found: dict[str, dict[str, str]], notes: Footnotes) -> str:
    """Which criteria run on a network: all, or all but those of the same reasons together."""
    without: dict[str, list[str]] = {}
    for name, reasons in found.items():
        marks = ", ".join(
            notes.mark(reason) + ("" if where == "sites" else f" for {where}") for where, reason in reasons.items()
        )
        if marks:
            without.setdefault(marks, []).append(name)
    if not without:
        return "all"
    return "all but " + "; ".join(f"{', '.join(names)} {marks}" for marks, names in without.items())


def plain(reason: str) -> str:
    """A reason without what is of one network: names, numbers of images and what a remedy names."""
    reason = re.sub(r" \(--exclude [^)]*\)", " (--exclude ...)", reason.replace("|", "/"))
    reason = re.sub(r"(layer|in) '[^']*'", r"\1 ...", reason)
    reason = re.sub(r"\d+ rows for \d+ images", "more rows than images", reason)
    reason = re.sub(r"exclude (it|both|all \d+ such layers)", "exclude such layers", reason)
    return re.sub(r"(timm|torchvision):\w+", "the network", reason)


def grouped(reasons: dict[str, str]) -> str:
    """The reasons why layers are not cut, most frequent first, without the names in them."""
    count: dict[str, int] = {}
    for reason in reasons.values():
        kind = re.sub(r"'[^']*'", "...", reason.partition(" (")[0])
        count[kind] = count.get(kind, 0) + 1
    ranked = sorted(count.items(), key=lambda pair: -pair[1])
    return "; ".join(f"{n} layer{'s' * (n > 1)}: {kind}" for kind, n in ranked[:3])


def table(rows: list[dict[str, Any]]) -> str:
    ruler = " | ".join("---" for _ in COLUMNS)
    notes = Footnotes()
    lines = [" | ".join(COLUMNS), ruler, *(" | ".join(cells(row, notes)) for row in rows)]
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*(f"| {line} |" for line in lines), *(["", *told] if told else [])])


def totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    verdicts = [verdict(row) for row in rows]
    big = sum(v == "cut" and row["share"] > 0.6 for row, v in zip(rows, verdicts, strict=True))
    counted = {v: verdicts.count(v) for v in ("refused", "wrong", "crashed", "slow")}
    return {"networks": len(rows), "cut": verdicts.count("cut"), "share_over_60": big, **counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks to run anew; all that have no row if left out")
    parser.add_argument("--folder", type=Path, default=Path("zoo"), help="where a JSON file a network is kept")
    parser.add_argument("--limit", type=int, default=600, help="seconds a network may take")
    parser.add_argument("--onnx", action="store_true", help="export each cut network")
    parser.add_argument("--criteria", action="store_true", help="try every criterion")
    parser.add_argument(
        "--table", action="store_true", help=f"run nothing, write the table of {DOCS.name} and {ROWS.name}"
    )
    given = parser.parse_args()
    known = networks()
    place = {name: given.folder / f"{name.replace(':', '+')}.json" for name in known}
    if wrong := [name for name in given.names if name not in known]:
        parser.error(f"unknown network {wrong[0]}")
    given.folder.mkdir(parents=True, exist_ok=True)
    found = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    missing = [name for name in known if name not in found and not place[name].exists()]
    for name in [] if given.table else given.names or missing:
        row = ran(name, known[name], given)
        place[name].write_text(json.dumps(row))
        print(" ".join([verdict(row), *cells(row, Footnotes())]), flush=True)
    found |= {name: json.loads(of.read_text()) for name, of in place.items() if of.exists()}
    rows = [found[name] for name in known if name in found]
    if given.table:
        ROWS.write_text(json.dumps({row["network"]: row for row in rows}, indent=0) + "\n")
        before, _, rest = DOCS.read_text().partition(MARKS[0])
        DOCS.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    print(json.dumps(totals(rows)))


if __name__ == "__main__":
    main()
