"""What a classifier is for, against its definition, one image at a time; and nobody else says it."""

import ast
import math
from pathlib import Path

import pytest
import torch

import sukashi
from sukashi.core.errors import DataError, ModelError
from sukashi.core.objective import CLASSIFICATION

SOURCE = Path(sukashi.__file__).parent


@pytest.fixture
def answers():
    """Logits in float64 with ties, and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (40, 5), generator=generator).double()
    return logits, torch.randint(0, 5, (40,), generator=generator)


def test_every_number_is_its_definition(answers):
    logits, target = answers
    rows = logits.tolist()
    outcome, score = CLASSIFICATION.outcome(logits, target), CLASSIFICATION.score(logits.float(), target)
    explained = CLASSIFICATION.explained(logits, target)
    total = smooth = 0.0
    for i, (row, k) in enumerate(zip(rows, target.tolist(), strict=True)):
        shares = [math.exp(z) / sum(map(math.exp, row)) for z in row]
        assert outcome[i] == (row.index(max(row)) == k)
        assert float(score[i]) == pytest.approx(shares[k], rel=1e-14)
        assert float(explained[i]) == row[k]
        total -= math.log(shares[k])
        smooth -= 0.9 * math.log(shares[k]) + 0.1 * sum(map(math.log, shares)) / 5
    assert 0 < int(outcome.sum()) < 40
    assert float(CLASSIFICATION.loss(logits, target)) == pytest.approx(total)
    assert float(CLASSIFICATION.loss(logits, target, label_smoothing=0.1)) == pytest.approx(smooth)
    images, classes = CLASSIFICATION.classes(target)
    assert (images.tolist(), classes.tolist()) == (list(range(40)), target.tolist())
    assert CLASSIFICATION.counts(target, 6).tolist() == [target.tolist().count(k) for k in range(6)]
    assert CLASSIFICATION.chance(torch.tensor([0, 1, 2, 2])) == 0.5, "one answer for all gets the largest class right"


def test_a_tiny_probability_is_not_zero():
    score = CLASSIFICATION.score(torch.tensor([[0.0, 200.0]]), torch.tensor([0]))
    assert float(score) == pytest.approx(math.exp(-200), rel=1e-9)


def test_what_no_classifier_gives_is_refused(answers):
    logits, target = answers
    for output, found in ((logits[:3], r"\(3, 5\)"), (logits[None], r"\(1, 40, 5\)"), ((logits,), "a tuple")):
        for refuse in (CLASSIFICATION.check, CLASSIFICATION.explained):
            with pytest.raises(ModelError, match=f"the model gives {found} for 40 images: .* \\(images, classes\\)"):
                refuse(output, target)
    with pytest.raises(DataError, match="target 5 is no class of a model with 5 logits: classes count from 0"):
        CLASSIFICATION.check(logits, target + 1)
    with pytest.raises(DataError, match=r"target has shape \(40, 2\) for 40 images"):
        CLASSIFICATION.check_target(target[:, None].expand(-1, 2), 40)
    with pytest.raises(DataError, match=r"target is of dtype torch\.float32"):
        CLASSIFICATION.check_target(target.float(), 40)


MEANINGS = {"argmax", "cross_entropy", "nll_loss"}
# A split counts its own class numbers, to draw and to hold out images evenly.
DECIDES = ("core/objective.py", "data/")


def meanings(tree):
    """Where a file decides itself what outputs and targets mean."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in MEANINGS:
                yield f"line {node.lineno}: {name}"
            case ast.Call(func=ast.Attribute(attr="gather" | "bincount" as name), args=args) if any(
                "target" in ast.unparse(arg) for arg in args
            ):
                yield f"line {node.lineno}: {name} of a target"
            case ast.BinOp(left=ast.Constant(value=1 | 1.0), op=ast.Div(), right=right) if "n_classes" in ast.unparse(
                right
            ):
                yield f"line {node.lineno}: 1 / n_classes"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_nobody_but_the_objective_says_what_outputs_and_targets_mean(path):
    if not path.relative_to(SOURCE).as_posix().startswith(DECIDES):
        assert list(meanings(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "z.argmax(1)",
        "F.cross_entropy(z, t)",
        "z.gather(1, target[:, None])",
        "torch.bincount(b.target)",
        "1 / m.n_classes",
    ],
)
def test_whoever_says_it_is_seen(line):
    assert list(meanings(ast.parse(line)))
