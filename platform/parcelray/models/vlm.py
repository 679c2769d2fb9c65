"""The elastic vision-language model: transformers' PaliGemma with a connector that gives any number of visual tokens.

Shapes: I images of the whole batch, N patches, K visual tokens (the budget), D vision width, L language width, S sequence length.

The image features pass vision tower -> connector (N patches to K tokens, width D) -> `multi_modal_projector` (D to L), and take the
place of I x K image placeholders in the prompt. Nothing else of the transformers classes changes, so `from_pretrained`,
`save_pretrained`, `generate` and PEFT work as they do for the stock class, and a stock checkpoint loads as it is.
"""

import math
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import transformers.initialization as init
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PaliGemmaConfig
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.paligemma.modeling_paligemma import (
    PaliGemmaCausalLMOutputWithPast,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PaligemmaModelOutputWithPast,
    PaliGemmaMultiModalProjector,
    PaliGemmaPreTrainedModel,
)

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.connectors import Connector, build_connector
from parcelray.models.quiet import quiet_transformers

MODEL_TYPE = "elastic_paligemma"
_CONNECTOR_ADAPTER: TypeAdapter[ConnectorConfig] = TypeAdapter(ConnectorConfig)


@runtime_checkable
class SelfInitialised(Protocol):
    """A module that knows its own initial weights."""

    def init_weights(self) -> None:
        """Sets them, drawing from torch's global generator."""
        ...


class ElasticPaliGemmaConfig(PaliGemmaConfig):  # type: ignore[misc]
    """PaliGemma's configuration and the connector's (a mapping as in `parcelray.config.connector`; unset: identity)."""

    model_type = MODEL_TYPE
    connector: dict[str, Any] | None = None

    @property
    def connector_config(self) -> ConnectorConfig:
        """The connector's configuration, validated."""
        return _CONNECTOR_ADAPTER.validate_python(self.connector or {"type": "identity"})

    @property
    def grid_size(self) -> int:
        """Side of the square patch grid."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)


class ElasticPaliGemmaModel(PaliGemmaModel):  # type: ignore[misc]
    """PaliGemma without its language-model head, with a connector between vision tower and projector."""

    config: ElasticPaliGemmaConfig

    def __init__(self, config: ElasticPaliGemmaConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.connector: Connector = build_connector(
            config.connector_config,
            hidden_size=vision.hidden_size,
            grid_size=config.grid_size,
            mlp_width=vision.intermediate_size,
            layer_norm_eps=vision.layer_norm_eps,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)

    def encode_patches(self, pixel_values_ICHW: Tensor) -> Tensor:
        """Runs the vision tower alone.

        Args:
            pixel_values_ICHW: normalised pixels of all images of the batch, in prompt order.

        Returns:
            Patch features [I, N, D]; one encoding serves every budget.
        """
        return cast(Tensor, self.vision_tower(pixel_values_ICHW).last_hidden_state)

    def compress(self, patch_features_IND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Reduces patch features to the budget and projects them to the language model's width: [I, N, D] -> [I, K, L]."""
        tokens_IKD = self.connector(patch_features_IND, num_visual_tokens=num_visual_tokens)
        assert tokens_IKD.shape[1] == num_visual_tokens, f"{self.connector.name} gave {tokens_IKD.shape[1]} tokens, not {num_visual_tokens}"
        return cast(Tensor, self.multi_modal_projector(tokens_IKD))

    def get_image_features(self, pixel_values: Tensor, num_visual_tokens: int | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Image features for the decoder; `pooler_output` is [I, K, L] and `last_hidden_state` the patch features [I, N, D].

        Args:
            pixel_values: [I, C, H, W].
            num_visual_tokens: the budget per image; None means all N patches, as in the stock class.
            kwargs: for the vision tower.
        """
        kwargs.pop("return_dict", None)
        outputs = self.vision_tower(pixel_values, **kwargs)
        patch_features_IND = outputs.last_hidden_state
        budget = patch_features_IND.shape[1] if num_visual_tokens is None else num_visual_tokens
        outputs.pooler_output = self.compress(patch_features_IND, num_visual_tokens=budget)
        return cast(BaseModelOutputWithPooling, outputs)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where the image features go; refuses a prompt whose placeholders do not match the budget, naming both."""
        if input_ids is not None:
            found = int((input_ids == self.config.image_token_id).sum())
            images, budget = image_features.shape[:2]
            if found != images * budget:
                raise UserError(
                    f"The prompts hold {found} image placeholders but {images} images at {budget} visual tokens each give {images * budget}; "
                    "build the prompts with the processor's num_visual_tokens equal to the model's."
                )
        return cast(Tensor, super().get_placeholder_mask(input_ids, inputs_embeds, image_features))

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, num_visual_tokens: int | None = None, **kwargs: Any
    ) -> PaligemmaModelOutputWithPast:
        """As the stock class; `num_visual_tokens` is the budget per image (None: all patches)."""
        if pixel_values is not None and kwargs.get("mm_encoder_outputs"):
            raise ValueError("pixel_values and mm_encoder_outputs exclude each other; pass one of them")
        if pixel_values is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, num_visual_tokens=num_visual_tokens)}
        return super().forward(input_ids=input_ids, **kwargs)


