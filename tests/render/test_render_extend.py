"""The next prompt of a conversation: the history's tokens kept, or the first one that the template writes otherwise."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from render_builders import CHATML, FORGETFUL, THINKING, SmallTokenizer, trained_bpe

from rlorch.errors import DataError
from rlorch.render import extend, render_messages, render_supervised

words = st.text(alphabet=st.sampled_from("the answer Anis\n é#"), max_size=12)
pieces = st.lists(st.integers(0, trained_bpe().get_vocab_size() - 1).filter(lambda token: token > 2), max_size=8)
"""Ordinary tokens, as a policy samples them: any order, any bytes."""

END = trained_bpe().token_to_id("<|im_end|>")
PLAIN, THINKS = SmallTokenizer(CHATML), SmallTokenizer(THINKING)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@given(words, pieces, st.booleans(), words)
def test_sampled_tokens_are_kept_whatever_an_encoder_would_make_of_their_text(
    question: str, sampled: list[int], closed: bool, said: str
) -> None:
    prompt = render_messages([user(question)], PLAIN)[1].tolist()
    history = [*prompt, *sampled, *([END] if closed else [])]
    answer = assistant(PLAIN.decode(sampled))
    extension = extend(history, [user(question), answer], [user(said)], PLAIN)
    assert extension.diverged_at is None
    assert extension.tokens_T[: len(history)].tolist() == history
    expected = PLAIN.apply_chat_template([user(question), answer, user(said)], add_generation_prompt=True)
    assert PLAIN.decode(extension.tokens_T.tolist()) == extension.text == expected


@given(words, words, words, words)
def test_a_template_that_drops_earlier_reasoning_is_reported_at_the_first_token_that_differs(
    question: str, thought: str, answer: str, said: str
) -> None:
    conversation = [user(question), assistant(f"<think>{thought}</think>{answer}")]
    learned = render_supervised(conversation, THINKS)
    history = learned.tokens_T[: int(learned.weights_T.nonzero()[0][-1]) + 1].tolist()
    extension = extend(history, conversation, [user(said)], THINKS)
    assert not extension.keeps_prefix
    assert extension.diverged_at is not None
    before = THINKS.decode(history[: extension.diverged_at])
    upto = THINKS.decode(history[: extension.diverged_at + 1])
    assert extension.text.startswith(before.rstrip("\ufffd"))  # a token may end within a character
    assert not extension.text.startswith(upto)
    expected = THINKS.apply_chat_template([*conversation, user(said)], add_generation_prompt=True)
    assert f"<think>{thought}</think>" not in expected.partition("assistant\n")[2]
    assert extension.text == expected
    assert extension.tokens_T.tolist() == THINKS.encode(expected, add_special_tokens=False)


@given(words, words, words)
def test_the_same_template_keeps_reasoning_while_no_user_speaks(question: str, thought: str, result: str) -> None:
    conversation = [user(question), assistant(f"<think>{thought}</think>")]
    history = render_supervised(conversation, THINKS).tokens_T.tolist()
    extension = extend(history, conversation, [{"role": "tool", "content": result}], THINKS)
    assert extension.keeps_prefix
    assert extension.tokens_T[: len(history)].tolist() == history


def test_the_place_and_both_texts_are_said() -> None:
    conversation = [user("what is it"), assistant("the answer")]
    forgetful = SmallTokenizer(FORGETFUL)
    prompt = render_messages(conversation[:1], forgetful)[1].tolist()
    history = [*prompt, *forgetful.encode("the answer<|im_end|>", add_special_tokens=False)]
    extension = extend(history, conversation, [user("is it")], forgetful)
    assert extension.diverged_at == len(prompt)
    assert extension.detail.startswith("the history goes on with 'the answer<|im_end|>', the template with '...<|im_")


def test_a_history_that_is_longer_than_the_conversation_differs_where_the_template_ends() -> None:
    conversation = [user("is"), assistant("it")]
    whole = render_messages([*conversation, user("what")], PLAIN)[1].tolist()
    more = PLAIN.encode("answer", add_special_tokens=False)
    extension = extend([*whole, *more], conversation, [user("what")], PLAIN)
    assert extension.diverged_at == len(whole)


def test_an_empty_history_is_the_beginning_of_anything() -> None:
    extension = extend([], [], [user("is")], PLAIN)
    assert extension.keeps_prefix
    assert extension.tokens_T.tolist() == render_messages([user("is")], PLAIN)[1].tolist()


def test_messages_that_the_template_refuses_are_an_error_of_the_input() -> None:
    with pytest.raises(DataError, match=r"refuses messages with roles \[user\]"):
        extend([], [], [user("x")], SmallTokenizer("{{ raise_exception('no') }}"))
