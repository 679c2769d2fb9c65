"""Base classes of the elastic models, which insert a connector before (or, for M3, after) the projector.

Shape suffixes: I images of the whole batch, N patches, K visual tokens (the budget), D vision width, L language width.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from parcelray.config.connector import FORMER_CONNECTOR_VALUES, ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.connectors import Connector
from parcelray.models.positions import image_position_ids

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
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model like the stock class, with a budget.

        Args:
            input_ids: token ids [B, S] with I x K image placeholders.
            pixel_values: pixels [I, C, H, W].
            num_visual_tokens: budget K per image; None means all patches.
            anchor_grid: see `compress`.
            image_index: image of each group of K placeholders, in prompt order; several prompts can thereby share an
                image, which is encoded once. None: each image belongs to one prompt.
            kwargs: passed to the stock class.

        Raises:
            UserError: the prompts do not have as many placeholders as there are visual tokens.
        """
        if pixel_values is not None and kwargs.get("mm_encoder_outputs"):
            raise ValueError("pixel_values and mm_encoder_outputs are mutually exclusive; pass one of them")
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, num_visual_tokens, anchor_grid)
            if image_index is not None:
                features.pooler_output = features.pooler_output[image_index]
            kwargs["mm_encoder_outputs"] = {"image": features}
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

    @cached_property
    def has_image_positions(self) -> bool:
        """Whether the rotary positions of visual tokens are their places in the image (`positions: image`)."""
        return getattr(self.config.connector_config, "positions", "contiguous") == "image"

    def token_places(self, num_visual_tokens: int, anchor_grid: int | None = None) -> Sequence[int]:
        """Returns the place in the patch grid of each visual token of an image; empty with contiguous positions.

        Args:
            num_visual_tokens: budget of the image.
            anchor_grid: see `ElasticModel.compress`.
        """
        return self.connector.token_places(num_visual_tokens, anchor_grid) if self.has_image_positions else ()

    def image_inputs(self, tokens_IKL: Tensor, anchor_grid: int | None = None) -> dict[str, Any]:
        """Returns inputs of `forward` and `generate` for visual tokens that were computed before.

        Args:
            tokens_IKL: output of `ElasticModel.compress`.
            anchor_grid: the one that `compress` was given.
        """
        return {
            "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens_IKL)},
            "anchor_grid": anchor_grid,
        }

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

        With `positions: image`, the default of `position_ids` are the places of the visual tokens in the image. Only
        the prompt has the places, so a later step over a KV cache must pass `position_ids`, as `generate` does.

        Raises:
            UserError: the placeholders do not match the images, or `position_ids` are needed.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if self.has_image_positions and inputs is not None:
            if position_ids is None:
                places_K = self._places(pixel_values, mm_encoder_outputs, num_visual_tokens, anchor_grid)
                position_ids = self._default_positions(inputs, past_key_values, places_K)
            if attention_mask is None and past_key_values is None:
                # Without a mask, transformers takes a jump in the positions for the start of another sequence.
                attention_mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
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

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Returns the positions of the prompts, from which transformers counts on in the steps of `generate`."""
        contiguous_BS: Tensor = super()._prepare_position_ids_for_generation(  # type: ignore[misc]
            inputs_tensor, model_kwargs
        )
        if not self.has_image_positions:
            return contiguous_BS
        names = ("pixel_values", "mm_encoder_outputs", "num_visual_tokens", "anchor_grid")
        return self._placed(contiguous_BS, inputs_tensor, self._places(*map(model_kwargs.get, names)))

    def _places(
        self,
        pixel_values: Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        num_visual_tokens: int | None,
        anchor_grid: int | None,
    ) -> Sequence[int]:
        """Returns the places of an image's visual tokens; empty without images."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is None and encoded is None:
            return ()
        budget = num_visual_tokens if encoded is None else len(encoded.pooler_output[0])
        return self.token_places(self.config.grid_size**2 if budget is None else budget, anchor_grid)

    def _default_positions(self, inputs: Tensor, past_key_values: Cache | None, places: Sequence[int]) -> Tensor:
        """Returns the positions that the stock class would count, with the images at their places."""
        length = inputs.shape[1] + (0 if past_key_values is None else int(past_key_values.get_seq_length()))
        contiguous_1S = self.first_position + torch.arange(length, device=inputs.device)[None]
        return self._placed(contiguous_1S, inputs, places)

    def _placed(self, contiguous_BS: Tensor, inputs: Tensor, places_K: Sequence[int]) -> Tensor:
        """Returns the positions of prompts given as token ids [B, S] or as embeddings [B, S, L]."""
        length, patches, limit = (
            inputs.shape[1],
            self.config.grid_size**2,
            self.config.text_config.max_position_embeddings,
        )
        if contiguous_BS.shape[1] != length:
            raise UserError(
                f"The connector {self.connector.name} has positions: image, so the positions of tokens after a KV cache"
                " cannot be counted from its length; pass position_ids, or call generate with the whole prompt."
            )
        image_token = torch.tensor(self.config.image_token_id, device=inputs.device)
        is_visual_BS = inputs == image_token
        if inputs.ndim == 3:
            is_visual_BS = (inputs == self.get_input_embeddings()(image_token)).all(2)
        positions_BS = image_position_ids(contiguous_BS, is_visual_BS, places_K, patches)
        # The first condition bounds the positions without waiting for the device.
        may_exceed = bool(places_K) and length + length // len(places_K) * (patches - len(places_K)) > limit
        if may_exceed and int(positions_BS.max()) > limit:
            raise UserError(
                f"A prompt needs {int(positions_BS.max())} positions, because with positions: image an image takes"
                f" {patches} at every budget, but the model has {limit}; use fewer images or a shorter prompt."
            )
        return positions_BS
