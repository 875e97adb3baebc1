"""ONNX files of a network, checked in onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch

from sukashi.core.errors import ModelError, UsageError, brief, writing
from sukashi.core.files import beside, check_free, sync
from sukashi.models.loaded import Loaded

_ONNX_CAP = 2**31  # bytes a protobuf message can hold
# Of fp32 logits that should be equal, between two runtimes with their own kernels.
_ONNX_TOLERANCE = 1e-4


def check_onnx_installed() -> None:
    """Refuse to export where a package of the extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"ONNX export needs {package}: pip install 'sukashi[onnx]'")


def export_onnx(loaded: Loaded, path: str | Path) -> None:
    """One ONNX file for any batch size, whose logits onnxruntime computes as torch does (within 1e-4 of the largest).

    Input `images` (B, C, H, W), preprocessed; output `logits` (B, K). Appears whole or not at all.

    Raises UsageError where the extra is not installed or the file exists, ModelError for a model that torch cannot
    export or that gives other logits, ResourceError where there is no space.
    """
    path = Path(path)
    check_onnx_installed()
    check_free(path)
    model = copy.deepcopy(loaded.model).cpu()
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if n_bytes >= _ONNX_CAP:
        raise ModelError(f"the model has {n_bytes:,} bytes of weights: one ONNX file holds less than {_ONNX_CAP:,}")
    shape = (loaded.preprocess.channels, loaded.preprocess.height, loaded.preprocess.width)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as draft:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.onnx.export(
                        model,
                        (images,),
                        draft,
                        input_names=["images"],
                        output_names=["logits"],
                        dynamic_shapes=({0: torch.export.Dim("batch")},),
                        dynamo=True,
                        external_data=False,
                        verbose=False,
                    )
            except OSError:
                raise
            except Exception as error:
                raise ModelError(
                    f"torch cannot export {loaded.spec} to ONNX ({brief(error)}): save it as a folder"
                ) from error
            _check_onnx(model, draft, images)
            sync(draft)
            check_free(path)
            draft.rename(path)


def _check_onnx(model: torch.nn.Module, path: Path, images: torch.Tensor) -> None:
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch).numpy()
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        if not worst <= _ONNX_TOLERANCE:
            raise ModelError(
                f"onnxruntime gives logits {worst:.1e} of the largest apart, {_ONNX_TOLERANCE:.0e} is allowed: "
                "save the model as a folder"
            )
