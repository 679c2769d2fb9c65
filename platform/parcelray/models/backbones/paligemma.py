"""The elastic model over transformers' PaliGemma classes (arXiv 2412.03555): SigLIP, linear projector, Gemma(-2).

The image features pass the vision tower, the connector (N patches to K tokens of width D) and `multi_modal_projector`
(width D to L). They replace the I x K image placeholders of the prompt. Nothing else of the transformers classes
changes: `from_pretrained`, `save_pretrained`, `generate` and PEFT work as with the stock class, and a stock checkpoint
can be loaded unchanged.
"""

import math
from typing import Any, cast

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PaliGemmaConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.paligemma.modeling_paligemma import (
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PaliGemmaMultiModalProjector,
    PaliGemmaPreTrainedModel,
)

from parcelray.config.connector import ConnectorConfig
from parcelray.models.backbones.base import (
    Depths,
    ElasticModel,
    ElasticVLM,
    SelfInitialised,
    read_connector,
)
from parcelray.models.connectors import build_connector
from parcelray.models.connectors.base import VisionDims

MODEL_TYPE = "elastic_paligemma"


class ElasticPaliGemmaConfig(PaliGemmaConfig):  # type: ignore[misc]
    """PaliGemma's configuration with a connector.

    `connector` is a mapping as in `parcelray.config.connector`; None means identity.
    """

    model_type = MODEL_TYPE
    connector: dict[str, Any] | None = None

    @property
    def connector_config(self) -> ConnectorConfig:
        """The validated configuration of the connector."""
        return read_connector(self.connector)

    @property
    def grid_size(self) -> int:
        """Side of the square patch grid."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def feature_layer(self) -> int:
        """Layer of the vision tower, counted from 0, that outputs the patch features."""
        return int(self.vision_config.num_hidden_layers) - 1

    @property
    def depths(self) -> Depths:
        """Number of layers in which reducers can reduce."""
        return Depths(self.feature_layer + 1, int(self.text_config.num_hidden_layers))

    @property
    def vision_dims(self) -> VisionDims:
        """Sizes of the vision tower that a connector is built from."""
        vision = self.vision_config
        return VisionDims(vision.hidden_size, self.grid_size, vision.intermediate_size, vision.layer_norm_eps)


class ElasticPaliGemmaModel(ElasticModel, PaliGemmaModel):  # type: ignore[misc]
    """PaliGemma without its head, with a connector between vision tower and projector."""

    config: ElasticPaliGemmaConfig

    def __init__(self, config: ElasticPaliGemmaConfig) -> None:
        super().__init__(config)
        self.connector = build_connector(config.connector_config, **config.vision_dims._asdict())
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)

    @property
    def features_are_normed(self) -> bool:
        """See `ElasticModel`."""
        return True

    def patch_features(self, outputs: Any) -> Tensor:
        """See `ElasticModel`."""
        return cast(Tensor, outputs.last_hidden_state)

    def feature_scale(self) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias of the tower's last LayerNorm."""
        norm = self.vision_tower.post_layernorm
        return norm.weight, norm.bias


class ElasticPaliGemmaForConditionalGeneration(ElasticVLM, PaliGemmaForConditionalGeneration):  # type: ignore[misc]
    """The elastic PaliGemma with its head; `generate` and `forward` take the budget as `num_visual_tokens`."""

    config_class = ElasticPaliGemmaConfig
    config: ElasticPaliGemmaConfig
    reads_both_ways = True
    first_position = 1
    layer_classes = ("SiglipEncoderLayer", "Gemma2DecoderLayer")

    def __init__(self, config: ElasticPaliGemmaConfig) -> None:
        # The stock constructor is skipped: it would build a stock inner model that is then discarded.
        PaliGemmaPreTrainedModel.__init__(self, config)
        self.model = ElasticPaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)


def _init_elastic_weights(model: PaliGemmaPreTrainedModel, module: nn.Module) -> None:
    """Sets initial weights: connectors initialise themselves, the projector starts at the scale of the text embeddings.

    All other modules are initialised as in the stock class. The patch features leave the vision tower through a
    LayerNorm, so they have unit variance. The text embeddings of the decoder have the standard deviation
    initializer_range * sqrt(L). With a projector of any other scale, one of the two would dominate.
    """
    super(PaliGemmaPreTrainedModel, model)._init_weights(module)
    if isinstance(module, PaliGemmaMultiModalProjector):
        text = model.config.text_config
        init.normal_(
            module.linear.weight, std=text.initializer_range * math.sqrt(text.hidden_size / module.linear.in_features)
        )
    elif isinstance(module, SelfInitialised) and not isinstance(module, PaliGemmaPreTrainedModel):
        module.init_weights()


AutoConfig.register(MODEL_TYPE, ElasticPaliGemmaConfig)
AutoModelForImageTextToText.register(ElasticPaliGemmaConfig, ElasticPaliGemmaForConditionalGeneration)
# Checkpoints on the hub have the key names of older releases, which the stock classes rename on loading. The rules are
# registered by model type for the whole model and by class name for the inner one, so both are registered here.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("paligemma"))
register_checkpoint_conversion_mapping(
    ElasticPaliGemmaModel.__name__, get_checkpoint_conversion_mapping("PaliGemmaModel")
)
