"""How much guidance there is, which rollouts get it, and the seeds of such draws."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from thinktuning.engines.seeding import derive_seed
from thinktuning.errors import InputError
from thinktuning.teaching import GammaSchedule, guided_count, select_guided

KINDS = ["constant", "linear", "cosine", "exponential"]


def values(planned_steps, **settings):
    schedule = GammaSchedule(**settings)
    return [schedule.at(step, planned_steps) for step in range(planned_steps)]


@pytest.mark.parametrize(
    ("kind", "start", "end", "expected"),
    [
        ("constant", 0.25, 0.01, [0.25, 0.25, 0.25, 0.25, 0.25]),
        ("linear", 1.0, 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("linear", 0.1, 0.5, [0.1, 0.2, 0.3, 0.4, 0.5]),
        # 0.4 times (1 + cos) / 2 at 0, 45, 90, 135 and 180 degrees
        ("cosine", 0.4, 0.0, [0.4, 0.341421356, 0.2, 0.058578644, 0.0]),
        ("cosine", 0.6, 0.2, [0.6, 0.541421356, 0.4, 0.258578644, 0.2]),
        ("exponential", 0.8, 0.05, [0.8, 0.4, 0.2, 0.1, 0.05]),
    ],
)
def test_gamma_goes_from_start_to_end_as_its_kind_says(kind, start, end, expected):
    assert values(5, kind=kind, start=start, end=end) == pytest.approx(expected, abs=1e-9)
    half = values(10, kind=kind, start=start, end=end, fraction=0.5)
    assert half == pytest.approx(expected + [0.0] * 5, abs=1e-9)


def test_the_recipe_guides_the_first_third_of_58_steps_from_a_tenth_to_a_hundredth():
    gamma = values(58, kind="linear", start=0.10, end=0.01, fraction=1 / 3)
    assert gamma[0] == 0.10
    assert gamma[10] == pytest.approx(0.10 - 0.09 * 10 / 19)
    assert gamma[19] == pytest.approx(0.01)  # a third of 58 is 19.3: 20 steps are guided
    assert gamma[20:] == [0.0] * 38
    assert all(a > b for a, b in itertools.pairwise(gamma[:21]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_of_zero_is_plain_grpo(kind):
    assert values(6, kind=kind, start=0.0, end=0.5) == [0.0] * 6
    assert values(6, kind=kind, start=0.0, end=0.0) == [0.0] * 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_guided_step_has_the_start(kind):
    assert values(1, kind=kind, start=0.3, end=0.1) == [0.3]
    assert values(10, kind=kind, start=0.3, end=0.1, fraction=0.1) == [0.3] + [0.0] * 9


@pytest.mark.parametrize(
    ("fraction", "planned", "guided"),
    [(1 / 3, 12, 4), (0.07, 100, 7), (0.29, 100, 29), (0.55, 100, 55), (0.5, 3, 2), (1.0, 7, 7)],
)
def test_guided_steps_are_counted_without_rounding_errors(fraction, planned, guided):
    gamma = values(planned, start=0.25, fraction=fraction)
    assert gamma == [0.25] * guided + [0.0] * (planned - guided)


@given(
    st.sampled_from(KINDS),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.floats(0.01, 1),
    st.integers(1, 200),
)
def test_gamma_stays_between_start_and_end_and_then_is_off(kind, start, end, fraction, planned):
    gamma = values(planned, kind=kind, start=start, end=end, fraction=fraction)
    on = [g for g in gamma if g > 0]
    assert gamma == on + [0.0] * (planned - len(on)), "guidance doesn't come back"
    assert abs(len(on) - fraction * planned) < 1 and on
    low, high = sorted((start, end if kind != "constant" else start))
    assert all(low - 1e-12 <= g <= high + 1e-12 for g in on)
    sign = 1 if end > start else -1
    assert all(sign * (b - a) >= -1e-12 for a, b in itertools.pairwise(on))
    past = GammaSchedule(kind, start, end, fraction).at(planned + 5, planned)
    assert past == (0 if fraction < 1 else gamma[-1])


def test_faults_are_told_together():
    with pytest.raises(InputError) as error:
        GammaSchedule(kind="exponential", start=1.5, end=-0.1, fraction=0)
    message = str(error.value)
    assert message.startswith("guidance.gamma: ")
    for fault in ("start must be", "1.5", "end must be", "-0.1", "fraction must be", "positive"):
        assert fault in message


@pytest.mark.parametrize(
    "faulty",
    [
        {"start": -0.01},
        {"start": 1.01},
        {"end": 1.01},
        {"fraction": 0.0},
        {"fraction": 1.01},
        {"start": math.nan},
        {"end": math.nan},
        {"fraction": math.nan},
        {"kind": "exponential", "end": 0.0},
    ],
)
def test_values_that_are_no_share_are_refused(faulty):
    with pytest.raises(InputError):
        GammaSchedule(**faulty)


@pytest.mark.parametrize(
    ("gamma", "group_size", "count"),
    [
        (0.0, 8, 0),
        (0.01, 5, 1),  # never none while guidance is on
        (0.25, 8, 2),
        (0.25, 7, 1),
        (0.3, 8, 2),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.99, 5, 4),
        (1.0, 5, 5),
    ],
)
def test_the_guided_rollouts_of_a_group_are_counted(gamma, group_size, count):
    assert guided_count(gamma, group_size) == count


@given(st.integers(1, 100), st.integers(2, 1000))
@example(29, 100)
def test_percentages_are_counted_as_on_paper(percent, group_size):
    # 0.29 * 100 is 28.999999999999996 in binary.
    assert guided_count(percent / 100, group_size) == max(1, percent * group_size // 100)


def test_the_draw_depends_on_the_seed_alone():
    assert select_guided([0, 2, 5, 7], 2, 11) == select_guided((0, 2, 5, 7), 2, 11)
    assert len({tuple(select_guided(range(8), 4, seed)) for seed in range(50)}) > 30


@given(st.sets(st.integers(0, 31)), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_the_drawn_are_eligible_distinct_in_order_and_as_many_as_there_can_be(places, count, seed):
    chosen = select_guided(sorted(places), count, seed)
    assert set(chosen) <= places
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(places))


def test_all_pairs_are_drawn_equally_often():
    eligible, draws = [0, 2, 3, 5, 7], 3000
    seen = Counter(
        tuple(select_guided(eligible, 2, derive_seed(seed, "select"))) for seed in range(draws)
    )
    pairs = list(itertools.combinations(eligible, 2))
    expected = draws / len(pairs)
    chi_square = sum((seen[pair] - expected) ** 2 / expected for pair in pairs)
    assert chi_square < 27.88  # one in a thousand exceeds it, at 9 degrees of freedom


@pytest.mark.parametrize(
    ("counters", "seed"),
    [
        ((0,), 7210762507766007076),
        ((1,), 2122349437186147863),
        (("1",), 6816117501529492216),
        ((0, 0, 0, 0, "rollout"), 7316161159413422416),
        ((3, 57, 7472, 4, "rollout"), 6299318158403379803),
        ((7, 0, "shuffle"), 9207607567255049045),
        ((0, 0, 12, "select"), 3538724312924132933),
    ],
)
def test_seeds_never_change(counters, seed):
    assert derive_seed(*counters) == seed


def test_every_draw_of_a_run_has_its_own_seed():
    stages = ("rollout", "select", "shuffle")
    names = [(0, *n) for n in itertools.product(range(10), range(20), range(8), stages)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds).bit_length() == 63


def test_counters_are_kept_apart():
    names = [(1,), ("1",), (1, 23), (12, 3), (123,), ("1", "23"), ("12", "3"), (3, 12), (0, 1)]
    assert len({derive_seed(*name) for name in names}) == len(names)
