"""Intervals and tests against scipy, enumeration and their own coverage."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sukashi.core import stats
from sukashi.core.errors import UsageError
from sukashi.core.stats import (
    bootstrap,
    crossed,
    crossed_test,
    holm,
    least_images,
    not_lower,
    ratio,
    share,
    shown_up_to,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_one_value_gives_no_bounds() -> None:
    got = bootstrap([50.0], generator=rng())
    assert (got.mean, got.low, got.high, got.n) == (50.0, None, None, 1)
    curve = bootstrap(np.ones((1, 3)), generator=rng())
    np.testing.assert_array_equal(curve.mean, np.ones(3))
    assert curve.low is None


def test_bootstrap_is_the_enumerated_distribution() -> None:
    """All 3^3 resamples of three values, against 200000 drawn ones and against scipy's."""
    values = np.array([0.0, 1.0, 5.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=3)]
    got = bootstrap(values, generator=rng(), level=0.8, n_resamples=200_000)
    low, high = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert (got.low, got.high) == pytest.approx((low, high))
    many = rng(1).exponential(size=60)
    theirs = scipy_stats.bootstrap((many,), np.mean, method="percentile", n_resamples=20_000, rng=rng(2))
    ours = bootstrap(many, generator=rng(3), n_resamples=20_000)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, drawn, counts = rng().normal(size=90), [], stats._counts
    whole = bootstrap(values, generator=rng(1))
    monkeypatch.setattr(stats, "BLOCK", 1000)
    monkeypatch.setattr(stats, "_counts", lambda n, size, generator: drawn.append(size) or counts(n, size, generator))
    found = bootstrap(values, generator=rng(1))
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert max(drawn) == 11
    assert sum(drawn) == 10_000


def test_columns_get_the_bootstrap_they_would_get_alone() -> None:
    values = rng().normal(size=(30, 2, 3))
    together = bootstrap(values, generator=rng(1), n_resamples=500)
    for at in np.ndindex(2, 3):
        alone = bootstrap(values[:, *at], generator=rng(1), n_resamples=500)
        found = [bounds[at] for bounds in (together.mean, together.low, together.high)]
        assert found == [alone.mean, alone.low, alone.high]
    one = bootstrap(values[:1], generator=rng(1))
    np.testing.assert_array_equal(one.mean, values[0])
    assert (one.low, one.n) == (None, 1)


def test_the_generator_decides() -> None:
    values = rng().normal(size=9)
    first, again, other = (bootstrap(values, generator=rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.low != other.low


@pytest.mark.parametrize(
    ("n_seeds", "of_seeds", "of_images"), [(3, 0.04, 0.5), (3, 0.0, 0.5), (5, 0.2, 0.1), (1, 0.0, 0.5)]
)
def test_crossed_covers_as_often_as_it_says_with_few_seeds(n_seeds: int, of_seeds: float, of_images: float) -> None:
    """1500 studies of 150 images: 95 % less 3 standard errors (0.56 % each); noise of both makes it wider."""
    generator = rng(13)
    covered = 0
    for _ in range(1500):
        values = generator.normal(0, of_seeds, (n_seeds, 1)) + generator.normal(0, of_images, (1, 150))
        got = crossed(values + generator.normal(0, 0.2, (n_seeds, 150)))
        covered += got.low <= 0 <= got.high
    assert 0.95 - 3 * 0.0056 < covered / 1500 < 0.999


def test_crossed_by_hand() -> None:
    got = crossed([[1.0, 2.0, 3.0, 6.0]])
    theirs = scipy_stats.ttest_1samp([1.0, 2.0, 3.0, 6.0], 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high)), "one seed: the t interval over images"
    same = crossed(np.full((3, 4), 0.5))
    assert (same.mean, same.low, same.high) == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="at least 2"):
        crossed(np.ones((3, 1)))


def test_crossed_takes_columns_alike() -> None:
    values = rng().normal(size=(3, 20, 2))
    together = crossed(values)
    for column in range(2):
        alone = crossed(values[..., column])
        assert (together.low[column], together.mean[column]) == pytest.approx((alone.low, alone.mean), rel=1e-12)


def test_the_test_of_crossed_is_its_interval() -> None:
    """p < 0.05 where the interval of 95 % leaves 0 out; with one seed it is the t test over images."""
    generator = rng(6)
    for n_seeds, n_images, shift in itertools.product((1, 2, 3, 5), (10, 500, 5000), (0.0, 0.1, 0.3, 2.0)):
        values = generator.normal(shift, 0.2, (n_seeds, 1)) + generator.normal(0, 0.5, (n_seeds, n_images))
        p = crossed_test(values)
        edge = crossed(values, level=min(1 - p, 1 - 1e-9))
        assert min(abs(edge.low), abs(edge.high)) < 1e-6 * abs(edge.mean) or p < 1e-9, "it ends at 0"
    assert crossed_test(values[:1]) == pytest.approx(scipy_stats.ttest_1samp(values[0], 0).pvalue)
    assert (crossed_test(np.ones((2, 3))), crossed_test(np.zeros((2, 3)))) == (0.0, 1.0)


