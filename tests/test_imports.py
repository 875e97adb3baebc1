"""Rules about the source itself, read from its syntax: imports point upwards, hooks live in one file, no pickle."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oracles  # noqa: F401
import sukashi
import sukashi.experiments.bench

SOURCE = Path(sukashi.__file__).parent

# Each room imports only from rooms above it. A new room gets its place here.
ROOMS = [
    "core",
    "data",
    "network",
    "models",
    "attributions",
    "measures",
    "repairs",
    "criteria",
    "decompositions",
    "training",
    "report",
    "experiments",
    "app",
    "cli",
    "__main__",
]

# Registries are made in a package's __init__, which then imports the files that fill them.
REGISTRIES = {"attributions", "criteria", "measures", "repairs"}
FACES = {*REGISTRIES, "data", "models"}

HOOKING = r"register_\w*hook|_\w+_hooks"
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}

FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(tree):
    """Our own modules that a tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from sukashi import x` and `from sukashi.data import x` name a module or something in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "sukashi":
                continue
            short = name.removeprefix("sukashi").removeprefix(".")
            yield short if short in FILES else short.rpartition(".")[0]


def room(name):
    return name.split(".")[0]


def violations(name, tree):
    above = ROOMS[: ROOMS.index(room(name)) + 1]
    for found in imported(tree):
        if room(found) not in above or found == name:
            yield found


def arrows():
    """{file: the files it imports}; a face and the files that it shows, or a registry those that fill it, are one."""
    for name, tree in TREES.items():
        if name in FACES:
            continue
        yield name, {found for found in imported(tree) if not (found in FACES and name.startswith(f"{found}."))}


def test_every_room_has_a_place():
    assert sorted(ROOMS) == sorted({room(name) for name in FILES})


def test_the_map_in_the_docs_has_these_rooms():
    told = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", told.partition("## One story")[0], re.MULTILINE) == ROOMS[:-1]


@pytest.mark.parametrize("name", FILES)
def test_imports_point_upwards(name):
    assert list(violations(name, TREES[name])) == []


def test_imports_have_no_circle():
    graphlib.TopologicalSorter(dict(arrows())).prepare()


def test_every_file_that_registers_is_imported():
    registering = [
        name for name, path in FILES.items() if room(name) in REGISTRIES and ".register(" in path.read_text()
    ]
    left_out = {name for name in registering if f"sukashi.{name}" not in sys.modules}
    assert not left_out, "name it in the imports of its package's __init__.py"


def test_every_file_of_oracles_is_imported():
    files = {path.stem for path in (Path(__file__).parent / "oracles").glob("*.py") if "@oracle(" in path.read_text()}
    left_out = {name for name in files - {"__init__"} if f"oracles.{name}" not in sys.modules}
    assert not left_out, "name it in the imports of oracles/__init__.py"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("core.types", "from sukashi.models import load"),
        ("network.hooks", "import sukashi.criteria"),
        ("network.sites", "def f():\n    from sukashi.experiments import check"),
        ("data.images", "from sukashi.report import page"),
        ("models.loading", "import sukashi"),
    ],
)
def test_an_import_that_points_down_is_seen(name, line):
    assert list(violations(name, ast.parse(line)))


def test_the_command_line_starts_without_torch():
    heavy = {"torch", "numpy", "scipy", "sklearn", "matplotlib", "timm", "pyarrow", "PIL"}
    code = f"import sys, sukashi, sukashi.cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_what_the_docs_say_imports_no_torch_imports_none():
    text = " ".join((Path(__file__).parent.parent / "docs" / "architecture.md").read_text().split())
    but = {f"core.{name}" for name in re.findall(r"`(\w+)`", re.search(r"`core` (.*?)every `settings.py`", text)[1])}
    said = {name for name in FILES if (room(name) == "core" and name not in but) or name.endswith(".settings")}
    code = f"import sys, {', '.join(f'sukashi.{name}' for name in sorted(said))}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def faults(name, tree):
    """What a file must not do, as sentences."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=attr) if (
                re.fullmatch(r"register_\w*hook|_\w+_hooks", attr) and name != "network.hooks"
            ):
                yield f"line {node.lineno}: {attr} outside network/hooks.py"
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                modules = [getattr(node, "module", None) or "", *(alias.name for alias in names)]
                for module in modules:
                    if module.split(".")[0] in UNPICKLING:
                        yield f"line {node.lineno}: {module} unpickles"
                if modules[0] == "torch" and "load" in modules[1:]:
                    yield f"line {node.lineno}: torch.load under another name"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="load"), keywords=keywords):
                given = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
                if owner == "torch" and given.get("weights_only") is not True:
                    yield f"line {node.lineno}: torch.load without weights_only=True"
                if owner in ("np", "numpy") and given.get("allow_pickle") is not False:
                    yield f"line {node.lineno}: np.load without allow_pickle=False"
            case ast.FunctionDef(args=args) | ast.AsyncFunctionDef(args=args) | ast.Lambda(args=args):
                for default in [*args.defaults, *args.kw_defaults]:
                    made = getattr(getattr(default, "func", None), "id", "")
                    display = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
                    if isinstance(default, display) or made in {"list", "dict", "set", "bytearray"}:
                        yield f"line {node.lineno}: a default that can change"


@pytest.mark.parametrize("name", FILES)
def test_a_file_keeps_the_rules(name):
    assert list(faults(name, TREES[name])) == []


@pytest.mark.parametrize(
    "line",
    [
        "m.register_forward_pre_hook(f)",
        "m.register_full_backward_hook(f)",
        "m._forward_hooks.clear()",
        "import pickle",
        "import os, pickle as p",
        "from joblib import load",
        "from torch import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "def f(a=[]): ...",
        "def f(*, a={}): ...",
        "lambda a=set(): a",
    ],
)
def test_a_broken_rule_is_seen(line):
    assert list(faults("models.loading", ast.parse(line)))
