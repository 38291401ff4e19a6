"""Engine and trainer disagree a little: how much, and what is done about it."""

import math
from dataclasses import replace

import pytest
import torch
from running import fit_arguments, scalars
from test_losses import loss_and_gradient, make_inputs

from thinktuning.cli import main
from thinktuning.objective import ObjectiveConfig, policy_loss, sampling_gap
from thinktuning.objective.mismatch import importance_weight

NAN, INF = math.nan, math.inf
LOG2 = math.log(2)

# The trainer's probabilities are these multiples of the engine's; the last place is no token of
# the student's.
RATIOS = [[2.0, 0.5, 1.0, 9.0], [1.0, 4.0, 9.0, 9.0]]
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()


def pair(junk=NAN, ratios=RATIOS, mask=MASK, dtype=torch.float64):
    """Logprobs of the trainer, with gradient, and of the engine, junk outside the mask."""
    engine = torch.linspace(-3, -0.5, mask.numel(), dtype=dtype).reshape(mask.shape)
    trainer = (engine + torch.tensor(ratios, dtype=dtype).log()).requires_grad_()
    return trainer, engine.masked_fill(~mask, junk)


# ---------------------------------------------------------------- the gap


@pytest.mark.parametrize("junk", [NAN, INF, -INF, -1.0])
def test_the_gap_by_hand(junk):
    gap = sampling_gap(*pair(junk), MASK)
    # |log r| of 2, 1/2, 1, 1, 4; k3 = r - 1 - log r
    assert (float(gap.mean.total), float(gap.mean.weight)) == pytest.approx((4 * LOG2, 5))
    assert float(gap.maximum) == pytest.approx(2 * LOG2)
    k3 = [1 - LOG2, LOG2 - 0.5, 0, 0, 3 - 2 * LOG2]
    assert (float(gap.k3.total), float(gap.k3.weight)) == pytest.approx((sum(k3), 5))


def test_no_gap_between_equal_logprobs():
    logprobs = torch.tensor([[-1.0, -30.0]])
    gap = sampling_gap(logprobs, logprobs, torch.ones(1, 2).bool())
    assert (gap.mean, gap.maximum, gap.k3) == ((0, 2), 0, (0, 2))


def test_no_tokens_have_no_gap():
    gap = sampling_gap(*pair(), MASK & ~MASK)
    assert (gap.mean, gap.maximum, gap.k3) == ((0, 0), 0, (0, 0))


def test_the_gap_carries_no_gradient():
    gap = sampling_gap(*pair(), MASK)
    assert not any(t.requires_grad for t in (*gap.mean, gap.maximum, *gap.k3))


@pytest.mark.parametrize("difference", [1e-6, -1e-5, 3e-4, -1e-3])
def test_small_gaps_are_not_lost_to_rounding(difference):
    engine = torch.full((1, 64), -0.25)
    trainer = engine + difference
    exact = (trainer - engine).double()
    gap = sampling_gap(trainer, engine, torch.ones(1, 64).bool())
    expected = (torch.expm1(exact) - exact).sum().item()
    assert expected > 0
    assert float(gap.k3.total) == pytest.approx(expected, rel=0.02, abs=64 * 1e-13)


def test_k3_estimates_the_divergence_of_the_trainer_from_the_engine():
    engine, trainer = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.1, 0.4]).log()
    drawn = torch.multinomial(
        engine.exp(), 200_000, True, generator=torch.Generator().manual_seed(0)
    )
    gap = sampling_gap(trainer[drawn][None], engine[drawn][None], torch.ones(1, len(drawn)).bool())
    exact = (engine.exp() * (engine - trainer)).sum().item()
    other = (trainer.exp() * (trainer - engine)).sum().item()
    assert abs(exact - other) > 0.05
    assert float(gap.k3.total / gap.k3.weight) == pytest.approx(exact, abs=0.01)


def test_absurd_gaps_stay_finite():
    trainer, engine = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    gap = sampling_gap(trainer, engine, torch.ones(1, 2).bool())
    assert float(gap.maximum) == 1e4
    assert math.isfinite(gap.k3.total)


# ---------------------------------------------------------------- the weight


