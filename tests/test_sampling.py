"""Sampling by what the dense model makes of images: features, confidence, and the samples chosen by them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sukashi.core.errors import DataError, ModelError, UsageError
from sukashi.criteria import calibration
from sukashi.experiments.bench import Source
from sukashi.models import Loaded


@pytest.fixture(scope="module")
def images(digits_split):
    return digits_split.train.limit(90)


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_view_is_what_the_classifier_reads_and_the_probability_of_the_own_class(small, images, name, monkeypatch):
    loaded = small[name].loaded
    monkeypatch.setattr(calibration, "pass_size", lambda x: 32)
    seen = calibration.view(loaded, images)
    batch, model = images.whole(loaded.preprocess), loaded.model
    with torch.no_grad():
        logits = model(batch.x)
        if name == "cnn":
            x = F.relu(model.bn1(model.conv1(batch.x)))
            x = F.relu(model.bn3(model.conv3(F.relu(x + model.bn2(model.conv2(x))))))
            features = F.relu(model.fc1(x.flatten(1)))
        else:
            tokens = model.patches(batch.x).flatten(2).transpose(1, 2) + model.position
            features = model.norm(model.blocks(tokens)).mean(1)
    torch.testing.assert_close(seen.features, features, rtol=1e-4, atol=1e-5)
    own = logits.double().softmax(1)[torch.arange(90), batch.target]
    torch.testing.assert_close(seen.confidence, own, rtol=1e-4, atol=1e-6)
    assert torch.equal(seen.correct, logits.argmax(1) == batch.target)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_surest_images_are_chosen_whatever_the_seed(digits_split, trained_cnn, tmp_path):
    torch.save(trained_cnn.model.state_dict(), tmp_path / "cnn.pt")
    setting = Source(model="sukashi:digits_cnn", data="digits", weights=str(tmp_path / "cnn.pt"), calibration=5).open()
    found = setting.calibration(0, "confidence")
    assert setting.calibration(7, "confidence").image_id == found.image_id
    confidence = dict(zip(digits_split.train.image_ids, setting.view.confidence.tolist(), strict=True))
    for number in range(10):
        of_class = [
            i for i, t in zip(digits_split.train.image_ids, digits_split.train.targets, strict=True) if t == number
        ]
        chosen = [i for i, t in zip(found.image_id, found.target, strict=True) if t == number]
        assert set(chosen) == set(sorted(of_class, key=lambda i: -confidence[i])[:5])
    clustered = {seed: setting.calibration(seed, "clustering") for seed in (0, 1)}
    assert clustered[0].image_id != clustered[1].image_id
    assert clustered[0].target.bincount().tolist() == [5] * 10
    assert found.target.tolist() == sorted(found.target.tolist()), "sorted by class, as criteria expect"


def test_a_class_that_the_model_never_gets_right_has_no_confident_image(small, images):
    loaded = copy.deepcopy(small["cnn"].loaded)
    with torch.no_grad():
        loaded.model.fc2.bias[3] = -1e4
    with pytest.raises(DataError, match=r"class '3' has no image in train that the model classifies correctly"):
        calibration.by_confidence(images, calibration.view(loaded, images), 2)


def test_what_cannot_be_sampled_is_refused(images, small):
    with pytest.raises(UsageError, match=r"unknown sampling 'cluster': did you mean 'clustering'\?"):
        calibration.check_sampling("cluster")
    fixed = Loaded(nn.Flatten(), "flat", {}, small["cnn"].loaded.preprocess, 64, None, "")
    fixed.model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="no linear layer or convolution"):
        calibration.view(fixed, images)
