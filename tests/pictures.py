"""Small images, and folders and Parquet files of them, for tests that read data."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sukashi.core.types import Preprocess


def plain(size: int, channels: int = 3) -> Preprocess:
    """No normalisation: x is the image in [0, 1]."""
    return Preprocess(size, size, channels, (0.0,) * channels, (1.0,) * channels)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(number: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape or (8, 8, 3), dtype=np.uint8)


def folder(root: Path, n: int = 4, classes: tuple[str, ...] = ("cat", "dog"), splits=("train", "test")) -> Path:
    """n different PNGs of each class and split."""
    for s, split in enumerate(splits):
        for k, name in enumerate(classes):
            for i in range(n):
                write(root / split / name / f"{i:02d}.png", encode(noise(1000 * s + 100 * k + i)))
    return root


def write(path: Path, encoded: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)


def parquet(path: Path, rows: list[tuple[bytes | None, int]], names: list[str] | None = None) -> None:
    table = pa.table(
        {
            "image": pa.array([{"bytes": b, "path": f"p{i}.png"} for i, (b, _) in enumerate(rows)]),
            "label": pa.array([label for _, label in rows], pa.int64()),
        }
    )
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
