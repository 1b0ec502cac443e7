"""Batched generation: one by one and in batches the same answers, in the order asked, and the model left as it was."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftx.generate import BATCH_ROWS, BATCH_TOKENS, Generate, _batches
from ftx.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def prompts():
    """Ragged: texts and conversations of 1 to 200 tokens."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh é", k=rng.choice([1, 2, 7, 30, 200]))) for _ in range(40)]
    return [text if i % 3 else [{"role": "user", "content": text}] for i, text in enumerate(texts)]


@pytest.fixture
def generate(model, tokenizer):
    return Generate(model, tokenizer)


def by_hand(model, tokenizer, prompt: str, steps: int) -> str:
    """Greedy, one whole forward pass a token: no cache, no padding, no batch."""
    ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    made: list[int] = []
    with torch.no_grad():
        for _ in range(steps):
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(made, skip_special_tokens=True)


def test_greedy_answers_are_the_models_own(generate, model, tokenizer, prompts):
    texts = [prompt for prompt in prompts if isinstance(prompt, str)][:8]
    assert generate(texts, max_new_tokens=12) == [by_hand(model, tokenizer, text, 12) for text in texts]


def test_batched_equals_one_by_one_in_the_order_asked(generate, prompts):
    together = generate(prompts, max_new_tokens=16)
    assert together == [generate([prompt], max_new_tokens=16)[0] for prompt in prompts]
    order = list(range(len(prompts)))
    random.Random(1).shuffle(order)
    assert generate([prompts[i] for i in order], max_new_tokens=16) == [together[i] for i in order]
    assert len(set(together)) > 12, "a model that always says the same would prove nothing"


def test_what_all_prompts_begin_with_is_read_once(generate, model):
    """The answers are those of each prompt alone, and the shared tokens go through the model a single time."""
    shared = "You are asked to do the same thing every time, namely this: "
    asked = [shared + text for text in ("a", "bc", "defghij", "k" * 30, "")]
    seen = []
    handle = model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    together = generate(asked, max_new_tokens=10)
    handle.remove()
    assert seen[0] == (1, len(shared) - 1) and seen[1][0] == 5 and seen[1][1] <= 32, "one token at least is left of every prompt"
    assert together == [generate([prompt], max_new_tokens=10)[0] for prompt in asked]


def test_a_finished_row_leaves_its_slot_to_the_next_prompt(model, tokenizer, prompts, monkeypatch):
    ending = early(model, tokenizer, prompts)
    alone = [ending([prompt], max_new_tokens=20)[0] for prompt in prompts]
    sampled = ending(prompts, max_new_tokens=20, temperature=0.9, seed=5)
    monkeypatch.setattr("ftx.generate.BATCH_ROWS", 5)
    monkeypatch.setattr("ftx.decode.ROOM", 3)
    sizes = []
    handle = ending.model.model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    assert ending(prompts, max_new_tokens=20) == alone
    handle.remove()
    assert max(rows for rows, _ in sizes) <= 5 and sum(width > 1 for _, width in sizes) > len(prompts) / 5, "prompts come in as rows end"
    assert ending(prompts, max_new_tokens=20, temperature=0.9, seed=5) == sampled


def test_a_model_with_another_cache_goes_through_transformers_and_the_log_says_so(tokenizer, prompts, caplog):
    from transformers import AutoModelForCausalLM, MistralConfig

    from ftx.decode import Unfit, driven

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=len(tokenizer), sliding_window=8, eos_token_id=2, **sizes)).eval()
    with pytest.raises(Unfit):
        driven(sliding)
    generate = Generate(sliding, tokenizer)
    with caplog.at_level("INFO", "ftx"):
        generate(prompts[:1], max_new_tokens=1)
    assert caplog.messages[0].startswith("answers come from transformers' own loop: its cache is no plain keys and values")
    assert generate(prompts[:9], max_new_tokens=12) == [generate([prompt], max_new_tokens=12)[0] for prompt in prompts[:9]]


def test_sampled_answers_depend_on_seed_and_prompt_alone(generate, prompts):
    def sample(asked, seed=1, temperature=0.7):
        return generate(asked, max_new_tokens=16, temperature=temperature, seed=seed)

    together = sample(prompts)
    assert together == sample(prompts) == [sample([prompt])[0] for prompt in prompts]
    assert sample(prompts[::-1])[::-1] == together and sample(prompts[10:13]) == together[10:13]
    assert sum(a != b for a, b in zip(together, sample(prompts, seed=2), strict=True)) > 18
    assert together != generate(prompts, max_new_tokens=16)


def test_sampling_follows_the_models_distribution(model, tokenizer):
    """Many seeds over one prompt: the shares of the first token are the softmax, within 5 standard errors."""
    generate = Generate(model, tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("ab")["input_ids"]])).logits[0, -1]
    wanted = torch.softmax(logits / 1.5, -1)
    from ftx.generate import _Gumbel

    draws = 2000
    picked = _Gumbel(list(range(draws)), 1.5)(torch.empty(0), logits.expand(draws, -1)).argmax(-1)
    for token in wanted.topk(3).indices.tolist():
        share, p = float((picked == token).float().mean()), float(wanted[token])
        assert abs(share - p) < 5 * (p * (1 - p) / draws) ** 0.5
    assert len({generate(["ab"], max_new_tokens=1, temperature=1.5, seed=seed)[0] for seed in range(20)}) > 3


def test_stop_strings_end_an_answer_and_are_not_in_it(generate, prompts):
    free = generate(prompts, max_new_tokens=24)
    mark = next(text[10:12] for text in free if len(text) > 12 and text[10:12].isprintable() and text[:10].count(text[10:12]) == 0)
    stopped = generate(prompts, max_new_tokens=24, stop=[mark, "never said"])
    assert [text.partition(mark)[0] for text in free] == stopped
    assert any(text != short for text, short in zip(free, stopped, strict=True))
    assert stopped == [generate([prompt], max_new_tokens=24, stop=[mark])[0] for prompt in prompts]


