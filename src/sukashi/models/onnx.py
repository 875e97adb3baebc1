"""ONNX files of a network: they say what it reads, are checked in onnxruntime, and run without sukashi and torch."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sukashi.core.errors import ModelError, UsageError, brief
from sukashi.core.types import Preprocess
from sukashi.models.loaded import Loaded

ONNX, ONNX_FP16, INFER = "model.onnx", "model-fp16.onnx", "infer.py"
_ONNX_CAP = 2**31  # bytes a protobuf message can hold
# Of fp32 logits that should be equal, between two runtimes with their own kernels.
_ONNX_TOLERANCE = 1e-4


def check_onnx_installed(*, fp16: bool = False) -> None:
    """Refuse to export where a package of the extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime", *(["onnxruntime.transformers"] if fp16 else [])):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"ONNX export needs {package}: pip install 'sukashi[onnx]'")


def infer_script(preprocess: Preprocess) -> bytes | None:
    """`infer.py`, which classifies images by an ONNX file of ours with onnxruntime, Pillow and NumPy alone.

    None where a network reads another number of channels than the 1 or 3 that image files have.
    """
    return Path(__file__).with_name(INFER).read_bytes() if preprocess.channels in (1, 3) else None


def run_line(infer: str, file: str) -> str:
    """What a shell is told to ask an ONNX file of ours about images."""
    return f"{shlex.join(['python', infer, file])} IMAGE ..."


def onnx_file(loaded: Loaded, about: Mapping[str, str] | None = None) -> bytes:
    """An ONNX file for any batch size, whose logits onnxruntime computes as torch does (within 1e-4 of the largest).

    Input `images` (B, C, H, W), preprocessed; output `logits` (B, K). Its metadata are `facts`, and what `about` adds.
    What torch's exporter notes of each node, lines of source code and where that lies, is left out.

    Raises UsageError where the extra is not installed, ModelError for a model that torch cannot export, or that gives
    other logits.
    """
    check_onnx_installed()
    model = copy.deepcopy(loaded.model).cpu()
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if n_bytes >= _ONNX_CAP:
        raise ModelError(f"the model has {n_bytes:,} bytes of weights: one ONNX file holds less than {_ONNX_CAP:,}")
    shape = (loaded.preprocess.channels, loaded.preprocess.height, loaded.preprocess.width)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:
        raise ModelError(
            f"torch cannot export {loaded.spec} to ONNX ({brief(error)}): use it as a saved folder"
        ) from error
    for noted in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del noted.metadata_props[:]
    _state(proto, {**facts(loaded), **(about or {})})
    content: bytes = proto.SerializeToString(deterministic=True)
    _check(model, content, images)
    return content


def half(content: bytes) -> bytes:
    """The same ONNX file with its weights and arithmetic in float16; images and logits stay float32.

    onnxruntime's own converter, which keeps operators in float32 that can't be had in float16. On a CPU onnxruntime
    reckons in float32 all the same and only the weights are rounded: `rounded` is what hardware makes of it.
    """
    check_onnx_installed(fp16=True)
    import onnx  # an extra
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers too small, one by one
        proto = convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True)
    stated = {prop.key: prop.value for prop in proto.metadata_props}
    del proto.metadata_props[:]
    _state(proto, stated | {"precision": "float16"})
    found: bytes = proto.SerializeToString(deterministic=True)
    return found


def rounded(content: bytes) -> bytes:
    """The same ONNX file, in which every number is rounded to float16: weights, pixels and what each operator gives.

    So does a GPU that adds up in float32. What is too large for float16 becomes Inf.
    """
    import onnx  # an extra
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    graph = proto.graph
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            with np.errstate(over="ignore"):
                values = numpy_helper.to_array(weight).astype(np.float16).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    known = (*graph.input, *graph.value_info, *graph.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    nodes, (images,) = list(graph.node), graph.input
    del graph.node[:]

    def through_float16(source: str, name: str) -> None:
        for of, to, kind in ((source, f"{name}/half", TensorProto.FLOAT16), (f"{name}/half", name, TensorProto.FLOAT)):
            graph.node.append(helper.make_node("Cast", [of], [to], to=kind))

    through_float16(images.name, f"{images.name}/rounded")
    for node in nodes:
        written = [name for name in node.output if name in floats]
        node.input[:] = [f"{name}/rounded" if name == images.name else name for name in node.input]
        node.output[:] = [f"{name}/whole" if name in written else name for name in node.output]
        graph.node.append(node)
        for name in written:
            through_float16(f"{name}/whole", name)
    found: bytes = proto.SerializeToString()
    return found


def facts(loaded: Loaded) -> dict[str, str]:
    """What a file says of its network; lists are JSON. Classes without names are called by their numbers."""
    reads = loaded.preprocess
    return {
        "sukashi_version": importlib.metadata.version("sukashi"),
        "model": loaded.spec,
        "class_names": json.dumps(loaded.class_names or [f"class {k}" for k in range(loaded.n_classes)]),
        **{name: str(getattr(reads, name)) for name in ("channels", "height", "width")},
        "colour": "grey" if reads.channels == 1 else "RGB",
        "layout": "NCHW",
        "scale": "[0, 1], then (x - mean) / std",
        "mean": json.dumps(reads.mean),
        "std": json.dumps(reads.std),
        "resize": "bilinear and antialiased, as Pillow does it; "
        + ("without keeping the aspect" if reads.shorter is None else "the shorter side to `shorter`, then the centre"),
        "shorter": str(reads.shorter or 0),
        "precision": "float32",
        "weights_sha256": loaded.weights_sha256,
    }


def session(content: bytes) -> Any:
    """An ONNX file, ready to run on a CPU, on as many threads as torch."""
    import onnxruntime  # an extra

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, chosen, providers=["CPUExecutionProvider"])


def metadata(content: bytes) -> dict[str, str]:
    """What an ONNX file says of itself."""
    return dict(sorted(session(content).get_modelmeta().custom_metadata_map.items()))


def logits(opened: Any, images: NDArray[Any]) -> NDArray[Any]:
    """(B, K) what a `session` makes of images (B, C, H, W)."""
    (found,) = opened.run(["logits"], {"images": images})
    return np.asarray(found)


def _state(proto: Any, about: Mapping[str, str]) -> None:
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)


def _check(model: torch.nn.Module, content: bytes, images: torch.Tensor) -> None:
    opened = session(content)
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = model(batch).numpy()
        worst = np.abs(logits(opened, batch.numpy()) - expected).max() / np.abs(expected).max()
        if not worst <= _ONNX_TOLERANCE:
            raise ModelError(
                f"onnxruntime gives logits {worst:.1e} of the largest apart, {_ONNX_TOLERANCE:.0e} is allowed: "
                "use the model as a saved folder"
            )
