"""What an export is."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from sukashi.core.errors import UsageError
from sukashi.core.schema import option
from sukashi.experiments.reading import Images, Single


class Export(Single):
    """Write a network as one ONNX file, with what it reads inside and infer.py beside it."""

    kind: ClassVar[str] = "export"

    data: str | None = option(  # type: ignore[assignment]
        None, help="Data whose test images `fp16` is checked on, and whose classes name the outputs."
    )
    file: str | None = option(
        None,
        path=True,
        decides=False,
        flag="--out",
        default="onnx/ in a saved folder",
        help="The file, NAME.onnx, or the folder for model.onnx.",
    )
    onnx: bool = option(True, help="The format; there is no other.", flag="--onnx")
    fp16: bool = option(False, help="Weights and arithmetic in float16: half the size, other logits.")

    @model_validator(mode="after")
    def _images_are_there(self) -> Self:
        of_data = [name for name in Images.model_fields if name in self.model_fields_set and name != "data"]
        if self.data is None and of_data:
            raise UsageError(f"`{of_data[0]}` is about data, and none are given: give `data` too, or leave it out")
        if not self.onnx:
            raise UsageError("onnx is the one format there is, got false: leave it out")
        return self
