"""The elastic model over transformers' PaliGemma classes (arXiv 2412.03555): SigLIP, a linear projector, Gemma or Gemma-2.

The image features pass vision tower -> connector (N patches to K tokens, width D) -> `multi_modal_projector` (D to L),
and take the place of I x K image placeholders in the prompt. Nothing else of the transformers classes changes, so
`from_pretrained`, `save_pretrained`, `generate` and PEFT work as they do for the stock class, and a stock checkpoint
loads as it is.
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
    """PaliGemma's configuration and the connector's (a mapping as in `parcelray.config.connector`; unset: identity)."""

    model_type = MODEL_TYPE
    connector: dict[str, Any] | None = None

    @property
    def connector_config(self) -> ConnectorConfig:
        """The connector's configuration, validated."""
        return read_connector(self.connector)

    @property
    def grid_size(self) -> int:
        """Side of the square patch grid."""
        return int(self.vision_config.image_size) // int(self.vision_config.patch_size)

    @property
    def feature_layer(self) -> int:
        """Layer of the vision tower, counted from 0, whose output the patch features are."""
        return int(self.vision_config.num_hidden_layers) - 1

    @property
    def depths(self) -> Depths:
        """Layers that reducers can reduce in."""
        return Depths(self.feature_layer + 1, int(self.text_config.num_hidden_layers))

    @property
    def vision_dims(self) -> VisionDims:
        """What a connector is built from."""
        vision = self.vision_config
        return VisionDims(vision.hidden_size, self.grid_size, vision.intermediate_size, vision.layer_norm_eps)


class ElasticPaliGemmaModel(ElasticModel, PaliGemmaModel):  # type: ignore[misc]
    """PaliGemma without its language-model head, with a connector between vision tower and projector."""

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
        """The affine part of the tower's last LayerNorm."""
        norm = self.vision_tower.post_layernorm
        return norm.weight, norm.bias


class ElasticPaliGemmaForConditionalGeneration(ElasticVLM, PaliGemmaForConditionalGeneration):  # type: ignore[misc]
    """The elastic model with its head. `generate` and `forward` take `num_visual_tokens`, the budget per image."""

    config_class = ElasticPaliGemmaConfig
    config: ElasticPaliGemmaConfig
    reads_both_ways = True
    first_position = 1
    layer_classes = ("SiglipEncoderLayer", "Gemma2DecoderLayer")

    def __init__(self, config: ElasticPaliGemmaConfig) -> None:
        # Not the stock constructor: it would build a second, stock inner model only to drop it.
        PaliGemmaPreTrainedModel.__init__(self, config)
        self.model = ElasticPaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_elastic_weights(self, module)


def _init_elastic_weights(model: PaliGemmaPreTrainedModel, module: nn.Module) -> None:
    """Fresh weights: connectors initialise themselves, the projector starts at the text embeddings' scale, the rest as stock.

    The patch features leave the vision tower through a LayerNorm and so have unit variance; the decoder's text
    embeddings have standard deviation initializer_range * sqrt(L). A projector of any other scale drowns one of the
    two.
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
# Checkpoints on the hub carry the key names of older releases. The stock classes rename them while loading; the rules
# are found by model type for the whole model and by class name for the inner one, so both are registered for ours.
register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("paligemma"))
register_checkpoint_conversion_mapping(
    ElasticPaliGemmaModel.__name__, get_checkpoint_conversion_mapping("PaliGemmaModel")
)
