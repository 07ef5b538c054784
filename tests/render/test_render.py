"""Prompts, demonstrations and observations through a real byte-level BPE tokenizer and chat templates."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from render_builders import CHATML, FORGETFUL, NO_SYSTEM, SmallTokenizer, trained_bpe

from rlorch.errors import DataError, ModelError
from rlorch.render import (
    Conversation,
    RenderSpec,
    completion_text,
    render_observation,
    render_prompt,
    render_supervised,
    supervised_example,
    to_datum,
)

TOKENIZER = SmallTokenizer()
words = st.text(alphabet=st.sampled_from("the answer Anis\n é#"), max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    turns = draw(st.integers(1, 3))
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return messages


# --- prompts ----------------------------------------------------------------------------------------------


def test_a_text_prompt_is_taken_verbatim_and_the_suffix_follows() -> None:
    text, tokens = render_prompt({"prompt": "what is it"}, TOKENIZER, RenderSpec(suffix="\n"))
    assert text == "what is it\n"
    assert tokens.dtype == np.int32
    assert tokens.tolist() == TOKENIZER.encode("what is it\n", add_special_tokens=False)


def test_special_tokens_are_added_on_request_only() -> None:
    _, tokens = render_prompt({"prompt": "is"}, TOKENIZER, RenderSpec(add_special_tokens=True))
    assert tokens[0] == trained_bpe().token_to_id("<s>")


def test_a_template_names_row_fields() -> None:
    row = {"a": 2, "b": "{x}"}
    assert render_prompt(row, TOKENIZER, RenderSpec(template="{a} and {b} {{}}="))[0] == "2 and {x} {}="


def test_messages_go_through_the_chat_template_with_the_generation_prompt() -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    text, tokens = render_prompt(row, TOKENIZER, RenderSpec(system="be good"))
    assert text == "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens.tolist() == TOKENIZER.encode(text, add_special_tokens=False)


def test_text_can_be_wrapped_as_a_user_message() -> None:
    text, _ = render_prompt({"prompt": "hi"}, TOKENIZER, RenderSpec(chat=True))
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        ({"question": "x"}, RenderSpec(), "no field 'prompt'; it has question"),
        ({"prompt": 3}, RenderSpec(), "must be a list of messages"),
        ({"prompt": [{"content": "x"}]}, RenderSpec(), "[0] must be a message with role and content"),
        ({"prompt": ""}, RenderSpec(), "the prompt is empty"),
        ({"a": 1}, RenderSpec(template="{b}"), "no field 'b'"),
    ],
)
def test_a_row_that_gives_no_prompt_is_named(row: dict[str, Any], spec: RenderSpec, message: str) -> None:
    with pytest.raises(DataError) as caught:
        render_prompt(row, TOKENIZER, spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{}", "{0}", "{a"])
def test_a_template_may_only_name_fields(template: str) -> None:
    with pytest.raises(ValidationError):
        RenderSpec(template=template)


def test_a_tokenizer_without_a_template_and_a_template_that_refuses_are_told_apart() -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}]}
    with pytest.raises(ModelError, match="no chat template"):
        render_prompt(row, SmallTokenizer(None), RenderSpec())
    with pytest.raises(DataError, match="roles \\[system, user\\]: no system role here"):
        render_prompt(row, SmallTokenizer(NO_SYSTEM), RenderSpec(system="s"))


def test_completion_text_leaves_out_special_tokens() -> None:
    assert completion_text(TOKENIZER.encode("is<|im_end|>", add_special_tokens=False), TOKENIZER) == "is"


# --- demonstrations ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(conversations())
def test_the_split_falls_exactly_where_the_generation_prompt_ends(messages: list[dict[str, str]]) -> None:
    example = render_supervised(messages, TOKENIZER)
    _, prompt_T = render_prompt({"prompt": messages[:-1]}, TOKENIZER, RenderSpec())
    assert example.tokens_T[: len(prompt_T)].tolist() == prompt_T.tolist()
    learned = np.flatnonzero(example.weights_T)
    assert learned[0] == len(prompt_T)
    assert learned.tolist() == list(range(learned[0], learned[-1] + 1))
    assert example.tokens_T[learned[-1]] == TOKENIZER.eos_token_id
    assert completion_text(example.tokens_T[learned].tolist(), TOKENIZER) == messages[-1]["content"]


@settings(deadline=None)
@given(conversations(), st.sampled_from(["last_assistant", "all_assistant"]))
def test_the_tokens_spell_the_whole_rendered_conversation(messages: list[dict[str, str]], train_on: Any) -> None:
    example = render_supervised(messages, TOKENIZER, train_on)
    rendered = TOKENIZER.apply_chat_template(messages, add_generation_prompt=False)
    assert TOKENIZER.decode(example.tokens_T.tolist()) == rendered


@settings(deadline=None)
@given(conversations())
def test_all_assistant_turns_are_learned_each_with_its_end(messages: list[dict[str, str]]) -> None:
    example = render_supervised(messages, TOKENIZER, "all_assistant")
    starts = np.flatnonzero(np.diff(np.concatenate([[0.0], example.weights_T, [0.0]])))
    spoken = [
        completion_text(example.tokens_T[start:stop].tolist(), TOKENIZER)
        for start, stop in zip(starts[::2], starts[1::2], strict=True)
    ]
    assert spoken == [message["content"] for message in messages if message["role"] == "assistant"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_the_message() -> None:
    messages = [{"role": role, "content": "it is"} for role in ("user", "assistant", "user", "assistant")]
    forgetful = SmallTokenizer(FORGETFUL)
    with pytest.raises(DataError, match=r"does not keep the text before message 1.*train on 'last_assistant'"):
        render_supervised(messages, forgetful, "all_assistant")
    assert render_supervised(messages, forgetful, "last_assistant").weights_T.sum() > 0


def test_a_pair_is_prompt_completion_and_eos() -> None:
    example = render_supervised(("what", " is"), TOKENIZER, spec=RenderSpec(suffix="\n"))
    prompt = TOKENIZER.encode("what\n", add_special_tokens=False)
    answer = [*TOKENIZER.encode(" is", add_special_tokens=False), TOKENIZER.eos_token_id]
    assert example.tokens_T.tolist() == prompt + answer
    assert example.weights_T.tolist() == [0.0] * len(prompt) + [1.0] * len(answer)


def test_eos_is_not_doubled() -> None:
    once = render_supervised(("what", "is"), TOKENIZER)
    assert render_supervised(("what", "is<|im_end|>"), TOKENIZER).tokens_T.tolist() == once.tokens_T.tolist()


def test_an_example_without_an_assistant_is_refused() -> None:
    with pytest.raises(DataError, match="no assistant message"):
        render_supervised([{"role": "user", "content": "x"}], TOKENIZER)


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, ["user", "assistant"]),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}, ["user", "assistant"]),
        ({"prompt": [{"role": "user"}], "completion": "yes"}, ["user", "assistant"]),
    ],
)
def test_rows_of_messages_become_one_conversation(row: dict[str, Any], roles: list[str]) -> None:
    example = supervised_example(row, RenderSpec())
    assert isinstance(example, Conversation)
    assert [message["role"] for message in example.messages] == roles


def test_rows_of_text_become_a_pair_and_bad_rows_are_named() -> None:
    assert supervised_example({"prompt": "a", "completion": "b"}, RenderSpec()) == ("a", "b")
    with pytest.raises(DataError, match="no field 'completion'"):
        supervised_example({"prompt": "a"}, RenderSpec())
    with pytest.raises(DataError, match="must be a list of messages"):
        supervised_example({"prompt": "a", "completion": [{"role": "assistant"}]}, RenderSpec())


def test_a_datum_aligns_targets_and_weights_with_the_predictions() -> None:
    tokens, weights = np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.float32)
    datum = to_datum(tokens, weights)
    assert datum.tokens_T.tolist() == [5, 6]
    assert datum.loss_inputs["target_tokens"].tolist() == [6, 7]
    assert datum.loss_inputs["weights"].tolist() == [0, 1]
    assert (datum.tokens_T.dtype, datum.loss_inputs["weights"].dtype) == (np.int64, np.float32)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        to_datum(tokens[:1], weights[:1])


# --- observations -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(conversations(), words)
def test_an_observation_continues_the_conversation_without_tokenising_it_again(
    messages: list[dict[str, str]], said: str
) -> None:
    observation = [{"role": "user", "content": said}]
    _, prompt_T = render_prompt({"prompt": messages[:-1]}, TOKENIZER, RenderSpec())
    sampled = [*TOKENIZER.encode(messages[-1]["content"], add_special_tokens=False), TOKENIZER.eos_token_id]
    appended = render_observation(observation, TOKENIZER, turn_closed=True)
    whole = [*prompt_T.tolist(), *sampled, *appended.tolist()]
    expected = TOKENIZER.apply_chat_template([*messages, *observation], add_generation_prompt=True)
    assert TOKENIZER.decode(whole) == expected


def test_a_turn_that_was_not_closed_is_closed_by_the_observation() -> None:
    observation = [{"role": "user", "content": "is"}]
    closed = render_observation(observation, TOKENIZER, turn_closed=True)
    opened = render_observation(observation, TOKENIZER, turn_closed=False)
    assert opened.tolist() == [TOKENIZER.eos_token_id, *closed.tolist()]


def test_a_template_that_rewrites_the_turn_before_cannot_give_observations() -> None:
    with pytest.raises(DataError, match="rewrites the assistant turn when \\[user\\] follows"):
        render_observation([{"role": "user", "content": "x"}], SmallTokenizer(FORGETFUL), turn_closed=True)


@pytest.mark.engine
def test_a_transformers_tokenizer_is_a_tokenizer() -> None:
    from transformers import PreTrainedTokenizerFast

    real: Any = PreTrainedTokenizerFast(tokenizer_object=trained_bpe(), eos_token="<|im_end|>", chat_template=CHATML)
    messages = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "the answer"}]
    ours, theirs = (render_supervised(messages, tokenizer) for tokenizer in (TOKENIZER, real))
    assert theirs.tokens_T.tolist() == ours.tokens_T.tolist()
    assert theirs.weights_T.tolist() == ours.weights_T.tolist()
    assert completion_text(ours.tokens_T[-5:].tolist(), real) == completion_text(ours.tokens_T[-5:].tolist(), TOKENIZER)
