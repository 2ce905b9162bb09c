"""What jobs will take, by what jobs took."""

import pytest

from models.tiers import Settings
from worker.queue.estimates import FADE, Sums
from worker.queue.records import Decode


def fitted(*measured: tuple[float, float]) -> Sums:
    sums = Sums()
    for seconds, work in measured:
        sums = sums.plus(Sums.of(seconds, work), FADE)
    return sums


def test_a_fixed_share_and_one_of_the_size_are_told_apart() -> None:
    cost = fitted(*((0.1 + 0.5 * w, w) for w in (0.04, 1.6, 0.16, 400.0))).fit()
    assert cost is not None
    assert cost.job_s == pytest.approx(0.1, rel=1e-3)
    assert cost.megapixel_step_s == pytest.approx(0.5, rel=1e-3)


def test_the_sum_of_many_is_predicted_however_single_times_scatter() -> None:
    sizes = [0.04, 0.16, 0.6, 1.6] * 20
    took = [(0.1 + 0.5 * w) * (0.5, 1.0, 1.5)[i % 3] for i, w in enumerate(sizes)]
    cost = fitted(*zip(took, sizes, strict=True)).fit()
    assert cost is not None
    assert sum(map(cost.seconds, sizes)) == pytest.approx(sum(took), rel=0.1)


def test_one_size_alone_says_nothing_of_a_fixed_share() -> None:
    cost = fitted((1.0, 2.0), (1.0, 2.0)).fit()
    assert cost is not None
    assert (cost.job_s, cost.seconds(4.0)) == (0.0, pytest.approx(2.0))


def test_a_thread_of_pixels_costs_what_is_coded() -> None:
    thread, block = (
        Decode("", "ddim-10", Settings("ddim", 10), 0, "", "", 2, 16384, height)
        for height in (1, 64)
    )
    assert thread.work == block.work == pytest.approx(16384 * 64 / 1e6 * 10)


def test_without_a_measurement_nothing_is_known() -> None:
    assert Sums().fit() is None


def test_what_is_new_outweighs_what_is_old() -> None:
    cost = fitted(*[(1.0, 1.0)] * 30, *[(3.0, 1.0)] * 30).fit()
    assert cost is not None
    assert cost.seconds(1.0) > 2


def test_an_odd_measurement_makes_no_cost_negative() -> None:
    cost = fitted((5.0, 0.1), (1.0, 10.0)).fit()
    assert cost is not None
    assert cost.job_s >= 0 and cost.megapixel_step_s > 0
