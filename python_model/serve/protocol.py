"""The fields of requests and replies, as in the OpenAI and Cohere APIs.

An unsupported field that would change the result is an error that names it; null and values without effect (``"tools": []``,
``"frequency_penalty": 0``) are ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that some or all requests do not support, and the values of theirs that have no effect."""


def _unicode(text: str) -> str:
    """JSON can encode half of a surrogate pair, which is not a character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("expected Unicode text, got a lone surrogate") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Texts = Text | Ids | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
_TEXTS = "a text, a non-empty list of token ids, or a non-empty list of texts or of such lists"


def _document(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add to the schema what :class:`Request` accepts beyond the model's own fields."""
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        if name not in required:
            described = {key: field.pop(key) for key in ("default", "title", "description") if key in field}
            options = field.pop("anyOf", None) or [dict(field)]
            field.clear()
            field.update(described, anyOf=[*(o for o in options if o != {"type": "null"}), {"type": "null"}])
    for name, values in NEUTRAL.items():
        if name not in schema["properties"]:
            schema["properties"][name] = {
                "enum": [*values, None],
                "description": "Unsupported except for these values.",
            }


class Request(BaseModel):
    """Base class of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_document)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if not (value is None and (name in cls.model_fields or name in NEUTRAL))
            and not (name not in cls.model_fields and _is_neutral(name, value))
        }


def _is_neutral(name: str, value: Any) -> bool:
    # unlike in Python, True is not 1 and False is not 0
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )


class TextPart(Request):
    """A part of a message; images and audio are not supported."""

    type: Literal["text"]
    text: Text


class Message(Request):
    """A turn of a conversation. ``developer`` is an alias of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] = Field(description="a text, or a list of parts of type text")

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Request):
    """``include_usage``: send token counts in a final chunk."""

    include_usage: bool = False


class Sampled(Request):
    """Common fields of all requests that generate."""

    model: Text = ""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    n: int = Field(1, ge=1, le=16)
    stop: Annotated[Text, Field(min_length=1)] | list[Annotated[Text, Field(min_length=1)]] = Field(
        [], description="a text or a list of up to 4, none of them empty"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text = ""

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @model_validator(mode="after")
    def _few_stops(self) -> Sampled:
        if len(self.stops) > 4:
            raise ValueError(f"stop: expected at most 4 strings, got {len(self.stops)}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected only with stream=true")
        return self


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=2048, description="a list of 1 to 2048 messages")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: expected the same as max_completion_tokens, or none, got another")
        return self

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: expected only with logprobs=true")
        return self


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: Texts = Field(description=_TEXTS)
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


