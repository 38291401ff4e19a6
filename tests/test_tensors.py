"""Rollouts to tensors, and the update whatever the cutting into micro-batches."""

import math
from dataclasses import fields, replace

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import ids
from torch import Tensor

from thinktuning.objective import Mean, ObjectiveConfig, policy_loss, token_weights
from thinktuning.policy import completion_logprobs
from thinktuning.tensors import micro_batches, policy_inputs, split, trim, with_advantages
from thinktuning.types import PolicyInputs, Prompt, Rollout, RolloutBatch

CPU = torch.device("cpu")


def rollout(
    prompt_ids: list[int],
    completion_ids: list[int],
    injected: int = 0,
    advantage: float | None = None,
    reward: float | None = None,
) -> Rollout:
    """A rollout whose last ``injected`` tokens are the teacher's."""
    length = len(completion_ids)
    return Rollout(
        prompt=Prompt(0, "?", "1", prompt_ids),
        sample=0,
        completion_ids=tuple(completion_ids),
        logprobs=(-1.0,) * (length - injected) + (math.nan,) * injected,
        injected_mask=(False,) * (length - injected) + (True,) * injected,
        finished=True,
        text="",
        advantage=advantage,
        reward=reward,
    )


def batch_of(*rollouts: Rollout, group_size: int = 2) -> RolloutBatch:
    return RolloutBatch(step=0, group_size=group_size, rollouts=rollouts)


# ---------------------------------------------------------------- advantages


def rewarded(*rewards: float, group_size: int) -> RolloutBatch:
    return batch_of(*(rollout([1], [2], reward=r) for r in rewards), group_size=group_size)


def test_advantages_are_taken_within_each_group():
    batch = rewarded(1, 0, 0, 1, 0, 0, 0, 1, 2, group_size=3)
    found = [r.advantage for r in with_advantages(batch, "std").rollouts]
    # Group 1: mean 1/3, squares 4/9 + 1/9 + 1/9 = 2/3, std = sqrt(2/3 / 2) = 0.57735.
    # Group 2 has the same rewards. Group 3: mean 1, std 1.
    high, low = (2 / 3) / (math.sqrt(1 / 3) + 1e-6), (-1 / 3) / (math.sqrt(1 / 3) + 1e-6)
    one = 1 / (1 + 1e-6)
    assert found == pytest.approx([high, low, low, high, low, low, -one, 0, one], abs=1e-12)
    assert high == pytest.approx(1.1547, abs=1e-4)


def test_unscaled_advantages_are_distances_from_the_mean():
    batch = with_advantages(rewarded(1, 0, 0.5, 0.5, group_size=2), "none")
    assert [r.advantage for r in batch.rollouts] == [0.5, -0.5, 0.0, 0.0]


def test_answers_that_were_cut_off_can_be_left_out_but_count_in_the_mean():
    batch = rewarded(1, 0, 0.25, 0.75, group_size=2)
    first, *others = batch.rollouts
    batch = batch.with_rollouts(
        (first, *(replace(r, finished=False) for r in others[:2]), others[2])
    )
    trained = [r.advantage for r in with_advantages(batch, "none").rollouts]
    assert trained == [0.5, -0.5, -0.25, 0.25]
    left = [r.advantage for r in with_advantages(batch, "none", "ignore").rollouts]
    assert left == [0.5, 0.0, 0.0, 0.25]


def test_a_group_of_equal_rewards_has_no_advantage():
    batch = with_advantages(rewarded(0.1, 0.1, 0.1, 1, 1, 0, group_size=3), "std")
    found = [r.advantage for r in batch.rollouts]
    assert found[:3] == [0.0, 0.0, 0.0]
    assert all(found[3:])


def test_advantages_leave_everything_else_alone():
    batch = rewarded(1, 0, group_size=2)
    after = with_advantages(batch, "std")
    assert (after.step, after.group_size) == (batch.step, batch.group_size)
    assert [replace(r, advantage=None, logprobs=()) for r in after.rollouts] == [
        replace(r, logprobs=()) for r in batch.rollouts
    ]


# ---------------------------------------------------------------- tensors

