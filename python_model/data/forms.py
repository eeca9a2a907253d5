"""Rows of this project and of other tools, recognised by their columns.

    GRIT                    {"query": TEXT, "pos": [TEXT, ..], "neg": [TEXT, ..]}     TEXT = "text" or ["instruction", "text"]
                            {"text": ["user", "assistant", ..]} or {"text": "a text without roles"}
    FlagEmbedding           query, pos, neg with prompt (the query's instruction), type, pos_scores, neg_scores
    sentence-transformers   anchor, positive, negative or negative_1, ..; sentence1, sentence2, score
    tevatron                query, positive_passages, negative_passages: [{"title", "text"}, ..]
    chat                    messages: [{"role", "content"}, ..]; ShareGPT conversations: [{"from", "value"}, ..];
                            Alpaca instruction, input, output; prompt, completion

A conversation may have ``documents``, a list of texts whose cached states it follows. ``neg`` may be missing or null. ``key``
names the entity a row is about, ``dataset`` its data set. An unknown column is ignored and reported once per file
(:class:`Reader` collects ``notes``); one that looks like a misspelt column is an error, because training would otherwise run
without it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from python_model.data.rows import (
    DataError,
    EmbeddingRow,
    GenerativeRow,
    InstructedText,
    PlainText,
    Row,
    check_text,
    json_type,
    titled_text,
)

Columns = Mapping[str, Any]

COMMON = ("key", "dataset")
NAMES_OF_ROWS = (
    "id",
    "_id",
    "idx",
    "qid",
    "query_id",
    "docid",
    "source",
    "url",
    "metadata",
    "meta",
    "pos_id",
    "neg_id",
    "answers",
)
"""Columns that identify a row or its origin, without effect."""
INSTRUCTIONS = ("prompt", "instruction")
TYPES = {
    "normal": "",
    "symmetric_sts": "FlagEmbedding halves its batch only",
    "symmetric_clustering": "FlagEmbedding halves its batch only",
    "symmetric_class": "FlagEmbedding takes fewer negatives where a row has fewer; here they are repeated",
    "only_1neg": "FlagEmbedding takes one negative; here as many as train_group_size says",
}
SYSTEM = ("system", "system_prompt")
WANTED = ("label", "kto_tag")
"""Columns that say whether a reply is wanted."""
FORMS: dict[str, tuple[str, ...]] = {
    "grit": ("query", "pos", "neg", "pos_scores", "neg_scores", "type", *INSTRUCTIONS),
    "sentence-transformers": ("anchor", "query", "positive", "negative", *INSTRUCTIONS),
    "sentence-transformers pairs": ("sentence1", "sentence2", "score", "label", "similarity_score"),
    "tevatron": ("query", "query_text", "positive_passages", "negative_passages"),
    "text": ("text", "documents"),
    "messages": ("messages", *SYSTEM, "prompt", *WANTED, "documents"),
    "ShareGPT": ("conversations", *SYSTEM, *WANTED, "documents"),
    "Alpaca": ("instruction", "input", "output", *SYSTEM, "history", "text", *WANTED, "documents"),
    "prompt and completion": ("prompt", "completion", "response", *SYSTEM, *WANTED, "documents"),
}
REQUIRED: dict[str, tuple[str, ...]] = {  # in the order they are tried
    "tevatron": ("positive_passages",),
    "sentence-transformers": ("positive",),
    "sentence-transformers pairs": ("sentence1", "sentence2"),
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "grit": ("query",),
    "text": ("text",),
    "prompt and completion": ("prompt",),
}
SAME = (
    ("anchor", "query"),
    ("query", "query_text"),
    ("completion", "response"),
    ("score", "label", "similarity_score"),
    SYSTEM,
    WANTED,
)
"""Names of one column, of which a row has one."""
CHATS = ("text", "messages", "ShareGPT", "Alpaca", "prompt and completion")
EMBEDDING_COLUMNS = {name for form, names in FORMS.items() if form not in CHATS for name in names}
TRAINED = ("weight", "loss", "train")
"""Entries of a message or a row by which other tools say whether it is trained on."""
READ_BY_OTHERS = {"instruction", "instruct", "prompt", "score", "scores", "label", "labels", "weight"}
"""Words in the names of columns by which other tools instruct, score or weight the texts of a row to embed."""
OF_PASSAGES = ("pos", "neg", "positive", "negative")
"""Beginnings of the names of columns with passages."""
OF_MESSAGES = {"role", "from", "content", "value", "tool_calls", "name", "id", *TRAINED}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}


class Reader:
    """Turns the objects in a file into rows.

    Args:
        dataset: data set name for rows without one.
        positive_score: lowest score (or label) of a sentence pair that counts as a positive; without it a scored pair is refused.
        instructed: a flat list of two strings in ``pos`` or ``neg`` is ``[instruction, text]``; see :meth:`decide`.

    Attributes:
        notes: remarks about the file for the user, each once.
        forms: number of rows by the format they were read as.
    """

    def __init__(self, dataset: str, *, positive_score: float | None = None, instructed: bool = False) -> None:
        self.dataset, self.positive_score = dataset, positive_score
        self.instructed = instructed
        self.notes: dict[str, None] = {}
        self.forms: dict[str, int] = {}

    def decide(self, rows: Iterable[Columns]) -> None:
        """Decide from a file's first rows what ``"pos": ["a", "b"]`` means: two passages, unless every such list has two strings
        and the first is always the same (an instruction, or ``""`` for none)."""
        firsts: list[str] = []
        for row in rows:
            for name in ("pos", "neg"):
                value = row.get(name)
                if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
                    if len(value) != 2:
                        return
                    firsts.append(value[0])
        if not firsts:
            return
        self.instructed = len(set(firsts)) == 1 and (len(firsts) > 1 or not firsts[0].strip())
        if self.instructed:
            note = f"pos, neg: every list is [{firsts[0]!r}, text]: read as one passage with that instruction"
        else:
            note = "pos, neg: every list holds two strings: read as two passages; write an instruction as [[instruction, text]]"
        self.notes[note] = None

    def row(self, columns: Columns, origin: str) -> Row:
        """The checked row.

        Raises:
            DataError: an unknown format, a missing or misspelt column, a wrong type, an empty text.
        """
        form = _form(columns, origin)
        if form is None:
            raise DataError(f"{origin}: expected {_expected()}, got the columns {sorted(columns)}{_meant(columns)}")
        self._check_columns(columns, form, origin)
        key = columns.get("key")
        key = None if key is None else check_text(key, "key", origin)
        named = columns.get("dataset")
        dataset = self.dataset if named is None else check_text(named, "dataset", origin)
        found: Any = self._turns(columns, form, origin) if form in CHATS else self._embedding(columns, form, origin)
        self.forms[form] = self.forms.get(form, 0) + 1
        if form in CHATS:
            documents = _documents(columns.get("documents"), origin)
            if documents and len(found) == 1:
                raise DataError(
                    f"{origin}: documents: expected a conversation that follows them, got a text without roles"
                )
            return GenerativeRow(found, key, dataset, origin, documents)
        query, pos, neg, pos_scores, neg_scores = found
        return EmbeddingRow(query, pos, neg, key, dataset, pos_scores, neg_scores, origin)

    def _check_columns(self, columns: Columns, form: str, origin: str) -> None:
        known = (*FORMS[form], *COMMON)
        for name in columns:
            if name in known or (form == "sentence-transformers" and _is_negative(name)):
                continue
            absent = [other for other in known if columns.get(other) is None]
            if close := difflib.get_close_matches(name, absent, 1, 0.74):
                raise DataError(f"{origin}: unknown column {name!r}: did you mean {close[0]!r}?", "misspelt")
            if columns[name] is not None and _is_meant_for_others(name, columns[name], form):
                raise DataError(f"{origin}: column {name!r} has no meaning in this row's format {form!r}")
            if form in CHATS and name in TRAINED and columns[name] not in (None, 1):
                raise DataError(
                    f"{origin}: {name}: a row that is weighted or not trained on is not supported", "weights"
                )
            if form not in CHATS and name == "no_in_batch_neg" and columns[name]:
                raise DataError(
                    f"{origin}: no_in_batch_neg: expected it in the name of the file, as in FlagEmbedding, since it holds for a "
                    "whole batch; got it as a column"
                )
            if name not in NAMES_OF_ROWS:
                self.notes[f"column {name!r} is ignored"] = None
        for names in SAME:
            given = [name for name in names if name in FORMS[form] and columns.get(name) is not None]
            if len(given) > 1:
                raise DataError(f"{origin}: expected one of the columns {', '.join(names)}, got {' and '.join(given)}")

    def _embedding(self, columns: Columns, form: str, origin: str) -> tuple[Any, ...]:
        scores: dict[str, tuple[float, ...]] = {"pos_scores": (), "neg_scores": ()}
        if form == "grit":
            query, pos, neg = columns["query"], columns.get("pos"), columns.get("neg")
            if "pos" not in columns:
                raise DataError(
                    f"{origin}: the column 'pos' is missing, the row has {sorted(columns)}{_meant(columns)}"
                )
            texts = [self._texts(pos, "pos", origin), () if neg is None else self._texts(neg, "neg", origin)]
            kind = columns.get("type")
            if kind is not None and kind not in TYPES:
                raise DataError(f"{origin}: type: expected one of {', '.join(map(repr, TYPES))}, got {kind!r}")
            if kind and TYPES[kind]:
                self.notes[f"type {kind!r}: {TYPES[kind]}"] = None
            scores = {
                name: _scores(columns[name], len(many), name, origin) if columns.get(name) is not None else ()
                for name, many in zip(scores, texts, strict=True)
            }
            if bool(scores["pos_scores"]) != bool(scores["neg_scores"]) and texts[1]:
                raise DataError(f"{origin}: pos_scores, neg_scores: expected both or none, got one of them")
        elif form == "tevatron":
            query = columns["query"] if "query" in columns else columns.get("query_text")
            texts = [
                _titled(columns.get(f"{n}_passages") or [], f"{n}_passages", origin) for n in ("positive", "negative")
            ]
        elif form == "sentence-transformers":
            query = columns["anchor"] if "anchor" in columns else columns.get("query")
            numbered = sorted((n for n in columns if _is_negative(n)), key=lambda n: (len(n), n))
            positive, negatives = columns["positive"], [columns[n] for n in numbered if columns[n] is not None]
            if len(negatives) == 1 and isinstance(negatives[0], list):  # n-tuples with lists
                negatives = negatives[0]
            texts = [
                self._texts(positive if isinstance(positive, list) else [positive], "positive", origin),
                self._texts(negatives, "negative", origin),
            ]
        else:
            query = columns["sentence1"]
            score = next(
                (columns[n] for n in ("score", "label", "similarity_score") if columns.get(n) is not None), None
            )
            if score is not None:
                self._check_positive(score, origin)
            texts = [(PlainText("", check_text(columns["sentence2"], "sentence2", origin)),), ()]
        if not texts[0]:
            raise DataError(f"{origin}: pos: expected at least one passage, got an empty list")
        return self._query(query, columns, form, origin), *texts, scores["pos_scores"], scores["neg_scores"]

    def _query(self, value: Any, columns: Columns, form: str, origin: str) -> InstructedText:
        query = self._instructed(value, "query", origin)
        named = [name for name in INSTRUCTIONS if name in FORMS[form] and columns.get(name) is not None]
        if not named:
            return query
        if len(named) > 1 or not isinstance(query, PlainText):
            raise DataError(f"{origin}: query: expected one instruction, got it in {named} and the query's list")
        return InstructedText(check_text(columns[named[0]], named[0], origin, may_be_empty=True), query.text)

    def _check_positive(self, score: Any, origin: str) -> None:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f"{origin}: score: expected a number, got {json_type(score)}")
        if self.positive_score is None:
            raise DataError(
                f"{origin}: sentence pairs with a score: which are positives? "
                "Convert the file with grit convert FILE ROWS --positive-score NUMBER",
                "scored pairs",
            )
        if score < self.positive_score:
            raise DataError(f"{origin}: score {score} is below {self.positive_score}: not a positive", "no positive")

    def _texts(self, value: Any, name: str, origin: str) -> tuple[InstructedText, ...]:
        if isinstance(value, str) and name == "positive":
            value = [value]
        if not isinstance(value, list):
            raise DataError(f"{origin}: {name}: expected a list of passages, got {json_type(value)}")
        if self.instructed and len(value) == 2 and all(isinstance(item, str) for item in value):
            value = [value]
        return tuple(self._instructed(item, f"{name}[{index}]", origin) for index, item in enumerate(value))

    def _instructed(self, value: Any, name: str, origin: str) -> InstructedText:
        if not isinstance(value, list):
            return PlainText("", check_text(value, name, origin))
        if len(value) != 2:
            raise DataError(f"{origin}: {name}: expected a text or [instruction, text], got a list of {len(value)}")
        instruction = check_text(value[0], f"{name}[0]", origin, may_be_empty=True)
        return InstructedText(instruction, check_text(value[1], f"{name}[1]", origin))

    def _turns(self, columns: Columns, form: str, origin: str) -> tuple[str, ...]:
        for name in WANTED:
            if name in FORMS[form] and (wanted := columns.get(name)) is not None and wanted is not True:
                if wanted is not False:
                    raise DataError(f"{origin}: {name}: expected true or false, got {json_type(wanted)}")
                raise DataError(f"{origin}: {name}: false: a reply that is not wanted", "unwanted replies")
        if form == "text":
            if isinstance(columns["text"], str):
                return (check_text(columns["text"], "text", origin),)
            turns = columns["text"]
            if not isinstance(turns, list):
                raise DataError(
                    f"{origin}: text: expected a text or a list [user, assistant, ...], got {json_type(turns)}"
                )
            messages = [("assistant" if index % 2 else "user", turn) for index, turn in enumerate(turns)]
        elif form == "Alpaca":
            texts = [check_text(columns[name], name, origin, may_be_empty=True) for name in ("instruction", "output")]
            extra = check_text(columns.get("input") or "", "input", origin, may_be_empty=True)
            messages = [pair for old in columns.get("history") or [] for pair in _exchange(old, origin)]
            messages += [("user", "\n\n".join(filter(str.strip, (texts[0], extra)))), ("assistant", texts[1])]
        elif form == "prompt and completion":
            reply = "completion" if "completion" in columns else "response"
            if reply not in columns:
                raise DataError(f"{origin}: expected {_expected()}, got the columns {sorted(columns)}{_meant(columns)}")
            parts = [columns["prompt"], columns[reply]]
            if any(isinstance(part, list) for part in parts):
                messages = self._messages(
                    [*parts[0], *parts[1]] if all(isinstance(p, list) for p in parts) else None, reply, origin
                )
            else:
                messages = [("user", parts[0]), ("assistant", parts[1])]
        else:
            column = "messages" if form == "messages" else "conversations"
            messages = self._messages(columns[column], column, origin)
            # some data sets repeat the first message there
            if (prompt := columns.get("prompt")) is not None and prompt not in (text for _, text in messages):
                self.notes["column 'prompt' is ignored"] = None
        if (system := columns.get("system") or columns.get("system_prompt")) and form != "text":
            messages.insert(0, ("system", system))
        return _alternating(messages, form, origin)

    def _messages(self, value: Any, name: str, origin: str) -> list[tuple[str, Any]]:
        if not isinstance(value, list):
            raise DataError(f"{origin}: {name}: expected a list of messages, got {json_type(value)}")
        found: list[tuple[str, Any]] = []
        for index, message in enumerate(value):
            place = f"{name}[{index}]"
            if not isinstance(message, dict):
                raise DataError(f"{origin}: {place}: expected an object, got {json_type(message)}")
            for key in message.keys() - OF_MESSAGES:
                if message[key]:
                    self.notes[f"{name}: {key!r} of a message is ignored"] = None
            role = message.get("role", message.get("from"))
            reply = ROLES.get(str(role), role) == "assistant"
            if reply and any(message.get(key) is not None and message[key] != 1 for key in TRAINED):
                raise DataError(
                    f"{origin}: {place}: a message that is weighted or not trained on is not supported", "weights"
                )
            content = message["content"] if "content" in message else message.get("value")
            if isinstance(content, list):  # parts: {"type": "text", "text": ..}
                if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                    raise DataError(f"{origin}: {place}: expected parts of type 'text', got others", "not only text")
                content = "".join(check_text(part.get("text"), place, origin, may_be_empty=True) for part in content)
            if message.get("tool_calls") or role in ("tool", "function", "observation", "function_call"):
                raise DataError(f"{origin}: {place}: tool calls are not supported", "tool calls")
            found.append((ROLES.get(str(role), str(role)), content))
        return found


def _form(columns: Columns, origin: str) -> str | None:
    if "query" in columns and "text" in columns:
        raise DataError(f"{origin}: expected either 'query', 'pos', 'neg' or 'text', got both 'query' and 'text'")
    return next((form for form, names in REQUIRED.items() if all(name in columns for name in names)), None)


def _expected() -> str:
    return "'query', 'pos', 'neg', or 'text', or the columns of a supported tool (docs/training.md)"


def _meant(columns: Columns) -> str:
    known = {name for names in FORMS.values() for name in names}
    for name in columns:
        if name not in known and (close := difflib.get_close_matches(name, known, 1, 0.6)):
            return f"; did you mean {close[0]!r} by {name!r}?"
    return ""


def _is_meant_for_others(name: str, value: Any, form: str) -> bool:
    """Whether other tools make something of a column that a row of this form does not have."""
    words = name.lower().split("_")
    if form in CHATS:
        return name in OF_PASSAGES or (words[0] in OF_PASSAGES and isinstance(value, list | dict))
    return (
        name in EMBEDDING_COLUMNS or _is_negative(name) or (words[-1] != "id" and not READ_BY_OTHERS.isdisjoint(words))
    )


def _is_negative(name: str) -> bool:
    return name in ("negative", "negatives") or (name.startswith("negative_") and name[9:].isdigit())


def _scores(value: Any, count: int, name: str, origin: str) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )
    if not numbers or len(value) != count:
        got = f"{len(value)} values" if isinstance(value, list) else json_type(value)
        raise DataError(f"{origin}: {name}: expected {count} finite numbers, one per passage, got {got}")
    return tuple(map(float, value))


def _titled(value: Any, name: str, origin: str) -> tuple[InstructedText, ...]:
    """Tevatron's passages: the title, if there is one, precedes the text."""
    if not isinstance(value, list):
        raise DataError(f"{origin}: {name}: expected a list of passages, got {json_type(value)}")
    found = []
    for index, item in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(item, dict) or "text" not in item:
            raise DataError(f"{origin}: {place}: expected an object with 'text', got {json_type(item)}")
        found.append(PlainText("", titled_text(item, origin, f"{place}.")))
    return tuple(found)


