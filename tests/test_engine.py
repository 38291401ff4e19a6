"""The Transformers engine against ``generate``, against itself, and against probabilities."""

import re

import naive
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import FAMILIES, ids
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from thinktuning.engines import Completion, SamplingParams, TransformersEngine, derive_seed
from thinktuning.engines.decoding import Batch, below_highest
from thinktuning.engines.kv_cache import RoomyLayer
from thinktuning.errors import DivergedError, InputError
from thinktuning.policy import completion_logprobs, load_model
from thinktuning.teaching import ReplyParams
from thinktuning.types import PolicyInputs

LENGTHS = [5, 1, 17, 9, 3]
PROMPTS = [ids(n, seed=n) for n in LENGTHS]
LIMIT = 24


@pytest.fixture(scope="module", params=FAMILIES)
def net(request) -> PreTrainedModel:
    return naive.decided_model(request.param)


def sample(net, prompts, seeds, params, max_batch_size=64) -> list[list[Completion]]:
    engine = TransformersEngine(max_batch_size)
    engine.load_weights(net)
    return engine.sample(prompts, seeds, params)


def alone(net, prompt, seed, params) -> Completion:
    """The completion of one prompt with nothing beside it."""
    ((completion,),) = sample(net, [prompt], [[seed]], params)
    return completion


def forwards(net, work) -> list[torch.Size]:
    """Shapes of the token ids that the model reads while ``work`` is done."""
    shapes: list[torch.Size] = []
    hook = net.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    work()
    hook.remove()
    return shapes


def assert_same(found: Completion, expected: Completion) -> None:
    """The same tokens; logprobs up to what another batch shape does to float32 sums."""
    assert found.token_ids == expected.token_ids
    assert found.finish_reason == expected.finish_reason
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


# ---------------------------------------------------------------- greedy


def generated(net, prompt, stop_ids) -> tuple[int, ...]:
    config = GenerationConfig(
        do_sample=False, max_new_tokens=LIMIT, eos_token_id=list(stop_ids) or None, pad_token_id=0
    )
    row = torch.tensor([prompt])
    out = net.generate(row, attention_mask=torch.ones_like(row), generation_config=config)
    return tuple(out[0, len(prompt) :].tolist())


def stop_ids_in_greedy(net) -> tuple[int, ...]:
    """Two ids that end some greedy completions early, at different places, and not all."""
    free = [generated(net, p, ()) for p in PROMPTS]
    for first in range(48):
        for second in range(first):
            ends = {
                next((i for i, t in enumerate(row) if t in (first, second)), LIMIT) for row in free
            }
            if len(ends) >= 3 and LIMIT in ends:
                return first, second
    raise AssertionError("choose other prompts: none of these greedy completions can be stopped")


def test_greedy_tokens_are_those_of_generate_for_prompts_together_and_single(net):
    stop_ids = stop_ids_in_greedy(net)
    params = SamplingParams(LIMIT, stop_ids, temperature=0.0)
    expected = [generated(net, p, stop_ids) for p in PROMPTS]
    assert len({len(e) for e in expected}) >= 3, "some are to stop early, and at different places"
    together = sample(net, PROMPTS, [[0]] * len(PROMPTS), params)
    assert [c.token_ids for (c,) in together] == expected
    assert [alone(net, p, 0, params).token_ids for p in PROMPTS] == expected


def test_greedy_decoding_ignores_the_seed(net):
    params = SamplingParams(LIMIT, (), temperature=0.0)
    (group,) = sample(net, PROMPTS[:1], [[1, 2, 3]], params)
    assert len({c.token_ids for c in group}) == 1


def test_greedy_logprobs_are_those_of_temperature_one(net):
    exact = naive.in_float64(net)
    completion = alone(net, PROMPTS[0], 0, SamplingParams(LIMIT, (), temperature=0.0))
    expected = naive.token_logprobs(exact, PROMPTS[0], completion.token_ids)
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


# ---------------------------------------------------------------- a completion and its seed

SAMPLED = SamplingParams(LIMIT, stop_ids=(3, 11, 20), temperature=1.0)
SEEDS = [[10, 11, 12], [20], [30, 31], [40, 41, 42, 43], [50, 51]]


