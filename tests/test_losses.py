"""The loss: plain GRPO without guidance, shaped tokens with it, and how micro-batches add up."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from thinktuning.errors import InputError
from thinktuning.objective import ObjectiveConfig, policy_loss, token_weights
from thinktuning.types import PolicyInputs

NAN, INF = math.nan, math.inf


def make_inputs(logprobs, advantages, old=None, ref=None, mask=None, injected=None):
    """Policy inputs in float64 from nested lists or tensors [B, T]; logprobs become a leaf."""

    def table(values, dtype=torch.float64):
        return None if values is None else torch.as_tensor(values, dtype=dtype)

    leaf = table(logprobs).clone().requires_grad_()
    every = torch.ones(leaf.shape, dtype=torch.bool)
    return PolicyInputs(
        input_ids=torch.zeros(leaf.shape, dtype=torch.long),
        attention_mask=every,
        completion_mask=every if mask is None else table(mask, torch.bool),
        injected_mask=~every if injected is None else table(injected, torch.bool),
        advantages=table(advantages),
        logprobs=leaf,
        old_logprobs=table(old),
        ref_logprobs=table(ref),
    )


def loss_and_gradient(inputs, config):
    loss = policy_loss(inputs, config).loss
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    return loss.item(), gradient


def one_token(probability, advantage, old=None, **options):
    """Loss and gradient of a single token given as probabilities; ``injected=True`` if so."""
    injected = options.pop("injected", False)
    inputs = make_inputs(
        [[math.log(probability)]],
        [advantage],
        old=None if old is None else [[math.log(old)]],
        injected=[[injected]],
    )
    loss, gradient = loss_and_gradient(inputs, ObjectiveConfig(**options))
    return loss, gradient.item()


# Without injected tokens: GRPO

# One row per advantage; the columns take the ratio through every branch of both clips.
RATIOS = [0.5, 0.85, 1.1, 1.25, 1.6, 4.0]
ADVANTAGES = [1.3, -0.7, 0.0, -2.1]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def grpo_inputs():
    generator = torch.Generator().manual_seed(5)
    shape = (len(ADVANTAGES), len(RATIOS))
    old = -2 - torch.rand(shape, generator=generator, dtype=torch.float64)
    logprobs = old + torch.tensor(RATIOS, dtype=torch.float64).log()
    ref = logprobs + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return make_inputs(logprobs, ADVANTAGES, old=old, ref=ref, mask=MASK)


def grpo_by_loops(inputs, config, max_tokens):
    """GRPO once more, token by token in plain Python; gradients by hand."""
    high = config.clip_eps if config.clip_eps_high is None else config.clip_eps_high
    mask = inputs.completion_mask.tolist()
    tokens, rows = sum(map(sum, mask)), len(mask)
    loss, gradient = 0.0, [[0.0] * len(row) for row in mask]
    for b, t in itertools.product(range(rows), range(len(mask[0]))):
        if not mask[b][t]:
            continue
        a, logprob = inputs.advantages[b].item(), inputs.logprobs[b, t].item()
        ratio = math.exp(logprob - inputs.old_logprobs[b, t].item())
        clipped = min(max(ratio, 1 - config.clip_eps), 1 + high)
        token, slope = -ratio * a, -ratio * a
        if -clipped * a > token:
            token, slope = -clipped * a, 0.0
        if config.dual_clip is not None and a < 0 and token > -config.dual_clip * a:
            token, slope = -config.dual_clip * a, 0.0
        if config.kl_coef:
            x = math.exp(inputs.ref_logprobs[b, t].item() - logprob)
            token += config.kl_coef * (x - 1 - math.log(x))
            slope += config.kl_coef * (1 - x)
        share = {
            "token_mean": 1 / tokens,
            "sequence_mean": 1 / rows / sum(mask[b]),
            "fixed_length": 1 / rows / max_tokens,
        }[config.normalizer]
        loss += share * token
        gradient[b][t] = share * slope
    return loss, torch.tensor(gradient, dtype=torch.float64)


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("dual_clip", [None, 3.0, 1.5])
@pytest.mark.parametrize("clip_eps_high", [None, 0.28])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_without_guidance_the_loss_is_grpo(normalizer, dual_clip, clip_eps_high, kl_coef):
    config = ObjectiveConfig(
        normalizer=normalizer, dual_clip=dual_clip, clip_eps_high=clip_eps_high, kl_coef=kl_coef
    )
    for max_tokens in (len(RATIOS), 16):
        inputs = grpo_inputs()
        weights = token_weights(inputs.completion_mask, normalizer, max_tokens=max_tokens)
        loss, gradient = loss_and_gradient(replace(inputs, token_weights=weights), config)
        expected, expected_gradient = grpo_by_loops(inputs, config, max_tokens)
        assert loss == pytest.approx(expected, rel=1e-6)  # the weights are float32
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "fixed_length"])
def test_rows_without_weights_are_the_whole_step(normalizer):
    config = ObjectiveConfig(normalizer=normalizer)
    inputs = grpo_inputs()
    loss, gradient = loss_and_gradient(inputs, config)
    expected, expected_gradient = grpo_by_loops(inputs, config, len(RATIOS))
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shaping", ["aas", "luffy", "clip", "none"])
@pytest.mark.parametrize("scope", ["guidance", "trajectory"])
def test_shaping_has_no_say_without_guidance(shaping, scope):
    expected, expected_gradient = loss_and_gradient(grpo_inputs(), ObjectiveConfig())
    loss, gradient = loss_and_gradient(grpo_inputs(), ObjectiveConfig(shaping=shaping, scope=scope))
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)


def test_first_update_has_ratio_one():
    inputs = make_inputs([[-1.0, -9.0], [-0.1, -3.0]], [2.0, -1.0])
    loss, gradient = loss_and_gradient(inputs, ObjectiveConfig())
    assert loss == pytest.approx(-(2 + 2 - 1 - 1) / 4)
    assert gradient.flatten().tolist() == pytest.approx([-0.5, -0.5, 0.25, 0.25])
    given = replace(inputs, old_logprobs=inputs.logprobs.detach().clone())
    again, gradient_again = loss_and_gradient(given, ObjectiveConfig())
    assert again == loss and torch.equal(gradient_again, gradient)


@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "loss", "gradient"),
    [
        # A > 0: what is gained ends at 1.2; below, the ratio counts as it is
        (2, 0.5, {}, -1.0, -1.0),
        (2, 1.1, {}, -2.2, -2.2),
        (2, 1.5, {}, -2.4, 0.0),
        (2, 5.0, {}, -2.4, 0.0),  # dual clip is for A < 0
        (2, 1.25, {"clip_eps_high": 0.28}, -2.5, -2.5),
        (2, 1.5, {"clip_eps_high": 0.28}, -2.56, 0.0),
        # A < 0: what is gained ends at 0.8; above, the ratio counts, up to dual clip
        (-2, 0.5, {}, 1.6, 0.0),
        (-2, 0.75, {"clip_eps_high": 0.28}, 1.6, 0.0),  # the lower bound stays
        (-2, 1.1, {}, 2.2, 2.2),
        (-2, 1.5, {}, 3.0, 3.0),
        (-2, 2.9, {}, 5.8, 5.8),
        (-2, 5.0, {}, 6.0, 0.0),
        (-2, 5.0, {"dual_clip": None}, 10.0, 10.0),
        (-2, 5.0, {"dual_clip": 4.0}, 8.0, 0.0),
        (0, 5.0, {}, 0.0, 0.0),
    ],
)
def test_clip_and_dual_clip_by_hand(advantage, ratio, options, loss, gradient):
    found = one_token(0.1 * ratio, advantage, old=0.1, **options)
    assert found == pytest.approx((loss, gradient), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])  # exp overflows
def test_absurd_ratios_stay_finite(advantage, log_ratio):
    """As where a token was impossible for one of the two policies."""
    logprob, old = (0.0, -log_ratio) if log_ratio > 0 else (log_ratio, 0.0)
    inputs = make_inputs([[logprob]], [advantage], old=[[old]], ref=[[old]])
    output = loss_and_gradient(inputs, ObjectiveConfig(kl_coef=0.1))
    assert math.isfinite(output[0]) and output[1].isfinite().all()


def test_kl_by_hand():
    # x = pi_ref / pi = 2, so k3 = 2 - 1 - log 2, with slope 1 - x = -1; the other token has x = 1/2
    logprobs = [[math.log(0.2), math.log(0.2)]]
    ref = [[math.log(0.4), math.log(0.1)]]
    inputs = make_inputs(logprobs, [0.0], ref=ref)
    loss, gradient = loss_and_gradient(inputs, ObjectiveConfig(kl_coef=0.1))
    first, second = 1 - math.log(2), -0.5 + math.log(2)
    assert loss == pytest.approx(0.1 * (first + second) / 2)
    assert gradient.flatten().tolist() == pytest.approx([-0.05, 0.025])
    kl = policy_loss(inputs, ObjectiveConfig(kl_coef=0.1)).metrics["kl"]
    assert (float(kl.total), float(kl.weight)) == pytest.approx((first + second, 2))


def test_kl_holds_for_injected_tokens_too():
    shared = {"advantages": [1.5], "ref": [[-1.0, -2.0]], "injected": [[0, 1]]}
    with_kl = make_inputs([[-2.0, -1.0]], **shared)
    _, gradient = loss_and_gradient(with_kl, ObjectiveConfig(kl_coef=0.1))
    _, without = loss_and_gradient(make_inputs([[-2.0, -1.0]], **shared), ObjectiveConfig())
    slopes = [0.1 * (1 - math.e) / 2, 0.1 * (1 - 1 / math.e) / 2]
    assert (gradient - without).flatten().tolist() == pytest.approx(slopes)


def test_reference_is_left_alone_without_a_kl_term():
    inputs = make_inputs([[-1.0]], [1.0], ref=[[NAN]])
    assert loss_and_gradient(inputs, ObjectiveConfig())[0] == -1
    assert "kl" not in policy_loss(inputs, ObjectiveConfig()).metrics


# Injected tokens


@pytest.mark.parametrize(
    ("probability", "advantage", "options", "loss", "gradient"),
    [
        # aas: c = 0.0005 for A = 2; the weight is pi / (pi + c), and so is the slope
        (0.5, 2, {}, -2 * 0.5 / 0.5005, -2 * 0.5 / 0.5005),
        (0.0005, 2, {}, -1.0, -1.0),
        (0.5, -2, {}, 2 * 0.5 / 0.4995, 2 * 0.5 / 0.4995),
        (0.005, -2, {}, 0.0, 0.0),
        (0.005, -2, {"mask_below": 0.002}, 2 * 0.005 / 0.0045, 2 * 0.005 / 0.0045),
        (0.5, 2, {"c_max": 0.2, "mask_below": 0.3}, -2 * 0.5 / 0.6, -2 * 0.5 / 0.6),
        (0.5, 2, {"advantage_bound": 2.0}, -2 * 0.5 / 0.501, -2 * 0.5 / 0.501),
        # luffy: pi / (pi + 0.1), slope 0.1 pi / (pi + 0.1)^2
        (0.1, 2, {"shaping": "luffy"}, -1.0, -0.5),
        (0.9, -2, {"shaping": "luffy"}, 1.8, 0.18),
        # none: plain policy gradient
        (0.001, 2, {"shaping": "none"}, -2.0, -2.0),
        (0.001, -2, {"shaping": "none"}, 2.0, 2.0),
    ],
)
def test_injected_token_by_hand(probability, advantage, options, loss, gradient):
    expected = pytest.approx((loss, gradient), rel=1e-9)
    assert one_token(probability, advantage, injected=True, **options) == expected
    # none of the ratio, whatever the old policy says
    for old in (0.9, 1e-30):
        assert one_token(probability, advantage, old=old, injected=True, **options) == expected


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [(2, 1.1, -2.2, -2.2), (2, 1.5, -2.4, 0.0), (-2, 0.5, 1.6, 0.0), (-2, 5.0, 6.0, 0.0)],
)
def test_shaping_clip_treats_injected_tokens_as_own(advantage, ratio, loss, gradient):
    found = one_token(0.1 * ratio, advantage, old=0.1, injected=True, shaping="clip")
    assert found == pytest.approx((loss, gradient), rel=1e-9, abs=1e-12)


# A guided rollout (own, own, injected, injected) next to one that is not.
def guided_pair(**changes):
    given = {
        "logprobs": torch.tensor([[0.15, 0.03, 0.5, 0.001], [0.15, 0.03, 0.5, 0.5]]).log(),
        "advantages": [4.0, -4.0],
        "old": torch.tensor([[0.1, 0.03, 0.4, 0.4], [0.1, 0.03, 0.5, 0.5]]).log(),
        "injected": [[0, 0, 1, 1], [0, 0, 0, 0]],
    }
    return make_inputs(**given | changes)


# of the second row, in every scope: ratios 1.5, 1, 1, 1 at A = -4
UNGUIDED_ROW = [6.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    ("scope", "guided_row", "slopes"),
    [
        # clip of 1.5 at 1.2 and ratio 1; then weights 0.5 / 0.501 and 1/2
        ("guidance", [-4.8, -4, -4 / 1.002, -2], [0, -4, -4 / 1.002, -2]),
        # the student's own tokens are shaped as well: 0.15 / 0.151 and 0.03 / 0.031
        (
            "trajectory",
            [-4 * 150 / 151, -4 * 30 / 31, -4 / 1.002, -2],
            [-4 * 150 / 151, -4 * 30 / 31, -4 / 1.002, -2],
        ),
    ],
)
def test_scope_says_which_tokens_are_shaped(scope, guided_row, slopes):
    loss, gradient = loss_and_gradient(guided_pair(), ObjectiveConfig(scope=scope))
    assert loss == pytest.approx(sum(guided_row + UNGUIDED_ROW) / 8, rel=1e-6)
    assert (8 * gradient[0]).tolist() == pytest.approx(slopes, rel=1e-6)
    assert (8 * gradient[1]).tolist() == pytest.approx(UNGUIDED_ROW, rel=1e-6)


@pytest.mark.parametrize("shaping", ["aas", "luffy", "none"])
@pytest.mark.parametrize("scope", ["guidance", "trajectory"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_old_logprobs_of_injected_tokens_do_not_matter(shaping, scope, junk):
    config = ObjectiveConfig(shaping=shaping, scope=scope, kl_coef=0.05)
    clean = guided_pair()
    clean = replace(clean, ref_logprobs=clean.logprobs.detach() - 0.3)
    old = clean.old_logprobs.clone()
    old[clean.injected_mask] = junk
    loss, gradient = loss_and_gradient(replace(clean, old_logprobs=old), config)
    expected, expected_gradient = loss_and_gradient(clean, config)
    assert loss == expected
    assert torch.equal(gradient, expected_gradient)


def padded_pair(junk=None, fields=()):
    """Two rows with padding behind; the ``fields`` hold ``junk`` there."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    injected = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    tables = {
        "logprobs": torch.tensor([[-1.0, -0.2, -3.0, -0.1, -1.0], [-0.5, -2.0, -1, -1, -1]]),
        "old": torch.tensor([[-1.3, -0.2, -3.0, -0.1, -1.0], [-0.1, -2.0, -1, -1, -1]]),
        "ref": torch.tensor([[-1.1, -0.3, -2.0, -0.3, -1.0], [-0.7, -1.0, -1, -1, -1]]),
    }
    for name in fields:
        tables[name] = tables[name].masked_fill(~mask, junk)
    return make_inputs(advantages=[1.2, -0.8], mask=mask, injected=injected, **tables)


