"""Saliency maps: each reduction against a loop over pixels."""

import pytest
import torch

from sukashi.attributions.maps import saliency_map
from sukashi.core.errors import UsageError

LOOPS = {
    "sum": sum,
    "abs_sum": lambda channels: abs(sum(channels)),
    "sum_abs": lambda channels: sum(abs(c) for c in channels),
    "max_abs": lambda channels: max(abs(c) for c in channels),
}


@pytest.mark.parametrize("reduce", LOOPS)
def test_a_pixel_is_what_its_channels_say(reduce):
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = saliency_map(values, reduce)
    assert found.shape == (2, 4, 5)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                assert found[b, i, j].item() == pytest.approx(LOOPS[reduce](values[b, :, i, j].tolist()), rel=1e-12)


def test_what_makes_no_map_is_refused():
    with pytest.raises(UsageError, match=r"'mean': choose one of sum, abs_sum, sum_abs, max_abs"):
        saliency_map(torch.zeros(1, 3, 2, 2), "mean")
    with pytest.raises(UsageError, match=r"\(1, 3, 2\) are no attribution of pixels"):
        saliency_map(torch.zeros(1, 3, 2), "sum")
