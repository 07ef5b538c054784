"""One prompt, G completions, one request: the engine computes the prompt once."""

from collections.abc import Awaitable, Callable

from rlorch.errors import InvariantError
from rlorch.ports import Tokenizer
from rlorch.render import completion_text
from rlorch.types import Completion, Prompt, Rollout, SamplingParams, Tokens, Turn

Sample = Callable[[Tokens, SamplingParams, str], Awaitable[tuple[Completion, ...]]]
"""`sample(prompt_T, params, request_id)`, of one sampler or of the pool."""


async def rollout_group(
    prompt: Prompt,
    *,
    group_id: int,
    params: SamplingParams,
    sample: Sample,
    tokenizer: Tokenizer,
    request_prefix: str = "group",
) -> tuple[Rollout, ...]:
    """The `params.n` rollouts of one prompt, without verdicts.

    The request id is `{request_prefix}-{group_id}`; cancelling this call cancels the request. Whatever `sample`
    raises passes through.

    Raises:
        InvariantError: the sampler returned another number of completions.
    """
    completions = await sample(prompt.tokens_T, params, f"{request_prefix}-{group_id}")
    if len(completions) != params.n:
        raise InvariantError(f"group {group_id}: asked for {params.n} completions, the sampler gave {len(completions)}")
    return tuple(
        Rollout(
            group_id=group_id,
            index=index,
            prompt=prompt,
            turns=(Turn(prompt.tokens_T, completion),),
            text=completion_text(completion.tokens_T.tolist(), tokenizer),
        )
        for index, completion in enumerate(completions)
    )
