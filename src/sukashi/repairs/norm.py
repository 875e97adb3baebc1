"""BatchNorm statistics, estimated anew."""

from __future__ import annotations

from torch import Tensor, nn

from sukashi.core.errors import ModelError
from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch
from sukashi.network import hooks
from sukashi.network.surgery import Table
from sukashi.repairs import repairs
from sukashi.repairs.order import in_order


@repairs.register("norm", source="Li et al. 2020 (EagleEye), sec. 3.3")
def norm(model: nn.Module, dense: nn.Module, table: Table, data: Batch, *, batch_size: BatchSize = 512) -> None:
    """Means and variances of each BatchNorm behind a cut, over the images and all positions, one after another as they
    run: each sees what those before it make of the images with their new statistics.

    They are those of all images together, in float64: no average of batches. `batch_size` bounds the images in one
    pass; where there are more, each BatchNorm takes a pass of its own.

    Raises ModelError for a network without BatchNorm behind a cut.
    """
    device = next(model.parameters()).device
    batches = data.x.to(device).split(batch_size)
    order = hooks.calls(model, batches[0][:1])
    first = min((order.index(name) for name in table if name in order), default=len(order))
    norms = [
        name
        for name in dict.fromkeys(order[first:])
        if isinstance(of := model.get_submodule(name), nn.modules.batchnorm._BatchNorm) and of.running_mean is not None
    ]
    if not norms:
        raise ModelError("no BatchNorm lies behind what was cut, so there are no statistics to estimate: refit instead")
    sums: dict[str, list[Tensor | int]] = {}

    def visit(name: str, x: Tensor) -> None:
        flat = x.transpose(0, 1).flatten(1).double()
        # Shifted, so that squares are not differences of large numbers.
        flat = flat - model.get_submodule(name).running_mean.double()[:, None]
        found = [flat.shape[1], flat.sum(1), flat.square().sum(1)]
        sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

    def mend(name: str) -> None:
        of = model.get_submodule(name)
        n, total, squares = sums.pop(name)
        mean = total / n
        of.running_var.copy_((squares - n * mean.square()) / max(1, n - 1))
        of.running_mean += mean.to(of.running_mean)

    in_order(model, norms, batches, visit, mend, what="norm")
