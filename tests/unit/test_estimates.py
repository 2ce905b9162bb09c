"""The cost model: predicted durations of jobs."""

import pytest

from models.tiers import Settings
from worker.queue.estimates import DECAY, RegressionSums
from worker.queue.records import DecodeRequest


def sums_of(*measured: tuple[float, float]) -> RegressionSums:
    """The sums of jobs, given as (seconds, work)."""
    sums = RegressionSums()
    for seconds, work in measured:
        sums = sums.plus(RegressionSums.of(seconds, work), DECAY)
    return sums


def test_the_fit_separates_the_fixed_part_from_the_part_per_work() -> None:
    cost = sums_of(*((0.1 + 0.5 * w, w) for w in (0.04, 1.6, 0.16, 400.0))).fit()
    assert cost is not None
    assert cost.job_s == pytest.approx(0.1, rel=1e-3)
    assert cost.megapixel_step_s == pytest.approx(0.5, rel=1e-3)


def test_the_total_of_many_jobs_is_predicted_although_durations_scatter() -> None:
    sizes = [0.04, 0.16, 0.6, 1.6] * 20
    durations = [(0.1 + 0.5 * w) * (0.5, 1.0, 1.5)[i % 3] for i, w in enumerate(sizes)]
    cost = sums_of(*zip(durations, sizes, strict=True)).fit()
    assert cost is not None
    assert sum(map(cost.seconds, sizes)) == pytest.approx(sum(durations), rel=0.1)


def test_jobs_of_one_size_give_no_fixed_part() -> None:
    cost = sums_of((1.0, 2.0), (1.0, 2.0)).fit()
    assert cost is not None
    assert cost.job_s == 0.0
    assert cost.seconds(4.0) == pytest.approx(2.0)


def test_work_counts_the_padded_size() -> None:
    narrow, block = (
        DecodeRequest("", "ddim-10", Settings("ddim", 10), 0, "", "", 2, 16384, height)
        for height in (1, 64)
    )
    assert narrow.work == block.work == pytest.approx(16384 * 64 / 1e6 * 10)


def test_without_jobs_there_is_no_cost_model() -> None:
    assert RegressionSums().fit() is None


def test_newer_jobs_weigh_more() -> None:
    cost = sums_of(*[(1.0, 1.0)] * 30, *[(3.0, 1.0)] * 30).fit()
    assert cost is not None
    assert cost.seconds(1.0) > 2


def test_outliers_make_no_part_negative() -> None:
    cost = sums_of((5.0, 0.1), (1.0, 10.0)).fit()
    assert cost is not None
    assert cost.job_s >= 0 and cost.megapixel_step_s > 0
