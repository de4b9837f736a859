"""A conversation as a model reads it: messages to the exact training string, its tokens, and which of them are learnt.

A training row is what inference feeds: the prompt is the chat template's own text up to the answer, tokenised alone as
`encode_chat` tokenises it; the answer follows, tokenised alone as well, and ends with the end of text. Turn boundaries
(role headers, line ends) are prompt. Blocks are counted from the conversation's first token.
"""

import hashlib
import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from hildanext.core.errors import ConfigError, DataError
from hildanext.core.json_text import check_prompt_text
from hildanext.data.control_tokens import Encoded, Marks, Unspeakable, encode_marked, find_marks
from hildanext.data.template_rendering import TemplateRefused, render_template
from hildanext.data.turns import ROLES
from hildanext.tokenization import begin_document

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""For base models, whose tokenizers have no template: `User:`, a line, the text, an empty line; `Assistant:` alike."""

TemplateChoice = Literal["auto", "own", "plain"]

logger = logging.getLogger(__name__)

_looked_at: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()
"""Of each tokenizer the template whose generation prompt was looked for."""


class BadExample(DataError):
    """A conversation that cannot be trained on. `kind` is the short name under which a report counts it."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind} ({detail})" if detail else kind, "mend the conversation or leave it out")
        self.kind, self.detail = kind, detail


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends with an answer which is learnt.

    `prompt` and `response` are the last user turn and the last answer, as trained; a causal graph's spans count their
    characters. `raw` is the answer as the data has it (GSM8K's with its calculator annotations).
    """

    prompt: str
    response: str
    graph: dict[str, Any] | None
    id: str
    messages: tuple[Message, ...]
    raw: str = ""
    unlearnt: frozenset[int] = frozenset()
    """Answers among the messages, by their number from 0, that are read and not learnt."""


@dataclass(frozen=True)
class Rendering:
    """One training row of a conversation, without padding.

    `offsets` are each token's characters in `text`; a beginning-of-text token that the text does not hold has (0, 0).
    `fields` maps "prompt" and "response" to their characters in `text`; empty where the row stops before the example's
    last answer.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    answers: tuple[tuple[int, int], ...]
    """Token ranges of the supervised answers, their ends of text included, in order and in blocks of their own."""
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def supervised(self) -> list[bool]:
        """For each token, whether it is learnt."""
        flags = [False] * len(self.ids)
        for begin, end in self.answers:
            flags[begin:end] = [True] * (end - begin)
        return flags


def make_example(
    messages: Sequence[Message],
    id: str | None = None,
    graph: Any = None,
    raw: str | None = None,
    unlearnt: Collection[int] = (),
) -> Example:
    """Check the turns and make an example of them; turns after the last learnt answer teach nothing and are dropped.
    `unlearnt` are numbers of answers, from 0, that are read and not learnt.

    Without an `id` the example is named by a hash of its turns, so that a duplicate has the same name. Raises
    `BadExample` for an unknown role, an empty turn, a conversation without an answer (that is learnt), or with one
    before any question.
    """
    for number, (role, content) in enumerate(messages, start=1):
        if role not in ROLES:
            raise BadExample("unknown role", f"{role[:40]!r} in turn {number}; known are {', '.join(ROLES)}")
        if not content.strip():
            raise BadExample("empty turn", f"turn {number}, the {role}'s")
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadExample("no assistant turn")
    learnt = [number for number in answers if number not in unlearnt]
    if not learnt:
        raise BadExample("no answer is learnt", f"each of {len(answers)} has weight 0")
    if graph is not None and learnt[-1] != answers[-1]:
        raise BadExample("causal_graph of an answer of weight 0")
    kept = tuple(messages[: learnt[-1] + 1])
    questions = [number for number, message in enumerate(kept) if message.role == "user"]
    if not questions or questions[0] > answers[0]:
        raise BadExample("an answer before any user turn")
    if graph is not None and not isinstance(graph, dict):
        raise BadExample("causal_graph is no object")
    response = kept[-1].content
    name = id if id is not None else hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    raw = response if raw is None else raw
    skipped = frozenset(number for number in answers if number < len(kept) and number in unlearnt)
    return Example(kept[questions[-1]].content, response, graph, name, kept, raw, skipped)


def set_template(tokenizer: Any, choice: TemplateChoice = "auto", options: Mapping[str, Any] | None = None) -> str:
    """Give the tokenizer the template it will be trained and saved with; returns which: "own" or "plain".

    `auto` keeps the tokenizer's own and gives a base model the plain one. `options` (such as Qwen3's
    `enable_thinking`) are written into the template, so that every later reader of the checkpoint renders alike.
    Raises `ConfigError` where `own` is asked of a tokenizer that has none, and where it has no end of text.
    """
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no end-of-text token", "answers could never end; give it an eos_token")
    own = tokenizer.chat_template
    if not isinstance(own, str) and own is not None:
        raise ConfigError("the tokenizer has several chat templates", "keep one of them, or choose template 'plain'")
    if choice == "own" and own is None:
        raise ConfigError("the tokenizer has no chat template", "choose template 'auto' or 'plain'")
    kind = "plain" if choice == "plain" or own is None else "own"
    text = own if own is not None and kind == "own" else PLAIN_TEMPLATE
    for name, value in sorted((options or {}).items()):
        if not name.isidentifier() or not isinstance(value, bool | int | float | str):
            raise ConfigError(f"template option {name!r} = {value!r}", "give a name and a text, number or true/false")
        earlier = r"\{%- set " + name + r' = (?:true|false|"[^"]*"|[-\d.e]+) %\}'
        text = "{%- set " + f"{name} = {json.dumps(value)}" + " %}" + re.sub(earlier, "", text)
    tokenizer.chat_template = text
    warn_without_header(tokenizer)
    return kind


def chat_text(tokenizer: Any, messages: Sequence[Message], answer: bool = True) -> str:
    """The template's text of a conversation; with `answer` it opens the assistant's next turn.

    Raises `BadExample` where the template refuses the conversation, `ConfigError` where there is no template,
    `ModelError` for one that takes too long or too much memory.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template is None:
        raise ConfigError("the tokenizer has no chat template", "fine-tune the model first, or give a plain prompt")
    turns = [{"role": role, "content": content} for role, content in messages]
    fields = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": answer}
    try:
        return render_template(template, {**tokenizer.special_tokens_map, **fields})
    except TemplateRefused as problem:
        raise BadExample("the chat template refuses it", str(problem)[:120]) from None


def opens_answers(tokenizer: Any) -> bool:
    """Whether the template writes the header of an answer to come (`add_generation_prompt`)."""
    question = [Message("user", "?")]
    try:
        return chat_text(tokenizer, question) != chat_text(tokenizer, question, answer=False)
    except BadExample:  # it wants another conversation than this one
        return True


def warn_without_header(tokenizer: Any) -> None:
    """Say once of a tokenizer that its template leaves the header of an answer to the model."""
    template = tokenizer.chat_template
    if template is None or _looked_at.get(tokenizer) == template:
        return
    _looked_at[tokenizer] = template
    if not opens_answers(tokenizer):
        logger.warning(
            "the chat template has no generation prompt: the model must write the header of its role itself, "
            "and its answers begin with it"
        )


def encode_chat(tokenizer: Any, messages: Sequence[Message], special_tokens_in_text: bool = False) -> list[int]:
    """The prompt that inference feeds: the conversation so far and the header of the answer to come.

    Control tokens that a message spells are encoded as text; with `special_tokens_in_text` they are parsed. Raises
    `BadExample` where they cannot be told from the template's own, and what `chat_text` raises.
    """
    warn_without_header(tokenizer)
    marks = None if special_tokens_in_text else find_marks(tokenizer, messages)
    return _encode(tokenizer, _marked_text(tokenizer, messages, marks), marks, opens=True)[0]


def _marked_text(tokenizer: Any, messages: Sequence[Message], marks: Marks | None, answer: bool = True) -> str:
    """`chat_text` with marks for the control tokens that messages spell."""
    text = chat_text(tokenizer, messages, answer)
    if marks is None:
        return text
    marked = chat_text(tokenizer, [Message(role, marks.put(role, content)) for role, content in messages], answer)
    if marks.lift(marked) != text:
        spelled = ", ".join(marks.letters)
        raise BadExample("a special token in a turn that the chat template alters", spelled)
    return marked


def render(
    tokenizer: Any, example: Example, block_size: int = 1, special_tokens_in_text: bool = False
) -> list[Rendering]:
    """The training rows of a conversation; each answer that is learnt is supervised in exactly one.

    An answer joins the row of an earlier one where the template and the tokens of the longer conversation begin with
    those of the shorter, and where the two have no block in common: the tail of a block would else show the next
    question, which inference never shows. Control tokens that a turn spells are text, unless
    `special_tokens_in_text` has them parsed. Raises `BadExample`.
    """
    marks = find_marks(tokenizer, example.messages)
    if special_tokens_in_text and marks is not None:
        _refuse_ends(tokenizer, marks)
        marks = None
    rows: list[Rendering] = []
    for turn, message in enumerate(example.messages):
        if message.role != "assistant" or turn in example.unlearnt:
            continue
        rendering = _answer(tokenizer, example, turn, marks)
        for number, row in enumerate(rows):
            if _goes_on(row, rendering, block_size):
                rows[number] = Rendering(
                    rendering.text, rendering.ids, rendering.offsets, row.answers + rendering.answers, rendering.fields
                )
                break
        else:
            rows.append(rendering)
    return rows


def _answer(tokenizer: Any, example: Example, turn: int, marks: Marks | None) -> Rendering:
    """The conversation up to one answer, and that answer."""
    messages = example.messages
    prompt = _marked_text(tokenizer, messages[:turn], marks)
    whole = _marked_text(tokenizer, messages[: turn + 1], marks, answer=False)
    if not whole.startswith(prompt):
        raise BadExample("the chat template changes the prompt once there is an answer", "template 'plain' does not")
    answer = whole[len(prompt) :]
    end = answer.find(tokenizer.eos_token)
    answer = answer.rstrip() + tokenizer.eos_token if end < 0 else answer[: end + len(tokenizer.eos_token)]
    ids, offsets = _encode(tokenizer, prompt, marks, opens=True)
    begin = len(ids)
    more, places = _encode(tokenizer, answer, marks)
    offsets += [(start + len(prompt), stop + len(prompt)) for start, stop in places]
    text = prompt + answer if marks is None else marks.lift(prompt + answer)
    fields: dict[str, tuple[int, int]] = {}
    if turn == len(messages) - 1:
        fields = _fields(text, len(prompt), example)
    return Rendering(text, ids + more, offsets, ((begin, begin + len(more)),), fields)


def _goes_on(row: Rendering, longer: Rendering, block_size: int) -> bool:
    """Whether the longer conversation's row can hold the answers of the shorter one's."""
    begin, end = longer.answers[0][0], row.answers[-1][1]
    apart = (end - 1) // block_size < begin // block_size
    return apart and longer.ids[:end] == row.ids


def _encode(tokenizer: Any, text: str, marks: Marks | None, opens: bool = False) -> Encoded:
    """Tokens and their characters; a text that opens a document gets the beginning-of-text token."""
    if not tokenizer.is_fast:
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer", "give one that has a tokenizer.json")
    check_prompt_text(text)
    if marks is None:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        plain, offsets = list(encoding["input_ids"]), [(int(a), int(b)) for a, b in encoding["offset_mapping"]]
    else:
        try:
            plain, offsets = encode_marked(tokenizer, text, marks)
        except Unspeakable as problem:
            raise BadExample("a special token in a turn", problem.message) from None
    ids = begin_document(tokenizer, plain) if opens else plain
    return ids, [(0, 0)] * (len(ids) - len(plain)) + offsets


def _fields(text: str, prompt_end: int, example: Example) -> dict[str, tuple[int, int]]:
    """Where the last question and the last answer stand. Templates may strip a turn's edges: then the range reaches
    over them, so that a character's index in the field is still its distance from the range's start."""
    places = {
        "prompt": _place(text[:prompt_end], example.prompt, last=True),
        "response": _place(text[prompt_end:], example.response, last=False),
    }
    fields = {name: place for name, place in places.items() if place is not None}
    if "response" in fields:
        fields["response"] = (fields["response"][0] + prompt_end, fields["response"][1] + prompt_end)
    return fields


def _place(text: str, content: str, last: bool) -> tuple[int, int] | None:
    for known in (content, content.strip()):
        at = text.rfind(known) if last else text.find(known)
        if at >= 0:
            start = at - content.index(known)
            return start, start + len(content)
    return None


def _refuse_ends(tokenizer: Any, marks: Marks) -> None:
    """A turn whose tokens are parsed must not end itself, or hold a mask."""
    for name in (tokenizer.eos_token, tokenizer.mask_token):
        if name is not None and str(name) in marks.letters:
            raise BadExample("a special token in a turn", str(name))
