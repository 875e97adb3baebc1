"""Wanda against its definition, number by number in float64, on layers of every shape it takes."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from oracles.wanda import slow_conv, slow_linear
from sukashi.core.errors import ModelError
from sukashi.core.types import Batch
from sukashi.criteria import criteria
from sukashi.network import sites


def batch(x):
    return Batch(x, torch.zeros(len(x), dtype=torch.long), tuple(map(str, range(len(x)))))


def wanda(model, x, **options):
    """{layer: scores}."""
    found = criteria["wanda"](model, sites.weights(model), batch(x), generator=torch.Generator(), **options)
    assert found.n_images == len(x)
    return {site.layer: values for site, values in found.values.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (2, 1)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "groups": 4},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 3},
        {"kernel_size": 1, "stride": 3},
    ],
    ids=str,
)
def test_a_convolution_reads_windows(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, **options).double()
    x = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(wanda(nn.Sequential(conv), x)["0"], slow_conv(conv, x), rtol=1e-12, atol=0)


def test_the_features_of_all_tokens_of_all_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    found = wanda(model, x)
    torch.testing.assert_close(found["0"], slow_linear(model[0].weight, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["2"], slow_linear(model[2].weight, model[:2](x)), rtol=1e-12, atol=0)


def test_a_layer_that_is_called_twice_reads_both_times():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    found = wanda(nn.Sequential(layer, nn.ReLU(), layer), x)["0"]
    read = torch.cat([x, layer(x).relu()])
    torch.testing.assert_close(found, slow_linear(layer.weight, read), rtol=1e-12, atol=0)


def test_maps_of_several_sizes_are_read_where_they_are():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, stride=2, padding=1).double()
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    found = wanda(nn.Sequential(conv, conv), x)["0"]
    expected = (slow_conv(conv, x) ** 2 + slow_conv(conv, conv(x)) ** 2).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("net", ["cnn weights", "vit weights"])
def test_the_batch_size_and_the_chunk_do_not_matter(small64, monkeypatch, net):
    from sukashi.criteria import wanda as module

    model, x = small64[net].model, small64[net].data.x
    whole = wanda(model, x)
    monkeypatch.setattr(module, "_CHUNK", 100)
    for size in (1, 7, 1000):
        for layer, values in wanda(model, x, batch_size=size).items():
            torch.testing.assert_close(values, whole[layer], rtol=1e-12, atol=0)


def test_sums_are_exact_where_float32_would_lose_them():
    # In float32 2^24 + 1 is 2^24: forty thousand ones after one large number would be lost.
    layer = nn.Linear(1, 1)
    x = torch.ones(40_000, 1)
    x[0] = 4096
    assert wanda(nn.Sequential(layer), x, batch_size=50)["0"].item() == pytest.approx(
        abs(layer.weight.item()) * (2**24 + 39_999) ** 0.5, rel=1e-12
    )


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_layers_it_cannot_measure_are_refused_by_name():
    with pytest.raises(ModelError, match="layer 'idle' reads nothing when the model runs: exclude it"):
        wanda(Idle(), torch.randn(2, 4))
    with pytest.raises(ModelError, match="layer '0' is a Conv1d: wanda scores linear layers and 2d convolutions"):
        wanda(nn.Sequential(nn.Conv1d(2, 2, 3)), torch.randn(2, 2, 9))


class Padded(nn.Conv2d):
    """A convolution that pads by itself, more to the right and below."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("times", [1, 2])
def test_a_convolution_that_pads_by_itself_reads_what_is_padded(times):
    torch.manual_seed(0)
    first, second = Conv2dSame(3, 3, 3, stride=2), Padded(3, 3, (3, 2))
    model = nn.Sequential(*[first] * times, second).double().eval()
    x = torch.randn(3, 3, 10, 9, dtype=torch.float64)
    found = wanda(model, x)
    read, plain = x, nn.Conv2d(3, 3, 3, stride=2).double()
    plain.load_state_dict(first.state_dict())
    squares = torch.zeros(())
    for _ in range(times):
        rows, columns = read.shape[2] % 2, read.shape[3] % 2  # as TensorFlow: the window's outer part is shared out
        padded = F.pad(read, (columns, 1, rows, 1))
        squares = squares + slow_conv(plain, padded) ** 2
        read = plain(padded)
    torch.testing.assert_close(found["0"], squares.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(read, nn.Sequential(*[first] * times)(x))
    plain = nn.Conv2d(3, 3, (3, 2)).double()
    plain.load_state_dict(second.state_dict())
    torch.testing.assert_close(found[str(times)], slow_conv(plain, F.pad(read, (0, 1, 0, 2))), rtol=1e-9, atol=0)
