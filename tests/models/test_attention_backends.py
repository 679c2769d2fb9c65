"""Attention backends of the decoder: equal logits, and refusals of what a backend cannot compute."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from parcelray.config.adaptation import AttentionBackend
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build
from parcelray.models.vlm import use_attention

from .conftest import CONFIG, CORPUS, MINI_LLAVA

SOFTCAP = 2.0
"""So small that it changes the logits of a small model with random weights."""


def _model(family: str, softcap: float | None) -> ElasticVLM:
    if family == "llava":
        return build(MINI_LLAVA, CORPUS, None, 0)[0].eval()
    config = build_config(CONFIG, build_processor(CONFIG, CORPUS))
    config.text_config.attn_logit_softcapping = softcap
    return build_model(config, 0).eval()


def _logits(model: ElasticVLM) -> torch.Tensor:
    """Logits of two prompts with answers, of which one is padded."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, 268), model.config.image_token_id)
    ids[:, 256:] = torch.arange(5, 17)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, -4:] = 0
    types[:, -6:] = 1
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, pixel_values=pixels, use_cache=False).logits
    return logits[mask == 1]


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without its compiler, which takes a minute on a CPU."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention", lambda training: lambda: flex_attention
    )
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *arguments, _compile, **settings: create_block_mask(*arguments, **settings),
    )


CASES = [
    ("paligemma", SOFTCAP, "flex"),
    ("paligemma", None, "flex"),
    ("llava", None, "flex"),
    ("paligemma", None, "sdpa"),
    ("llava", None, "sdpa"),
]


def _compare(family: str, softcap: float | None, backend: AttentionBackend) -> None:
    model = _model(family, softcap)
    use_attention(model, "eager")
    expected = _logits(model)
    use_attention(model, backend)
    torch.testing.assert_close(_logits(model), expected, atol=1e-4, rtol=1e-4)
    if softcap is not None:
        model.config.text_config.attn_logit_softcapping = None
        for layer in model.model.language_model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(_logits(model), expected, atol=1e-3), "the bound of the logits matters"


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("family", "softcap", "backend"), CASES)
def test_backends_give_the_logits_of_eager_attention(family: str, softcap: float | None, backend: Any) -> None:
    _compare(family, softcap, backend)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_compiled_flex_attention_gives_the_logits_of_eager_attention(family: str) -> None:
    _compare(family, SOFTCAP if family == "paligemma" else None, "flex")


@pytest.mark.parametrize(
    ("softcap", "backend", "message"),
    [
        (SOFTCAP, "sdpa", "training.attention is sdpa, but .* caps its attention logits, .* use flex"),
        (None, "flash", "training.attention is flash, but .* attends to the whole prompt, .* use flex"),
    ],
)
def test_a_backend_that_cannot_compute_the_attention_is_refused(
    softcap: float | None, backend: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        use_attention(_model("paligemma", softcap), backend)
