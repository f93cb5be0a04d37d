"""The scorer on records with known verdicts: ties, misses, divergence, Holm, and the null test."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.bench.evidence import Bench, Check, Evidence, Rows, at_least, at_most
from assay.bench.statistics import holm, mean_interval, p_value, paired, seeds_to_settle, verdicts


def test_interval_is_students():
    values = np.array([1.0, 2.0, 4.0, 7.0])
    _, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_without_two_finite_values(values):
    _, low, high = mean_interval(values)
    assert (low, high) == (-math.inf, math.inf)


def test_p_value_is_scipys():
    values = [0.3, -0.1, 0.5, 0.2, 0.4]
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(ps):
    adjusted = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) + 1e-12 for p, q in zip(ps, adjusted, strict=True))
    order = np.argsort(ps, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


def test_clear_gain_and_clear_loss_in_both_directions():
    base = [0.90, 0.91, 0.89, 0.90, 0.92]
    up, down = [b + 0.05 for b in base], [b - 0.05 + 0.001 * i for i, b in enumerate(base)]
    assert verdicts([paired(up, base, "max"), paired(down, base, "max")]) == ["better", "worse"]
    assert verdicts([paired(up, base, "min"), paired(down, base, "min")]) == ["worse", "better"]


def test_ties_cannot_tell():
    base = [0.9, 0.8, 0.7]
    assert verdicts([paired(base, base, "max")]) == ["cannot tell"]


def test_a_miss_is_never_better_and_all_misses_are_worse():
    base = [0.5, 0.5, 0.5, 0.5]
    some = paired([0.9, 0.9, 0.9, None], base, "max")
    assert (some.missed, some.low) == (1, -math.inf)
    assert verdicts([some]) == ["cannot tell"]
    assert verdicts([paired([None] * 4, base, "max")]) == ["worse"]
    bad = paired([0.1, 0.11, 0.1, None], base, "max")
    assert verdicts([bad]) == ["worse"]


def test_where_the_baseline_failed_nothing_is_said():
    result = paired([0.9, 0.9, None], [None, None, None], "max")
    assert (result.n, verdicts([result])) == (0, ["cannot tell"])


def test_no_spread_below_a_step_of_the_metric_is_believed():
    one_step = paired([0.914] * 5, [0.913] * 5, "max", examples=1000)
    assert verdicts([one_step]) == ["cannot tell"]
    assert verdicts([paired([0.914, 0.915], [0.913, 0.914], "max", examples=1000)]) == ["cannot tell"]
    assert verdicts([paired([0.95] * 5, [0.9] * 5, "max", examples=1000)]) == ["better"]
    exact = paired([0.31234] * 5, [0.3] * 5, "max", examples=1000)
    assert exact.low == exact.gain, "a metric that is no share of the examples keeps its spread"


@pytest.mark.parametrize("chance", [0.25, 0.4, 0.45])
def test_null_comparison_of_runs_that_differ_by_one_example(chance):
    """Paired runs that mostly agree: differences of one step up or down, six methods judged together."""
    rng = np.random.default_rng(1)
    draws, wrong, base = 1000, 0, [0.9] * 5
    for _ in range(draws):
        steps = rng.choice([-1, 0, 1], p=[chance, 1 - 2 * chance, chance], size=(6, 5))
        results = [paired([0.9 + k / 1000 for k in row], base, "max", examples=1000) for row in steps]
        wrong += any(answer != "cannot tell" for answer in verdicts(results))
    assert wrong <= draws * 0.05 + 3 * math.sqrt(draws * 0.05 * 0.95)


def test_pairing_is_used():
    """A difference far below the spread over seeds is seen, since every seed shows it."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 6)
    method = base + 0.01 + rng.normal(0, 0.001, 6)
    assert verdicts([paired(list(method), list(base), "max")]) == ["better"]


