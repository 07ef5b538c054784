import pytest

from rlorch.data import preference_pair
from rlorch.errors import DataError

ASK = [{"role": "user", "content": "2+2?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


TEXT = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
TURNS = {"prompt": ASK, "chosen": say("4"), "rejected": say("5")}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TEXT | {"source": "x"}, TEXT),
        ({"prompt": "2+2?", "preferred": "4", "non_preferred": "5"}, TEXT),
        ({"prompt": ASK, "chosen": "4", "rejected": "5"}, {"prompt": ASK, "chosen": say("4"), "rejected": say("5")}),
        (TURNS, TURNS),
        ({"chosen": ASK + say("4"), "rejected": ASK + say("5")}, TURNS),
        ({"chosen": {"messages": ASK + say("4")}, "rejected": {"messages": ASK + say("5")}}, TURNS),
        ({"prompt": "2+2?", "chosen": ASK + say("4"), "rejected": ASK + say("5")}, TURNS),
        ({"prompt": "2+2?", "chosen": say("4"), "rejected": "5"}, TURNS),
        ({"input": {"messages": ASK}, "preferred_output": say("4"), "non_preferred_output": say("5")}, TURNS),
        (
            {"prompt": "2+2?", "samples": [{"completion": c, "score": s} for c, s in (("5", 0), ("4", 1), ("9", 0.5))]},
            TEXT,
        ),
        ({"samples": [{"messages": ASK + say(c), "evals": {"score": s}} for c, s in (("4", 1.0), ("5", -1))]}, TURNS),
    ],
)
def test_every_format_becomes_a_prompt_and_two_answers(row, expected):
    found = preference_pair(row, "rows.jsonl row 1")
    if isinstance(expected["prompt"], list) and isinstance(found["chosen"], str):
        found |= {name: say(found[name]) for name in ("chosen", "rejected")}
    assert found == expected


def test_another_prompt_field_keeps_its_name():
    row = {"question": "2+2?", "chosen": "4", "rejected": "5"}
    assert preference_pair(row, "row 1", "question") == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "4", "rejected": "4"},
        {"prompt": "p", "samples": [{"completion": "4", "score": 1}, {"completion": "4", "score": 1}]},
        {"prompt": ASK, "chosen": say("4"), "rejected": say("4")},
    ],
)
def test_rows_that_prefer_nothing_give_no_pair(row):
    assert preference_pair(row, "row 1") is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "answer": "4"}, "row 7: no preference.*'prompt', 'answer'"),
        ({"chosen": "4", "rejected": "5"}, "row 7: answers that are text need a prompt"),
        ({"prompt": "p", "chosen": "", "rejected": "5"}, "row 7: chosen must be text or messages"),
        ({"prompt": "p", "chosen": "4", "rejected": [{"content": "5"}]}, "row 7: rejected must be text or messages"),
        ({"prompt": "p", "samples": [{"completion": "4", "score": 1}]}, "row 7: samples must be a list of at least"),
        (
            {"prompt": "p", "samples": [{"completion": "4"}, {"completion": "5", "score": 1}]},
            r"samples\[0\] needs a fi",
        ),
        ({"prompt": 3, "chosen": "4", "rejected": "5"}, "row 7: prompt must be"),
        ({"chosen": say("4"), "rejected": say("5")}, "row 7: no prompt that both answers follow"),
    ],
)
def test_a_row_that_is_no_pair_says_where_and_why(row, said):
    with pytest.raises(DataError, match=said):
        preference_pair(row, "row 7")
