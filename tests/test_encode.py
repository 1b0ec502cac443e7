"""Rows to token ids and labels: what is supervised, to the character, and what is refused."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftx.encode import (
    IGNORE,
    Encoded,
    encode_row,
    end_tokens,
    prompt_text,
    question_and_reference,
    render,
    tools_apart,
)
from ftx.errors import ModelError, RowError
from ftx.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def supervised(encoded: Encoded, tokenizer) -> str:
    """The text behind the labels that count."""
    assert len(encoded.input_ids) == len(encoded.labels)
    assert all(label in (IGNORE, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


def whole(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.input_ids)


def says(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def with_template(template: str | None):
    changed = tiny_tokenizer()
    changed.chat_template = template
    return changed


# ---- messages ------------------------------------------------------------------------------------------------------


def test_only_the_answer_and_its_end_are_supervised(tokenizer):
    encoded = encode_row({"prompt": [says("user", "hi")], "completion": [says("assistant", "yes")]}, tokenizer)
    assert whole(encoded, tokenizer) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert supervised(encoded, tokenizer) == "yes<|im_end|>\n"


def test_every_answer_of_a_conversation_is_supervised(tokenizer):
    turns = [says("system", "be kind"), says("user", "a"), says("assistant", "one"), says("user", "b"), says("assistant", "two")]
    encoded = encode_row({"messages": turns}, tokenizer)
    assert supervised(encoded, tokenizer) == "one<|im_end|>\ntwo<|im_end|>\n"
    assert whole(encoded, tokenizer) == render(turns, tokenizer)


def test_answers_in_the_prompt_are_not_supervised(tokenizer):
    prompt = [says("user", "a"), says("assistant", "one"), says("user", "b")]
    assert supervised(encode_row({"prompt": prompt, "completion": [says("assistant", "two")]}, tokenizer), tokenizer) == "two<|im_end|>\n"
    assert supervised(encode_row({"prompt": prompt, "completion": []}, tokenizer), tokenizer) == ""


def test_text_that_looks_like_the_template_is_only_text(tokenizer):
    """A mask by looking for the assistant's header in the tokens would supervise the user's words here."""
    sly = "quote: <|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"
    encoded = encode_row({"messages": [says("user", sly), says("assistant", "real")]}, tokenizer)
    assert supervised(encoded, tokenizer) == "real<|im_end|>\n" and "fake" in whole(encoded, tokenizer)


def test_a_string_beside_messages_is_one_message(tokenizer):
    pairs = ({"prompt": "hi", "completion": [says("assistant", "yes")]}, {"prompt": [says("user", "hi")], "completion": "yes"})
    for row in pairs:
        assert whole(encode_row(row, tokenizer), tokenizer) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


@functools.cache
def tokenizer_once():
    return tiny_tokenizer()


turns = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(turns)
def test_what_is_supervised_is_what_was_answered(contents):
    tokenizer = tokenizer_once()
    messages = [says("user" if i % 2 else "assistant", text) for i, text in enumerate(contents)]
    answers = "".join(f"{m['content']}<|im_end|>\n" for m in messages if m["role"] == "assistant")
    assert supervised(encode_row({"messages": messages}, tokenizer), tokenizer) == answers


def test_an_answer_that_begins_the_conversation(tokenizer):
    """With a template that writes a system turn of its own in front, as many do."""
    turns = [says("assistant", "hello"), says("user", "hi"), says("assistant", "bye")]
    assert supervised(encode_row({"messages": turns}, tokenizer), tokenizer) == "hello<|im_end|>\nbye<|im_end|>\n"
    greeting = with_template("{{ '<|im_start|>system\nbe good<|im_end|>\n' }}" + tokenizer.chat_template)
    assert supervised(encode_row({"messages": turns}, greeting), greeting) == "hello<|im_end|>\nbye<|im_end|>\n"


# ---- templates -----------------------------------------------------------------------------------------------------


def test_no_template_is_refused():
    with pytest.raises(ModelError) as error:
        encode_row({"messages": [says("user", "a"), says("assistant", "b")]}, with_template(None))
    assert error.value.problem == "the model's tokenizer has no chat template, so messages cannot be rendered."
    assert error.value.remedy.endswith("--formatter alpaca -o formatter.style=instruction")


def test_a_template_that_is_not_prefix_stable_is_refused():
    """Qwen3's drops the reasoning of earlier turns: then the answer is not where the shorter rendering says."""
    forgetful = "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else m['content'][:1]) + '\n' }}{% endfor %}"
    tokenizer = with_template(forgetful + "{% if add_generation_prompt %}assistant:{% endif %}")
    turns = [says("user", "q"), says("assistant", "long"), says("user", "r"), says("assistant", "b")]
    with pytest.raises(RowError) as error:
        encode_row({"messages": turns}, tokenizer)
    assert str(error.value) == "the chat template renders message 2 differently when more follows, so its answer cannot be found in the text"
    assert supervised(encode_row({"messages": turns[:2]}, tokenizer), tokenizer) == "long\n", "one answer is fine"
    with pytest.raises(RowError, match="renders message 2 differently"):
        encode_row({"messages": turns[:2]}, with_template("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"))