class EmbeddingRequest(Request):
    """``POST /v1/embeddings``.

    ``input_type`` (with the server's instruction for queries) or its own ``instruction`` say what the embedding is for.
    ``priority``: by default a request with one text is interactive, and longer lists are served when there is room.
    """

    model: Text = ""
    input: Texts = Field(description=_TEXTS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    input_type: Literal["query", "document", "search_query", "search_document"] | None = None
    instruction: Text | None = None
    priority: Literal["interactive", "bulk"] | None = None
    user: Text = ""

    @model_validator(mode="after")
    def _one_purpose(self) -> EmbeddingRequest:
        if self.instruction is not None and self.input_type is not None:
            raise ValueError("instruction: expected without input_type")
        return self


class RerankDocument(Request):
    """A document whose text is in a field."""

    text: Text


class RerankRequest(Request):
    """``POST /v1/rerank`` and ``/v2/rerank``."""

    model: Text = ""
    query: Text = Field(min_length=1, description="a text that is not empty")
    documents: list[Text | RerankDocument] = Field(
        min_length=1, description="a list of at least one text, or object with a text"
    )
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False
    max_tokens_per_doc: int = Field(512, ge=1)

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [d if isinstance(d, str) else d.text for d in self.documents]


class RagRequest(Request):
    """``POST /v1/rag``: search an index of the server and answer from the documents found."""

    model: Text = ""
    question: Text = Field(min_length=1, description="a text that is not empty")
    index: Text | None = None
    k: int = Field(3, ge=1, le=100)
    mode: Literal["auto", "none", "query_first", "document_first", "document_cache"] = "auto"
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False


class ErrorBody(BaseModel):
    """The error; ``param`` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The body of every error."""

    error: ErrorBody


class Usage(BaseModel):
    """Token counts. ``prompt_tokens_details.cached_tokens`` counts tokens whose states were reused."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: dict[str, int] = {}


class Choices(BaseModel):
    """Common fields of replies with choices."""

    id: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class ChatReply(Choices):
    """A conversation's next turn, ``n`` times."""

    object: Literal["chat.completion"] = "chat.completion"


class CompletionReply(Choices):
    """The continuation of each prompt."""

    object: Literal["text_completion"] = "text_completion"


class EmbeddingRow(BaseModel):
    """The vector of one text: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingReply(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingRow]
    model: str
    usage: Usage


class RerankReply(BaseModel):
    """Documents, best first; ``relevance_score``: the geometric mean of the probabilities of the query's tokens; ``truncated``:
    whether the document is longer than ``max_tokens_per_doc``. ``meta.warnings`` says how many are.
    """

    id: str
    model: str
    results: list[dict[str, Any]]
    usage: Usage
    meta: dict[str, Any]


class Source(BaseModel):
    """A document that an answer is based on."""

    index: int
    id: str
    title: str
    text: str
    score: float


class RagReply(BaseModel):
    """An answer and its sources."""

    id: str
    object: Literal["rag.answer"] = "rag.answer"
    created: int
    model: str
    answer: str
    mode: str
    sources: list[Source]
    finish_reason: str
    usage: Usage


class ModelCard(BaseModel):
    """The model served, and the names of its indexes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "grit_kernels"
    indexes: list[str] = []


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ApiError(Exception):
    """An error to send: HTTP status and the fields of the body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        return error_body(self.status, self.message, self.param, self.code)


_REQUESTS = (Message, ChatRequest, CompletionRequest, EmbeddingRequest, RerankRequest, RagRequest)
_ACCEPTED = {n: str(f.description) for kind in _REQUESTS for n, f in kind.model_fields.items() if f.description}
"""What a field may hold, in words, where its types alone do not say it."""
_KINDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_error(errors: list[Any]) -> ApiError:
    """The error for an invalid request: it names the field and what is expected, and never repeats its value."""
    first = _most_telling(errors)
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "body: expected valid JSON", code="invalid_json")
    if not place and first["type"] != "value_error":
        return ApiError(400, f"body: expected a JSON object, got {_kind(first)}")
    fields = [part for part in place if not _is_branch(part)]
    name = ".".join(fields)[:200].encode(errors="replace").decode()  # a field may have any name
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{name}: this field is not supported", param=name, code="unsupported_parameter")
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        if name:
            return ApiError(400, f"{name}: {message}", param=name, code="invalid_value")
        return ApiError(400, message, param=message.partition(":")[0], code="invalid_value")
    while fields[-1].isdecimal():  # what is accepted is said of the whole field
        fields.pop()
    if (accepted := _ACCEPTED.get(fields[-1])) is not None:
        name = ".".join(fields)
        whole = [error for error in errors if [str(p) for p in error["loc"] if not _is_branch(str(p))][1:] == fields]
        return ApiError(
            400, f"{name}: expected {accepted}, got {_kind((whole or [None])[0])}", param=name, code="invalid_value"
        )
    words = "expected a value, got none" if first["type"] == "missing" else str(first["msg"])
    words = re.sub("^Input should be (greater|less)", r"expected a number \1", words)
    return ApiError(400, f"{name}: {words.replace('Input should be', 'expected')}", param=name, code="invalid_value")


def _is_branch(part: str) -> bool:
    """Whether a part of an error's place is a type of a union, and no field."""
    return any(c in part for c in "[](),-") or part in ("str", "TextPart", "RerankDocument")


def _kind(error: Any) -> str:
    """What was given instead, in words: never the value itself."""
    if error is None:
        return "a list with other entries"
    if error["type"] == "missing" or error["input"] is None:
        return "none"
    value = error["input"]
    if isinstance(value, str | list | dict) and not value:
        return _KINDS[type(value)].replace("a ", "an empty ").replace("an object", "an empty object")
    if isinstance(value, list) and any(entry in ("", [], {}, None) for entry in value):
        return "a list with an empty entry"
    return "a list with other entries" if isinstance(value, list) else _KINDS.get(type(value), "something else")


def _most_telling(errors: list[Any]) -> Any:
    """Among a union's errors, that of the branch that got furthest."""
    return max(errors, key=lambda error: (error["type"] == "extra_forbidden", len(error["loc"])))