RAGGED = batch_of(
    rollout([11, 12, 13], [21], advantage=0.5),
    rollout([14], [22, 23, 24, 25], injected=2, advantage=-1.5),
    rollout([15, 16], [26, 27], injected=1, advantage=0.0),
    rollout([17], [28, 0, 29], advantage=2.0),
)


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    inputs = policy_inputs(RAGGED, CPU)
    assert inputs.input_ids.tolist() == [
        [11, 12, 13, 21, 0, 0, 0],
        [0, 0, 14, 22, 23, 24, 25],
        [0, 15, 16, 26, 27, 0, 0],
        [0, 0, 17, 28, 0, 29, 0],
    ]
    assert inputs.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
    ]
    assert inputs.completion_mask.int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
    ]
    assert inputs.injected_mask.int().tolist() == [
        [0, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    assert inputs.advantages.tolist() == [0.5, -1.5, 0.0, 2.0]
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.advantages.dtype == torch.float32
    for mask in (inputs.attention_mask, inputs.completion_mask, inputs.injected_mask):
        assert mask.dtype == torch.bool
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "token_weights"):
        assert getattr(inputs, name) is None


def computed(inputs: PolicyInputs) -> PolicyInputs:
    """With numbers in every field that is computed later."""
    shape = inputs.completion_mask.shape
    names = ("logprobs", "old_logprobs", "ref_logprobs", "token_weights")
    numbers = torch.arange(4 * inputs.completion_mask.numel()).view(4, *shape).float()
    return replace(inputs, **dict(zip(names, numbers, strict=True)))


def test_split_keeps_every_row_and_the_last_part_may_be_shorter():
    inputs = computed(policy_inputs(RAGGED, CPU))
    for size, sizes in ((1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (8, [4])):
        parts = list(split(inputs, size))
        assert [p.input_ids.shape[0] for p in parts] == sizes
        for f in fields(PolicyInputs):
            joined = torch.cat([getattr(p, f.name) for p in parts])
            torch.testing.assert_close(
                joined, getattr(inputs, f.name), rtol=0, atol=0, equal_nan=True, msg=f.name
            )


def test_split_leaves_out_what_is_not_there():
    assert all(p.old_logprobs is None for p in split(policy_inputs(RAGGED, CPU), 3))


def lengths_of(*groups: list[int], prompts: list[int]) -> PolicyInputs:
    """Groups of rollouts by the lengths of their completions; prompts by theirs."""
    rollouts = [
        rollout(ids(prompts[number], seed=number), ids(length, seed=length))
        for number, group in enumerate(groups)
        for length in group
    ]
    batch = with_advantages(
        batch_of(*(replace(r, reward=0.0) for r in rollouts), group_size=len(groups[0])), "none"
    )
    return policy_inputs(batch, CPU)


def places(
    inputs: PolicyInputs, rows: int, tokens: int | None = None, packed: bool = False
) -> list[list[int]]:
    return [batch.tolist() for batch in micro_batches(inputs, rows, tokens, packed)]


def test_rollouts_of_a_prompt_go_together_and_short_ones_with_short_ones():
    inputs = lengths_of([9, 3, 6, 5], [2, 8, 1, 4], prompts=[4, 4])
    assert places(inputs, 8) == [[6, 4, 7, 5, 1, 3, 2, 0]]
    assert places(inputs, 4) == [[6, 4, 7, 5], [1, 3, 2, 0]]
    assert places(inputs, 3) == [[6, 4, 7], [5, 1, 3], [2, 0]]
    assert places(inputs, 1) == [[6], [4], [7], [5], [1], [3], [2], [0]]


def test_a_micro_batch_has_no_more_tokens_than_allowed_unless_one_rollout_has():
    inputs = lengths_of([9, 3, 6, 5], [2, 8, 1, 4], prompts=[4, 4])
    # Columns are 4 of the prompt and those of the longest completion, times rows.
    assert places(inputs, 8, tokens=26) == [[6, 4, 7], [5, 1], [3, 2], [0]]
    assert places(inputs, 8, tokens=5) == [[i] for i in (6, 4, 7, 5, 1, 3, 2, 0)]


def test_a_long_rollout_passes_alone_where_padding_would_cost_more():
    # Beside the long one, three rollouts would be padded by 3 * 90 tokens; another pass costs about
    # 64, and the prompt once more.
    assert places(lengths_of([10, 100, 10, 10], prompts=[20]), 8) == [[0, 2, 3], [1]]
    assert places(lengths_of([10, 100, 10, 10], prompts=[220]), 8) == [[0, 2, 3, 1]]


def test_packed_rows_have_no_padding_to_avoid_and_a_prompt_once():
    uneven = lengths_of([10, 100, 10, 10], prompts=[20])
    assert places(uneven, 8, packed=True) == [[0, 2, 3, 1]]
    assert places(uneven, 8, tokens=149, packed=True) == [[0, 2, 3], [1]]
    assert places(uneven, 8, tokens=150, packed=True) == [[0, 2, 3, 1]]
    two = lengths_of([9, 3], [2, 8], prompts=[4, 5])  # 4 + 12 and 5 + 10 tokens
    assert places(two, 8, tokens=30, packed=True) == [[1, 0, 2], [3]]
    assert places(two, 8, tokens=31, packed=True) == [[1, 0, 2, 3]]


def test_no_rollouts_make_no_micro_batch():
    inputs = lengths_of([9, 3], prompts=[4])
    assert micro_batches(inputs.rows(inputs.advantages != 0), 4) == []


@given(
    groups=st.lists(st.lists(st.integers(1, 200), min_size=2, max_size=2), min_size=1, max_size=6),
    rows=st.integers(1, 5),
    tokens=st.one_of(st.none(), st.integers(1, 500)),
    packed=st.booleans(),
)
def test_every_rollout_is_in_one_micro_batch(groups, rows, tokens, packed):
    inputs = lengths_of(*groups, prompts=[3] * len(groups))
    found = micro_batches(inputs, rows, tokens, packed)
    assert sorted(torch.cat(found).tolist()) == list(range(2 * len(groups)))
    assert all(1 <= len(batch) <= rows for batch in found)


def test_trim_drops_what_is_padding_in_every_row():
    last_two = list(split(computed(policy_inputs(RAGGED, CPU)), 2))[1]
    trimmed = trim(last_two)
    assert trimmed.input_ids.tolist() == [[15, 16, 26, 27, 0], [0, 17, 28, 0, 29]]
    assert trimmed.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert trimmed.completion_mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert trimmed.injected_mask.int().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert trimmed.advantages.tolist() == [0.0, 2.0]
    for name in ("logprobs", "old_logprobs", "ref_logprobs", "token_weights"):
        assert torch.equal(getattr(trimmed, name), getattr(last_two, name)[:, :3]), name


def test_trim_leaves_a_batch_without_common_padding_as_it_is():
    inputs = computed(policy_inputs(RAGGED, CPU))
    trimmed = trim(inputs)
    for f in fields(PolicyInputs):
        torch.testing.assert_close(
            getattr(trimmed, f.name),
            getattr(inputs, f.name),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=f.name,
        )
    assert trim(policy_inputs(RAGGED, CPU)).old_logprobs is None


# ---------------------------------------------------------------- the update


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def net(request):
    return naive.in_float64(naive.decided_model(request.param))


# Prompt length, completion length, injected tokens, advantage of eight rollouts in two groups.
# Guided rows with both signs of the advantage; two guided rows are neighbours.
ROWS = [
    (4, 6, 0, 1.2),
    (4, 9, 5, -0.8),
    (4, 3, 2, 0.6),
    (4, 1, 0, -1.0),
    (7, 8, 0, 0.5),
    (7, 8, 0, -1.5),
    (7, 12, 4, 1.7),
    (7, 5, 0, -0.7),
]
CONFIG = ObjectiveConfig(kl_coef=0.05)


@pytest.fixture(scope="module")
def whole(net) -> PolicyInputs:
    """Inputs of all eight rollouts, with token weights of the whole optimizer step."""
    rollouts = [
        rollout(ids(p, seed=p), ids(c, seed=30 + i), injected=n, advantage=a)
        for i, (p, c, n, a) in enumerate(ROWS)
    ]
    inputs = policy_inputs(batch_of(*rollouts, group_size=4), CPU)
    with torch.no_grad():
        logprobs = completion_logprobs(net, inputs).logprobs
    generator = torch.Generator().manual_seed(0)
    # Far enough from the policy that some ratios are clipped.
    shift = torch.randn(2, *logprobs.shape, generator=generator) * 0.3
    return replace(
        inputs,
        old_logprobs=(logprobs + shift[0]).masked_fill(~inputs.completion_mask, 0.0),
        ref_logprobs=(logprobs + shift[1]).masked_fill(~inputs.completion_mask, 0.0),
        token_weights=token_weights(inputs.completion_mask),
    )


def update(
    net, parts: list[PolicyInputs], config: ObjectiveConfig = CONFIG
) -> tuple[float, dict[str, Tensor], dict[str, Mean]]:
    """Loss, gradients and metrics of an optimizer step over ``parts``."""
    loss, metrics = 0.0, {}
    for part in parts:
        scores = completion_logprobs(net, part)
        output = policy_loss(replace(part, logprobs=scores.logprobs), config)
        output.loss.backward()
        loss += output.loss.item()
        for name, value in output.metrics.items():
            old = metrics.get(name, Mean(0.0, 0.0))
            metrics[name] = Mean(*(a + float(b) for a, b in zip(old, value, strict=True)))
    return loss, naive.gradients(net), metrics


def assert_same_update(found, expected) -> None:
    # The model is float64; logprobs and loss are float32, whose sums depend on their order.
    assert found[0] == pytest.approx(expected[0], abs=1e-6)
    scale = max(float(g.abs().max()) for g in expected[1].values())
    assert scale > 0.01
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=2e-6 * scale)
    for name, value in expected[2].items():
        assert found[2][name] == pytest.approx(value, abs=1e-4), name


def test_loss_and_gradients_are_those_of_the_formulas_rollout_by_rollout(net, whole):
    mask = whole.completion_mask
    loss = torch.zeros((), dtype=torch.float64)
    clipped = masked = 0
    for i, (p, c, injected, advantage) in enumerate(ROWS):
        logprobs = naive.token_logprobs(net, ids(p, seed=p), ids(c, seed=30 + i))
        for t in range(c):
            logprob = logprobs[t]
            pi = logprob.exp()
            if t < c - injected:
                ratio = (logprob - whole.old_logprobs[i, t]).exp()
                plain, bounded = ratio * advantage, ratio.clamp(0.8, 1.2) * advantage
                gain = torch.minimum(plain, bounded)
                clipped += bool(bounded < plain)
                if advantage < 0:
                    gain = gain.clamp(min=3 * advantage)
            else:
                c_of_a = 1e-3 * max(-1.0, min(1.0, advantage / 4))
                gain = pi / (pi.detach() + c_of_a) * advantage
                if advantage < 0 and pi < 0.01:
                    gain = 0 * gain
                    masked += 1
            log_x = whole.ref_logprobs[i, t] - logprob
            loss = loss - gain + CONFIG.kl_coef * (log_x.exp() - 1 - log_x)
    loss = loss / int(mask.sum())
    loss.backward()
    expected = naive.gradients(net)
    assert clipped > 3 and masked > 0, "the interesting cases occur"
    found_loss, found, metrics = update(net, [whole])
    assert found_loss == pytest.approx(loss.item(), rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale)
    assert metrics["shaping_masked"] == Mean(masked, sum(n for _, _, n, _ in ROWS))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "fixed_length"])
