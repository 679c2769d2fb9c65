"""Explanations of pydantic errors: the key path that the user wrote, the legal keys or values, and a suggestion."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from parcelray.config import explain
from parcelray.config.explain import problems, sentence


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Text(Closed):
    type: Literal["text"]
    text: str


class Picture(Closed):
    type: Literal["picture"]
    picture: Text


class Body(Closed):
    parts: list[Annotated[Text | Picture, Field(discriminator="type")]]
    weights: dict[str, float] | None = None
    size: Literal["small", "large"] = "small"
    content: str | Annotated[list[Text], Field(min_length=1)] = ""


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # The tag of a variant has the same name as one of its keys.
        ({"parts": [{"type": "text", "text": 1}]}, "parts.0.text is 1: input should be a valid string"),
        ({"parts": [{"type": "text"}]}, "parts.0.text is missing; add it"),
        (
            {"parts": [{"type": "picture", "picture": {"type": "text", "text": "a", "txt": 1}}]},
            "parts.0.picture.txt is not a known key; legal here: text, type (did you mean text?)",
        ),
        ({"parts": [{"text": "a"}]}, "parts.0.type is missing; add it: one of picture, text"),
        ({"parts": [{"type": "txt"}]}, "parts.0.type is 'txt'; legal: text, picture (did you mean text?)"),
        (
            {"parts": [], "weights": {"a.b": "x"}},
            "weights.a.b is 'x': input should be a valid number, unable to parse string as a number",
        ),
        ({"parts": [], "size": "big"}, "size is 'big'; legal: small, large"),
        (
            {"parts": [], "content": []},
            "content is []: list should have at least 1 item after validation, not 0",
        ),
        ({"parts": [], "content": 5}, "content is 5: input should be a valid string or list"),
        ({"parts": [3]}, "parts.0 is 3: must be a mapping of keys to values"),
    ],
)
def test_an_error_is_explained_with_the_keys_of_the_input(data: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(data)
    assert [sentence(problem) for problem in problems(Body, caught.value)] == [expected]


def test_long_keys_get_no_suggestion() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"parts": [], "parts" * 100: 1})
    (problem,) = problems(Body, caught.value)
    assert "did you mean" not in sentence(problem)


def test_the_number_of_explained_errors_is_limited() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"parts": []} | {f"key{index}": 1 for index in range(200_000)})
    assert 0 < len(problems(Body, caught.value)) <= 100


def test_a_renamed_key_is_explained_with_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "RENAMED_KEYS", {"scale": "size"})
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"parts": [], "scale": "small"})
    assert [sentence(problem) for problem in problems(Body, caught.value)] == [
        "scale is now called size; rename the key"
    ]
