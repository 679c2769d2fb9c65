"""The playground at `/`: one page without external resources, and the inspection of an image at a budget."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from parcelray.serving.engine.engine import EngineRefusal
from parcelray.serving.http.api_errors import ApiError, from_refusal
from parcelray.serving.http.schemas import InspectRequest
from parcelray.serving.ingress.chat import ChatService
from parcelray.serving.ingress.clients import ReplicaLost

_FOLDER = Path(__file__).parent
_FILES = {
    "/": ("index.html", "text/html"),
    "/playground/page.css": ("page.css", "text/css"),
    "/playground/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    # The page accepts API keys, so it allows no external resources, framing or inline scripts.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_routes() -> list[Route]:
    """Returns the routes of the page and its files."""
    return [Route(path, _file(name, kind)) for path, (name, kind) in _FILES.items()]


async def inspect_request(body: bytes, service: ChatService) -> dict[str, Any]:
    """Returns the anchor grid and the query attention of one image at one budget.

    Raises:
        ApiError: the body is not valid, or the image cannot be read.
    """
    try:
        request = InspectRequest.model_validate_json(body)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or None
        message = (
            "The body must be {url: data:image/..., visual_tokens: NUMBER}; legal numbers are "
            + f"{', '.join(map(str, service.policy.offered))}."
        )
        raise ApiError(422, message, code="invalid_request", param=field) from None
    budget = service.policy.decide(request.visual_tokens)
    route = service.routes.champion
    with service.admission.slot():
        (image,) = await service.images.read(route.prompts, {"url": request.url}, service.limits.timeout_s)
        try:
            inspection = await route.client.inspect(image, budget)
        except ReplicaLost:
            raise ApiError(
                503, "The replica that handled this request was lost; send it again.", code="no_replica"
            ) from None
        except EngineRefusal as refusal:
            raise from_refusal(refusal, 1) from None
    return {
        "visual_tokens": budget,
        "anchor_grid": inspection.anchor_grid,
        "grid": inspection.grid,
        "cropped": route.prompts.crops,
        "attention": [round(value, 4) for value in inspection.attention],
    }


def _file(name: str, kind: str) -> Any:
    content = (_FOLDER / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