def test_the_update_does_not_depend_on_the_micro_batch_size(net, whole, size, normalizer):
    config = replace(CONFIG, normalizer=normalizer)
    weights = token_weights(whole.completion_mask, normalizer, max_tokens=20)
    inputs = replace(whole, token_weights=weights)
    expected = update(net, [inputs], config)
    found = update(net, [trim(part) for part in split(inputs, size)], config)
    assert_same_update(found, expected)


@pytest.mark.parametrize("size", [2, 3])
def test_trimming_changes_nothing(net, whole, size):
    parts = list(split(whole, size))
    trimmed = [trim(part) for part in parts]
    assert any(
        t.input_ids.numel() < p.input_ids.numel() for t, p in zip(trimmed, parts, strict=True)
    )
    assert_same_update(update(net, trimmed), update(net, parts))


def test_padding_changes_nothing_whatever_stands_in_it(net, whole):
    def pad(tensor: Tensor, left: int, value: float = 0) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, 2), value=value)

    padded = PolicyInputs(
        input_ids=pad(whole.input_ids, 3),
        attention_mask=pad(whole.attention_mask, 3),
        completion_mask=pad(whole.completion_mask, 0),
        injected_mask=pad(whole.injected_mask, 0),
        advantages=whole.advantages,
        old_logprobs=pad(whole.old_logprobs, 0),
        ref_logprobs=pad(whole.ref_logprobs, 0),
        token_weights=pad(whole.token_weights, 0),
    )
    outside = ~padded.completion_mask
    filler = torch.tensor(ids(padded.input_ids.numel(), seed=77)).view(padded.input_ids.shape)
    dirty = replace(
        padded,
        input_ids=torch.where(padded.attention_mask, padded.input_ids, filler),
        old_logprobs=padded.old_logprobs.masked_fill(outside, float("-inf")),
        ref_logprobs=padded.ref_logprobs.masked_fill(outside, float("inf")),
    )
    expected = update(net, [whole])
    assert_same_update(update(net, [padded]), expected)
    assert_same_update(update(net, [dirty]), expected)


@pytest.mark.parametrize(
    "order",
    [
        [1, 2, 6, 0, 3, 4, 5, 7],  # guided rows together
        [1, 0, 2, 3, 6, 4, 5, 7],  # guided rows each with an unguided one
        [7, 6, 5, 4, 3, 2, 1, 0],
    ],
)
def test_it_does_not_matter_which_micro_batch_holds_the_guided_rows(net, whole, order):
    moved = PolicyInputs(
        **{
            f.name: None if getattr(whole, f.name) is None else getattr(whole, f.name)[order]
            for f in fields(PolicyInputs)
        }
    )
    found = update(net, [trim(part) for part in split(moved, 2)])
    assert_same_update(found, update(net, [whole]))


def test_without_weights_of_the_whole_step_micro_batches_would_not_add_up(net, whole):
    """Guards the tests above: their rows are uneven enough to show the difference."""
    inputs = replace(whole, token_weights=None)
    loss, _, _ = update(net, [inputs])
    in_parts, _, _ = update(net, list(split(inputs, 3)))
    assert abs(in_parts - loss) > 0.01