def test_pairing_takes_out_what_the_pairs_share() -> None:
    shared = rng(8).normal(0, 100, size=(3, 50))
    assert crossed(shared + 1 + rng(9).normal(0, 0.1, size=(3, 50)) - shared).low > 0.5


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert ratio([1.0, 2.0, 4.0], [2.0, 16.0, 12.0]).mean == 3.0
    assert (ratio([1.0] * 5, [2.0] * 5).low, ratio([1.0] * 5, [2.0] * 5).high) == (0.0, math.inf), "five show nothing"
    six = ratio([1.0] * 6, [2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    assert (six.low, six.high) == (2.0, 7.0), "P(all on one side) = 2 / 64 = 3 %"
    twenty = ratio(np.ones(20), np.arange(1.0, 21.0))
    assert (twenty.low, twenty.high) == (6.0, 15.0), "as in tables of the sign test"
    disturbed = np.exp(rng(2).normal(0, 1, 30))  # of both alike
    found = ratio(3 * disturbed, 3.6 * disturbed * np.exp(rng(3).normal(0, 0.01, 30)))
    assert found.low < 1.2 < found.high < found.low * 1.02
    spiked = 3.6 * disturbed
    spiked[:3] *= 100
    assert ratio(3 * disturbed, spiked).mean == pytest.approx(1.2), "some passes that took long move nothing"
    forth, back = ratio(disturbed, disturbed[::-1]), ratio(disturbed[::-1], disturbed)
    assert (1 / back.high, 1 / back.low) == pytest.approx((forth.low, forth.high))
    with pytest.raises(UsageError, match="positive values on both sides"):
        ratio([1.0, 0.0], [1.0, 1.0])


def test_networks_are_shown_up_to_the_first_that_fails() -> None:
    n_gained, n_lost = np.zeros(4, int), np.array([0, 5, 200, 0])
    assert shown_up_to(n_gained, n_lost, 1000, 0.02) == 2
    both = np.stack([n_lost, [0, 200, 0, 0]], axis=1)
    assert shown_up_to(np.zeros_like(both), both, 1000, 0.02) == 1, "each of two tests must pass"
    assert shown_up_to([0], [12], 1000, 0.02) == 0
    assert shown_up_to([0], [12], 1000, 0.02, level=0.9) == 1


def _likeliest(b: int, c: int, n: int, margin: float) -> float:
    """p_c that maximises the likelihood of b, c and n - b - c under p_b = p_c - margin, by search."""
    grid = np.linspace(margin + 1e-9, (1 + margin) / 2 - 1e-9, 2_000_001)
    log_l = c * np.log(grid) + (n - b - c) * np.log1p(margin - 2 * grid) + (b * np.log(grid - margin) if b else 0)
    return float(grid[np.argmax(log_l)])


@pytest.mark.parametrize(("b", "c", "n", "margin"), [(3, 9, 200, 0.05), (0, 4, 900, 0.02), (30, 41, 500, 0.01)])
def test_not_lower_is_the_score_test_at_the_likeliest_share(b: int, c: int, n: int, margin: float) -> None:
    q = _likeliest(b, c, n, margin)
    score = (b - c + n * margin) / math.sqrt(n * (2 * q - margin * (1 + margin)))
    level = float(scipy_stats.norm.cdf(score))
    assert not_lower(b, c, n, margin, level=level - 1e-4)
    assert not not_lower(b, c, n, margin, level=level + 1e-4)


def test_equal_answers_on_few_images_show_nothing() -> None:
    assert least_images(0.01) == 381
    assert not_lower(0, 0, 381, 0.01)
    assert not not_lower(0, 0, 380, 0.01)


@pytest.mark.parametrize(("n", "margin", "disagree"), [(200, 0.05, 0.1), (225, 0.05, 0.15), (1000, 0.02, 0.1)])
def test_not_lower_errs_as_often_as_it_says(n: int, margin: float, disagree: float) -> None:
    """Networks that truly lose `margin`: 2.5 % of 40,000 pass, less by up to 1 % for counts are whole numbers."""
    shares = [(disagree - margin) / 2, (disagree + margin) / 2, 1 - disagree]
    counts = rng(11).multinomial(n, shares, size=40_000)
    passed = not_lower(counts[:, 0], counts[:, 1], n, margin)
    assert 0.015 < passed.mean() < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 40_000)
    better = rng(12).multinomial(n, [disagree / 2, disagree / 2, 1 - disagree], size=40_000)
    assert not_lower(better[:, 0], better[:, 1], n, margin).mean() > 5 * passed.mean()


@pytest.mark.parametrize(("n_right", "n"), [(0, 10), (10, 10), (851, 1000)])
def test_share_is_scipys_wilson_interval(n_right: int, n: int) -> None:
    theirs = scipy_stats.binomtest(n_right, n).proportion_ci(0.9, "wilson")
    got = share(n_right, n, level=0.9)
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high))
    assert (got.mean, got.n) == (n_right / n, n)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert len(holm([])) == 0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(UsageError, match="interval"):
        bootstrap(values, generator=rng())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match=r"level must be in \(0, 1\), got 95"):
        bootstrap([1.0, 2.0], generator=rng(), level=95)
    with pytest.raises(UsageError, match="got 2 and 3"):
        ratio([1, 2], [1, 2, 3])
    for margin in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(UsageError, match=r"margin must be in \(0, 1\), got"):
            not_lower(1, 1, 10, margin)
    with pytest.raises(UsageError, match=r"counts that n = 10 holds, got 6\.0 and 5\.0"):
        not_lower(6, 5, 10, 0.1)
    with pytest.raises(UsageError, match="got 11 of 10"):
        share(11, 10)
    with pytest.raises(UsageError, match="at least 2"):
        crossed(np.ones((3, 1)))


