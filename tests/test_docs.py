"""Every command in README and docs is one the command line takes; those that need nothing but digits are run, small."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
import typer

import sukashi
from sukashi.cli.main import app
from sukashi.network import hooks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Given beside what a command says, so that a run is a matter of seconds; the last one given counts.
SMALL = {
    "check": ["--calibration", "2", "--limit", "2"],
    "compare": ["--calibration", "2", "--test-images", "30", "--seeds", "1", "--ratios", "0.5"],
    "prune": ["--calibration", "2", "--test-images", "30"],
    "train": ["--epochs", "1", "--test-images", "30"],
    "finetune": ["--epochs", "1", "--test-images", "30"],
    "schedule": ["--epochs", "1", "--calibration", "2", "--test-images", "30", "--seeds", "1"],
    "audit": ["--test-images", "20", "--population", "all"],
    "export": [],
    "list": [],
    "report": [],
}


def commands(page):
    """What follows `sukashi` in each command of a page, in order, with $VARIABLES of its blocks filled in."""
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        variables = dict(re.findall(r"^(\w+)=(\S+)$", block, re.MULTILINE))
        if re.search(r"^for ", block, re.MULTILINE):
            continue  # a loop of the shell
        for line in block.replace("\\\n", "").splitlines():
            if not re.match(r"(\S+=\S+ |torchrun .*-m )?sukashi ", line):
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            yield words[words.index("sukashi") + 1 :]


FOUND = [(page.name, words) for page in PAGES for words in commands(page)]


def test_commands_are_found():
    assert len(FOUND) > 25
    assert {words[0] for _, words in FOUND} >= {*SMALL, "study"}


@pytest.mark.parametrize(("page", "words"), FOUND, ids=lambda value: value if isinstance(value, str) else value[0])
def test_the_command_line_takes_it(page, words):
    command = typer.main.get_command(app)
    name, *rest = words
    command.commands[name].make_context(name, rest)  # raises for an option or argument that there is not


def python_of(page):
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def put_files(page):
    """Write the blocks that begin with the name of a file, as `# mine.py`, into the working directory."""
    for block in python_of(page):
        if name := re.match(r"# (\w+\.py)\n", block):
            Path(name[1]).write_text(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_digits_run_in_order(page, trained_cnn, alone):
    put_files(page)
    page = page.name
    Path("runs/demo").mkdir(parents=True)
    safetensors.torch.save_file(trained_cnn.model.state_dict(), "runs/demo/digits_cnn.safetensors")
    for name, words in FOUND:
        made = [word for word in words if word.startswith("runs/") and words[words.index(word) - 1] != "--out"]
        if name != page or words[0] not in SMALL or not all(Path(word).exists() for word in made):
            continue
        if "digits" in words or words[0] in ("list", "report"):
            assert app([*words, *SMALL[words[0]]], standalone_mode=False) in (None, 0)


@pytest.mark.slow
def test_the_notebook_of_the_readme_runs(capsys):
    blocks = [block for block in python_of(ROOT / "README.md") if "def small" not in block]
    if find_spec("pandas") is None:
        blocks = [block for block in blocks if ".frame()" not in block]
    code = "\n".join(blocks)
    told = {}
    exec(compile(code.replace("range(10)", "range(2)"), "README.md", "exec"), told)
    assert "2 sites, 96 units" in capsys.readouterr().out
    assert told["pixels"].shape == (8, 1, 8, 8)
    assert told["units"].shape == (8, 32, 6, 6)


def test_the_criterion_of_the_docs_works_in_a_notebook_too(alone, capsys):
    blocks = python_of(ROOT / "docs" / "criteria.md")
    first = next(block for block in blocks if block.startswith("# mine.py"))
    second = next(block for block in blocks if block.startswith("import sukashi\n"))
    session = {"__name__": "__main__"}
    for block in (first, second, first, second):  # every cell twice
        exec(compile(block, "cell", "exec"), session)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert re.fullmatch(r"activity: \d+ units, first to go \w+\[\d+\], .*", printed[0])


def test_the_gradients_of_the_docs_are_those_of_the_loss(alone):
    put_files(ROOT / "docs" / "criteria.md")
    bench = sukashi.open("sukashi:digits_cnn", "digits", width=8, calibration=2)
    found = {(row["layer"], row["unit"]): row["effect"] for row in bench.rank("slope:slope").table()}
    site, data = bench.sites[-1], bench.calibration(0)
    with hooks.recorded(bench.loaded.model, [site]) as seen:
        loss = data.objective.loss(bench.loaded.model(data.x), data.target)
    (slope,) = torch.autograd.grad(loss, seen[site])
    steep = hooks.gather(site, [slope]).abs().reshape(len(data), site.n_units, -1).sum((0, 2)) / len(data)
    for unit, value in enumerate(steep):
        assert found[site.layer, unit] == pytest.approx(float(value), rel=1e-4)
