"""Group advantages: values worked out by hand, and what must hold for any rewards."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinktuning.errors import InputError
from thinktuning.objective import group_advantages


def advantages_of(rewards, dtype=torch.float64, **options):
    return group_advantages(torch.tensor(rewards, dtype=dtype), **options)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        # mean 1/2, squares add up to 4 * 1/4, std = sqrt(1 / 3), 0.5 / std = sqrt(3) / 2
        ([1, 0, 0, 1], [0.8660254, -0.8660254, -0.8660254, 0.8660254]),
        # mean 1/5, squares 0.64 + 4 * 0.04 = 0.8, std = sqrt(0.8 / 4), 0.8 / std = 4 / sqrt(5)
        ([0, 0, 1, 0, 0], [-0.4472136, -0.4472136, 1.7888544, -0.4472136, -0.4472136]),
        # mean 1/2, std = sqrt(1/2)
        ([1, 0], [0.7071068, -0.7071068]),
        # mean 2, std = sqrt(8 / 2) = 2
        ([0, 2, 4], [-1, 0, 1]),
        # mean and deviations 3/4: one and a half times the first case, which std takes out again
        ([1.5, 0, 1.5, 0], [0.8660254, -0.8660254, 0.8660254, -0.8660254]),
    ],
)
def test_hand_worked_values(rewards, expected):
    advantages = advantages_of([rewards], eps=0.0)
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_eps_joins_the_standard_deviation():
    # std is 2, so that the deviations -2, 0, 2 are divided by 4
    assert advantages_of([[0, 2, 4]], eps=2.0).tolist() == [[-1 / 2, 0, 1 / 2]]


def test_default_eps_is_a_millionth():
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert advantages_of([[1, 0, 0, 1]])[0, 0].item() == pytest.approx(expected, rel=1e-12)


def test_scale_none_only_subtracts_the_mean():
    assert advantages_of([[1, 0, 0, 1], [0, 2, 4, 2]], scale="none").tolist() == [
        [0.5, -0.5, -0.5, 0.5],
        [-2, 0, 2, 0],
    ]


def test_groups_do_not_see_each_other():
    groups = [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    together = advantages_of(groups)
    alone = torch.cat([advantages_of([group]) for group in groups])
    assert torch.equal(together, alone)
    assert together[2].tolist() == [0, 0, 0, 0]
    assert together[:2].ne(0).all()


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 13])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1.1, 1 / 3, -0.7, 12345.678])
def test_equal_rewards_give_exactly_zero(value, group_size, scale):
    rewards = torch.full((2, group_size), value, dtype=torch.float32)
    assert (group_advantages(rewards, scale=scale) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_stay(dtype):
    advantages = advantages_of([[1, 0, 0], [0, 0, 1]], dtype=dtype)
    assert (advantages.dtype, advantages.shape) == (dtype, (2, 3))


@pytest.mark.parametrize("shape", [(4, 1), (3, 0), (4,), (2, 2, 2)])
def test_group_too_small_or_wrong_rank_is_refused(shape):
    with pytest.raises(InputError, match="at least 2"):
        group_advantages(torch.zeros(shape))


def test_unknown_scale_is_refused():
    with pytest.raises(InputError, match="scale"):
        advantages_of([[1, 0]], scale="mad")


# Quarters are exact in binary, so that equal rewards stay equal after a shift.
quarters = st.integers(-40, 40).map(lambda n: n / 4)
groups_of_rewards = st.lists(quarters, min_size=2, max_size=12)


@settings(deadline=None)  # the first call imports half of torch
@given(groups_of_rewards, quarters, st.sampled_from(["std", "none"]))
def test_centred_ordered_and_blind_to_a_shift(rewards, shift, scale):
    advantages = advantages_of([rewards], scale=scale)[0]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-12)

    by_reward = sorted(range(len(rewards)), key=rewards.__getitem__)
    for i, j in pairwise(by_reward):
        if rewards[i] == rewards[j]:
            assert advantages[i] == advantages[j]
        else:
            assert advantages[i] < advantages[j]

    shifted = advantages_of([[r + shift for r in rewards]], scale=scale)[0]
    torch.testing.assert_close(shifted, advantages, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(groups_of_rewards.filter(lambda rewards: len(set(rewards)) > 1))
def test_scaled_advantages_have_unit_spread(rewards):
    advantages = advantages_of([rewards])[0]
    # the smallest spread that quarters allow is about 0.07, next to which eps is nothing
    assert advantages.square().sum().item() / (len(rewards) - 1) == pytest.approx(1, abs=1e-4)
