"""The text of a reply as it grows is that of all its tokens, with every kind of decoder, and costs the same with every token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from python_model.generate.text import TextStream

WRITTEN = (
    "A  river, caf\u00e9 \u6771\u4eac\u6771\u4eac and \U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f600!\n\n"
    "    return x . It 's  e\u0301\u05e9\u05dc\u05d5\u05dd\ufffd \ufffd end"
)
WORDS = [
    "a",
    "e",
    "n",
    "d",
    "r",
    "t",
    "s",
    "\n",
    ",",
    ".",
    "!",
    "'",
    "\u6771",
    "\u2581",
    "\u2581\u2581",
    "\u2581a",
    "\u2581and",
]


def fast(core: Tokenizer, **settings: Any) -> Any:
    core.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **settings)


def byte_fallback(decoder: Any, **settings: Any) -> Any:
    """Words, and three or four bytes for what is not among them, as in Llama 2."""
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), *((word, -2.0) for word in WORDS)]
    core = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoder
    return fast(core, **settings)


def llama(**settings: Any) -> Any:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return byte_fallback(decoders.Sequence(steps), **settings)


def metaspace() -> Any:
    return byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def word_pieces() -> Any:
    parts = [*(f"##{word}" for word in WORDS), *WORDS]
    core = Tokenizer(models.WordPiece({part: n for n, part in enumerate(["[UNK]", *parts])}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return fast(core)


TOKENIZERS = {
    "Llama": llama,
    "Metaspace": metaspace,
    "WordPiece": word_pieces,
    "blanks are removed": lambda: llama(clean_up_tokenization_spaces=True),
}


@pytest.fixture(params=["byte level", *TOKENIZERS])
def reader(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return TOKENIZERS[request.param]() if request.param in TOKENIZERS else tokenizer


def whole(reader: Any, tokens: list[int]) -> str:
    return str(reader.decode(tokens, skip_special_tokens=True))


def test_after_each_token_the_text_is_that_of_all(reader: Any) -> None:
    written = reader(WRITTEN, add_special_tokens=False)["input_ids"]
    end = reader.eos_token_id
    alone = [token for token in range(len(reader)) if "\ufffd" not in whole(reader, [token])]
    drawn = random.Random(0).choices(alone, k=80)
    for tokens in (written, [end, *written[:20], end, end, *written[20:], end], drawn):
        stream = TextStream(reader)
        for count, token in enumerate(tokens, 1):
            assert not stream.push(token)
            text = whole(reader, tokens[:count])
            settled = text.rstrip("\ufffd")
            assert stream.text.rstrip("\ufffd") == settled or count < len(tokens) and text.endswith("\ufffd")
        assert stream.finish() == whole(reader, tokens)


def test_a_stop_string_ends_the_text_wherever_its_tokens_begin(reader: Any) -> None:
    tokens = reader(WRITTEN, add_special_tokens=False)["input_ids"]
    text = whole(reader, tokens)
    stops = {text[first : first + size] for size in (1, 2, 3, 7, 20) for first in range(0, len(text) - size, 3)}
    for stop in (stop for stop in sorted(stops) if stop.isascii()):
        needed = next(count for count in range(1, len(tokens) + 1) if stop in whole(reader, tokens[:count]))
        pieces: list[str] = []
        stream = TextStream(reader, [stop, "never"], pieces.append)
        assert not any(stream.push(token) for token in tokens[: needed - 1]), stop
        assert stream.push(tokens[needed - 1]), stop
        before = whole(reader, tokens[:needed])
        assert stream.finish() == before[: before.index(stop)], stop
        if not reader.clean_up_tokenization_spaces:  # a blank that was shown cannot be removed
            assert "".join(pieces) == stream.text, stop


@pytest.mark.parametrize("kind", ["byte level", "Llama"])
def test_bytes_that_are_no_text_are_shown_once_it_is_certain(kind: str, tokenizer: Any) -> None:
    reader = tokenizer if kind == "byte level" else llama()
    (letter,) = reader("a", add_special_tokens=False)["input_ids"]
    river = reader("\u6771\U0001f600", add_special_tokens=False)["input_ids"]
    lost = river[-1]  # goes on with a character that never began
    pieces: list[str] = []
    stream = TextStream(reader, on_text=pieces.append)
    for token in (letter, lost):
        stream.push(token)
    assert pieces == ["a"]
    stream.push(letter)
    assert pieces == ["a", "\ufffda"]
    stream.push(river[-2])
    assert stream.finish() == "".join(pieces) == "a\ufffda\ufffd"


def test_a_long_reply_decodes_few_tokens_for_each(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader.clean_up_tokenization_spaces:
        pytest.skip("what is removed depends on all tokens")
    tokens = reader(WRITTEN, add_special_tokens=False)["input_ids"] * 10
    counts, decode = [], type(reader).decode

    def counted(self: Any, ids: list[int], **options: Any) -> Any:
        counts.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(reader), "decode", counted)
    stream = TextStream(reader, ["never"])
    for token in tokens:
        stream.push(token)
    assert stream.text and sum(counts) < 40 * len(tokens)