every_junk = pytest.mark.parametrize("junk", [NAN, INF, -INF])
every_shaping = pytest.mark.parametrize("shaping", ["aas", "luffy", "clip", "none"])
every_field = pytest.mark.parametrize(
    "fields", [("old",), ("ref",), ("logprobs",), ("logprobs", "old", "ref")], ids="+".join
)


@every_shaping
@every_junk
@every_field
def test_nothing_outside_the_completion_matters(fields, junk, shaping):
    config = ObjectiveConfig(shaping=shaping, kl_coef=0.05)
    mask = padded_pair().completion_mask
    expected = policy_loss(padded_pair(), config)
    _, expected_gradient = loss_and_gradient(padded_pair(), config)

    inputs = padded_pair(junk, fields)
    output = policy_loss(inputs, config)
    _, gradient = loss_and_gradient(inputs, config)
    assert output.loss.item() == expected.loss.item()
    assert output.weight_max == expected.weight_max
    assert output.metrics == expected.metrics
    assert torch.equal(gradient[mask], expected_gradient[mask])


@every_shaping
@every_junk
@every_field
def test_no_gradient_outside_the_completion(fields, junk, shaping):
    inputs = padded_pair(junk, fields)
    _, gradient = loss_and_gradient(inputs, ObjectiveConfig(shaping=shaping, kl_coef=0.05))
    assert (gradient[~inputs.completion_mask] == 0).all()


