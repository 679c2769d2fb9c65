"""The elastic model over transformers' LLaVA-1.5 classes (arXiv 2310.03744): vision tower, two-layer projector, Llama.

The vision tower is one of three kinds: CLIP, whose class token before the patches is dropped by the strategy `default`;
SigLIP, which has no class token (`full`); or ConvNeXt, whose last feature map is the patch grid. The visual tokens
follow the first words of the prompt, and attention is causal throughout.
"""

import math
from typing import Any, cast

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.backbones.base import (
    Depths,
    ElasticModel,
    ElasticVLM,
    SelfInitialised,
    read_connector,
)
from parcelray.models.connectors import build_connector
from parcelray.models.connectors.base import VisionDims

MODEL_TYPE = "elastic_llava"
_GELU_RMS = 0.65
"""Root mean square of GELU of a standard normal variable."""
_SCALE_IMAGES = 4
"""Number of noise images that the scale of the patch features is measured on."""


class ElasticLlavaConfig(LlavaConfig):  # type: ignore[misc]
    """LLaVA's configuration with a connector.

    `connector` is a mapping as in `parcelray.config.connector`; None means identity.
    """

    model_type = MODEL_TYPE
    connector: dict[str, Any] | None = None

    @property
    def connector_config(self) -> ConnectorConfig:
        """The validated configuration of the connector."""
        return read_connector(self.connector)

    def __post_init__(self, **kwargs: Any) -> None:
        """Sets the `hidden_size` of a convolutional tower, which the stock projector reads."""
        # The value of a stock checkpoint would hide this class's own.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        if self.convolutional:
            self.vision_config.hidden_size = self.vision_config.hidden_sizes[-1]

    @property
    def convolutional(self) -> bool:
        """Whether the vision tower outputs a feature map instead of tokens."""
        return hasattr(self.vision_config, "hidden_sizes")

    @property
    def grid_size(self) -> int:
        """Side of the square patch grid."""
        vision = self.vision_config
        stride = int(vision.patch_size)
        if self.convolutional:
            # Every stage after the first halves the map.
            stride *= 2 ** (len(vision.depths) - 1)
        return int(vision.image_size) // stride

    @property
    def feature_layer(self) -> int | None:
        """Layer of the vision tower, counted from 0, that outputs the patch features; None without attention."""
        if self.convolutional:
            return None
        # A tower with L layers has L + 1 hidden states; the first one is the input of the first layer.
        return int(self.vision_feature_layer % (self.vision_config.num_hidden_layers + 1)) - 1

    @property
    def depths(self) -> Depths:
        """Number of layers in which reducers can reduce."""
        return Depths(
            0 if self.feature_layer is None else self.feature_layer + 1, int(self.text_config.num_hidden_layers)
        )

    @property
    def vision_dims(self) -> VisionDims:
        """Sizes of the vision tower that a connector is built from."""
        vision = self.vision_config
        width = int(vision.hidden_size)
        if not isinstance(self.vision_feature_layer, int):
            raise UserError(
                f"vision_feature_layer {self.vision_feature_layer} joins several layers; elastic models support one"
                " layer, such as -2."
            )
        return VisionDims(
            width,
            self.grid_size,
            getattr(vision, "intermediate_size", 4 * width),
            vision.layer_norm_eps,
            projector_layers=2,
        )


class ElasticLlavaModel(ElasticModel, LlavaModel):  # type: ignore[misc]
    """LLaVA without its head, with a connector before the projector (M3: after it)."""

    config: ElasticLlavaConfig

    def __init__(self, config: ElasticLlavaConfig) -> None:
        super().__init__(config)
        self.connector = build_connector(config.connector_config, **config.vision_dims._asdict())
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)

    @property
    def vision_options(self) -> dict[str, Any]:
        """Requests only the hidden state that is used, so that the others are not kept."""
        return {} if self.config.convolutional else {"output_hidden_states": self.config.vision_feature_layer}

    @property
    def has_class_token(self) -> bool:
        """See `ElasticModel`."""
        return not self.config.convolutional and bool(self.config.vision_feature_select_strategy == "default")

    def patch_features(self, outputs: Any) -> Tensor:
        """See `ElasticModel`."""
        if self.config.convolutional:
            return cast(Tensor, outputs.last_hidden_state.flatten(2).transpose(1, 2))
        features = outputs.hidden_states[self.config.vision_feature_layer]
        return cast(Tensor, features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features)

    @torch.no_grad()
    def feature_scale(self) -> tuple[Tensor, Tensor | None]:
        """Returns standard deviation and mean of each channel, measured on images of seeded noise.

        The patch features come from a middle layer, so no LayerNorm determines their scale.
        """
        side = int(self.config.vision_config.image_size)
        parameter = next(self.vision_tower.parameters())
        noise = torch.randn(_SCALE_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
        features = self.encode_patches(noise.to(parameter)).flatten(0, 1)
        return features.std(dim=0), features.mean(dim=0)

    def as_stock(self, encoded: BaseModelOutputWithPooling) -> BaseModelOutputWithPooling:
        """Returns the visual tokens as a sequence of images, which the stock class expects."""
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state, pooler_output=tuple(encoded.pooler_output)
        )


class ElasticLlavaForConditionalGeneration(ElasticVLM, LlavaForConditionalGeneration):  # type: ignore[misc]
    """The elastic LLaVA with its head; `generate` and `forward` take the budget as `num_visual_tokens`."""

    config_class = ElasticLlavaConfig
    config: ElasticLlavaConfig
    reads_both_ways = False
    first_position = 0
    layer_classes = ("CLIPEncoderLayer", "LlamaDecoderLayer")

    def __init__(self, config: ElasticLlavaConfig) -> None:
        # The stock constructor is skipped: it would build a stock inner model that is then discarded.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = ElasticLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)


def _init_elastic_weights(model: LlavaPreTrainedModel, module: nn.Module) -> None:
    """Sets initial weights: connectors initialise themselves, the projector starts at the scale of the text embeddings.

    All other modules are initialised as in the stock class.
    """
    super(LlavaPreTrainedModel, model)._init_weights(module)
    if isinstance(module, LlavaMultiModalProjector):
        init.normal_(module.linear_1.weight, std=1 / math.sqrt(module.linear_1.in_features))
        init.normal_(
            module.linear_2.weight,
            std=model.config.text_config.initializer_range / (_GELU_RMS * math.sqrt(module.linear_2.in_features)),
        )
    elif isinstance(module, SelfInitialised) and not isinstance(module, LlavaPreTrainedModel):
        module.init_weights()


AutoConfig.register(MODEL_TYPE, ElasticLlavaConfig)
AutoModelForImageTextToText.register(ElasticLlavaConfig, ElasticLlavaForConditionalGeneration)
# As for PaliGemma: keys of hub checkpoints are renamed on loading, by rules registered under these models' names.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("llava"))
register_checkpoint_conversion_mapping(ElasticLlavaModel.__name__, get_checkpoint_conversion_mapping("LlavaModel"))
