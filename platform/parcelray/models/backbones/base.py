"""Base classes of the elastic models, which insert a connector before (or, for M3, after) the projector.

Shape suffixes: I images of the whole batch, N patches, K visual tokens (the budget), D vision width, L language width.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from parcelray.config.connector import FORMER_CONNECTOR_VALUES, ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.connectors import Connector

_CONNECTOR_ADAPTER: TypeAdapter[ConnectorConfig] = TypeAdapter(ConnectorConfig)


@runtime_checkable
class SelfInitialised(Protocol):
    """A module that sets its own initial weights."""

    def init_weights(self) -> None:
        """Sets the weights, drawing from torch's global generator."""
        ...


class Depths(NamedTuple):
    """Number of layers of a model, for reducers that reduce inside the layers."""

    encoder: int
    """Layers of the vision tower up to the patch features; 0 for a tower without attention."""
    decoder: int
    """Layers of the language model."""


def read_connector(connector: dict[str, Any] | None) -> ConnectorConfig:
    """Validates the connector section of a model's configuration; None means identity.

    A section without a key is from a checkpoint of a version before the key. M3 without `variant` then pooled before
    the projector; `start` and `positions` were what FORMER_CONNECTOR_VALUES says.
    """
    if connector is not None and connector.get("type") == "m3":
        connector = {"variant": "parcel_baseline"} | connector
    config = _CONNECTOR_ADAPTER.validate_python(connector or {"type": "identity"})
    missing = FORMER_CONNECTOR_VALUES.keys() & type(config).model_fields.keys() - config.model_fields_set
    return config.model_copy(update={key: FORMER_CONNECTOR_VALUES[key] for key in missing})


