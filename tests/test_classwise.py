"""What is said class by class, against counts and sums written out."""

import itertools

import numpy as np
import pytest

from sukashi.core import stats
from sukashi.measures import classwise

RNG = np.random.default_rng(0)
TARGET = np.repeat([0, 1, 2], [4, 30, 66])
ANSWER = np.where(RNG.random(100) < 0.7, TARGET, RNG.integers(-1, 3, 100))


def test_a_confusion_matrix_counts():
    table = classwise.confusion(ANSWER, TARGET, 3)
    for k, given in itertools.product(range(3), (0, 1, 2, -1)):
        n = sum(t == k and a == given for a, t in zip(ANSWER.tolist(), TARGET.tolist(), strict=True))
        assert table[k, given if given >= 0 else 3] == n
    assert table.sum() == 100


def test_sensitivity_and_specificity_are_shares_of_the_class_and_of_the_others():
    table = classwise.confusion(ANSWER, TARGET, 3)
    for k, (found, left) in enumerate(zip(classwise.sensitivity(table), classwise.specificity(table), strict=True)):
        assert found.mean == np.mean(ANSWER[k == TARGET] == k)
        assert left.mean == np.mean(ANSWER[k != TARGET] != k)
        assert (found.n, left.n) == (int((k == TARGET).sum()), int((k != TARGET).sum()))
        assert 0 <= found.low <= found.mean <= found.high <= 1
    absent = classwise.confusion(np.array([0, 1]), np.array([0, 0]), 2)
    assert classwise.sensitivity(absent)[1] is None
    assert classwise.specificity(absent)[0] is None


def test_balanced_accuracy_is_the_mean_of_the_sensitivities():
    found = classwise.balanced_accuracy(ANSWER == TARGET, TARGET, 4)
    by_class = [np.mean(ANSWER[k == TARGET] == k) for k in range(3)]
    assert found.mean == pytest.approx(np.mean(by_class)), "a class without images is left out"
    assert 0 < found.low < found.mean < found.high < 1
    one_for_all = classwise.balanced_accuracy(TARGET == 2, TARGET, 3)
    assert one_for_all.mean == pytest.approx(1 / 3)
    certain = classwise.balanced_accuracy(TARGET >= 0, TARGET, 3)
    assert 0.6 < certain.low < 0.9 < certain.high == 1, "four images of a class leave room for errors"


def test_one_answer_for_all_is_a_guess_whatever_the_classes():
    target = np.repeat([0, 1, 2], [25, 100, 100])
    assert classwise.guesses(target == 1, target, 3), "44 % of these, and no more than its share"
    fair = np.zeros(225, dtype=bool)
    fair[[*range(20), *range(25, 60), *range(125, 160)]] = True
    assert fair.mean() < 100 / 225, "fewer right than one answer for all"
    assert not classwise.guesses(fair, target, 3), "but more of each class than that"
    assert not classwise.guesses(target >= 0, target, 3)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    probability = RNG.random((40, 3)).round(1)  # with ties
    target = np.repeat([0, 1, 2], [1, 12, 27])
    none, *found = classwise.auc(probability, target, 3)
    assert none is None, "one image is no sample"
    for k, area in enumerate(found, 1):
        pairs = [
            1.0 if p > q else 0.5 if p == q else 0.0
            for p in probability[target == k, k]
            for q in probability[target != k, k]
        ]
        assert area.mean == pytest.approx(np.mean(pairs), abs=1e-12)
        assert area.low < area.mean < area.high
    perfect = classwise.auc(np.eye(3)[target], target, 3)[1]
    assert (perfect.mean, perfect.high) == (1.0, 1.0)
    assert perfect.low < 0.9, "12 images on one side"


def test_calibration_is_the_mean_over_bins():
    confidence, correct = RNG.random(200), RNG.random(200) < 0.5
    over, error = classwise.calibration(confidence, correct)
    assert over.mean == pytest.approx(confidence.mean() - correct.mean())
    total = 0.0
    for k in range(15):
        rows = (confidence >= k / 15) & (confidence < (k + 1) / 15)
        if rows.any():
            total += rows.mean() * abs(confidence[rows].mean() - correct[rows].mean())
    assert error == pytest.approx(total)
    assert classwise.calibration(np.ones(10), np.ones(10))[1] == 0


def test_what_a_class_lost_is_paired_with_its_interval_and_falls_when_that_is_shown():
    target = np.repeat([0, 1, 2, 3], [25, 100, 3, 1])
    dense = np.ones((1, 129), dtype=bool)
    dense[0, :5] = False
    cut = np.ones((1, 129), dtype=bool)
    cut[0, :14] = False  # of the first class nine more, while the intervals of both overlap
    cut[0, 25:30] = False  # of the second five points
    cut[0, 125] = False  # one of the three of the third
    first, second, third = classwise.changes(dense, cut, target, 4)
    assert [of.number for of in (first, second, third)] == [0, 2, 1], "one image is no sample"
    assert [of.fell for of in (first, second, third)] == [True, False, False], "three images show little"
    assert first.cut.high > first.dense.low
    assert (first.n_images, first.dense.low, first.cut.mean) == (25, stats.share(20, 25).low, 11 / 25)
    assert first.change == stats.paired(np.repeat([-1, 0], [9, 16])[None])
