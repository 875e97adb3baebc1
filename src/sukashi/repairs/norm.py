"""BatchNorm statistics, estimated anew."""

from __future__ import annotations

from torch import Tensor, nn

from sukashi.core.registry import BatchSize
from sukashi.core.types import Batch
from sukashi.network import hooks
from sukashi.network.branches import Branch
from sukashi.network.surgery import Table
from sukashi.repairs import repairs
from sukashi.repairs.order import in_order, parts


@repairs.register("norm", source="Li et al. 2020 (EagleEye), sec. 3.3", needs=(nn.modules.batchnorm._BatchNorm,))
def norm(model: nn.Module, dense: nn.Module, table: Table, data: Batch, *, batch_size: BatchSize = 512) -> None:
    """Means and variances of each BatchNorm behind a cut, over the images and all positions, one after another as they
    run: each sees what those before it make of the images with their new statistics.

    They are those of all images together, in float64: no average of batches. `batch_size` bounds the images in one
    pass, and so does their size (`order.parts`); what all of them hold at one place of the network is in memory
    together, up to 256 MB of images.

    A BatchNorm that runs before anything that was cut sees what it saw, and is left alone.
    """
    device = next(model.parameters()).device
    batches = parts(data.x.to(device), batch_size)
    order = hooks.calls(model, batches[0][:1])
    first = min((order.index(name) for name in table if name in order), default=len(order))
    norms = {name: of for name in dict.fromkeys(order[first:]) if (of := _norm(model, name)) is not None}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def visit(name: str, x: Tensor, other: Tensor | None) -> None:
        flat = x.transpose(0, 1).flatten(1).double()
        # Shifted, so that squares are not differences of large numbers.
        flat = flat - norms[name][0].double()[:, None]
        zero = flat.new_zeros(len(flat))
        n, total, squares = sums.get(name, (0, zero, zero))
        sums[name] = n + flat.shape[1], total + flat.sum(1), squares + flat.square().sum(1)

    def mend(name: str) -> None:
        (mean, variance), (n, total, squares) = norms[name], sums.pop(name)
        off = total / n
        variance.copy_((squares - n * off.square()) / max(1, n - 1))
        mean += off.to(mean)

    if norms:
        in_order(model, dict.fromkeys(norms, Branch()), batches, visit, mend, what="norm")


def _norm(model: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """The mean and variance that a BatchNorm keeps; None of a layer that keeps none."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer.running_mean is None:
        return None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var