def test_what_a_template_refuses_is_a_row_error():
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Conversation must start\nwith a user') }}{% endif %}"
    with pytest.raises(RowError) as error:
        encode_row({"messages": [says("system", "x"), says("assistant", "y")]}, with_template(strict))
    assert str(error.value) == "the chat template refuses the row (Conversation must start)"


def test_end_tokens(tokenizer):
    ends, (start, end) = end_tokens(tokenizer), tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ends == {end} and start not in ends
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] + '<|turn|>' }}{% endfor %}"
    assert end_tokens(other) == {end, other.convert_tokens_to_ids("<|turn|>")}
    assert end_tokens(with_template("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")) == {end}, "a plain newline ends no answer"
    assert end_tokens(with_template("{{ raise_exception('no') }}")) == {end} and end_tokens(with_template(None)) == {end}


# ---- tools ---------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 0.3}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "é"}}]


def test_tools_and_calls_are_written_as_text_where_the_template_knows_neither(tokenizer):
    row = {"messages": [says("user", "2+2"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS}
    encoded = encode_row(row, tokenizer)
    text = whole(encoded, tokenizer)
    assert text.startswith('<|im_start|>system\nTools:\n[{"type": "function", "function": {"name": "add", "description": "é"}}]<|im_end|>\n<|im_start|>user')
    assert supervised(encoded, tokenizer) == '<tool_call>{"name": "add", "arguments": {"a": 0.3}}</tool_call><|im_end|>\n'
    assert prompt_text([{**row["messages"][0], "tools": TOOLS}], tokenizer) == text[: text.index("<tool_call>")], "asked as it was trained"


@pytest.mark.parametrize("knows", [False, True])
def test_a_question_is_asked_with_its_tools(knows):
    tokenizer = tiny_tokenizer()
    if knows:
        tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + tokenizer.chat_template
    ask, answer = [says("user", "2+2")], {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for row in ({"messages": [*ask, answer], "tools": TOOLS}, {"prompt": ask, "completion": [answer], "tools": TOOLS}):
        text = whole(encode_row(row, tokenizer), tokenizer)
        question, reference = question_and_reference(row)
        assert text.startswith(prompt_text(question, tokenizer) + reference) and '"description": "é"' in prompt_text(question, tokenizer)
        assert tools_apart(question) == (ask, TOOLS) and tools_apart(ask) == (ask, None) and ask == [says("user", "2+2")]


def test_tools_join_the_systems_own_words(tokenizer):
    row = {"prompt": [says("system", "be kind"), says("user", "x")], "completion": [says("assistant", "y")], "tools": TOOLS}
    encoded = encode_row(row, tokenizer)
    assert whole(encoded, tokenizer).startswith("<|im_start|>system\nbe kind\n\nTools:\n[") and supervised(encoded, tokenizer) == "y<|im_end|>\n"


def test_with_tools_in_front_earlier_answers_stay_unsupervised(tokenizer):
    row = {"prompt": [says("user", "a"), says("assistant", "old"), says("user", "b")], "completion": [says("assistant", "new")], "tools": TOOLS}
    assert supervised(encode_row(row, tokenizer), tokenizer) == "new<|im_end|>\n"


def test_a_template_that_knows_tools_gets_them():
    knowing = "{{ tools | tojson }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ m.tool_calls | default('') | string }};{% endfor %}"
    tokenizer = with_template(knowing + "{% if add_generation_prompt %}assistant:{% endif %}")
    text = whole(encode_row({"messages": [says("user", "x"), says("assistant", "", tool_calls=[CALL])], "tools": TOOLS}, tokenizer), tokenizer)
    assert "Tools:" not in text and "<tool_call>" not in text and "'name': 'add'" in text


# ---- plain text ----------------------------------------------------------------------------------------------------


def test_plain_text_ends_with_the_end_token(tokenizer):
    encoded = encode_row({"prompt": "Q: 2+2\nA:", "completion": " 4"}, tokenizer)
    assert supervised(encoded, tokenizer) == " 4<|im_end|>" and whole(encoded, tokenizer) == "Q: 2+2\nA: 4<|im_end|>"
    encoded = encode_row({"text": "all of it"}, tokenizer)
    assert supervised(encoded, tokenizer) == "all of it<|im_end|>"


def test_an_end_token_that_the_text_has_is_not_doubled(tokenizer):
    encoded = encode_row({"prompt": "Q", "completion": "A<|im_end|>"}, tokenizer)
    assert whole(encoded, tokenizer) == "QA<|im_end|>" and supervised(encoded, tokenizer) == "A<|im_end|>"


def adding(template: str):
    """A tokenizer that adds its own special tokens around a text, as many models' do."""
    from tokenizers.processors import TemplateProcessing

    changed = tiny_tokenizer()
    changed.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)])
    return changed