@pytest.fixture(scope="module")
def one_by_one(net) -> dict[tuple[int, int], Completion]:
    """Every completion by the number of its prompt and its seed, each drawn alone."""
    found = {
        (i, seed): alone(net, PROMPTS[i], seed, SAMPLED)
        for i, seeds in enumerate(SEEDS)
        for seed in seeds
    }
    assert len({c.token_ids for c in found.values()}) == len(found), "seeds draw different answers"
    assert len({len(c.token_ids) for c in found.values()}) > 4, "rows end at different places"
    assert {c.finish_reason for c in found.values()} == {"stop", "length"}
    return found


@pytest.mark.parametrize("max_batch_size", [1, 2, 5, 64])
def test_a_completion_does_not_depend_on_the_batch_size(net, one_by_one, max_batch_size):
    groups = sample(net, PROMPTS, SEEDS, SAMPLED, max_batch_size)
    assert [len(g) for g in groups] == [len(s) for s in SEEDS]
    for i, group in enumerate(groups):
        for seed, completion in zip(SEEDS[i], group, strict=True):
            assert_same(completion, one_by_one[i, seed])


def test_a_completion_does_not_depend_on_the_order_of_the_batch(net, one_by_one):
    order = [3, 0, 4, 2, 1]
    seeds = [SEEDS[i][::-1] for i in order]
    groups = sample(net, [PROMPTS[i] for i in order], seeds, SAMPLED)
    for i, own, group in zip(order, seeds, groups, strict=True):
        for seed, completion in zip(own, group, strict=True):
            assert_same(completion, one_by_one[i, seed])


def test_a_completion_does_not_depend_on_its_group(net, one_by_one):
    groups = sample(net, [PROMPTS[3], PROMPTS[0]], [[42], [12, 10]], SAMPLED)
    assert_same(groups[0][0], one_by_one[3, 42])
    assert_same(groups[1][0], one_by_one[0, 12])
    assert_same(groups[1][1], one_by_one[0, 10])


def test_a_completion_does_not_depend_on_the_length_limit(net, one_by_one):
    short = SamplingParams(5, SAMPLED.stop_ids)
    for (i, seed), whole in one_by_one.items():
        assert alone(net, PROMPTS[i], seed, short).token_ids == whole.token_ids[:5]


def test_equal_prompts_and_equal_seeds_give_equal_completions(net, one_by_one):
    groups = sample(net, [PROMPTS[0]] * 3, [[10], [11], [10]], SAMPLED)
    for (completion,), seed in zip(groups, [10, 11, 10], strict=True):
        assert_same(completion, one_by_one[0, seed])


def test_derived_seeds_name_their_draw():
    drawn = {derive_seed(*n) for n in [(0, 1), (1, 0), (0, "1"), ("0", 1), (0, 1, ""), (0,)]}
    assert len(drawn) == 6
    assert derive_seed(7, 3, 11, 2, "rollout") == 8050116557162722556, "fixed for all time"
    assert all(0 <= s < 2**63 for s in drawn)


# ---------------------------------------------------------------- logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_are_those_of_a_full_forward(net, temperature):
    exact = naive.in_float64(net)
    params = SamplingParams(LIMIT, SAMPLED.stop_ids, temperature)
    groups = sample(net, PROMPTS, SEEDS, params)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = naive.token_logprobs(exact, prompt, completion.token_ids, temperature)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_logprobs_are_those_that_training_computes(net, temperature):
    params = SamplingParams(LIMIT, SAMPLED.stop_ids, temperature)
    ((first,), (second,)) = sample(net, PROMPTS[:2], [[1], [2]], params)
    for prompt, completion in ((PROMPTS[0], first), (PROMPTS[1], second)):
        row = torch.tensor([[*prompt, *completion.token_ids]])
        mask = torch.ones(1, len(completion.token_ids), dtype=torch.bool)
        inputs = PolicyInputs(row, torch.ones_like(row).bool(), mask, ~mask, torch.zeros(1))
        with torch.no_grad():
            trained = completion_logprobs(net, inputs, temperature).logprobs[0]
        assert completion.logprobs == pytest.approx(trained.tolist(), abs=1e-4)


def test_temperature_changes_what_is_drawn(net):
    params = [SamplingParams(LIMIT, (), t) for t in (1.0, 0.3)]
    hot, cold = (sample(net, PROMPTS, SEEDS, p) for p in params)

    def mean_logprob(groups):
        exact = naive.in_float64(net)
        rows = [
            naive.token_logprobs(exact, p, c.token_ids)
            for p, group in zip(PROMPTS, groups, strict=True)
            for c in group
        ]
        return torch.cat(rows).mean()

    assert mean_logprob(cold) > mean_logprob(hot) + 0.5


