"""Request bodies of the endpoint, their validation, and the OpenAPI document that is generated from them.

Chat requests have the fields of OpenAI's API that this model supports, and the visual-token budget. Validation is
strict: an unknown field or a wrong type is refused, because the client expects the field to have an effect.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from parcelray import __version__
from parcelray.config.explain import problems, sentence
from parcelray.serving.http.api_errors import ApiError

_LONGEST_MESSAGE = 300
_SHOWN = 80
"""Longest part of a rejected value that an error message repeats, characters."""
Detail = Literal["low", "high", "auto"]
_LONGEST_STOP = 64
_MOST_STOPS = 4


def _neutral(value: Any, reason: str) -> Any:
    """Validates a field of OpenAI's API that is not supported here: only its neutral value is accepted."""

    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"legal is {str(value).lower()}: {reason}")
        return given

    return AfterValidator(check)


def _legal_stop(value: Any) -> Any:
    # Checked before the types, because pydantic reports an error for each member of a union.
    texts = value if isinstance(value, list) else [value]
    if value is not None and (
        len(texts) > _MOST_STOPS or not all(isinstance(text, str) and 1 <= len(text) <= _LONGEST_STOP for text in texts)
    ):
        raise ValueError(
            f"legal is a string, or a list of at most {_MOST_STOPS} strings, of 1 to {_LONGEST_STOP} characters each"
        )
    return value


_StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
_Penalty = Annotated[float, Field(json_schema_extra={"const": 0}), _neutral(0, "penalties are not applied")]
_Off = Annotated[bool, Field(json_schema_extra={"const": False})]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class TextPart(_Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """URL of an image, and its budget in words."""

    url: str = Field(min_length=1)
    """`data:image/png;base64,...`, or an https URL of a host that the server allows."""
    detail: Detail = "auto"
    """low: the smallest budget; high: the largest budget; auto: the server chooses."""


class ImagePart(_Strict):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class UserMessage(_Strict):
    """The question with its images."""

    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=256)]
    name: str | None = None


class SystemMessage(_Strict):
    """Instructions before the question."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: str | None = None


Message = Annotated[UserMessage | SystemMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Additional content of a stream."""

    include_usage: bool = False
    include_obfuscation: Annotated[_Off, _neutral(False, "streams are not padded")] = False


class ResponseFormat(_Strict):
    """Format of the answer. Only text is supported, because the output is not constrained to other formats."""

    type: Annotated[str, Field(json_schema_extra={"const": "text"}), _neutral("text", "answers are plain text")]


class ProcessorOptions(_Strict):
    """The budget in the field that vLLM's clients use for processor settings."""

    visual_tokens: int | Literal["auto"]


