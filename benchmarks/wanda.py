"""Wanda of one linear layer, 768 x 3072: our mask against the definition, and our time against sorting.

One process; activations, weights and images are the same for all. Three ways to take the lowest half of each row, in
turns, medians: ours (a selection); a stable sort of each row on its own; the reference's stable sort of
the whole matrix. All time the way from the same scores to a mask. Norms have a line of their own: ours, streamed in
float64 through a hook, against one product over all tokens. `mismatches` counts mask bits that differ from the slow
definition: Python numbers, each row through `sorted`.

    python benchmarks/wanda.py

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sukashi.core.types import Batch
from sukashi.criteria import criteria
from sukashi.network import sites, sparsity


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=11)
    return parser.parse_args(argv)


def race(chosen: argparse.Namespace) -> dict[str, float]:
    """`wanda_speedup` and `one_sort`, times as fast as either sort, and `mismatches`; with a table, printed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(chosen.columns, chosen.rows)).eval()
    # Inputs of very different sizes, as after a GELU.
    x = torch.randn(chosen.tokens, chosen.columns) * torch.rand(chosen.columns).exp()
    data = Batch(x, torch.zeros(len(x), dtype=torch.long), tuple(map(str, range(len(x)))))
    found = sites.weights(model)
    k = int(chosen.columns * chosen.ratio)

    def scored() -> Tensor:
        return criteria["wanda"](model, found, data, generator=torch.Generator(), batch_size=256)

    scores = scored()
    (values,) = scores.values.values()

    def ours() -> Tensor:
        return sparsity.mask_of(scores, chosen.ratio, "row").keep[found[0]]

    def by_row() -> Tensor:
        keep = torch.ones(values.shape, dtype=torch.bool)
        for row, kept in zip(values, keep, strict=True):
            kept[row.sort(stable=True).indices[:k]] = False
        return keep

    def at_once() -> Tensor:
        keep = torch.ones(values.shape, dtype=torch.bool)
        return keep.scatter_(1, values.sort(dim=1, stable=True).indices[:, :k], False)

    ways: dict[str, Callable[[], Tensor]] = {"ours": ours, "a sort a row": by_row, "one sort": at_once}
    times = {name: [] for name in ways}
    for turn in range(chosen.repeats + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            taken = clocked(ways[name])
            if turn:  # the first turn warms up
                times[name].append(taken)
    medians = {name: statistics.median(of_way) for name, of_way in times.items()}

    start = time.perf_counter()
    expected = slow(model[0].weight, x, k)
    seconds = time.perf_counter() - start
    mismatches = {name: int((way() != expected).sum()) for name, way in ways.items()}
    print(f"{chosen.rows} x {chosen.columns}, ratio {chosen.ratio:g}, {torch.get_num_threads()} threads")
    for name, median in medians.items():
        print(f"{name:14s} {1e3 * median:8.1f} ms  x {median / medians['ours']:5.1f}  {mismatches[name]} bits differ")
    print(f"{'slow definition':14s} {1e3 * seconds:7.0f} ms  x {seconds / medians['ours']:5.1f}  norms of it included")
    streamed = statistics.median(clocked(scored) for _ in range(3))
    print(f"scores of {chosen.tokens} tokens, the layer's own pass included: {1e3 * streamed:.0f} ms")
    return {
        "wanda_speedup": round(medians["a sort a row"] / medians["ours"], 1),
        "mismatches": mismatches["ours"],
        "one_sort": round(medians["one sort"] / medians["ours"], 1),
    }


def slow(weight: Tensor, x: Tensor, k: int) -> Tensor:
    """Which weights stay, by the definition: |w| times the root of a sum of squares in float64, each row sorted."""
    norms = [norm(column) for column in x.double().T]
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for row, numbers in enumerate(weight.tolist()):
        ranked = sorted(range(len(numbers)), key=lambda j: abs(numbers[j]) * norms[j])
        keep[row, ranked[:k]] = False
    return keep


def norm(column: Tensor) -> float:
    """The Euclidean norm of one feature, number by number."""
    return sum(number * number for number in column.tolist()) ** 0.5


def clocked(way: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(race(options())))
