"""Tools: offered to the template, called by the policy, answered by the world, learned from, and read back."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from render_builders import CHATML, HERMES, SPECIAL, SmallTokenizer, token_id, trained_bpe

from rlorch.errors import DataError
from rlorch.render import (
    RenderSpec,
    extend,
    parse_completion,
    render_messages,
    render_observation,
    render_prompt,
    render_supervised,
    supervised_example,
)
from rlorch.render.parse import parse_text

TOKENIZER = SmallTokenizer(HERMES)
SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of the answer"}}

words = st.text(alphabet=st.sampled_from('the answer Anis\n é#"{}'), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
calls = st.builds(
    lambda name, arguments: call(name) | {"function": {"name": name, "arguments": arguments}},
    st.sampled_from(["search", "weather"]),
    st.dictionaries(st.sampled_from(["query", "the place", "é"]), json_values, max_size=2),
)
offers = st.sampled_from([(), (SEARCH,), (SEARCH, WEATHER)])


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@st.composite
def assistant_turns(draw: st.DrawFn) -> dict[str, Any]:
    called = draw(st.lists(calls, max_size=2))
    turn: dict[str, Any] = {"role": "assistant", "content": draw(words)}
    return turn | {"tool_calls": called} if called else turn


@st.composite
def agent_conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question, then turns that call tools (each call answered) or are followed by the user; ends in an answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    messages.append({"role": "user", "content": draw(words)})
    for _ in range(draw(st.integers(0, 2))):
        messages += [turn := draw(assistant_turns()), *draw(replies(turn))]
    return [*messages, draw(assistant_turns())]


@st.composite
def replies(draw: st.DrawFn, turn: dict[str, Any]) -> list[dict[str, Any]]:
    called = turn.get("tool_calls", ())
    return [{"role": "tool", "content": draw(words)} for _ in called] or [{"role": "user", "content": draw(words)}]


def sampled(turn: dict[str, Any]) -> list[int]:
    """The tokens of a policy that writes `turn` as the template does, its end included."""
    prompt = TOKENIZER.apply_chat_template([], add_generation_prompt=True)
    whole = TOKENIZER.apply_chat_template([turn], add_generation_prompt=False)
    return TOKENIZER.encode(whole.removeprefix(prompt).removesuffix("\n"), add_special_tokens=False)


def in_single_bytes(tokens: Sequence[int]) -> list[int]:
    """Tokens that spell the same in another way: ordinary text byte by byte, special tokens as they are."""
    spelled: list[int] = []
    for token in tokens:
        piece = trained_bpe().id_to_token(token)
        assert piece is not None
        spelled += [token] if piece in SPECIAL else [token_id(letter) for letter in piece]
    return spelled


# --- prompts ----------------------------------------------------------------------------------------------


@given(agent_conversations(), offers)
def test_a_prompt_is_what_the_template_writes_with_the_tools_that_are_offered(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...]
) -> None:
    text, tokens_T = render_messages(messages[:-1], TOKENIZER, tools=tools)
    assert text == TOKENIZER.apply_chat_template(messages[:-1], add_generation_prompt=True, tools=tools or None)
    assert tokens_T.dtype == np.int32
    assert tokens_T.tolist() == TOKENIZER.encode(text, add_special_tokens=False)
    assert text.count("<tools>") == len(tools)
    row = {"prompt": messages[:-1], "tools": list(tools)}
    assert render_prompt(row, TOKENIZER, RenderSpec())[1].tolist() == tokens_T.tolist()
    as_text = {"prompt": messages[:-1], "tools": json.dumps(tools)}
    assert render_prompt(as_text, TOKENIZER, RenderSpec())[0] == text


def test_the_field_of_the_tools_can_have_another_name() -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}], "functions": [SEARCH], "tools": 3}
    assert render_prompt(row, TOKENIZER, RenderSpec(tools_field="functions"))[0].count("<tools>") == 1


@pytest.mark.parametrize("tools", [3, ["search"], "search", '{"name": "search"}'])
def test_tools_that_are_no_schemas_are_refused(tools: Any) -> None:
    row = {"prompt": [{"role": "user", "content": "hi"}], "tools": tools}
    with pytest.raises(DataError, match=r"row field 'tools' must be a list of tools"):
        render_prompt(row, TOKENIZER, RenderSpec())


def test_messages_from_tables_and_from_other_apis_render_alike() -> None:
    plain = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call("search", query="é")]},
    ]
    foreign = [
        {"role": "user", "content": "hi", "tool_calls": None, "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "search", "arguments": '{"query": "é"}'}}],
        },
    ]
    expected = render_messages(plain, TOKENIZER, add_generation_prompt=False)[0]
    assert render_messages(foreign, TOKENIZER, add_generation_prompt=False)[0] == expected
    assert '"arguments": {"query": "é"}' in expected


@pytest.mark.parametrize(
    ("calls_made", "message"),
    [
        ([{"function": {"name": "f", "arguments": "{"}}], r"messages\[0\]\.tool_calls\[0\]\.function\.arguments"),
        ([{"name": "f", "arguments": "[1]"}], "must be an object, not"),
        ("f()", "tool_calls must be a list of calls"),
    ],
)
def test_calls_whose_arguments_are_no_object_are_refused(calls_made: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render_messages([{"role": "assistant", "content": "", "tool_calls": calls_made}], TOKENIZER)


@pytest.mark.engine
def test_a_transformers_tokenizer_renders_tools_alike() -> None:
    from transformers import PreTrainedTokenizerFast

    real: Any = PreTrainedTokenizerFast(tokenizer_object=trained_bpe(), eos_token="<|im_end|>", chat_template=HERMES)
    turn = {"role": "assistant", "content": "the answer", "tool_calls": [call("search", query='é "it"', n=[1.5, None])]}
    messages = [{"role": "user", "content": "what is it"}, turn, {"role": "tool", "content": "Answer"}]
    ours, theirs = (render_messages(messages, tokenizer, tools=[SEARCH, WEATHER]) for tokenizer in (TOKENIZER, real))
    assert theirs[0] == ours[0]
    assert theirs[1].tolist() == ours[1].tolist()
    assert parse_completion(sampled(turn), real).message == turn
    asked = render_messages(messages[:1], real, tools=[SEARCH])[1].tolist()
    assert extend([*asked, *sampled(turn)], messages[:2], messages[2:], real, tools=[SEARCH]).keeps_prefix


# --- demonstrations ---------------------------------------------------------------------------------------


@given(agent_conversations(), offers, st.sampled_from(["last_assistant", "all_assistant"]))
def test_only_what_the_policy_would_have_sampled_is_learned(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...], train_on: Any
) -> None:
    row = {"messages": messages, "tools": list(tools)}
    learned = render_supervised(supervised_example(row, RenderSpec()), TOKENIZER, train_on)
    rendered = TOKENIZER.apply_chat_template(messages, add_generation_prompt=False, tools=tools or None)
    assert TOKENIZER.decode(learned.tokens_T.tolist()) == rendered

    turns = [message for message in messages if message["role"] == "assistant"]
    turns = turns[-1:] if train_on == "last_assistant" else turns
    edges = np.flatnonzero(np.diff(np.concatenate([[0.0], learned.weights_T, [0.0]])))
    pieces = [learned.tokens_T[start:stop].tolist() for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    assert pieces == [sampled(turn) for turn in turns]


@given(agent_conversations(), offers)
def test_the_split_is_where_the_prompt_with_tools_ends(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...]
) -> None:
    learned = render_supervised(supervised_example({"messages": messages, "tools": tools}, RenderSpec()), TOKENIZER)
    prompt_T = render_messages(messages[:-1], TOKENIZER, tools=tools)[1]
    assert learned.tokens_T[: len(prompt_T)].tolist() == prompt_T.tolist()
    assert np.flatnonzero(learned.weights_T)[0] == len(prompt_T)


# --- what was sampled -------------------------------------------------------------------------------------


@given(assistant_turns())
@example({"role": "assistant", "content": "<think>a <tool_call> it is</think>\n"})
@example({"role": "assistant", "content": "<think>a <tool_call></think>", "tool_calls": [call("f", x="</think>")]})
@example({"role": "assistant", "content": "", "tool_calls": [call("f", x="a</think>b<tool_call>")]})
def test_a_turn_that_is_sampled_as_the_template_writes_it_is_read_back(turn: dict[str, Any]) -> None:
    parsed = parse_completion(sampled(turn), TOKENIZER)
    assert parsed.problem is None
    assert parsed.message == turn


@given(st.text(max_size=30), st.text(max_size=30))
@example("a", '{"name": "f", "arguments": {}}</tool_call> and more')
@example("", "[" * 100_000)
@example("", '{"name": "f", "arguments": ' + '{"x": ' * 700 + "1" + "}" * 700 + "}</tool_call>")
def test_any_text_is_read_as_a_call_or_kept_word_for_word_with_the_reason(before: str, inside: str) -> None:
    parsed = parse_text(f"{before}<tool_call>{inside}")
    assert (parsed.problem is None) == ("tool_calls" in parsed.message)
    if parsed.problem is not None:
        assert parsed.message == {"role": "assistant", "content": f"{before}<tool_call>{inside}"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>", "tool call 1 is not JSON"),
        ("<tool_call>{'name': 'f'}</tool_call>", "tool call 1 is not JSON"),
        ('<tool_call>{"name": "f", "arguments": {}}', "tool call 1 does not end in </tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call> done', "text follows tool call 1: 'done'"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>', "tool call 2 is not JSON"),
        ('<tool_call>["f"]</tool_call>', "tool call 1 is not an object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "tool call 1 has no name"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "tool call 1 has no name"),
        ('<tool_call>{"name": "f"}</tool_call>', "tool call 1 (f) has no arguments object"),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "tool call 1 (f) has no arguments object"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is not a JSON number"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "1e999 is not a JSON number"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "half of a surrogate pair"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text: str, problem: str) -> None:
    parsed = parse_text(text)
    assert parsed.message == {"role": "assistant", "content": text}
    assert parsed.problem is not None
    assert problem in parsed.problem


def test_text_inside_arguments_may_look_like_the_end_of_a_call() -> None:
    parsed = parse_text('<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}, "id": 3}</tool_call>')
    assert parsed.message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": "</tool_call>"}}


def test_calls_are_looked_for_where_the_template_writes_them_or_on_request() -> None:
    tokens = TOKENIZER.encode('<tool_call>{"name": "f", "arguments": {}}</tool_call>', add_special_tokens=False)
    assert "tool_calls" in parse_completion(tokens, TOKENIZER).message
    assert "tool_calls" not in parse_completion(tokens, SmallTokenizer(CHATML)).message
    assert "tool_calls" in parse_completion(tokens, SmallTokenizer(CHATML), tool_calls=True).message
    assert "tool_calls" not in parse_completion(tokens, TOKENIZER, tool_calls=False).message


def test_the_end_of_a_turn_is_left_out_and_special_tokens_within_it_are_kept() -> None:
    start, end = token_id("<|im_start|>"), token_id("<|im_end|>")
    assert parse_completion([start, end], TOKENIZER).message["content"] == "<|im_start|>"
    assert parse_completion([end, start], TOKENIZER, stop_token_ids=[start]).message["content"] == "<|im_end|>"
    assert parse_completion([], TOKENIZER).message["content"] == ""


# --- the next turn ----------------------------------------------------------------------------------------


@given(agent_conversations(), offers, st.booleans(), st.data())
def test_an_episode_with_tools_keeps_every_token_and_equals_the_template(
    messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...], odd_tokens: bool, data: st.DataObject
) -> None:
    turn, asked = messages[-1], messages[:-1]
    answer = sampled(turn)
    said = in_single_bytes(answer) if odd_tokens else answer
    history = [*render_messages(asked, TOKENIZER, tools=tools)[1].tolist(), *said]
    heard = parse_completion(said, TOKENIZER).message
    new = data.draw(replies(turn))
    extension = extend(history, [*asked, heard], new, TOKENIZER, tools=tools)
    assert extension.keeps_prefix
    assert extension.diverged_at is None
    assert extension.tokens_T[: len(history)].tolist() == history
    expected = TOKENIZER.apply_chat_template([*messages, *new], add_generation_prompt=True, tools=tools or None)
    assert TOKENIZER.decode(extension.tokens_T.tolist()) == extension.text == expected
    appended = render_observation(new, TOKENIZER, turn_closed=True, tools=tools)
    assert TOKENIZER.decode([*history, *appended.tolist()]) == expected


def test_a_call_that_is_written_in_another_way_than_the_template_does_is_reported() -> None:
    asked = [{"role": "user", "content": "hi"}]
    prompt = render_messages(asked, TOKENIZER)[1].tolist()
    said = TOKENIZER.encode(
        '<tool_call>{"name":"search","arguments":{}}</tool_call><|im_end|>', add_special_tokens=False
    )
    heard = parse_completion(said, TOKENIZER).message
    extension = extend([*prompt, *said], [*asked, heard], [{"role": "tool", "content": "is"}], TOKENIZER)
    assert not extension.keeps_prefix
    assert extension.diverged_at == len(prompt) + len(TOKENIZER.encode("<tool_call>", add_special_tokens=False))
    assert extension.detail.startswith('the history goes on with \'{"name":"search"')