# ---------------------------------------------------------------- where a completion ends


def test_any_of_the_stop_ids_ends_a_completion_and_stays_in_it(net, one_by_one):
    ended_by = set()
    for completion in one_by_one.values():
        *before, last = completion.token_ids
        assert not set(before) & set(SAMPLED.stop_ids), "nothing stands behind a stop token"
        if completion.finish_reason == "stop":
            assert last in SAMPLED.stop_ids
            ended_by.add(last)
        else:
            assert last not in SAMPLED.stop_ids
            assert len(completion.token_ids) == LIMIT
        assert len(completion.logprobs) == len(completion.token_ids)
    assert len(ended_by) >= 2, "more than one of the stop ids was drawn"


def test_a_stop_token_in_the_last_place_counts_as_stopped(net):
    free = alone(net, PROMPTS[0], 0, SamplingParams(LIMIT, ()))
    place = next(i for i, t in enumerate(free.token_ids) if t not in free.token_ids[:i] and i > 2)
    stop = (free.token_ids[place],)
    at_limit = alone(net, PROMPTS[0], 0, SamplingParams(place + 1, stop))
    assert at_limit.finish_reason == "stop"
    assert at_limit.token_ids == free.token_ids[: place + 1]
    before_it = alone(net, PROMPTS[0], 0, SamplingParams(place, stop))
    assert before_it.finish_reason == "length"
    assert before_it.token_ids == free.token_ids[:place]


def test_a_stop_token_inside_the_prompt_ends_nothing(net):
    prompt = [3, 5, 3]
    free = alone(net, prompt, 2, SamplingParams(LIMIT, ())).token_ids
    assert free[0] != 3
    end = free.index(3) + 1 if 3 in free else LIMIT
    assert alone(net, prompt, 2, SamplingParams(LIMIT, (3,))).token_ids == free[:end]


def test_without_stop_ids_every_completion_reaches_the_limit(net):
    groups = sample(net, PROMPTS, SEEDS, SamplingParams(6, ()))
    completions = [c for group in groups for c in group]
    assert {len(c.token_ids) for c in completions} == {6}
    assert {c.finish_reason for c in completions} == {"length"}


def test_rows_that_finish_leave_the_batch(net, one_by_one):
    shapes = forwards(net, lambda: sample(net, PROMPTS, SEEDS, SAMPLED))
    decoded = sum(shape.numel() for shape in shapes[1:])
    # The first token comes from reading the prompts; the last one is never read.
    assert decoded == sum(len(c.token_ids) - 1 for c in one_by_one.values())


