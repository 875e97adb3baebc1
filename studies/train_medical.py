"""Trains the networks of medical.toml and writes their weights: runs/medical/{vgg,resnet,vit}.safetensors.

    PYTHONPATH=studies python studies/train_medical.py --data ../shared/data/chest-xray

A seventh of the training images of each class is held out: the epoch with the lowest loss there is kept, and training
stops `--patience` epochs after it. The test split is looked at once, at the end, and decides nothing.
"""

import argparse
import copy
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sukashi import data, models
from sukashi.core import files
from sukashi.core.types import Batch
from sukashi.measures.accuracy import evaluate

NETWORKS = ("vgg=networks:vgg", "resnet=networks:resnet", "vit=networks:vit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/medical"))
    parser.add_argument("--network", action="append", metavar="NAME=SPEC", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--patience", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    images = data.load(given.data)
    for name, spec in (network.split("=", 1) for network in given.network or NETWORKS):
        weights = given.out / f"{name}.safetensors"
        if not weights.exists():
            files.write(weights, train(spec, images, given.epochs, given.patience, given.seed))


def train(spec: str, images: data.Data, epochs: int, patience: int, seed: int) -> bytes:
    """The safetensors file of a network trained on `images.train`."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = models.load(spec, n_classes=images.n_classes)
    held_out = (
        torch.from_numpy(images.train.rank_in_class("validation", seed)) * 7 < images.train.counts[images.train.targets]
    )
    validation = images.train.subset(held_out.numpy()).whole(loaded.preprocess)
    fit = images.train.subset((~held_out).numpy()).whole(loaded.preprocess)
    # Of the pixels in [0, 1]; kept in the header, where models.load finds it.
    shape = (1, -1, 1, 1)
    old_mean, old_std = (torch.tensor(part).view(shape) for part in (loaded.preprocess.mean, loaded.preprocess.std))
    pixels = fit.x * old_std + old_mean
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    fit, validation, test = (
        Batch((part.x * old_std + old_mean - mean.view(shape)) / std.view(shape), part.target, part.image_id)
        for part in (fit, validation, images.test.whole(loaded.preprocess))
    )
    share = fit.target.bincount(minlength=images.n_classes) / len(fit)
    weight = (1 / (images.n_classes * share)).to(device)  # rare classes count as much as frequent ones

    model = loaded.model.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=epochs * -(-len(fit) // 32))
    best, best_loss, best_epoch, start = copy.deepcopy(model.state_dict()), float("inf"), 0, time.monotonic()
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(fit)).split(32):
            logits = model(shaken(fit.x[rows]).to(device))
            loss = F.cross_entropy(logits, fit.target[rows].to(device), weight=weight, label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        lost = held_out_loss(model.eval(), validation, weight)
        if lost < best_loss:
            best, best_loss, best_epoch = copy.deepcopy(model.state_dict()), lost, epoch
        print(f"{spec} epoch {epoch}: held-out loss {lost:.3f}, {time.monotonic() - start:.0f} s", flush=True)
        if epoch - best_epoch >= patience:
            break
    model.load_state_dict(best)
    scores = {
        name: float(evaluate(model, part)[0].mean()) for name, part in (("validation", validation), ("test", test))
    }
    print(f"{spec}: epoch {best_epoch}, {scores}", flush=True)
    metadata = {
        "architecture": spec,
        "classes": str(images.n_classes),
        "mean": ",".join(f"{value:.6f}" for value in mean.tolist()),
        "std": ",".join(f"{value:.6f}" for value in std.tolist()),
        **{f"{name}_accuracy": f"{score:.4f}" for name, score in scores.items()},
    }
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(state, metadata)


def shaken(x: Tensor) -> Tensor:
    """Each image turned by up to 10 degrees, moved by up to 5 % and scaled by up to 10 %, half of them mirrored."""
    n = len(x)
    angle, scale = (torch.rand(n) - 0.5) * 0.35, 1 + (torch.rand(n) - 0.5) * 0.2
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    move = (torch.rand(n, 2) - 0.5) * 0.2
    theta = torch.stack([mirror * cos, -sin, move[:, 0], mirror * sin, cos, move[:, 1]], 1).view(n, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), padding_mode="border", align_corners=False)


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Batch, weight: Tensor) -> float:
    """Cross entropy, classes weighed alike."""
    logits = torch.cat([model(part.x.to(weight.device)) for part in batch.split(128)])
    return float(F.cross_entropy(logits, batch.target.to(weight.device), weight=weight))


if __name__ == "__main__":
    main()
