"""Saved folders that were altered at random: none is run, none takes all memory, none is taken for what it is not.

    python tests/fuzz/folders.py N [--seed S]     # N folders, and those that were not done right

A trained, a cut and a sparse network are saved; of a copy bytes, parts of the JSON or whole files are altered, and it
is loaded in a process of its own. It is refused by one sentence, or it loads and its weights are those whose hashes
stand in its recipe.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import Ended, fuzz, watched

from sukashi import models
from sukashi.core.errors import SukashiError
from sukashi.experiments import functions
from sukashi.models.recipe import digest

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, "", "x", "1", "../..", "/dev/zero"),
    *(
        [],
        {},
        [[]],
        [1] * 100,
        ["a", "b"],
        {"a": 1},
        "os:system",
        "sukashi:digits_cnn",
        "timm:resnet18",
        "torch.nn:ReLU",
    ),
    *("a" * 5000, "\x00", "日本語", "channel", "in", "out"),
]


def json_altered(draw: random.Random, folder: Path) -> str:
    """One place of a recipe is another value, is gone or is there twice."""
    path = folder / "recipe.json"
    whole = json.loads(path.read_text())
    places = list(_places(whole))
    inside, key = draw.choice(places)
    what = draw.choice(("value", "value", "gone", "more", "bent"))
    if what == "value":
        inside[key] = copy.deepcopy(draw.choice(ODD))
    elif what == "gone":
        del inside[key]
    elif what == "bent" and isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
        inside[key] = inside[key] * draw.choice((2, -1, 10**6)) + draw.choice((0, 1))
    elif isinstance(inside, list):
        inside.insert(key, copy.deepcopy(draw.choice([*ODD, inside[key]])))
    else:
        inside[str(draw.choice(ODD))] = copy.deepcopy(draw.choice(ODD))
    path.write_text(json.dumps(whole))
    return f"recipe.json {what} at {key!r}"


def _places(whole: Any) -> list[tuple[Any, Any]]:
    keys = list(whole) if isinstance(whole, dict) else range(len(whole)) if isinstance(whole, list) else []
    return [(whole, key) for key in keys] + [place for key in keys for place in _places(whole[key])]


def bytes_altered(draw: random.Random, folder: Path) -> str:
    """A few bytes of a file are others; more often at its start, where headers are."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = bytearray(path.read_bytes())
    reach = len(content) if draw.random() < 0.4 else min(len(content), 200)
    for _ in range(draw.choice((1, 1, 2, 20))):
        content[draw.randrange(reach)] = draw.randrange(256)
    path.write_bytes(content)
    return f"bytes of {path.name}"


def cut_short(draw: random.Random, folder: Path) -> str:
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = path.read_bytes()
    path.write_bytes(draw.choice((content[: draw.randrange(len(content))], b"", content * 2, b"\x00" * 100)))
    return f"length of {path.name}"


def exchanged(draw: random.Random, folder: Path) -> str:
    """A file is gone, a folder, or that of another network."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.unlink()
    how = draw.choice(("gone", "a folder", "another's"))
    if how == "a folder":
        path.mkdir()
    elif how == "another's":
        others = [other for other in folder.parent.glob(f"made/*/{path.name}") if other.is_file()]
        shutil.copy(draw.choice(others), path)
    return f"{path.name} is {how}"


def trusted(draw: random.Random, folder: Path) -> str:
    """The weights are altered and their hashes with them: what nobody can tell from a network of one's own."""
    recipe, weights = folder / "recipe.json", folder / "model.safetensors"
    told = bytes_altered(draw, folder)
    whole = json.loads(recipe.read_text()) if _reads(recipe) else {}
    if weights.is_file() and isinstance(whole, dict) and whole:
        whole["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        whole["sha256"] = digest(whole)
        recipe.write_text(json.dumps(whole))
    return f"{told}, and the hash of the file"


def _reads(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


WAYS: tuple[Callable[[random.Random, Path], str], ...] = (
    *(json_altered, json_altered, json_altered, bytes_altered, bytes_altered, cut_short, exchanged, trusted),
)


def load(folder: Path) -> int:
    """Load it as a command would: 0 where its weights are those of its recipe, an error's exit code, 1 otherwise."""
    try:
        loaded = models.load(str(folder))
    except SukashiError as error:
        print(error)
        return error.exit_code
    whole = json.loads((folder / "recipe.json").read_text())
    state = {name: tensor.detach().contiguous() for name, tensor in loaded.model.state_dict().items()}
    if models.saved.tensor_digests(state) != whole["tensors"]:
        print("its weights are not those hashed")
        return 1
    return 0


def prepare(home: Path) -> list[Path]:
    made, few = home / "made", {"data": "digits", "test_images": 20}
    functions.train("sukashi:digits_cnn", width=8, epochs=1, out=made / "trained", **few)
    cut = {"calibration": 2, "out": made / "cut", "round_to": 1, **few}
    functions.prune(made / "trained", criterion="magnitude", ratio=0.5, **cut)
    sparse = {"calibration": 2, "out": made / "sparse", "scope": "global", **few}
    functions.prune(made / "trained", criterion="magnitude", ratio=0.5, **sparse)
    found = []
    for folder in sorted(made.iterdir()):
        kept = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "recipe.json"]
        place = home / f"{folder.name}, bare"
        place.mkdir()
        for path in kept:
            shutil.copy(path, place)
        found.append(place)
    return found


def tried(draw: random.Random, home: Path, folders: list[Path]) -> tuple[str, Ended]:
    """What was altered, and how loading it ended."""
    folder = home / "altered"
    source = draw.choice(folders)
    shutil.copytree(source, folder)
    told = f"{source.name}: {draw.choice(WAYS)(draw, folder)}"
    try:
        return told, watched(lambda: load(folder), home)
    finally:
        shutil.rmtree(folder)


def tries(draw: random.Random, n: int, home: Path) -> Iterator[tuple[str, Ended]]:
    folders = prepare(home)
    for _ in range(n):
        yield tried(draw, home, folders)


if __name__ == "__main__":
    sys.exit(fuzz(__doc__, tries))