# ---------------------------------------------------------------- sampling is sampling


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean."""
    expected = probabilities * counts.sum()
    likely = expected >= 5
    # Rare cells go together, as the approximation asks for.
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]])
    keep = wanted > 0
    statistic = ((seen - wanted)[keep] ** 2 / wanted[keep]).sum()
    freedom = int(keep.sum()) - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_are_drawn_as_often_as_softmax_says(temperature):
    net = naive.decided_model("llama", vocab_size=16)
    prompt = ids(4, seed=1, vocab_size=16)
    seeds = [derive_seed(5, i, "frequency") for i in range(4000)]
    (group,) = sample(net, [prompt], [seeds], SamplingParams(1, (), temperature))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=16).double()
    exact = naive.in_float64(net)
    scores = naive.token_distributions(exact, prompt, [0], temperature)[0].detach()
    assert chi_square(counts, scores.exp()) < 4
    other = naive.token_distributions(exact, prompt, [0], temperature * 0.8)[0].detach()
    assert chi_square(counts, other.exp()) > 8, "the test can tell another temperature apart"


def test_pairs_of_tokens_are_drawn_as_often_as_the_chain_rule_says():
    net = naive.decided_model("llama", vocab_size=6)
    prompt = ids(4, seed=1, vocab_size=6)
    seeds = [derive_seed(6, i, "pair") for i in range(4000)]
    (group,) = sample(net, [prompt], [seeds], SamplingParams(2, ()))
    pairs = torch.tensor([c.token_ids for c in group])
    counts = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36).double()
    exact = naive.in_float64(net)
    with torch.no_grad():
        rows = [naive.token_distributions(exact, prompt, [a, 0]) for a in range(6)]
    joint = torch.stack([row[0, a] + row[1] for a, row in enumerate(rows)]).exp().flatten()
    assert joint.sum() == pytest.approx(1.0)
    assert chi_square(counts, joint) < 4


@pytest.fixture
def two_tokens() -> PreTrainedModel:
    """A model that gives ids 4 and 9 one half each, whatever stands before."""
    net = naive.decided_model("gpt2", vocab_size=16)
    net.lm_head = torch.nn.Linear(48, 16)
    with torch.no_grad():
        net.lm_head.weight.zero_()
        net.lm_head.bias.fill_(-1e9)
        net.lm_head.bias[[4, 9]] = 0.0
    return net


def test_a_token_without_probability_is_never_drawn(two_tokens):
    (group,) = sample(two_tokens, [[1, 2]], [list(range(500))], SamplingParams(1, ()))
    drawn = [c.token_ids[0] for c in group]
    assert set(drawn) == {4, 9}
    assert 190 < drawn.count(4) < 310


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(temperature, odd):
    logits = torch.zeros(2, 300)
    logits[1, 7] = odd
    with pytest.raises(DivergedError, match="aren't finite"):
        below_highest(logits, temperature)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 4), (0.5, 9), (1 - 2**-53, 9)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(
    two_tokens, monkeypatch, uniform, token
):
    monkeypatch.setattr(
        torch, "rand", lambda n, **_: torch.full((n,), uniform, dtype=torch.float64)
    )
    assert alone(two_tokens, [1, 2], 0, SamplingParams(2, ())).token_ids == (token, token)


# ---------------------------------------------------------------- shared beginnings

PREFIX = ids(40, seed=9)


def test_a_shared_beginning_changes_nothing_and_is_read_once(net):
    tails = [ids(n, seed=100 + n) for n in (3, 8, 1, 5)]
    assert len({t[0] for t in tails}) == len(tails)
    prompts = [PREFIX + tail for tail in tails]
    seeds = [[1, 2], [3, 4], [5], [6, 7]]
    groups = []
    shapes = forwards(net, lambda: groups.extend(sample(net, prompts, seeds, SAMPLED)))
    for prompt, own, group in zip(prompts, seeds, groups, strict=True):
        for seed, completion in zip(own, group, strict=True):
            assert_same(completion, alone(net, prompt, seed, SAMPLED))
    assert [tuple(s) for s in shapes[:2]] == [(1, 40), (4, 8)]


def test_one_prompt_may_be_the_beginning_of_the_others(net):
    prompts = [PREFIX, [*PREFIX, 7], [*PREFIX, 7, 8, 9], PREFIX]
    greedy = SamplingParams(LIMIT, (), temperature=0.0)
    together = sample(net, prompts, [[0]] * 4, greedy)
    for prompt, (completion,) in zip(prompts, together, strict=True):
        assert completion.token_ids == generated(net, prompt, ())


def test_a_prompt_is_read_once_for_its_whole_group(net):
    shapes = forwards(net, lambda: sample(net, [PREFIX], [list(range(6))], SamplingParams(3, ())))
    assert [tuple(s) for s in shapes] == [(1, 40), (6, 1), (6, 1)]


# ---------------------------------------------------------------- the edges


def test_no_prompts_give_no_completions(net):
    assert sample(net, [], [], SAMPLED) == []
    groups = sample(net, PROMPTS[:2], [[], [4]], SAMPLED)
    assert [len(g) for g in groups] == [0, 1]


def test_the_next_sample_uses_weights_that_were_changed_in_place():
    net = naive.decided_model("llama")
    other = naive.decided_model("llama", seed=1)
    greedy = SamplingParams(LIMIT, (), temperature=0.0)
    engine = TransformersEngine()
    engine.load_weights(net)
    ((before,),) = engine.sample(PROMPTS[:1], [[0]], greedy)
    with torch.no_grad():
        for weight, new in zip(net.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    engine.load_weights(net)
    ((after,),) = engine.sample(PROMPTS[:1], [[0]], greedy)
    assert after.token_ids == generated(other, PROMPTS[0], ())
    assert after.token_ids != before.token_ids


def test_at_most_max_batch_size_rows_are_decoded_at_a_time(net):
    params = SamplingParams(4, ())
    two_each = [[i, 10 + i] for i in range(5)]
    shapes = forwards(net, lambda: sample(net, PROMPTS, two_each, params, max_batch_size=4))
    assert max(shape[0] for shape in shapes) == 4
    shapes = forwards(net, lambda: sample(net, PROMPTS, two_each, params, max_batch_size=1))
    assert max(shape[0] for shape in shapes) == 2, "a group stays together"


def test_waiting_prompts_join_when_a_quarter_of_the_batch_is_free(net, one_by_one):
    order = [(i, seed) for i, seeds in enumerate(SEEDS) for seed in seeds]
    prompts, seeds = [PROMPTS[i] for i, _ in order], [[seed] for _, seed in order]
    found: list[list[Completion]] = []
    shapes = forwards(net, lambda: found.extend(sample(net, prompts, seeds, SAMPLED, 4)))
    for key, (completion,) in zip(order, found, strict=True):
        assert_same(completion, one_by_one[key])
    lengths = [len(one_by_one[key].token_ids) for key in order]
    steps = sum(max(lengths[start : start + 4]) for start in range(0, len(lengths), 4))
    decoding = [shape for shape in shapes if shape[1] == 1]
    assert len(decoding) < steps - 5, "batches one after the other would wait for their longest"
    assert max(shape[0] for shape in decoding) == 4


def test_rows_that_join_have_no_columns_of_those_that_have_left(net, monkeypatch):
    lengths, real = [], Batch.read

    def read(self, model, tokens):
        real(self, model, tokens)
        lengths.append(self.mask.shape[1])
        assert all(layer.get_seq_length() == lengths[-1] for layer in self.cache.layers)

    monkeypatch.setattr(Batch, "read", read)
    prompts = [ids(5 + i % 4, seed=i) for i in range(24)]
    params = SamplingParams(12, tuple(range(0, 48, 6)), 1.0)
    found = sample(net, prompts, [[i] for i in range(24)], params, max_batch_size=4)
    assert len(lengths) > 8 + 12
    assert max(lengths) <= 8 + 12
    for i, (completion,) in enumerate(found):
        assert_same(completion, alone(net, prompts[i], i, params))


def test_a_teachers_own_weights_are_frozen(tmp_path):
    engine = TransformersEngine(pretrained=str(tiny.save(tmp_path / "teacher")))
    engine.start()
    manual = {"role": "system", "content": "Add. " * 60}
    chats = [[manual, {"role": "user", "content": text}] for text in ("3 plus 4?", "4 plus 3?")]
    params = ReplyParams(4, 400)
    first = forwards(engine._model, lambda: engine.reply(chats, params))
    again = forwards(engine._model, lambda: engine.reply(chats, params))
    read = [shape for shape in first if shape == (1, 64)]
    assert read and again == first[len(read) :], "what both begin with was kept"


def test_what_frozen_weights_have_read_is_kept_until_they_change():
    net = naive.decided_model("llama")
    net.requires_grad_(False)
    engine = TransformersEngine()
    prompts = [[*ids(130, seed=1), *ids(n, seed=n)] for n in (4, 6, 5)]
    params = SamplingParams(1, (), temperature=0.0)

    def ask(chosen: list[list[int]]) -> list[torch.Size]:
        return forwards(net, lambda: engine.sample(chosen, [[0]] * len(chosen), params))

    engine.load_weights(net)
    assert ask(prompts) == [(1, 64), (1, 64), (3, 8)]
    assert ask(prompts[:2]) == [(2, 8)]
    assert ask(prompts[2:]) == [(1, 7)], "goes on from what is kept"
    assert ask(prompts) == [(3, 8)]
    other = [[7, *prompt] for prompt in prompts]
    assert ask(other) == [(1, 64), (1, 64), (3, 9)]
    found = engine.sample(other, [[0]] * 3, params)
    assert [g[0].token_ids for g in found] == [alone(net, p, 0, params).token_ids for p in other]
    net.requires_grad_(True)
    assert ask(other) == ask(other) == [(1, 131), (3, 6)], "what is trained is read anew"


def test_what_was_read_before_changes_no_bit(tmp_path):
    net = load_model(str(tiny.save(tmp_path / "net", width=64)), torch.bfloat16)
    net.requires_grad_(False)
    params = SamplingParams(8, (), temperature=0.0)
    one = ids(230, seed=1)
    texts = [one, [*one[:100], *ids(130, seed=2)]]

    def ask(engine: TransformersEngine, text: list[int], shared: int) -> list[tuple[float, ...]]:
        prompts = [[*text[:shared], *ids(n, seed=n)] for n in (9, 5)]
        return [c.logprobs for (c,) in engine.sample(prompts, [[0], [0]], params)]

    old = TransformersEngine()
    old.load_weights(net)
    for number, shared in enumerate((200, 200, 90, 173, 64, 230, 230, 130, 30, 150, 211)):
        fresh = TransformersEngine()
        fresh.load_weights(net)
        asked = texts[number % 2], shared
        assert ask(old, *asked) == ask(fresh, *asked), asked


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.integers(1, 90)),
            st.tuples(st.just("keep"), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
            st.tuples(st.just("drop"), st.integers(0, 3)),
            st.tuples(st.just("crop"), st.integers(1, 3)),
            st.tuples(st.just("join"), st.integers(1, 70)),
        ),
        max_size=12,
    )
)
def test_a_layer_with_room_holds_what_copies_would(steps):
    layer, keys = RoomyLayer(), torch.rand(2, 2, 5, 3)
    layer.update(keys, -keys)
    for name, value in steps:
        length = keys.shape[2]
        if name == "update":
            new = torch.rand(len(keys), 2, value, 3)
            found, _ = layer.update(new, -new)
            keys = torch.cat([keys, new], dim=2)
            assert torch.equal(found, keys)
        elif name == "keep":
            rows = torch.tensor(value) % len(keys)
            layer.keep(rows)
            keys = keys[rows]
        elif name == "drop":
            start = min(value, length - 1)
            layer.keep(torch.arange(len(keys)), start)
            keys = keys[:, :, start:]
        elif name == "crop" and length > value:
            layer.crop(-value)
            keys = keys[:, :, :-value]
        elif name == "join":
            other, theirs = RoomyLayer(), torch.rand(1, 2, value, 3)
            other.update(theirs, -theirs)
            layer.join(other)
            width = max(length, value)
            keys = torch.cat([pad(k, (0, 0, width - k.shape[2], 0)) for k in (keys, theirs)])
        assert layer.get_seq_length() == keys.shape[2]
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, -keys)


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_size_below_one_is_refused(size):
    with pytest.raises(InputError, match=f"at least 1, got {size}"):
        TransformersEngine(max_batch_size=size)


def test_sampling_leaves_no_gradient_behind(net):
    alone(net, PROMPTS[0], 0, SamplingParams(3, ()))
    assert all(p.grad is None for p in net.parameters())


def test_sampling_leaves_the_global_random_state_alone(net):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    alone(net, PROMPTS[0], 0, SAMPLED)
    assert torch.equal(torch.rand(3), expected)


def test_a_pattern_is_kept_and_ends_in_a_stop_id():
    text = tiny.tokenizer("own_pad")
    net = tiny.model("llama", len(text), text.eos_token_id)
    engine = TransformersEngine()
    engine.load_weights(net, text)
    pattern = r"<a>(yes|no)</a>\n<b>[^<]{1,12}</b>"
    params = SamplingParams(60, (text.eos_token_id,), 1.0, pattern)
    prompts = [text.encode("3 plus 4"), text.encode("What is 1 plus 2?")]
    for group in engine.sample(prompts, [[1, 2, 3], [4, 5, 6]], params):
        for completion in group:
            assert completion.finish_reason == "stop"
            reply = text.decode(completion.token_ids, skip_special_tokens=True)
            assert re.fullmatch(pattern, reply, re.DOTALL), reply
    free = engine.sample(prompts, [[1], [4]], SamplingParams(60, params.stop_ids))
    assert not any(re.fullmatch(pattern, text.decode(c.token_ids), re.DOTALL) for (c,) in free), (
        "the model keeps to the pattern anyway: the test shows nothing"
    )


def test_a_reply_that_leaves_no_room_for_its_prompt_is_an_input_error():
    text = tiny.tokenizer("own_pad")
    engine = TransformersEngine()
    engine.load_weights(tiny.model("llama", len(text), text.eos_token_id), text)
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 plus 2?"}]
    (reply,) = engine.reply([chat], ReplyParams(1024 - 20, 500))
    assert reply.skipped == "prompt_too_long"
    with pytest.raises(InputError, match="leave no room for a prompt in the 1024 positions"):
        engine.reply([chat], ReplyParams(1000, 500, spare_tokens=24))