class ElasticModel(nn.Module):
    """The elastic model without its head: a mix-in that precedes the transformers class."""

    config: Any
    connector: Connector
    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any
    get_input_embeddings: Callable[[], nn.Module]
    post_init: Callable[[], None]

    @property
    def vision_options(self) -> dict[str, Any]:
        """Keyword arguments of the vision tower's forward pass."""
        return {}

    @property
    def feature_layer(self) -> int | None:
        """Layer of the vision tower, counted from 0, that outputs the patch features; None without attention."""
        return cast("int | None", self.config.feature_layer)

    @property
    def features_are_normed(self) -> bool:
        """Whether the patch features pass the vision tower's last norm."""
        return False

    @property
    def has_class_token(self) -> bool:
        """Whether the vision tower puts a class token before the patches."""
        return False

    @abstractmethod
    def patch_features(self, outputs: Any) -> Tensor:
        """Returns the patch features [I, N, D] from the vision tower's outputs, row-major."""

    @abstractmethod
    def feature_scale(self) -> tuple[Tensor, Tensor | None]:
        """Returns standard deviation and mean of each channel of the patch features, which the projector expects."""

    def encode_patches(self, pixel_values_ICHW: Tensor) -> Tensor:
        """Runs the vision tower alone.

        Args:
            pixel_values_ICHW: normalised pixels of all images of the batch, in prompt order.

        Returns:
            Patch features [I, N, D], which can be compressed to every budget.
        """
        return self.patch_features(self.vision_tower(pixel_values_ICHW, **self.vision_options))

    def compress(self, patch_features_IND: Tensor, *, num_visual_tokens: int, anchor_grid: int | None = None) -> Tensor:
        """Reduces patch features to the budget and projects them to the language model's width: [I, N, D] -> [I, K, L].

        Args:
            patch_features_IND: output of the vision tower.
            num_visual_tokens: budget K.
            anchor_grid: side of the anchor grid in a supernet over splits, see `ParcelConnector`; None: the connector's
                routing.
        """
        split = {} if anchor_grid is None else {"anchor_grid": anchor_grid}
        after = self.connector.after_projector
        features = self.multi_modal_projector(patch_features_IND) if after else patch_features_IND
        tokens = self.connector(features, num_visual_tokens=num_visual_tokens, **split)
        assert tokens.shape[1] == num_visual_tokens, (
            f"{self.connector.name} gave {tokens.shape[1]} tokens, not {num_visual_tokens}"
        )
        return cast(Tensor, tokens if after else self.multi_modal_projector(tokens))

    def get_image_features(
        self, pixel_values: Tensor, num_visual_tokens: int | None = None, anchor_grid: int | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Returns image features for the decoder.

        Args:
            pixel_values: pixels [I, C, H, W].
            num_visual_tokens: budget per image; None means all N patches, as in the stock class.
            anchor_grid: see `compress`.
            kwargs: passed to the vision tower.

        Returns:
            `pooler_output`: visual tokens [I, K, L]; `last_hidden_state`: patch features [I, N, D].
        """
        kwargs.pop("return_dict", None)
        outputs = self.vision_tower(pixel_values, **self.vision_options, **kwargs)
        patch_features_IND = self.patch_features(outputs)
        budget = patch_features_IND.shape[1] if num_visual_tokens is None else num_visual_tokens
        tokens_IKL = self.compress(patch_features_IND, num_visual_tokens=budget, anchor_grid=anchor_grid)
        return BaseModelOutputWithPooling(
            last_hidden_state=patch_features_IND,
            pooler_output=tokens_IKL,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_visual_tokens: int | None = None,
        anchor_grid: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model like the stock class, with a budget.

        Args:
            input_ids: token ids [B, S] with I x K image placeholders.
            pixel_values: pixels [I, C, H, W].
            num_visual_tokens: budget K per image; None means all patches.
            anchor_grid: see `compress`.
            kwargs: passed to the stock class.

        Raises:
            UserError: the prompts do not have as many placeholders as there are visual tokens.
        """
        if pixel_values is not None and kwargs.get("mm_encoder_outputs"):
            raise ValueError("pixel_values and mm_encoder_outputs are mutually exclusive; pass one of them")
        if pixel_values is not None:
            kwargs["mm_encoder_outputs"] = {
                "image": self.get_image_features(pixel_values, num_visual_tokens, anchor_grid)
            }
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            if input_ids is not None:
                self._check_placeholders(input_ids, encoded.pooler_output)
            kwargs["mm_encoder_outputs"] = {"image": self.as_stock(encoded)}
        return super().forward(input_ids=input_ids, **kwargs)

    def as_stock(self, encoded: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Returns encoded images in the form that the stock class expects."""
        return encoded

    def _check_placeholders(self, input_ids: Tensor, tokens_IKL: Tensor) -> None:
        placeholders = int((input_ids == self.config.image_token_id).sum())
        images, budget = tokens_IKL.shape[:2]
        if placeholders != images * budget:
            raise UserError(
                f"The prompts have {placeholders} image placeholders, but {images} images at {budget} visual tokens"
                f" each need {images * budget}; build the prompts with the processor's num_visual_tokens equal to the"
                " model's."
            )


class ElasticVLM(nn.Module):
    """The elastic model with its head: a mix-in that precedes the transformers class.

    `generate` and `forward` take `num_visual_tokens`.
    """

    config: Any
    model: ElasticModel
    lm_head: nn.Linear
    dtype: torch.dtype
    generate: Callable[..., Any]
    generation_config: Any
    save_pretrained: Callable[..., Any]
    get_input_embeddings: Callable[[], nn.Module]
    set_attn_implementation: Callable[[str], None]
    post_init: Callable[[], None]

    reads_both_ways: ClassVar[bool]
    """Whether attention in the prompt is bidirectional."""
    first_position: ClassVar[int]
    """Rotary position of the first token of a prompt in `generate`."""
    layer_classes: ClassVar[tuple[str, ...]]
    """Class names of the layers that sharded training wraps."""

    @property
    def connector(self) -> Connector:
        """The module that reduces patch features to the budget."""
        return self.model.connector

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """The legal values of `num_visual_tokens` in ascending order."""
        return self.connector.supported_budgets

    def image_inputs(self, tokens_IKL: Tensor) -> dict[str, Any]:
        """Returns inputs of `forward` and `generate` for visual tokens that were computed before, [I, K, L]."""
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens_IKL)}}

    def forward(  # noqa: PLR0913 - `generate` and PEFT inspect this signature: the stock one plus the budget
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
        anchor_grid: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model like the stock class, with a budget.

        `num_visual_tokens` is the budget per image (None: all patches); for `anchor_grid` see `ElasticModel.compress`.
        `token_type_ids` (0: prompt, 1: answer) have no effect if attention is also causal in the prompt.
        """
        if pixel_values is not None:
            kwargs |= {"num_visual_tokens": num_visual_tokens, "anchor_grid": anchor_grid}
        if self.reads_both_ways:
            kwargs["token_type_ids"] = token_type_ids
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