# Micro-batches


def step_inputs(guided_rows):
    """Six rows of up to eight tokens, of which ``guided_rows`` end with injected tokens."""
    generator = torch.Generator().manual_seed(8)

    def normal():
        return torch.randn(6, 8, generator=generator, dtype=torch.float64)

    mask = torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6])[:, None]
    logprobs = -3 * normal().abs()
    injected = torch.zeros_like(mask)
    injected[list(guided_rows), 2:] = True
    return make_inputs(
        logprobs,
        [1.5, -0.7, 0.2, -1.4, 0.0, 0.9],
        old=(logprobs + 0.4 * normal()).masked_fill(injected, NAN),
        ref=logprobs + 0.4 * normal(),
        mask=mask,
        injected=injected & mask,
    )


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "fixed_length"])
@pytest.mark.parametrize("guided_rows", [(), (0, 3), (2, 3), (0, 1, 2, 3, 5)])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("scope", ["guidance", "trajectory"])
def test_micro_batches_add_up_to_the_whole(normalizer, guided_rows, sizes, scope):
    config = ObjectiveConfig(normalizer=normalizer, kl_coef=0.05, scope=scope)
    whole = step_inputs(guided_rows)
    weights = token_weights(whole.completion_mask, normalizer, max_tokens=8)
    whole = replace(whole, token_weights=weights)
    output = policy_loss(whole, config)
    expected_loss, expected_gradient = loss_and_gradient(whole, config)

    ends = itertools.accumulate(sizes)
    parts = [
        policy_loss(whole.rows(slice(end - size, end)), config)
        for end, size in zip(ends, sizes, strict=True)
    ]
    total = sum(part.loss for part in parts)
    (gradient,) = torch.autograd.grad(total, whole.logprobs)
    assert total.item() == pytest.approx(expected_loss, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    for name, metric in output.metrics.items():
        for of_whole, of_parts in zip(
            metric, zip(*(part.metrics[name] for part in parts), strict=True), strict=True
        ):
            assert float(sum(of_parts)) == pytest.approx(float(of_whole), rel=1e-6), name
    assert max(part.weight_max for part in parts) == output.weight_max


def test_unguided_micro_batch_is_not_asked_about_guidance():
    output = policy_loss(step_inputs([0, 3]).rows(slice(1, 3)), ObjectiveConfig())
    assert output.metrics["shaping_weight"] == (0, 0)
    assert output.metrics["shaping_masked"] == (0, 0)
    assert output.weight_max == 0


def test_rows_without_advantage_can_be_left_out():
    whole = step_inputs([0, 4])
    whole = replace(whole, token_weights=token_weights(whole.completion_mask))
    busy = whole.rows(whole.advantages != 0)
    assert busy.input_ids.shape[0] == 5
    expected_loss, expected_gradient = loss_and_gradient(whole, ObjectiveConfig())
    loss = policy_loss(busy, ObjectiveConfig()).loss
    (gradient,) = torch.autograd.grad(loss, whole.logprobs)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=0)