@pytest.mark.parametrize(("methods", "seeds"), [(1, 2), (6, 2), (1, 3), (1, 5), (6, 5), (6, 10)])
def test_null_comparison_cannot_tell(methods, seeds):
    """The baseline against itself: a verdict in at most 5 % of draws, however many methods are judged together."""
    rng = np.random.default_rng(methods * 100 + seeds)
    draws = 2000
    wrong = 0
    for _ in range(draws):
        base = rng.binomial(1000, 0.97, seeds) / 1000
        results = [
            paired(list(rng.binomial(1000, 0.97, seeds) / 1000), list(base), "max", 1000) for _ in range(methods)
        ]
        wrong += any(answer != "cannot tell" for answer in verdicts(results))
    # Three standard deviations of a count with the allowed rate.
    assert wrong <= draws * 0.05 + 3 * math.sqrt(draws * 0.05 * 0.95)


def test_seeds_to_settle_shrinks_the_interval_below_the_gap():
    n, half, gap = 5, 1.0, 0.4
    needed = seeds_to_settle(n, half, gap)
    spread = half * math.sqrt(n) / stats.t.ppf(0.975, n - 1)
    widths = {k: stats.t.ppf(0.975, k - 1) * spread / math.sqrt(k) for k in (needed - 1, needed)}
    assert widths[needed] < gap <= widths[needed - 1]
    assert seeds_to_settle(5, 1.0, 0.0) is None


class TestCheck:
    def test_a_bound_inside_the_interval_cannot_tell_and_says_how_many_seeds_would(self):
        check = at_most("x", [0.5, 1.0, 1.4], 1.0)
        assert check.verdict == "cannot tell"
        assert check.seeds_needed > 3

    @pytest.mark.parametrize(
        ("make", "bound", "verdict"),
        [
            (at_most, 2.0, "holds"),
            (at_most, 0.5, "does not hold"),
            (at_least, 0.5, "holds"),
            (at_least, 2.0, "does not hold"),
        ],
    )
    def test_outside_the_interval(self, make, bound, verdict):
        check = make("x", [1.0, 1.01, 0.99], bound)
        assert (check.verdict, check.seeds_needed) == (verdict, None)

    def test_an_exact_number_has_no_interval(self):
        assert at_most("x", 1.0, 1.0).verdict == "holds"
        assert at_least("x", 0.999, 1.0).verdict == "does not hold"

    def test_nan_never_holds(self):
        assert at_most("x", [1.0, math.nan, 1.0], 5.0).verdict == "cannot tell"
        assert at_most("x", math.nan, 5.0).verdict == "cannot tell"


class TestEvidence:
    HOLDS = Check("a", 1, 1, 1, "<=", 2, 1)
    FAILS = Check("b", 3, 3, 3, "<=", 2, 1)
    OPEN = Check("c", 2, 1, 3, "<=", 2, 3)

    @pytest.mark.parametrize(
        ("checks", "verdict"),
        [
            ([], "cannot tell"),
            ([HOLDS], "holds"),
            ([HOLDS, OPEN], "cannot tell"),
            ([HOLDS, OPEN, FAILS], "does not hold"),
        ],
    )
    def test_verdict_follows_from_the_checks(self, checks, verdict):
        assert Evidence(Rows(), checks).verdict == verdict

    def test_read_back_equals_written(self):
        rows = Rows([{"variant": "a", "seed": 1, "x": 0.5}])
        evidence = Evidence(rows, [self.HOLDS, self.OPEN], ["a note"])
        assert Evidence.from_json(evidence.to_json()) == evidence

    def test_rows_are_paired_by_seed_whatever_their_order(self):
        rows = Rows([{"variant": v, "seed": s, "x": s * k} for v, k in (("a", 2), ("b", 1)) for s in (3, 1, 2)])
        assert rows.ratio("a", "b", "x").tolist() == [2, 2, 2]
        assert rows.difference("a", "b", "x").tolist() == [1, 2, 3]
        with pytest.raises(KeyError, match="no row of variant 'c'"):
            rows.values("c", "x")


def test_a_bench_can_be_sent_to_other_processes():
    import pickle
    import threading

    lock = threading.Lock()  # as in a progress bar: cannot be pickled
    bench = Bench(quick=True, jobs=2, progress=lambda done, total: lock.acquire())
    assert pickle.loads(pickle.dumps(bench)).seeds(5) == [100, 101]
