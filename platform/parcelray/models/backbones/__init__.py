"""Elastic models over transformers' vision-language classes, one module per backbone family."""

from parcelray.models.backbones.base import ElasticModel, ElasticVLM
from parcelray.models.backbones.llava import ElasticLlavaConfig, ElasticLlavaForConditionalGeneration
from parcelray.models.backbones.paligemma import ElasticPaliGemmaConfig, ElasticPaliGemmaForConditionalGeneration

__all__ = [
    "ElasticLlavaConfig",
    "ElasticLlavaForConditionalGeneration",
    "ElasticModel",
    "ElasticPaliGemmaConfig",
    "ElasticPaliGemmaForConditionalGeneration",
    "ElasticVLM",
]
