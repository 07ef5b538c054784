"""The completion is the answer, character by character."""

from rlorch.scoring import Rollout, reward

from ._row import field


@reward
def exact(rollout: Rollout, *, answer: str = "answer", strip: bool = True, case: bool = True) -> float:
    """1 where the completion equals the row's answer, else 0.

    Options:
        answer: the row's field that holds the answer.
        strip: ignore white space around both.
        case: upper and lower case differ.
    """
    got, wanted = rollout.completion, str(field(rollout, answer))
    if strip:
        got, wanted = got.strip(), wanted.strip()
    if not case:
        got, wanted = got.casefold(), wanted.casefold()
    return float(got == wanted)
