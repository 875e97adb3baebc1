"""What is asked of autoencoders, checked, and a trial for each network, number of active latents and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sukashi.core import progress
from sukashi.core.code import codes_of
from sukashi.core.errors import UsageError
from sukashi.core.experiment import Trial
from sukashi.decompositions import sae
from sukashi.decompositions.vectors import features
from sukashi.experiments.audit.looking import Looking
from sukashi.experiments.audit.networks import Network, per_class
from sukashi.experiments.audit.neurons.run import CHOOSING, TOP
from sukashi.experiments.audit.settings import Audit
from sukashi.experiments.workspace import Desk
from sukashi.measures.neurons import Layout, layout, looked_at
from sukashi.training.autoencoder import fit_autoencoder

SETTINGS = ("layer", "top", "tokens", "k", "expansion", "seeds")
EXPANSION = 32
IMAGES = 10_000  # of the training split at most, evenly over the classes
POSITIONS = 16  # of each training image at most, where an autoencoder is of more
STEPS, ROWS = 3000, 512  # of training, and rows a step
SHOWN, SIDE = 6, 96  # latents and images of each in the gallery; pixels of one
PART = 4096  # rows at a time
PARTS: tuple[Callable[..., Any], ...] = (
    *(sae.SparseAutoencoder, sae.quality, sae.latents, sae.rows_of),
    *(fit_autoencoder, features, looked_at, layout),
)


def check(settings: Audit) -> None:
    """Refuse what means nothing, before anything is loaded."""
    if settings.layer is None:
        raise UsageError("autoencoders are of what a layer writes: give `layer`")
    if settings.k is not None and (len({*settings.k}) != len(settings.k) or not settings.k or min(settings.k) < 1):
        raise UsageError(f"k must be different numbers above 0, at least one, got {settings.k}")


def code(settings: Audit) -> dict[str, str]:
    return codes_of(PARTS)


class Subject(Looking):
    """Autoencoders of one layer of the networks of an audit, at the same tokens of all."""

    def __init__(self, settings: Audit, networks: Sequence[Network]) -> None:
        assert settings.layer is not None
        first = networks[0]
        self.layer, self.networks = settings.layer, networks
        self.sites = {one.label: features(one.loaded.model, self.layer, one.some) for one in networks}
        self.layouts = {one.label: layout(one.loaded.model, self.sites[one.label], one.some) for one in networks}
        self.which = settings.tokens or ("all" if self.layouts[first.label].class_token is None else "class")
        for label, lies in self.layouts.items():
            if self.which != "all" and lies.class_token is None and (self.which == "class" or not lies.before):
                why = f" that can be told ({lies.unknown})" if lies.unknown else ""
                raise UsageError(
                    f"layer {self.layer!r} of {label} holds no class token{why}, got `tokens` {self.which}: give all"
                )
        sizes = {label: site.n_units for label, site in self.sites.items()}
        self.k = settings.k or [max(1, sizes[first.label] // 6)]
        self.expansion = settings.expansion or EXPANSION
        self.top = settings.top or min(TOP, max(1, self.expansion * sizes[first.label] // 4))
        for label, size in sizes.items():
            for name, least in (("k", max(self.k)), ("top", self.top)):
                if least > self.expansion * size:
                    raise UsageError(
                        f"`{name}` must be at most the {self.expansion * size} latents ({self.expansion} x the {size} "
                        f"features of {self.layer!r} in {label}), got {least}: give `{name}`"
                    )
        self.seeds, self.seed, self.choosing = settings.seeds, settings.seed, per_class(first, CHOOSING)
        self.code = code(settings)
        self.identity = {"k": self.k, "tokens": self.which}
        self.facts = {
            "layer": self.layer,
            "tokens": self.which,
            "k": self.k,
            "expansion": self.expansion,
            "top": self.top,
            "seeds": self.seeds,
            "choosing": self.choosing,
            "training": [IMAGES, POSITIONS, STEPS, ROWS],
            "features": sizes,
        }

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
            **one.about,
            "chosen": self.seed,
            "code": self.code,
        }

    def _tokens(self, lies: Layout) -> slice | None:
        if self.which == "class":
            assert lies.class_token is not None
            return slice(lies.class_token, lies.class_token + 1)
        return slice(lies.before, None) if self.which == "patch" else None

    def _run(self, one: Network, k: int, seed: int, desk: Desk) -> None:
        """Keeps an autoencoder and how well it gives back the test images, class by class; of the first number what
        its latents answer to, and pictures."""
        model, batch, site = one.loaded.model, one.batch.to(one.setting.device), self.sites[one.label]
        n_classes, lies = len(one.answers.class_names), self.layouts[one.label]
        tokens = self._tokens(lies)
        x = self._training_rows(one, tokens)
        found = fit_autoencoder(
            *(x, self.expansion * site.n_units, k),
            out=desk.scratch,
            about={"trial": desk.trial.key},
            epochs=max(1, round(STEPS * ROWS / len(x))),
            batch_size=ROWS,
            seed=seed,
        )
        rows = sae.rows_of(model, site, batch, tokens)
        quality = sae.quality(found, rows.flatten(0, 1))
        kept = {f"sae {name}": of.cpu().numpy() for name, of in found.state_dict().items()}
        kept |= {"nmse": _of_classes(found, rows, batch.target, n_classes), "fires": quality.fires.numpy()}
        if k == self.k[0]:
            chosen = one.training(self.choosing, self.seed)
            # Where some tokens are taken latents are held at these alone.
            of_latents = lies if tokens is None else Layout()
            with sae.latents(model, self.layer, site.axis, found, tokens) as units:
                zero = torch.zeros(found.n_latents, 1)
                of = looked_at(model, units, zero, chosen, batch, of_latents, n_classes, self.top)
            kept |= {name: tensor.cpu().numpy() for name, tensor in of.items()}
            kept |= self._pictures(one, found, rows, of["top"], lies)
        desk.save("sae", kept)
        told = {name: getattr(quality, name) for name in ("nmse", "explained", "dead", "active")}
        desk.finish({**told, "k": k, "seed": seed, "rows": len(x)})

    def _training_rows(self, one: Network, tokens: slice | None) -> Tensor:
        """(N, D) features of IMAGES training images, at POSITIONS of each at most, drawn by seed."""
        found = []
        generator = torch.Generator().manual_seed(self.seed)
        train = one.setting.data.train.limit(IMAGES)
        with progress.task("features of training images", len(train)) as shown:
            for start in range(0, len(train), 500):
                part = train.subset(range(start, min(start + 500, len(train)))).whole(one.loaded.preprocess)
                rows = sae.rows_of(one.loaded.model, self.sites[one.label], part.to(one.setting.device), tokens)
                if rows.shape[1] > POSITIONS:
                    at = torch.rand(rows.shape[:2], generator=generator).argsort(1)[:, :POSITIONS].to(rows.device)
                    rows = rows.gather(1, at[:, :, None].expand(-1, -1, rows.shape[2]))
                found.append(rows.flatten(0, 1))
                shown.advance(len(part))
        return torch.cat(found)

    def _pictures(
        self, one: Network, found: sae.SparseAutoencoder, rows: Tensor, top: Tensor, lies: Layout
    ) -> dict[str, Any]:
        """The latents that matter most for the first classes, each once, and the test images that excite them most:
        `latents` (S,), `of_class` (S,), `shown` (S, n, h, w, C), as bright as the latent is active there."""
        chosen: dict[int, int] = {}
        for k, own in enumerate(top.tolist()):
            latent = next((latent for latent in own if latent not in chosen), None)
            if latent is not None and len(chosen) < SHOWN:
                chosen[latent] = k
        with torch.no_grad():
            flat = rows.flatten(0, 1).split(PART)
            active = torch.cat([found.encode(part)[:, [*chosen]].cpu() for part in flat]).unflatten(0, rows.shape[:2])
        best = active.amax(1).argsort(dim=0, descending=True, stable=True)[:SHOWN].T  # (S, n)
        test, pictures = one.setting.data.test.limit(len(one.batch)), []
        for i, images in enumerate(best):
            pixels = test.shown(one.loaded.preprocess, images.numpy())
            step = max(1, -(-max(pixels.shape[1:3]) // SIDE))
            pixels = pixels[:, ::step, ::step]
            where = active[images, :, i]  # (n, P)
            if self.which != "class" and lies.grid is not None:
                of_patches = where[:, where.shape[1] - lies.grid[0] * lies.grid[1] :].unflatten(1, lies.grid)
                light = F.interpolate(of_patches[:, None], pixels.shape[1:3], mode="bilinear", align_corners=False)
                share = (light / light.amax((1, 2, 3), keepdim=True).clamp(min=1e-12))[:, 0, :, :, None].numpy()
                pixels = (pixels * (0.25 + 0.75 * share)).astype(np.uint8)
            pictures.append(pixels)
        return {"latents": np.array([*chosen]), "of_class": np.array([*chosen.values()]), "shown": np.stack(pictures)}


@torch.no_grad()
def _of_classes(found: sae.SparseAutoencoder, rows: Tensor, target: Tensor, n_classes: int) -> NDArray[np.float64]:
    """(K,) the share of the squares of a class's rows (B, P, D), about the mean of all, that is not given back."""
    flat = rows.flatten(0, 1)
    mean = sae.mean_of(flat)
    of_row = target.repeat_interleave(rows.shape[1]).cpu()
    sums = torch.zeros(2, n_classes, dtype=torch.float64)
    for part, own in zip(flat.split(PART), of_row.split(PART), strict=True):
        both = torch.stack([(found(part) - part).double().square().sum(1), (part.double() - mean).square().sum(1)])
        sums.index_add_(1, own, both.cpu())
    return np.asarray((sums[0] / sums[1]).numpy())
