"""The endpoint's description for tools, made from the models that validate requests."""

from collections.abc import Sequence
from typing import Any

from parcelray import __version__
from parcelray.serving.http.playground import InspectRequest
from parcelray.serving.http.schemas import ChatRequest

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
    """OpenAPI 3.1.

    Args:
        name: the model's.
        budgets: those that are offered.
        max_tokens: of the longest answer.
        playground: whether there is one, with what it asks beside answers.
    """
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.pop("$defs", {})
    schema["properties"]["model"]["enum"] = [name]
    offered: dict[str, Any] = {"enum": [*budgets, "auto"]}
    schema["properties"]["visual_tokens"] = {
        "anyOf": [offered, {"type": "null"}],
        "description": "Budget per image; wins over `detail`.",
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
    found = {
        "200": {"description": "Found", "content": {"application/json": {"schema": {"type": "object"}}}},
        **refusals,
    }
    chat = {
        "summary": "Answer a question about images",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answered, **refusals},
    }
    inspect = {
        "summary": "Where the anchors of an image are, and what its queries look at",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _inspect_schema(budgets)}}},
        "responses": found,
    }
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [name]}}
    text = {"200": {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}, **refusals}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"parcelray: {name}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": chat},
            "/v1/models": {"get": {"summary": "List the models", "responses": found}},
            "/v1/models/{model}": {
                "get": {"summary": "The model, its budgets and their costs", "parameters": [model], "responses": found}
            },
            "/health": {"get": {"summary": "Whether the endpoint runs", "responses": found}},
            "/ready": {"get": {"summary": "Whether the model answers", "responses": found}},
            "/version": {"get": {"summary": "What is served", "responses": found}},
            "/metrics": {"get": {"summary": "Metrics for Prometheus", "responses": text}},
            **({"/playground/inspect": {"post": inspect}} if playground else {}),
        },
        "components": {"schemas": components},
    }


def _inspect_schema(budgets: Sequence[int]) -> dict[str, Any]:
    schema = InspectRequest.model_json_schema()
    schema["properties"]["visual_tokens"] = {"enum": list(budgets)}
    return schema
