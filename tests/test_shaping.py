"""Weights of guidance tokens: by hand, against a reference, and at the edges."""

import math

import numpy as np
import pytest
import torch

from thinktuning.errors import InputError
from thinktuning.objective import advantage_aware_weight, shaping_coefficient
from thinktuning.objective.shaping import luffy_weight, unshaped_weight


def weight_and_gradient(weight, probabilities, *arguments, **options):
    """The weights and d(sum of weights) / d(logprob), from probabilities."""
    logprobs = torch.tensor(probabilities, dtype=torch.float64).log().requires_grad_()
    weights = weight(logprobs, *arguments, **options)
    (gradient,) = torch.autograd.grad(weights.sum(), logprobs)
    return weights.tolist(), gradient.tolist()


# The coefficient c(A)


def test_coefficient_by_hand():
    advantages = torch.tensor([-8.0, -4.0, -2.0, 0.0, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    # 1e-3 * A / 4, and no further than 1e-3 from zero
    expected = [-1e-3, -1e-3, -5e-4, 0, 2.5e-4, 5e-4, 1e-3, 1e-3]
    assert shaping_coefficient(advantages).tolist() == pytest.approx(expected, rel=1e-12)


def test_coefficient_with_other_bounds():
    advantages = torch.tensor([-3.0, -0.5, 1.0, 3.0], dtype=torch.float64)
    coefficient = shaping_coefficient(advantages, c_max=0.2, advantage_bound=2.0)
    assert coefficient.tolist() == pytest.approx([-0.2, -0.05, 0.1, 0.2], rel=1e-12)


def test_clamp_has_its_bounds_the_right_way_round():
    """Torch returns ``max`` everywhere if min > max: then c would be -0.001 whatever A is."""
    advantages = torch.linspace(-9, 9, 181, dtype=torch.float64)
    coefficient = shaping_coefficient(advantages)
    swapped = (advantages * (1e-3 / 4)).clamp(min=1e-3, max=-1e-3)
    assert (swapped == -1e-3).all()
    assert torch.equal(coefficient.sign(), advantages.sign())
    assert (coefficient[advantages > 4] == 1e-3).all()
    assert (coefficient[advantages < -4] == -1e-3).all()
    assert (coefficient[advantages.abs() < 4].diff() > 0).all()


# The AAS weight


@pytest.mark.parametrize(
    ("probability", "advantage", "expected"),
    [
        # A = 2 makes c = 0.0005, A = 4 and more 0.001, and the negative ones likewise
        (1.0, 2.0, 1 / 1.0005),
        (0.5, 2.0, 0.5 / 0.5005),
        (0.001, 4.0, 0.5),  # pi = c: half
        (0.001, 40.0, 0.5),  # saturated
        (0.0001, 4.0, 1 / 11),  # raised, but conservatively
        (1.0, -4.0, 1 / 0.999),  # a confident mistake counts for more
        (0.5, -2.0, 0.5 / 0.4995),
        (0.02, -4.0, 0.02 / 0.019),
        (0.0101, -4.0, 0.0101 / 0.0091),  # the largest there is: just above the mask
        (0.0099, -4.0, 0.0),  # just below
        (0.001, -4.0, 0.0),  # on the pole, were it not masked
        (1e-9, -0.01, 0.0),
        (0.3, 0.0, 1.0),  # no advantage, no shaping
        (0.0001, 0.0, 1.0),  # and no mask either
        (0.0099, 0.01, 0.0099 / (0.0099 + 2.5e-6)),  # the mask is for A < 0 only
    ],
)
def test_aas_by_hand(probability, advantage, expected):
    advantages = torch.tensor([advantage], dtype=torch.float64)
    weights, gradient = weight_and_gradient(advantage_aware_weight, [probability], advantages)
    assert weights == pytest.approx([expected], rel=1e-9)
    assert gradient == pytest.approx([expected], rel=1e-9)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_aas_equals_the_formula_on_random_pairs(dtype, rtol):
    rng = np.random.default_rng(3)
    number = 100_000
    # half of the probabilities near 1, half spread over e^-14 ... 1; advantages also beyond 4
    logprobs = np.where(
        rng.random(number) < 0.5, -rng.exponential(0.2, number), -14 * rng.random(number)
    ).astype(np.float32)
    advantages = (2.5 * rng.standard_normal(number)).astype(np.float32)

    pi, a = np.exp(logprobs.astype(np.float64)), advantages.astype(np.float64)
    c = np.maximum(np.minimum(1e-3 * a / 4, 1e-3), -1e-3)
    dropped = (a < 0) & (pi < 0.01)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(dropped, 0.0, pi / (pi + c))
    assert 5_000 < dropped.sum() < 50_000
    assert (np.abs(a) > 4).sum() > 5_000

    leaf = torch.tensor(logprobs, dtype=dtype, requires_grad=True)
    given = torch.tensor(advantages, dtype=dtype)
    weights = advantage_aware_weight(leaf, given)
    # as the loss uses it: -w * A, whose gradient must be -A * pi / (pi + c)
    (gradient,) = torch.autograd.grad(-(weights * given).sum(), leaf)
    np.testing.assert_allclose(weights.detach().double().numpy(), expected, rtol=rtol)
    np.testing.assert_allclose(gradient.double().numpy(), -a * expected, rtol=rtol)
    assert (gradient.numpy()[dropped] == 0).all()


def test_aas_broadcasts_one_advantage_per_rollout():
    logprobs = torch.tensor([[0.5, 0.001], [0.5, 0.001]], dtype=torch.float64).log()
    advantages = torch.tensor([[4.0], [-4.0]], dtype=torch.float64)
    weights = advantage_aware_weight(logprobs, advantages)
    assert weights[0].tolist() == pytest.approx([0.5 / 0.501, 0.5])
    assert weights[1].tolist() == pytest.approx([0.5 / 0.499, 0.0])


def test_aas_holds_its_denominator_fixed():

    logprobs = torch.tensor([0.2, 0.002], dtype=torch.float64).log().requires_grad_()
    weights = advantage_aware_weight(logprobs, torch.tensor([3.0, 3.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(weights.sum(), logprobs)
    # were it not, the gradient would be c * pi / (pi + c)^2, far from the weight
    assert torch.allclose(gradient, weights.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aas_has_no_pole_and_no_nan(dtype):
    logprobs = torch.cat(
        [
            torch.linspace(-200, 0, 4001, dtype=dtype),
            # around pi = 0.001 = c_max, and around the mask's edge
            math.log(1e-3) + torch.linspace(-1e-3, 1e-3, 201, dtype=dtype),
            math.log(1e-2) + torch.linspace(-1e-3, 1e-3, 201, dtype=dtype),
        ]
    ).requires_grad_()
    special = torch.tensor([-1e30, -1e6, -4.0, -1e-30, -0.0, 0.0, 1e-30, 4.0, 1e6, 1e30])
    advantages = torch.cat([special.to(dtype), torch.linspace(-8, 8, 161, dtype=dtype)])[:, None]
    weights = advantage_aware_weight(logprobs, advantages)
    (gradient,) = torch.autograd.grad(weights.sum(), logprobs)
    assert torch.isfinite(weights).all() and torch.isfinite(gradient).all()
    assert (weights >= 0).all()
    assert weights.max() <= 0.01 / 0.009 + 1e-4


def test_aas_vanishes_for_tokens_that_the_policy_never_writes():
    logprobs = torch.tensor([-30.0, -100.0, -200.0])
    assert (advantage_aware_weight(logprobs, torch.tensor(2.0)) < 1e-9).all()


@pytest.mark.parametrize("probability", [1.0, 0.5, 0.1, 0.02, 0.0101, 0.009, 1e-3, 1e-6])
def test_aas_never_grows_with_the_advantage(probability):
    advantages = torch.linspace(-6, 6, 241, dtype=torch.float64)
    if probability < 0.01:
        advantages = advantages[advantages >= 0]  # below zero everything is masked
    logprobs = torch.full_like(advantages, math.log(probability))
    steps = advantage_aware_weight(logprobs, advantages).diff()
    assert (steps <= 0).all()
    within = (advantages[1:].abs() <= 4) & (advantages[:-1].abs() <= 4)
    assert (steps[within] < 0).all()


def test_aas_becomes_plain_policy_gradient_as_c_vanishes():
    logprobs = torch.linspace(-8, 0, 81, dtype=torch.float64).requires_grad_()
    advantages = torch.linspace(-5, 5, 21, dtype=torch.float64)[:, None]
    distances = []
    for c_max in (1e-5, 1e-7, 1e-9, 1e-12):
        weights = advantage_aware_weight(logprobs, advantages, c_max=c_max, mask_below=2 * c_max)
        (gradient,) = torch.autograd.grad((advantages * weights).sum(dim=0).sum(), logprobs)
        vanilla = advantages.sum(dim=0).expand_as(gradient)
        assert (gradient - vanilla).abs().max() < 1e6 * c_max
        distances.append((weights - 1).abs().max().item())
    # c / pi at most, with pi = e^-8
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-12 * math.exp(8) * 1.1


@pytest.mark.parametrize(
    "options",
    [
        {"c_max": 0.01, "mask_below": 0.01},
        {"c_max": 0.02, "mask_below": 0.01},
        {"c_max": 0.0},
        {"c_max": -1e-3},
        {"mask_below": 0.0},
    ],
)
def test_aas_refuses_what_would_have_a_pole(options):
    with pytest.raises(InputError, match="pole"):
        advantage_aware_weight(torch.tensor([-1.0]), torch.tensor([1.0]), **options)


# What AAS is compared with


def test_luffy_by_hand():
    weights, gradient = weight_and_gradient(luffy_weight, [0.1, 0.9, 1.0])
    assert weights == pytest.approx([0.5, 0.9, 1 / 1.1])
    # 0.1 / (pi + 0.1)^2 * pi
    assert gradient == pytest.approx([0.25, 0.09, 0.1 / 1.21])


def test_luffy_with_another_offset():
    weights, gradient = weight_and_gradient(luffy_weight, [0.25], offset=1.0)
    assert (weights, gradient) == (pytest.approx([0.2]), pytest.approx([0.16]))


def test_luffy_equals_its_formula_everywhere():
    probabilities = np.linspace(1e-6, 1, 1000)
    weights, gradient = weight_and_gradient(luffy_weight, probabilities)
    np.testing.assert_allclose(weights, probabilities / (probabilities + 0.1), rtol=1e-9)
    slope = 0.1 / (probabilities + 0.1) ** 2
    np.testing.assert_allclose(gradient, slope * probabilities, rtol=1e-9)


def test_unshaped_is_plain_policy_gradient():
    weights, gradient = weight_and_gradient(unshaped_weight, [1e-80, 0.001, 0.5, 1.0])
    assert weights == [1, 1, 1, 1]
    assert gradient == [1, 1, 1, 1]


@pytest.mark.parametrize("weight", [luffy_weight, unshaped_weight])
def test_alternatives_stay_finite(weight):
    logprobs = torch.linspace(-200, 0, 401).requires_grad_()
    weights = weight(logprobs)
    (gradient,) = torch.autograd.grad(weights.sum(), logprobs)
    assert torch.isfinite(weights).all() and torch.isfinite(gradient).all()
