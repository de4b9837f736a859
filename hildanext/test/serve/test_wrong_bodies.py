"""Bodies of a hundred thousand wrong items: one complaint each, in no time, since one loop answers everybody."""

import pytest
from pydantic import ValidationError

from hildanext.serve.requests import MOST_IDS, ChatBody, CompletionBody, GenerateBody

MANY = 20_000
PER_BRANCH = 4
"""A prompt may be four things, and each is told of."""


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (GenerateBody, {"tokens": [-1] * MANY}),
        (GenerateBody, {"prompt": "a", "stop": [1] * MANY}),
        (GenerateBody, {"messages": [1] * MANY}),
        (CompletionBody, {"model": "a", "prompt": [-1] * MANY}),
        (CompletionBody, {"model": "a", "prompt": [[-1] * MANY]}),
        (CompletionBody, {"model": "a", "prompt": [[-1]] * MANY}),
        (ChatBody, {"model": "a", "messages": [{}] * MANY}),
        (ChatBody, {"model": "a", "messages": [{"role": "user", "content": [1] * MANY}]}),
    ],
)
def test_the_first_wrong_item_ends_it(body, fields):
    with pytest.raises(ValidationError) as problem:
        body.model_validate(fields)
    assert problem.value.error_count() <= PER_BRANCH


def test_more_ids_than_any_context_holds_are_refused():
    assert len(GenerateBody.model_validate({"tokens": [1] * 1000}).tokens or ()) == 1000
    with pytest.raises(ValidationError, match="at most"):
        GenerateBody.model_validate({"tokens": [1] * (MOST_IDS + 1)})