# Shares of the tokens

WEIGHTS_MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("normalizer", "options", "per_row"),
    [
        ("token_mean", {}, [1 / 7, 1 / 7, 1 / 7]),
        ("token_mean", {"num_tokens": 20, "num_sequences": 99}, [1 / 20, 1 / 20, 1 / 20]),
        ("sequence_mean", {}, [1 / 12, 1 / 3, 1 / 6]),
        ("sequence_mean", {"num_sequences": 6, "num_tokens": 99}, [1 / 24, 1 / 6, 1 / 12]),
        ("fixed_length", {"max_tokens": 4}, [1 / 12, 1 / 12, 1 / 12]),
        ("fixed_length", {"max_tokens": 10, "num_sequences": 6}, [1 / 60, 1 / 60, 1 / 60]),
    ],
)
def test_token_weights_by_hand(normalizer, options, per_row):
    weights = token_weights(WEIGHTS_MASK, normalizer, **options)
    expected = torch.tensor(per_row)[:, None] * WEIGHTS_MASK
    torch.testing.assert_close(weights, expected)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean"])
def test_micro_batches_need_only_the_counts_of_the_step(normalizer):
    whole = token_weights(WEIGHTS_MASK, normalizer)
    parts = [
        token_weights(rows, normalizer, num_tokens=7, num_sequences=3)
        for rows in WEIGHTS_MASK.split(1)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "fixed_length"])