@pytest.mark.parametrize("junk", [NAN, INF, -INF, -1.0])
@pytest.mark.parametrize(
    ("level", "cap", "expected"),
    [
        ("token", 8.0, [[2, 0.5, 1, 1], [1, 4, 1, 1]]),
        ("token", 1.5, [[1.5, 0.5, 1, 1], [1, 1.5, 1, 1]]),
        ("token", 0.25, [[0.25, 0.25, 0.25, 1], [0.25, 0.25, 1, 1]]),
        ("sequence", 8.0, [[1, 1, 1, 1], [4, 4, 1, 1]]),
        ("sequence", 3.0, [[1, 1, 1, 1], [3, 3, 1, 1]]),
    ],
)
def test_the_weight_by_hand(level, cap, expected, junk):
    weight = importance_weight(*pair(junk), MASK, level, cap)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64))
    assert not weight.requires_grad


def test_a_sequence_weighs_the_product_over_its_own_tokens():
    trainer, engine = pair(ratios=[[2.0, 3.0, 0.5, 9.0], [0.5, 0.1, 9.0, 9.0]])
    weight = importance_weight(trainer, engine, MASK, "sequence", 100.0)
    assert weight[0].tolist() == pytest.approx([3, 3, 3, 1])
    assert weight[1].tolist() == pytest.approx([0.05, 0.05, 1, 1])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_absurd_ratios_have_finite_weights(level):
    trainer, engine = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, -1e4]])
    mask = torch.ones(1, 2).bool()
    assert importance_weight(trainer, engine, mask, level, 2.0).max() == 2
    assert (importance_weight(engine, trainer, mask, level, 2.0) >= 0).all()


# ---------------------------------------------------------------- in the loss


def weighed_pair(**changes):
    """A guided rollout (own, own, injected, injected) and one of three own tokens.

    Own tokens have the ratios to the old policy 1.1 and 1.5 at A = 2, and 0.9, 1, 1.1 at A = -1,
    and the old policy has 2 and 1/4 times, and 4, 1 and 1/2 times the engine's probabilities.
    """
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    injected = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    old = torch.tensor([[0.2, 0.1, 0.4, 0.4], [0.4, 0.5, 0.2, 0.9]], dtype=torch.float64)
    ratio = torch.tensor([[1.1, 1.5, 1.0, 1.0], [0.9, 1.0, 1.1, 1.0]], dtype=torch.float64)
    engine = torch.tensor([[0.1, 0.4, NAN, NAN], [0.1, 0.5, 0.4, NAN]], dtype=torch.float64)
    inputs = make_inputs(
        (old * ratio).log(), [2.0, -1.0], old=old.log(), mask=mask, injected=injected
    )
    return replace(inputs, sampling_logprobs=engine.log(), **changes)


# Losses of the own tokens: 1.5 is clipped at 1.2, and its slope is 0.
OWN = [-2.2, -2.4, 0.9, 1.0, 1.1]
SLOPES = [-2.2, 0.0, 0.9, 1.0, 1.1]
# AAS at A = 2: c = 0.0005 at pi = 0.4, twice; it is its own slope.
INJECTED = -2 * 0.4 / 0.4005


@pytest.mark.parametrize(
    ("level", "cap", "weights"),
    [
        ("token", 9.0, [2, 0.25, 4, 1, 0.5]),
        ("token", 2.0, [2, 0.25, 2, 1, 0.5]),
        ("sequence", 9.0, [0.5, 0.5, 2, 2, 2]),
        ("sequence", 1.5, [0.5, 0.5, 1.5, 1.5, 1.5]),
        ("none", 2.0, [1, 1, 1, 1, 1]),
    ],
)
def test_weighed_loss_and_gradient_by_hand(level, cap, weights):
    config = ObjectiveConfig(importance=level, importance_cap=cap)
    inputs = weighed_pair()
    loss, gradient = loss_and_gradient(inputs, config)
    own = [w * x for w, x in zip(weights, OWN, strict=True)]
    slopes = [w * x for w, x in zip(weights, SLOPES, strict=True)]
    assert loss == pytest.approx((sum(own) + 2 * INJECTED) / 7, rel=1e-6)
    expected = [*slopes[:2], INJECTED, INJECTED, *slopes[2:], 0.0]
    assert (7 * gradient).flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shaping", ["aas", "luffy", "none", "clip"])
