"""The document that clients draw: what each forward does to its positions."""

from hildanext.decoding.trace import MASK
from hildanext.serve.canvas import Canvas


def step(start, masks=(), drafts=(), edits=(), kind="denoise", final=False):
    return {
        "forward": 1,
        "kind": kind,
        "block_start": start,
        "masks": list(masks),
        "drafts": [{"position": at, "token": token, "text": f"t{token} ", "probability": 0.5} for at, token in drafts],
        "edits": [
            {"position": at, "old": old, "new": new, "old_text": f"t{old} ", "new_text": f"t{new} ", "probability": 0.5}
            for at, old, new in edits
        ],
        "final": final,
    }


def states(canvas):
    return [canvas.glyphs[at].state for at in sorted(canvas.glyphs)]


def two_blocks():
    """Blocks of two tokens behind a prompt of one; the second block is not final."""
    canvas = Canvas(1, 2)
    canvas.apply(step(0, masks=[1], drafts=[(1, 5)], final=True))
    canvas.apply(step(2, masks=[2, 3], drafts=[(2, 6), (3, 7)], final=True))
    return canvas


def test_a_block_is_committed_when_its_last_forward_says_so():
    canvas = Canvas(1, 2)
    canvas.apply(step(0, masks=[1], drafts=[(1, 5)]))
    assert states(canvas) == ["draft"]
    canvas.apply(step(0, final=True))
    assert states(canvas) == ["committed"]


def test_a_token_edited_by_the_forward_that_ends_its_block_is_final_from_then_on():
    canvas = Canvas(0, 2)
    canvas.apply(step(0, masks=[0, 1], drafts=[(0, 5), (1, 6)]))
    canvas.apply(step(0, edits=[(0, 5, 8)], final=True))
    assert states(canvas) == ["edited", "committed"]
    canvas.apply(step(2, masks=[2, 3]))
    assert states(canvas) == ["committed", "committed", "mask", "mask"]


def test_what_is_revised_in_a_finished_block_stays_final():
    canvas = two_blocks()
    canvas.apply(step(0, edits=[(1, 5, 9)], kind="revise"))
    assert states(canvas) == ["edited", "committed", "committed"] and canvas.edits == 1
    canvas.apply(step(4, masks=[4, 5], drafts=[(4, 3)]))
    assert states(canvas) == ["committed", "committed", "committed", "draft", "mask"]


def test_a_revision_that_calls_itself_final_ends_no_block():
    canvas = two_blocks()
    canvas.apply(step(4, masks=[4, 5], drafts=[(4, 3)]))
    canvas.apply(step(4, edits=[(2, 6, 9)], kind="revise", final=True))
    assert states(canvas) == ["committed", "edited", "committed", "draft", "mask"]
    canvas.apply(step(4, masks=[5], drafts=[(5, 4)], final=True))
    assert states(canvas) == ["committed"] * 5


def test_blocks_of_unknown_size_are_committed_too():
    canvas = Canvas(1, None)
    canvas.apply(step(0, masks=[1], drafts=[(1, 5)], final=True))
    assert states(canvas) == ["committed"]


def test_characters_of_several_tokens_are_shown_whole_and_their_bytes_are_each_token_s_own():
    canvas, fox = Canvas(1, 8, {9}), "🦊".encode()
    record = step(0, masks=range(1, 6), drafts=[(at, at) for at in range(1, 6)])
    for cell, raw in zip(record["drafts"], [b" a", fox[:1], fox[1:3], fox[3:], fox[:2]], strict=True):
        cell["text"] = raw.decode("utf-8", "replace")
        cell |= {} if cell["text"].encode() == raw else {"bytes": list(raw)}
    canvas.apply(record)
    assert canvas.text() == " a🦊\ufffd"
    kept = canvas.kept(5, canvas.text())
    assert [glyph.text for glyph in kept] == [" a", "", "", "🦊", "\ufffd"]
    assert b"".join(glyph.raw for glyph in kept[:4]) == " a🦊".encode() and kept[4].raw == fox[:2]
    assert [(glyph.text, glyph.raw) for glyph in canvas.kept(5, " ")] == [(" ", b" "), *[("", b"")] * 4], "a stop cuts"
    assert [cell["text"] for cell in canvas.picture(record, 0)["tokens"]] == [" a", "", "", "🦊", "\ufffd"]


def test_the_end_of_text_is_a_token_and_no_text():
    canvas = Canvas(1, 4, {9})
    canvas.apply(step(0, masks=[1, 2, 3], drafts=[(1, 5), (2, 9)]))
    assert canvas.text() == f"t5 {MASK}"
    picture = canvas.picture(step(0), 0)
    assert [cell["text"] for cell in picture["tokens"]] == ["t5 ", "t9 ", MASK] and picture["text"] == f"t5 {MASK}"
    assert [(glyph.token, glyph.text) for glyph in canvas.kept(2, "t5 ")] == [(5, "t5 "), (9, "")]