def test_rows_without_tokens_weigh_nothing(normalizer):
    mask = torch.tensor([[1, 1], [0, 0]]).bool()
    weights = token_weights(mask, normalizer, max_tokens=2)
    assert weights[1].tolist() == [0, 0]
    assert weights.isfinite().all()
    assert token_weights(~mask & mask, normalizer, max_tokens=2).tolist() == [[0, 0], [0, 0]]


def test_step_without_tokens_has_no_loss():
    inputs = make_inputs([[-1.0, -2.0]], [1.0], mask=[[0, 0]])
    loss, gradient = loss_and_gradient(inputs, ObjectiveConfig())
    assert loss == 0
    assert gradient.tolist() == [[0, 0]]


def test_fixed_length_needs_the_length():
    with pytest.raises(InputError, match="max_tokens"):
        token_weights(WEIGHTS_MASK, "fixed_length")


def test_unknown_normalizer_is_refused():
    with pytest.raises(InputError, match="median"):
        token_weights(WEIGHTS_MASK, "median")


# Metrics


def metrics_of(inputs, **options):
    output = policy_loss(inputs, ObjectiveConfig(**options))
    values = {name: (float(m.total), float(m.weight)) for name, m in output.metrics.items()}
    return values | {"weight_max": float(output.weight_max)}


