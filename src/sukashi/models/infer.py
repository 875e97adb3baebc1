"""What a network makes of images: python infer.py MODEL.onnx IMAGE ...  (pip install onnxruntime pillow numpy)"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MODES = ("1", "L", "I", "I;16", "I;16B", "P", "RGB", "LA", "PA", "RGBA", "CMYK", "YCbCr")


def resized(image: Image.Image, height: int, width: int, shorter: int) -> Image.Image:
    """The image at the network's size: squashed, or the centre of what its shorter side is resized to."""
    if not shorter:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    w, h = (-(-side * shorter // min(width, height)) for side in (width, height))
    wide = image.width * h >= image.height * w
    w, h = (h * image.width // image.height, h) if wide else (w, w * image.height // image.width)
    left, top = round((w - width) / 2), round((h - height) / 2)
    return image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


def pixels(path: str, channels: int, height: int, width: int, shorter: int) -> np.ndarray:
    """(C, H, W) in [0, 1]: the image upright, over white where it is transparent, resized."""
    try:
        opened = Image.open(path)
        opened.load()
    except (OSError, Image.DecompressionBombError) as error:
        sys.exit(f"{path} can't be read as an image: {getattr(error, 'strerror', None) or error}")
    if opened.mode not in MODES or (opened.mode == "I" and opened.format not in ("PNG", "PPM")):
        sys.exit(f"{path}: {opened.format} of mode {opened.mode} has no fixed scale to [0, 1]")
    image, scale = ImageOps.exif_transpose(opened), 255
    if image.mode.startswith("I"):  # 16-bit grey
        image, scale = Image.fromarray(np.asarray(image, dtype=np.float32) / 65535), 1
    else:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        image = image.convert("L" if channels == 1 else image.mode)
    planes = np.asarray(resized(image, height, width, shorter), dtype=np.float32) / np.float32(scale)
    return np.broadcast_to(planes[None] if planes.ndim == 2 else planes.transpose(2, 0, 1), (channels, height, width))


def main(model: str = "", *images: str) -> None:
    if not model:
        sys.exit(__doc__)
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has many
        sys.exit(f"{model} can't be run: {(str(error).splitlines() or [type(error).__name__])[0]}")
    about = session.get_modelmeta().custom_metadata_map
    size = [int(about[name]) for name in ("channels", "height", "width", "shorter")]
    mean, std = (np.array(json.loads(about[name]), dtype=np.float32)[:, None, None] for name in ("mean", "std"))
    names = json.loads(about["class_names"])
    for path in images:
        x = (pixels(path, *size) - mean) / std
        (logits,) = session.run(["logits"], {"images": x[None]})
        odds = np.exp(logits[0].astype(np.float64) - logits[0].max())
        best = np.argsort(-odds, kind="stable")[:5]
        print(f"{path}: {', '.join(f'{names[k]} {odds[k] / odds.sum():.1%}' for k in best)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