class ElasticPaliGemmaForConditionalGeneration(PaliGemmaForConditionalGeneration):  # type: ignore[misc]
    """The elastic model with its head. `generate` and `forward` take `num_visual_tokens`, the budget per image."""

    config_class = ElasticPaliGemmaConfig
    config: ElasticPaliGemmaConfig

    def __init__(self, config: ElasticPaliGemmaConfig) -> None:
        # Not the stock constructor: it would build a second, stock inner model only to drop it.
        PaliGemmaPreTrainedModel.__init__(self, config)
        self.model = ElasticPaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)

    @property
    def connector(self) -> Connector:
        """The module that reduces patch features to the budget."""
        return self.model.connector

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """Legal values of `num_visual_tokens`, ascending."""
        return self.connector.supported_budgets

    def encoded_images(self, patch_features_IND: Tensor, *, num_visual_tokens: int) -> dict[str, BaseModelOutputWithPooling]:
        """`mm_encoder_outputs` for `forward` and `generate` from patch features that are already there: one encoding, many budgets."""
        tokens_IKL = self.model.compress(patch_features_IND, num_visual_tokens=num_visual_tokens)
        return {"image": BaseModelOutputWithPooling(last_hidden_state=patch_features_IND, pooler_output=tokens_IKL)}

    def forward(  # noqa: PLR0913 - generate and PEFT read the legal inputs off this signature, which is the stock one plus the budget
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> PaliGemmaCausalLMOutputWithPast:
        """As the stock class; `num_visual_tokens` is the budget per image (None: all patches)."""
        if pixel_values is not None:
            kwargs["num_visual_tokens"] = num_visual_tokens
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


def _init_elastic_weights(model: PaliGemmaPreTrainedModel, module: nn.Module) -> None:
    """Fresh weights: connectors initialise themselves, the projector starts at the text embeddings' scale, the rest as stock.

    The patch features leave the vision tower through a LayerNorm and so have unit variance; the decoder's text embeddings have
    standard deviation initializer_range * sqrt(L). A projector of any other scale drowns one of the two.
    """
    super(PaliGemmaPreTrainedModel, model)._init_weights(module)
    if isinstance(module, PaliGemmaMultiModalProjector):
        text = model.config.text_config
        init.normal_(module.linear.weight, std=text.initializer_range * math.sqrt(text.hidden_size / module.linear.in_features))
    elif isinstance(module, SelfInitialised) and not isinstance(module, PaliGemmaPreTrainedModel):
        module.init_weights()


def connector_of(path: str | Path) -> Connector:
    """The connector of a checkpoint folder without its weights: what it is called and which budgets it can give."""
    config = ElasticPaliGemmaConfig.from_pretrained(path)
    vision = config.vision_config
    with torch.device("meta"):
        return build_connector(config.connector_config, hidden_size=vision.hidden_size, grid_size=config.grid_size, mlp_width=vision.intermediate_size)


def load_vlm(path: str | Path, *, connector: ConnectorConfig | None = None, seed: int = 0, **kwargs: Any) -> ElasticPaliGemmaForConditionalGeneration:
    """Loads a checkpoint folder, stock PaliGemma or elastic, and inserts a connector when one is given.

    A new connector starts from seeded random weights at the scale of the checkpoint's own patch features; every other weight must
    be in the checkpoint (`from_pretrained` would fill a missing one at random with only a warning).

    Args:
        path: folder with `config.json` and safetensors.
        connector: replaces the checkpoint's connector; None keeps it (identity for a stock checkpoint).
        seed: of the new connector's weights.
        kwargs: for `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises:
        UserError: the folder is no checkpoint, or weights are missing from it.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not a checkpoint folder (it has no config.json); give a folder written by save_pretrained.")
    config = ElasticPaliGemmaConfig.from_pretrained(path)
    if connector is not None:
        config.connector = connector.model_dump(mode="json")
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model, info = ElasticPaliGemmaForConditionalGeneration.from_pretrained(path, config=config, output_loading_info=True, use_safetensors=True, **kwargs)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("model.connector."))
    if missing:
        raise UserError(f"{path} lacks {len(missing)} weights of the model, {missing[0]} among them; use a complete checkpoint.")
    if any(key.startswith("model.connector.") for key in info["missing_keys"]):
        norm = model.model.vision_tower.post_layernorm
        model.connector.match_scale(norm.weight, norm.bias)
    return cast(ElasticPaliGemmaForConditionalGeneration, model)


def use_sdpa_where_exact(model: ElasticPaliGemmaForConditionalGeneration) -> None:
    """Switches the decoder to scaled-dot-product attention when it has no logit soft-capping (which SDPA cannot express)."""
    if model.config.text_config.attn_logit_softcapping is None:
        model.model.language_model.config._attn_implementation = "sdpa"


AutoConfig.register(MODEL_TYPE, ElasticPaliGemmaConfig)
AutoModelForImageTextToText.register(ElasticPaliGemmaConfig, ElasticPaliGemmaForConditionalGeneration)
# Checkpoints on the hub carry the key names of older releases. The stock classes rename them while loading; the rules are found by model
# type for the whole model and by class name for the inner one, so both are registered for ours.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("paligemma"))
register_checkpoint_conversion_mapping(ElasticPaliGemmaModel.__name__, get_checkpoint_conversion_mapping("PaliGemmaModel"))
