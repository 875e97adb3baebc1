"""What is asked of autoencoders, checked, and a trial for each network, number of active latents and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sukashi.core import progress
from sukashi.core.code import code_of
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Trial
from sukashi.core.precision import without_tf32
from sukashi.core.types import Batch, Site
from sukashi.decompositions import sae
from sukashi.decompositions.vectors import features
from sukashi.experiments.audit.networks import Network
from sukashi.experiments.audit.neurons.run import CHOOSING, TOP, looked_at
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.measures import neurons
from sukashi.network import hooks
from sukashi.training.autoencoder import fit_autoencoder

SETTINGS = ("layer", "top", "tokens", "k", "expansion", "seeds")
EXPANSION = 32
IMAGES = 10_000  # of the training split at most, evenly over the classes
POSITIONS = 16  # of each training image at most, where an autoencoder is of more
STEPS, ROWS = 3000, 512  # of training, and rows a step
SHOWN, SIDE = 6, 96  # latents and images of each in the gallery; pixels of one
PARTS: tuple[Callable[..., Any], ...] = (
    *(sae.SparseAutoencoder, sae.quality, sae.latents, fit_autoencoder, features, looked_at),
    *(neurons.selectivity, neurons.class_variance, neurons.label_entropy, neurons.ablation_impact, neurons.responses),
)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if settings.layer is None:
        raise UsageError("autoencoders are of what a layer writes: give `layer`")
    if settings.k is not None and (len({*settings.k}) != len(settings.k) or not settings.k or min(settings.k) < 1):
        raise UsageError(f"k must be different numbers above 0, at least one, got {settings.k}")


def code(settings: Audit) -> dict[str, str]:
    return {part.__name__: code_of(part) for part in PARTS}


@dataclass(frozen=True)
class Place:
    """Where an autoencoder's rows are: features of a site, at some tokens or all positions; `before` tokens of what it
    holds are no patches, of which the first is the class token."""

    site: Site
    tokens: slice | None
    before: int | None

    @property
    def axis(self) -> int:
        return self.site.axis


class Subject:
    """Autoencoders of one layer of the networks of an audit."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        assert settings.layer is not None
        first = networks[0]
        self.layer, self.networks = settings.layer, networks
        self.places = {one.label: self._place(one, settings) for one in networks}
        sizes = {label: of.site.n_units for label, of in self.places.items()}
        self.k = settings.k or [max(1, min(sizes.values()) // 6)]
        self.expansion = settings.expansion or EXPANSION
        for label, size in sizes.items():
            n_latents = self.expansion * size
            for name, least in (("k", max(self.k)), ("top", settings.top or 1)):
                if least > n_latents:
                    raise UsageError(
                        f"`{name}` must be at most the {n_latents} latents ({self.expansion} x the {size} features of "
                        f"{self.layer!r} in {label}), got {least}"
                    )
        self.n_classes = len(first.answers.class_names)
        self.top = settings.top or min(TOP, self.expansion * min(sizes.values()) // 4) or 1
        self.seeds, self.seed = settings.seeds, settings.seed
        first.setting.data.train.calibration(CHOOSING, settings.seed)  # refused where a class has too few
        self.code = code(settings)
        self.identity: dict[str, Any] = {"k": self.k, "tokens": self._tokens(first.label)}
        self.notes: list[str] = []
        self.areas: dict[str, Any] = {}
        self.facts: dict[str, Any] = {
            "layer": self.layer,
            "tokens": self._tokens(first.label),
            "k": self.k,
            "expansion": self.expansion,
            "top": self.top,
            "seeds": self.seeds,
            "choosing": CHOOSING,
            "features": sizes,
        }

    def _place(self, one: Network, settings: Audit) -> Place:
        model, some = one.loaded.model, _some(one)
        site = features(model, self.layer, some)
        with hooks.recorded(model, [site]) as seen, torch.no_grad():
            model(some.clone())
        of_tokens = seen[site][0].dim() == 3
        before = neurons.n_before(model, some) if of_tokens else None
        asked = settings.tokens or ("class" if before else "all")
        if asked != "all" and not before:
            what = "no class token" if of_tokens else "no tokens"
            raise UsageError(f"layer {self.layer!r} of {one.label} holds {what}, got `tokens` {asked}: give all")
        tokens = {"class": slice(0, 1), "patch": slice(before, None), "all": None}[asked]
        return Place(site, tokens, before if asked == "all" else None)

    def _tokens(self, label: str) -> str:
        tokens = self.places[label].tokens
        return "all" if tokens is None else "class" if tokens.stop else "patch"

    def trials(self, answers: Trial) -> list[Trial]:
        return [
            Trial(self._about(one, k, seed), partial(self._run, one, k, seed), label=f"autoencoder, {one.label}, k {k}")
            for seed in range(self.seeds)
            for k in (self.k if seed == 0 else self.k[:1])
            for one in self.networks
        ]

    def _about(self, one: Network, k: int, seed: int) -> dict[str, Any]:
        own = {name: of for name, of in self.facts.items() if name not in ("k", "seeds", "features")}
        return {
            "autoencoder": {**own, "k": k, "seed": seed, "first": k == self.k[0]},
            "network": one.identity,
            "data": one.setting.data.sha256,
            "images": list(one.batch.image_id),
            "chosen": self.seed,
            "code": self.code,
        }

    def _run(self, one: Network, k: int, seed: int, desk: Desk) -> None:
        """Keeps an autoencoder and how well it gives back the test images, class by class; of the first what its
        latents answer to, and pictures."""
        model, device, data = one.loaded.model, one.setting.device, one.setting.data
        place, batch = self.places[one.label], one.batch.to(device)
        x = self._training_rows(one)
        n_latents = self.expansion * place.site.n_units
        n_epochs = max(1, round(STEPS * ROWS / len(x)))
        about = {"network": dict(one.identity), "trial": desk.trial.key}
        found = fit_autoencoder(
            x, n_latents, k, out=desk.scratch, about=about, epochs=n_epochs, batch_size=ROWS, seed=seed
        )
        rows = _rows(model, place, batch)
        quality = sae.quality(found, rows.flatten(0, 1))
        kept = {f"sae {name}": of.cpu().numpy() for name, of in found.state_dict().items()}
        kept |= {"nmse": self._of_classes(found, rows, batch.target), "fires": quality.fires.numpy()}
        if k == self.k[0] and seed == 0:
            chosen = data.train.calibration(CHOOSING, self.seed).whole(one.loaded.preprocess).by_class().to(device)
            with sae.latents(model, self.layer, place.axis, found, place.tokens) as site:
                zero = torch.zeros(n_latents, 1)
                of = looked_at(model, site, zero, chosen, batch, place.before, self.n_classes, self.top)
            kept |= {name: tensor.cpu().numpy() for name, tensor in of.items()}
            kept |= self._pictures(one, found, rows, of["top"])
        desk.save("sae", kept)
        told = {name: getattr(quality, name) for name in ("nmse", "explained", "dead", "active")}
        desk.finish({**told, "k": k, "seed": seed, "rows": len(x), "test_rows": rows.flatten(0, 1).shape[0]})

    def _training_rows(self, one: Network) -> Tensor:
        """(N, D) features of IMAGES training images, at POSITIONS of each at most, drawn by seed."""
        place, found = self.places[one.label], []
        generator = torch.Generator().manual_seed(self.seed)
        train = one.setting.data.train.limit(IMAGES)
        n = len(train)
        with progress.task("features of training images", n) as shown:
            for start in range(0, n, 500):
                part = train.subset(range(start, min(start + 500, n))).whole(one.loaded.preprocess)
                rows = _rows(one.loaded.model, place, part.to(one.setting.device))
                if rows.shape[1] > POSITIONS:
                    at = torch.rand(rows.shape[:2], generator=generator).argsort(1)[:, :POSITIONS].to(rows.device)
                    rows = rows.gather(1, at[:, :, None].expand(-1, -1, rows.shape[2]))
                found.append(rows.flatten(0, 1))
                shown.advance(len(part))
        return torch.cat(found)

    def _of_classes(self, found: sae.SparseAutoencoder, rows: Tensor, target: Tensor) -> NDArray[np.float64]:
        """(K,) the share of the squares, about the mean of all rows, that is not given back in a class's images."""
        mean = rows.double().mean((0, 1))
        off, spread = [], []
        with torch.no_grad():
            for part in rows.split(256):
                off.append((found(part) - part).double().square().sum((1, 2)))
                spread.append((part.double() - mean).square().sum((1, 2)))
        sums = [
            torch.zeros(self.n_classes, dtype=torch.float64).index_add(0, target.cpu(), torch.cat(of).cpu())
            for of in (off, spread)
        ]
        return np.asarray((sums[0] / sums[1]).numpy())

    def _pictures(self, one: Network, found: sae.SparseAutoencoder, rows: Tensor, top: Tensor) -> dict[str, Any]:
        """The latents that matter most for the first classes, each once, and the test images that excite them most:
        `latents` (S,), `of_class` (S,), `shown` (S, n, h, w, C), as bright as the latent is active there."""
        latents: list[int] = []
        of_class: list[int] = []
        for k in range(self.n_classes):
            own = next((int(latent) for latent in top[k] if int(latent) not in latents), None)
            if own is not None and len(latents) < SHOWN:
                latents.append(own)
                of_class.append(k)
        with torch.no_grad():
            active = torch.cat([found.encode(part)[..., latents] for part in rows.split(256)])  # (B, P, S)
        best = active.amax(1).argsort(dim=0, descending=True, stable=True)[:SHOWN].T.cpu()  # (S, n)
        test = one.setting.data.test.limit(len(one.batch))
        place, pictures = self.places[one.label], []
        for i, images in enumerate(best):
            pixels = test.shown(one.loaded.preprocess, images.numpy())
            step = max(1, -(-max(pixels.shape[1:3]) // SIDE))
            pixels = pixels[:, ::step, ::step]
            where = active[images, :, i].cpu()
            grid = _grid(where.shape[1], place)
            if grid is not None:
                first, height, width = grid
                map_ = where[:, first:].unflatten(1, (height, width))[:, None]
                map_ = torch.nn.functional.interpolate(map_, pixels.shape[1:3], mode="bilinear", align_corners=False)
                share = (map_[:, 0] / map_.amax((1, 2, 3), keepdim=False)[:, None, None].clamp(min=1e-12)).numpy()
                pixels = (pixels * (0.25 + 0.75 * share[..., None])).astype(np.uint8)
            pictures.append(pixels)
        return {"latents": np.array(latents), "of_class": np.array(of_class), "shown": np.stack(pictures)}


def _grid(n: int, place: Place) -> tuple[int, int, int] | None:
    """Where the positions of a square lie among n: (first, rows, columns); None where they are no square."""
    first = place.before or 0
    side = round((n - first) ** 0.5)
    return (first, side, side) if side > 1 and side * side == n - first else None


@torch.no_grad()
def _rows(model: torch.nn.Module, place: Place, batch: Batch) -> Tensor:
    """(B, P, D) the features of images at the positions that an autoencoder is of."""
    found = []
    with without_tf32(), hooks.recorded(model, [place.site]) as seen:
        for part in batch.in_passes():
            model(part.x.clone())
            of = seen[place.site][0].movedim(1, -1)  # (B, positions..., D)
            of = of if place.tokens is None else of[:, place.tokens]
            found.append(of.reshape(len(of), -1, of.shape[-1]))
    return torch.cat(found)


def _some(one: Network) -> Tensor:
    """Two images, where the network is."""
    return one.batch.x[:2].to(one.setting.device)