def _answers(gained: int, lost: int, n: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [gained, lost, n - gained - lost])[None]


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 225), (3, 2, 225), (0, 7, 25), (5, 0, 5), (40, 21, 500)])
def test_a_paired_difference_is_the_score_test_inverted(b: int, c: int, n: int) -> None:
    """The shares under each difference by search of the likelihood, and the differences by search of the test."""
    found, z = stats.paired(_answers(b, c, n)), scipy_stats.norm.ppf(0.975)
    assert (found.mean, found.n) == (pytest.approx((b - c) / n), 1)
    for bound in (found.low, found.high):
        if abs(bound) < 1:
            change = bound if bound < found.mean else -bound  # a rise is a loss of the other
            gained, lost = (b, c) if bound < found.mean else (c, b)
            # Only what is below 0 is a margin: of differences above it the sides are changed.
            sides = (gained, lost, -change) if change < 0 else (lost, gained, change)
            q = _likeliest(*sides[:2], n, sides[2])
            score = (gained - lost - n * change) / math.sqrt(n * (2 * q - sides[2] * (1 + sides[2])))
            assert score == pytest.approx(z, abs=1e-3)
    opposite = stats.paired(-_answers(b, c, n))
    assert (opposite.low, opposite.high) == pytest.approx((-found.high, -found.low))
    assert not_lower(b, c, n, 0.05) == (found.low >= -0.05), "the same test"


def test_equal_answers_bound_a_change_by_how_many_they_are() -> None:
    found = stats.paired(np.zeros((1, 225)))
    assert (100 * found.low, 100 * found.high) == pytest.approx((-1.679, 1.679), abs=1e-3)
    assert -found.low == pytest.approx(stats.least_margin(225))
    assert stats.paired(np.zeros((3, 225))).high == pytest.approx(found.high, rel=0.02), "on every seed"
    with pytest.raises(UsageError, match="-1, 0 or 1"):
        stats.paired([[0.5, 0.0]])


@pytest.mark.parametrize(
    ("n_seeds", "n", "gained", "lost"), [(1, 225, 0.01, 0.01), (1, 25, 0, 0.04), (3, 225, 0, 0.02)]
)
def test_a_paired_difference_covers_where_few_answers_differ(n_seeds: int, n: int, gained: float, lost: float) -> None:
    """1000 studies, half of whose answers all seeds share: 95 % less 3 standard errors (0.69 % each)."""
    generator, covered, shares = rng(17), 0, [gained, lost, 1 - gained - lost]
    for _ in range(1000):
        of_all, of_each = (generator.choice([1, -1, 0], p=shares, size=(k, n)) for k in (1, n_seeds))
        found = stats.paired(np.where(generator.random((n_seeds, n)) < 0.5, of_all, of_each))
        covered += found.low <= gained - lost <= found.high
    assert covered / 1000 > 0.95 - 3 * 0.0069


def test_seeds_that_err_on_opposite_images_do_not_cancel_what_images_bring() -> None:
    """Two networks that give one answer to every image, each another one: not surer together than if independent."""
    target = np.repeat([0, 1, 2], [25, 100, 100])
    found, alone = crossed([target == 1, target == 2], bounds=(0, 1)), share(100, 225)
    assert found.high - found.low > 0.95 * (alone.high - alone.low) / math.sqrt(2)


def test_accuracy_of_one_network_is_wilsons() -> None:
    right = np.arange(25) < 19
    for n_seeds in (1, 3):
        found = stats.accuracy([right] * n_seeds)
        assert (found.low, found.high, found.n) == (share(19, 25).low, share(19, 25).high, n_seeds)
    other = np.stack([right, right[::-1], right])
    assert stats.accuracy(other) == crossed(other, bounds=(0, 1))