def _documents(value: Any, origin: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{origin}: documents: expected a list of texts, got {json_type(value)}")
    return tuple(check_text(text, f"documents[{place}]", origin) for place, text in enumerate(value))


def _exchange(old: Any, origin: str) -> list[tuple[str, Any]]:
    if not isinstance(old, list) or len(old) != 2:
        raise DataError(f"{origin}: history: expected pairs [user, assistant], got {json_type(old)}")
    return [("user", old[0]), ("assistant", old[1])]


def _alternating(messages: list[tuple[str, Any]], form: str, origin: str) -> tuple[str, ...]:
    """The turns user, assistant, ...; a system message is prepended to the first user turn."""
    name = "text" if form == "text" else form
    system = ""
    if messages and messages[0][0] in ("system", "developer"):
        system = check_text(messages[0][1] or "", f"{name}: system", origin, may_be_empty=True).strip()
        messages = messages[1:]
    if len(messages) < 2 or len(messages) % 2:
        raise DataError(f"{origin}: {name}: expected an even number [user, assistant, ...], got {len(messages)} turns")
    turns = []
    for index, (role, content) in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise DataError(f"{origin}: {name}[{index}]: expected a turn of the {expected}, got one of {role!r}")
        turns.append(check_text(content, f"{name}[{index}]", origin))
    if system:
        turns[0] = f"{system}\n\n{turns[0]}"
    return tuple(turns)