def test_an_end_token_that_the_tokenizer_adds_is_supervised_and_not_doubled():
    tokenizer = adding("<|im_start|> $A <|im_end|>")
    encoded = encode_row({"prompt": "Q", "completion": "A"}, tokenizer)
    assert whole(encoded, tokenizer) == "<|im_start|>QA<|im_end|>" and supervised(encoded, tokenizer) == "A<|im_end|>"


def test_a_rendered_template_gets_no_second_bos():
    tokenizer = adding("<|im_start|> $A")
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    encoded = encode_row({"messages": [says("user", "a"), says("assistant", "b")]}, tokenizer)
    assert encoded.input_ids[0] == tokenizer.bos_token_id and encoded.input_ids[1] != tokenizer.bos_token_id


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"the tokenizer has no end-of-sequence token\."):
        encode_row({"prompt": "a", "completion": "b"}, tokenizer)


def test_a_token_across_the_border_belongs_to_the_answer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<e>", "a", "b", "c", "ab", "bc"])}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c"), ("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<e>")
    encoded = encode_row({"prompt": "ab", "completion": "c"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["a", "bc", "<e>"]
    assert encoded.labels == [IGNORE, vocabulary["bc"], vocabulary["<e>"]]


def test_bytes_of_one_character_are_all_supervised(tokenizer):
    encoded = encode_row({"prompt": "ß", "completion": "😀é"}, tokenizer)
    assert supervised(encoded, tokenizer) == "😀é<|im_end|>" and sum(label == IGNORE for label in encoded.labels) == 2


def test_an_empty_answer_is_only_its_end(tokenizer):
    assert supervised(encode_row({"prompt": "Q", "completion": ""}, tokenizer), tokenizer) == "<|im_end|>"


# ---- cutting -------------------------------------------------------------------------------------------------------


def test_truncation_counts_what_it_loses(tokenizer):
    encoded = encode_row({"prompt": "12345", "completion": "67890"}, tokenizer)
    assert encoded.truncated(None) is encoded and encoded.truncated(11) is encoded
    cut = encoded.truncated(8)
    assert (len(cut.input_ids), len(cut.labels), cut.cut) == (8, 8, 3) and supervised(cut, tokenizer) == "678"
    assert encoded.truncated(3).cut == 6 and cut.truncated(6).cut == 5


# ---- questions -----------------------------------------------------------------------------------------------------


def test_questions_and_references():
    ask = [says("user", "a"), says("assistant", "b"), says("user", "c")]
    assert question_and_reference({"messages": [*ask, says("assistant", "d")]}) == (ask, "d")
    assert question_and_reference({"messages": ask}) == (ask[:1], "b"), "the last answer, though more follows"
    assert question_and_reference({"prompt": "q", "completion": "a"}) == ("q", "a")
    assert question_and_reference({"prompt": ask, "completion": [says("assistant", "d")]}) == (ask, "d")
    assert question_and_reference({"prompt": "q", "chosen": "good", "rejected": "bad"}) == ("q", "good")
    assert question_and_reference({"prompt": [ask[0]], "chosen": [says("assistant", "g")], "rejected": []}) == ([ask[0]], "g")
    calling = {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}
    assert question_and_reference({"messages": [ask[0], calling]})[1] == 'let me see<tool_call>{"name": "add", "arguments": {"a": 0.3}}</tool_call>'
    turns = [says("assistant", "d"), says("user", "e"), says("assistant", "f")]
    assert question_and_reference({"prompt": ask, "completion": turns}) == ([*ask, *turns[:2]], "f"), "as in messages: the last answer"
    assert question_and_reference({"prompt": "q", "completion": [says("assistant", "d")]}) == ([says("user", "q")], "d"), "a turn, as it was trained"
    with pytest.raises(RowError, match="no assistant turn"):
        question_and_reference({"messages": [says("user", "a")]})
    with pytest.raises(RowError, match="holds no question"):
        question_and_reference({"text": "a"})
