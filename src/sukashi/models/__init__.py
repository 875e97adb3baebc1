"""Models: loaded from a name, an import path or a saved folder, checked, saved, exported; never unpickled."""

from sukashi.models.adapted import read_as, with_new_head
from sukashi.models.checks import noise, probe
from sukashi.models.loaded import READ, Loaded, Origin, Trained, given_loaded, takes_classes
from sukashi.models.loading import load
from sukashi.models.memory import hold
from sukashi.models.onnx import INFER, ONNX, check_onnx_installed, infer_script, onnx_file
from sukashi.models.recipe import MASKS, RECIPE, WEIGHTS, Recipe, read_recipe, recipe_sha256
from sukashi.models.saved import code_of, contents, needs_code, save
from sukashi.models.sparse import semi_structured
from sukashi.models.specs import names
from sukashi.models.weights import digest, tensor_digests

__all__ = [
    "INFER",
    "MASKS",
    "ONNX",
    "READ",
    "RECIPE",
    "WEIGHTS",
    "Loaded",
    "Origin",
    "Recipe",
    "Trained",
    "check_onnx_installed",
    "code_of",
    "contents",
    "digest",
    "given_loaded",
    "hold",
    "infer_script",
    "load",
    "names",
    "needs_code",
    "noise",
    "onnx_file",
    "probe",
    "read_as",
    "read_recipe",
    "recipe_sha256",
    "save",
    "semi_structured",
    "takes_classes",
    "tensor_digests",
    "with_new_head",
]