def test_injected_tokens_and_the_kl_term_keep_weight_one(level, shaping):
    own, other = weighed_pair(), weighed_pair()
    ref = own.logprobs.detach() - 0.3
    losses, gradients = [], []
    for importance in ("none", level):
        for kl_coef in (0.0, 0.1):
            config = ObjectiveConfig(importance=importance, shaping=shaping, kl_coef=kl_coef)
            loss, gradient = loss_and_gradient(replace(other, ref_logprobs=ref), config)
            losses.append(loss)
            gradients.append(gradient)
    plain, plain_kl, weighed, weighed_kl = gradients
    injected = own.injected_mask
    assert torch.equal(plain[injected], weighed[injected])
    assert plain[injected].abs().min() > 0
    assert not torch.equal(plain[~injected], weighed[~injected])
    torch.testing.assert_close(weighed_kl - weighed, plain_kl - plain, rtol=1e-9, atol=1e-12)
    assert losses[3] - losses[2] == pytest.approx(losses[1] - losses[0])
    assert losses[1] > losses[0]


def test_the_first_update_weighs_by_its_own_logprobs():
    inputs = weighed_pair(old_logprobs=None)
    given = replace(inputs, old_logprobs=inputs.logprobs.detach().clone())
    config = ObjectiveConfig(importance="token", importance_cap=9.0)
    loss, gradient = loss_and_gradient(inputs, config)
    expected, expected_gradient = loss_and_gradient(given, config)
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)
    # Ratios to the engine 2.2, 0.375, and 3.6, 1, 0.55; ratios to the old policy all 1.
    slopes = [-2 * 2.2, -2 * 0.375, 3.6, 1.0, 0.55]
    found = (7 * gradient)[~inputs.injected_mask & inputs.completion_mask]
    assert found.tolist() == pytest.approx(slopes, rel=1e-6)


def test_without_importance_the_engine_has_no_say():
    config = ObjectiveConfig()
    loss, gradient = loss_and_gradient(weighed_pair(), config)
    for sampling in (None, torch.full((2, 4), NAN)):
        inputs = replace(weighed_pair(), sampling_logprobs=sampling)
        found, found_gradient = loss_and_gradient(inputs, config)
        assert found == loss
        assert torch.equal(found_gradient, gradient)
    assert "importance" not in policy_loss(weighed_pair(), config).metrics


def test_the_weights_metrics_by_hand():
    config = ObjectiveConfig(importance="token", importance_cap=1.9)
    metrics = policy_loss(weighed_pair(), config).metrics
    found = {k: (float(m.total), float(m.weight)) for k, m in metrics.items() if "imp" in k}
    assert found == {
        "importance": pytest.approx((1.9 + 0.25 + 1.9 + 1 + 0.5, 5)),
        "importance_capped": (2, 5),
    }


# ---------------------------------------------------------------- in a run

TAGS = ["engine/logprob_gap", "engine/logprob_gap_max", "engine/kl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "idle"),
    [
        ([], False),
        (["--model.num_mini_batches=2"], False),
        (["--model.temperature=0.7", "--model.objective.importance=sequence"], False),
        # Answers of two tokens earn nothing, so that the update reads no rollout.
        (["--model.max_new_tokens=2"], True),
        (["--model.max_new_tokens=2", "--model.objective.kl_coef=0.1"], True),
        (["--model.max_new_tokens=2", "--model.num_mini_batches=2"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_transformers_engine_agrees_with_the_trainer(student, questions, tmp_path, more, idle):
    main(fit_arguments(student(), questions, tmp_path, *more))
    seen = scalars(tmp_path / "version_0")
    assert (seen["groups/zero_variance"] == [1.0] * 3) is idle
    for tag in TAGS:
        assert len(seen[tag]) == 3, tag
        assert all(abs(value) < 1e-4 for value in seen[tag]), tag
    assert all(a <= b for a, b in zip(seen[TAGS[0]], seen[TAGS[1]], strict=True))
    assert min(seen[TAGS[2]]) >= -1e-12
    if "--model.objective.importance=sequence" in more:
        assert seen["objective/importance"] == pytest.approx([1.0] * 3, abs=1e-3)
        assert seen["objective/importance_capped"] == [0.0] * 3