def metric_inputs():
    """Own tokens with ratios 1.5, 1, 0.5 and padding; guided ones with one token below the mask."""
    probabilities = [
        [0.15, 0.1, 0.05, 0.9],  # A = 2: clipped, not, not, padding
        [0.15, 0.05, 0.5, 0.005],  # A = -4: not, clipped, weight 0.5 / 0.499, masked
        [0.1, 0.1, 0.001, 0.9],  # A = 4: not, not, weight 1/2, padding
        [0.5, 0.1, 0.9, 0.9],  # A = -1: dual clip at ratio 5, then 1, padding
    ]
    return make_inputs(
        torch.tensor(probabilities, dtype=torch.float64).log(),
        [2.0, -4.0, 4.0, -1.0],
        old=torch.full((4, 4), math.log(0.1), dtype=torch.float64),
        mask=[[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
        injected=[[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]],
    )


def test_metrics_by_hand():
    # 9 own tokens: clipped are one for A = 2, one for A = -4 and the dual-clipped one
    found = metrics_of(metric_inputs())
    assert found["clip_fraction"] == (3, 9)
    assert found["shaping_weight"] == pytest.approx((0.5 / 0.499 + 0.5, 3), rel=1e-6)
    assert found["shaping_masked"] == (1, 3)
    assert found["weight_max"] == pytest.approx(0.5 / 0.499)
    assert set(found) == {"clip_fraction", "shaping_weight", "shaping_masked", "weight_max"}


def test_metrics_without_dual_clip():
    assert metrics_of(metric_inputs(), dual_clip=None)["clip_fraction"] == (2, 9)


def test_metrics_of_scope_trajectory():
    # rows 2 and 3 are all shaped: own 0.15 and 0.05 at c = -0.001, own 0.1 twice at c = 0.001
    found = metrics_of(metric_inputs(), scope="trajectory")
    assert found["clip_fraction"] == (2, 5)
    weights = [0.15 / 0.149, 0.05 / 0.049, 0.5 / 0.499, 0, 0.1 / 0.101, 0.1 / 0.101, 0.5]
    assert found["shaping_weight"] == pytest.approx((sum(weights), 7), rel=1e-6)
    assert found["shaping_masked"] == (1, 7)
    assert found["weight_max"] == pytest.approx(0.05 / 0.049)


def test_metrics_of_other_shapings():
    luffy = metrics_of(metric_inputs(), shaping="luffy")
    weights = [0.5 / 0.6, 0.005 / 0.105, 0.001 / 0.101]
    assert luffy["shaping_weight"] == pytest.approx((sum(weights), 3), rel=1e-6)
    assert (luffy["shaping_masked"], luffy["clip_fraction"]) == ((0, 3), (3, 9))

    plain = metrics_of(metric_inputs(), shaping="none")
    assert (plain["shaping_weight"], plain["weight_max"]) == ((3, 3), 1)

    # injected tokens at ratios 5, 0.05 (A = -4) and 0.01 (A = 4): the first two are clipped
    clip = metrics_of(metric_inputs(), shaping="clip")
    assert clip["clip_fraction"] == (5, 12)
    assert (clip["shaping_weight"], clip["weight_max"]) == ((0, 0), 0)


def test_metrics_carry_no_gradient():
    output = policy_loss(step_inputs([0, 3]), ObjectiveConfig(kl_coef=0.05))
    for total, count in output.metrics.values():
        assert not total.requires_grad and not count.requires_grad
    assert output.loss.requires_grad and not output.weight_max.requires_grad


# Configuration

FAULTS = [
    ({"clip_eps": 0.0}, "clip_eps must"),
    ({"clip_eps": 1.0}, "clip_eps must"),
    ({"clip_eps_high": 0.0}, "clip_eps_high"),
    ({"dual_clip": 1.0}, "dual_clip"),
    ({"kl_coef": -0.1}, "kl_coef"),
    ({"advantage_bound": 0.0}, "advantage_bound"),
    ({"c_max": 0.0}, "c_max"),
    ({"c_max": 0.01}, "pole"),
    ({"mask_below": 0.001}, "mask_below"),
    ({"mask_below": 1.0}, "mask_below"),
]


@pytest.mark.parametrize(("options", "named"), FAULTS, ids=str)
def test_each_fault_is_named_alone(options, named):
    with pytest.raises(InputError) as caught:
        ObjectiveConfig(**options)
    message = str(caught.value)
    assert named in message
    assert str(next(iter(options.values()))) in message
    assert ";" not in message.replace("pi = c_max; got", "")


def test_all_faults_are_reported_together():
    with pytest.raises(InputError) as caught:
        ObjectiveConfig(
            clip_eps=1.5,
            clip_eps_high=-0.2,
            dual_clip=0.5,
            kl_coef=-1.0,
            advantage_bound=-4.0,
            c_max=0.02,
        )
    message = str(caught.value)
    for name in ("clip_eps must", "clip_eps_high", "dual_clip", "kl_coef", "advantage_bound"):
        assert name in message
    assert "c_max=0.02" in message


def test_defaults_and_the_edges_of_what_is_allowed():
    config = ObjectiveConfig()
    assert (config.clip_eps, config.dual_clip, config.kl_coef) == (0.2, 3.0, 0.0)
    assert (config.c_max, config.advantage_bound, config.mask_below) == (1e-3, 4.0, 0.01)
    assert (config.shaping, config.scope) == ("aas", "guidance")
    assert (config.normalizer, config.advantage_scale) == ("token_mean", "std")
    assert config.cut_off == "train"
    ObjectiveConfig(clip_eps=0.99, clip_eps_high=3.0, dual_clip=1.01, c_max=0.9, mask_below=0.99)