def early(model, tokenizer, prompts) -> Generate:
    """A generator over a copy whose answers often end early: the token it says most ends them."""
    copy = tiny_model(seed=3)
    said = [tokenizer(text)["input_ids"] for text in Generate(model, tokenizer)(prompts, max_new_tokens=16)]
    counts = Counter(token for ids in said for token in ids if token > 2 and token in range(30, 90))
    copy.generation_config.eos_token_id = [2, counts.most_common(1)[0][0]]
    return Generate(copy, tokenizer)


def test_the_models_own_end_tokens_end_an_answer(model, tokenizer, prompts):
    ending, free = early(model, tokenizer, prompts), Generate(model, tokenizer)(prompts, max_new_tokens=16)
    mark = tokenizer.decode([ending.model.generation_config.eos_token_id[1]])
    assert ending(prompts, max_new_tokens=16) == [text.partition(mark)[0] for text in free]
    assert sum(mark in text for text in free) > 3, "some must end early for this to mean anything"


def test_what_pads_a_finished_row_is_not_in_the_answer(model, tokenizer, prompts):
    """A tokenizer without a pad token: the id 0 that fills a finished row is a token of its own elsewhere."""
    backend = Tokenizer(models.BPE(vocab=tokenizer.get_vocab(), merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=tokenizer.chat_template)
    assert bare.pad_token_id is None and bare.decode([0], skip_special_tokens=True) == "<|pad|>"
    generate = Generate(early(model, tokenizer, prompts).model, bare)
    assert generate(prompts, max_new_tokens=16) == [generate([prompt], max_new_tokens=16)[0] for prompt in prompts]


def test_special_tokens_are_not_in_the_answers(generate, prompts):
    assert not any("<|" in text for text in generate(prompts, max_new_tokens=64))


def test_a_checkpoints_own_generation_settings_do_not_bend_it(tokenizer, prompts):
    plain, bent = tiny_model(seed=3), tiny_model(seed=3)
    own = bent.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty = True, 2.0, 5, 0.5, 1.7
    own.no_repeat_ngram_size, own.min_new_tokens, own.bad_words_ids, own.num_beams = 1, 9, [[40], [41]], 3
    own.suppress_tokens, own.max_length, own.length_penalty, own.forced_eos_token_id = [50, 51, 52], 7, 3.0, 2
    assert Generate(bent, tokenizer)(prompts[:12], max_new_tokens=16) == Generate(plain, tokenizer)(prompts[:12], max_new_tokens=16)
    assert own.no_repeat_ngram_size == 1 and own.temperature == 2.0, "and they stay as they were"


def test_the_cache_is_on_and_the_model_is_left_as_it_was(tokenizer):
    model = tiny_model(seed=3)
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()  # a frozen part may stay in eval mode while the rest trains
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    lengths = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]).shape[1]), with_kwargs=True
    )
    state = torch.random.get_rng_state()
    Generate(model, tokenizer)(["abcdef", "ab"], max_new_tokens=5, temperature=1.0)
    handle.remove()
    assert lengths[0] == 6 and set(lengths[1:]) == {1}, "with the cache each further step sees one token"
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config.use_cache is False and all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state), "an evaluation must not move the seed of the training"


def test_it_is_left_as_it_was_after_an_error_too(tokenizer):
    model = tiny_model(seed=3).train()
    with pytest.raises(Exception):  # noqa: B017 - whatever it is
        Generate(model, tokenizer)(["abc"], max_new_tokens=4, stop=[3])
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("scaling", [None, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}])
def test_training_works_after_generation(tokenizer, scaling):
    more = {"max_position_embeddings": 16, "rope_parameters": scaling} if scaling else {}
    model = tiny_model(seed=3, **more)
    Generate(model, tokenizer)(["abcdef" * 8], max_new_tokens=4)
    ids = torch.tensor([tokenizer("hello there, this is longer than before" * 2)["input_ids"]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_nothing_asked_and_nothing_said(generate):
    assert generate([], max_new_tokens=4) == []
    (empty, word) = generate(["", "word"], max_new_tokens=4)
    assert isinstance(empty, str) and word == generate(["word"], max_new_tokens=4)[0]
    assert generate([""], max_new_tokens=4) == [empty]


def test_prompts_that_leave_no_room_are_said(tokenizer):
    said: list[str] = []
    generate = Generate(tiny_model(max_position_embeddings=16).eval(), tokenizer, say=said.append)
    generate(["a", "b" * 40, "c" * 9], max_new_tokens=2)
    longest = len(tokenizer("b" * 40)["input_ids"])
    assert said == [f"warning: 1 of 3 prompts leave no room to answer: the model takes 16 tokens, the longest prompt has {longest}"]
    generate(["a"], max_new_tokens=2)
    assert len(said) == 1


def test_batches_are_bounded_by_rows_and_tokens():
    lengths = [5, 4000, 10, 8000, 1] + [20] * 100
    batches = _batches([[0] * length for length in lengths], 100)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= BATCH_ROWS and batches[0][0] == 3, "the largest first: it fails at once if it does not fit"
    assert all(len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 100) <= BATCH_TOKENS for batch in batches)


def test_progress_counts_every_prompt(model, tokenizer, prompts):
    told = []
    Generate(model, tokenizer, progress=lambda done, total: told.append((done, total)))(prompts, max_new_tokens=2)
    assert told[-1] == (len(prompts), len(prompts)) and [done for done, _ in told] == sorted(done for done, _ in told)