class ChatRequest(_Strict):
    """Body of `/v1/chat/completions`."""

    model: str = Field(min_length=1, max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=16)
    visual_tokens: int | Literal["auto"] | None = None
    """Visual tokens per image; overrides `detail`."""
    mm_processor_kwargs: ProcessorOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """Sampling temperature; null or unset: 0 (greedy decoding), as in evaluation."""
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        _StopText | Annotated[list[_StopText], Field(max_length=_MOST_STOPS)] | None, BeforeValidator(_legal_stop)
    ] = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    user: str | None = Field(default=None, max_length=256)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, float], Field(json_schema_extra={"maxProperties": 0}), _neutral({}, "tokens are not weighted")
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    store: Annotated[_Off, _neutral(False, "nothing is stored")] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if sum(message.role == "user" for message in self.messages) != 1 or self.messages[-1].role != "user":
            raise ValueError(
                "messages must be any number of system messages followed by one user message, because the model answers"
                " single questions"
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if len({part.image_url.detail for part in self.images}) > 1:
            raise ValueError("all images of a request have the same budget; give them the same detail")
        budgets = {
            value
            for value in (self.visual_tokens, self.mm_processor_kwargs and self.mm_processor_kwargs.visual_tokens)
            if value is not None
        }
        if len(budgets) > 1:
            raise ValueError("visual_tokens and mm_processor_kwargs.visual_tokens differ; give one of them")
        return self

    @property
    def images(self) -> list[ImagePart]:
        """Image parts in the order of the prompt."""
        return [
            part
            for message in self.messages
            if not isinstance(message.content, str)
            for part in message.content
            if isinstance(part, ImagePart)
        ]

    @property
    def image_urls(self) -> dict[str, str]:
        """Image URLs in the order of the prompt, by the path of their field."""
        return {
            f"messages.{message_index}.content.{part_index}.image_url.url": part.image_url.url
            for message_index, message in enumerate(self.messages)
            if not isinstance(message.content, str)
            for part_index, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        }

    @property
    def text(self) -> str:
        """All texts of the messages, one per line."""
        texts: list[str] = []
        for message in self.messages:
            parts = (
                [message.content]
                if isinstance(message.content, str)
                else [part.text for part in message.content if isinstance(part, TextPart)]
            )
            texts += [part for part in parts if part]
        return "\n".join(texts)

    @property
    def asked_budget(self) -> int | Detail:
        """The budget or detail of the request; `auto` if neither is set."""
        explicit = self.visual_tokens
        if explicit is None and self.mm_processor_kwargs is not None:
            explicit = self.mm_processor_kwargs.visual_tokens
        if explicit is not None:
            return explicit
        return self.images[0].image_url.detail if self.images else "auto"

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class InspectRequest(BaseModel):
    """Body of `/playground/inspect`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["image"] = "image"
    url: str = Field(min_length=1)
    visual_tokens: int = Field(ge=1)


def parse_chat(body: bytes, budgets: Sequence[int]) -> ChatRequest:
    """Parses and validates the body of a chat request.

    Args:
        body: JSON.
        budgets: offered budgets, for the error message about an invalid budget.

    Raises:
        ApiError: 400 if the body is not JSON, 422 if it is not a valid request.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {_short(str(error))}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(
            422, f"The body is {_kind(data)}, but must be an object with model and messages.", code="invalid_type"
        )
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _explained(error, budgets) from None


def _explained(error: ValidationError, budgets: Sequence[int]) -> ApiError:
    # The error at the deepest key belongs to the variant of a union that the client meant.
    problem = max(problems(ChatRequest, error), key=lambda each: each.path.count("."))
    problem = problem._replace(path=_short(problem.path), message=_short(problem.message, _LONGEST_MESSAGE))
    kind, path = problem.kind, problem.path
    if path.endswith("visual_tokens") and kind not in ("extra_forbidden", "missing", "model_type"):
        message = f"{path} is {_shown(problem.value)}; legal are {', '.join(map(str, budgets))} and auto."
        return ApiError(422, message, code="unsupported_budget", param=path)
    code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(kind, "invalid_value")
    return ApiError(422, f"{sentence(problem, _shown)}.", code=code if path else "invalid_request", param=path or None)


def _shown(value: Any) -> str:
    return (
        _short(repr(value[:_SHOWN] if isinstance(value, str) else value))
        if isinstance(value, str | int | float | None)
        else _kind(value)
    )


def _kind(value: Any) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }.get(type(value), "null")


def _short(text: str, longest: int = _SHOWN) -> str:
    clean = text.encode("ascii", "replace").decode()
    return clean if len(clean) <= longest else f"{clean[:longest]}..."


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_REFUSALS = ("400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "503")


def openapi(name: str, budgets: Sequence[int], max_tokens: int, *, playground: bool) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of the endpoint.

    Args:
        name: name of the model.
        budgets: offered budgets.
        max_tokens: largest legal `max_tokens`.
        playground: whether the playground and its path `/playground/inspect` are served.
    """
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.pop("$defs", {})
    schema["properties"]["model"]["enum"] = [name]
    offered: dict[str, Any] = {"enum": [*budgets, "auto"]}
    schema["properties"]["visual_tokens"] = {
        "anyOf": [offered, {"type": "null"}],
        "description": "Visual tokens per image; overrides `detail`.",
    }
    components["ProcessorOptions"]["properties"]["visual_tokens"] = offered
    for field in ("max_tokens", "max_completion_tokens"):
        schema["properties"][field]["anyOf"][0]["maximum"] = max_tokens
    refusals = {
        status: {"description": "Refused", "content": {"application/json": {"schema": _ERROR}}} for status in _REFUSALS
    }
    answered = {
        "description": "The answer",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    success = {
        "200": {"description": "Found", "content": {"application/json": {"schema": {"type": "object"}}}},
        **refusals,
    }
    chat = {
        "summary": "Answer a question about images",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answered, **refusals},
    }
    inspect = {
        "summary": "Anchor grid and query attention of an image",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inspect_schema(budgets)}}},
        "responses": success,
    }
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [name]}}
    text = {"200": {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"parcelray: {name}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": chat},
            "/v1/models": {"get": {"summary": "List the models", "responses": success}},
            "/v1/models/{model}": {
                "get": {
                    "summary": "The model, its budgets and their costs",
                    "parameters": [model],
                    "responses": success,
                }
            },
            "/health": {"get": {"summary": "Whether the endpoint is running", "responses": success}},
            "/ready": {"get": {"summary": "Whether the model answers", "responses": success}},
            "/version": {"get": {"summary": "Versions of the served models", "responses": success}},
            "/metrics": {"get": {"summary": "Metrics for Prometheus", "responses": text}},
            **({"/playground/inspect": {"post": inspect}} if playground else {}),
        },
        "components": {"schemas": components},
    }


def _inspect_schema(budgets: Sequence[int]) -> dict[str, Any]:
    schema = InspectRequest.model_json_schema()
    schema["properties"]["visual_tokens"] = {"enum": list(budgets)}
    return schema
