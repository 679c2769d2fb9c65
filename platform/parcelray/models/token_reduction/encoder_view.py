"""One run of the vision tower, with the attention maps and keys that some reducers read.

Shape suffixes: I images, N patches, S tokens of the tower (class token, if it has one, and patches), R attention rows,
H heads, D width, L width of the language model.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parcelray.errors import UserError
from parcelray.models.backbones.base import ElasticModel


class EncoderView:
    """A run of the vision tower over some images.

    Attention maps are computed on first access, from the inputs of the two layers that reducers use: the layer whose
    output the patch features are, and the last layer. The fused kernels of the run itself do not return attention.

    Args:
        model: the elastic model without its head.
        pixel_values_ICHW: normalised pixels.
        watch: whether to keep the inputs and outputs of these two layers; False keeps only the patch features.
    """

    def __init__(self, model: ElasticModel, pixel_values_ICHW: Tensor, *, watch: bool = True) -> None:
        self.model = model
        self.pixel_values_ICHW = pixel_values_ICHW
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        if model.feature_layer is None or not watch:
            self.patch_features_IND = model.encode_patches(pixel_values_ICHW)
            return
        layers = model.vision_tower.encoder.layers
        hooks = []
        for index in {model.feature_layer, len(layers) - 1}:
            hooks.append(layers[index].register_forward_pre_hook(self._keep_input(index)))
            hooks.append(layers[index].register_forward_hook(self._keep_output(index)))
        try:
            self.patch_features_IND = model.encode_patches(pixel_values_ICHW)
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def num_bytes(self) -> int:
        """Size in bytes of the tensors held from the start; attention maps, computed later, are not counted."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def split(self) -> list["EncoderView"]:
        """Returns one view for each image, with copies of its tensors, so that none keeps the whole run in memory."""
        return [
            self._with(tensor[image : image + 1].clone() for tensor in self._tensors)
            for image in range(len(self.pixel_values_ICHW))
        ]

    @staticmethod
    def joined(views: Sequence["EncoderView"]) -> "EncoderView":
        """Returns one view of the images of several views, which are of the same model and keep the same layers."""
        return views[0]._with(torch.cat(parts) for parts in zip(*(view._tensors for view in views), strict=True))

    def without_maps(self) -> "EncoderView":
        """Returns the same run without the attention maps and keys computed so far."""
        return self._with(self._tensors)

    @property
    def feature_layer(self) -> int:
        """Layer of the tower, counted from 0, whose output the patch features are.

        Raises:
            UserError: the tower has no attention.
        """
        if self.model.feature_layer is None:
            raise UserError(
                "This reducer reads the attention of the vision tower, but a convolutional tower has none; choose a"
                " reducer that reads only the tokens."
            )
        return self.model.feature_layer

    @cached_property
    def class_features_ID(self) -> Tensor | None:
        """Features of the class token at the layer of the patch features; None if there is no class token."""
        if not self.model.has_class_token:
            return None
        assert self.model.feature_layer is not None
        return self._outputs[self.model.feature_layer][:, 0]

    def project(self, features_IKD: Tensor) -> Tensor:
        """Projects features from the vision tower's width to the decoder's: [I, K, D] -> [I, K, L]."""
        projected: Tensor = self.model.multi_modal_projector(features_IKD)
        return projected

    @cached_property
    def attention_IHN(self) -> Tensor:
        """Attention that each patch receives at the layer of the patch features, per head.

        It is the attention of the class token, or without a class token the mean over all patches.

        Raises:
            UserError: the tower has no attention.
        """
        rows_IHRD, keys_IHSD, scale = self._projections(self.feature_layer)
        weights_IHRS: Tensor = (rows_IHRD @ keys_IHSD.transpose(2, 3) * scale).softmax(dim=3)
        return weights_IHRS.mean(dim=2)[:, :, self._first :]

    @cached_property
    def keys_IHND(self) -> Tensor:
        """Keys of the patches at the layer of the patch features, per head."""
        return self._projections(self.feature_layer)[1][:, :, self._first :]

    @cached_property
    def joint_attention_IN(self) -> Tensor:
        """Attention that each patch receives at the last layer, with all heads joined into one (LLaVA-PruMerge)."""
        rows_IRD, keys_ISD = (each.transpose(1, 2).flatten(2) for each in self._projections(self._last_layer)[:2])
        logits_IRS = rows_IRD @ keys_ISD.transpose(1, 2) * keys_ISD.shape[2] ** -0.5
        weights_IRS: Tensor = logits_IRS.softmax(dim=2)
        return weights_IRS.mean(dim=1)[:, self._first :]

    @cached_property
    def joint_keys_IND(self) -> Tensor:
        """Keys of the patches at the last layer, with the heads concatenated."""
        return self._projections(self._last_layer)[1].transpose(1, 2).flatten(2)[:, self._first :]

    @property
    def _tensors(self) -> list[Tensor]:
        """The tensors held from the start, one row per image each."""
        return [self.pixel_values_ICHW, self.patch_features_IND, *self._inputs.values(), *self._outputs.values()]

    def _with(self, tensors: Iterable[Tensor]) -> "EncoderView":
        """Returns a view of other tensors in the order of `_tensors`."""
        other = object.__new__(EncoderView)
        remaining = iter(tensors)
        other.model = self.model
        other.pixel_values_ICHW, other.patch_features_IND = next(remaining), next(remaining)
        other._inputs, other._outputs = (
            {index: next(remaining) for index in kept} for kept in (self._inputs, self._outputs)
        )
        return other

    @property
    def _first(self) -> int:
        """Index of the first patch among the tower's tokens."""
        return int(self.model.has_class_token)

    @property
    def _last_layer(self) -> int:
        return max(self._inputs, default=self.feature_layer)

    def _projections(self, index: int) -> tuple[Tensor, Tensor, float]:
        """Returns the queries [I, H, R, D], the keys [I, H, S, D] and the scale of a layer's attention.

        The queries are those of the class token, or without a class token those of all patches.
        """
        layer = self.model.vision_tower.encoder.layers[index]
        attention = layer.self_attn
        normed_ISD = layer.layer_norm1(self._inputs[index])
        queries_ISD = attention.q_proj(normed_ISD[:, : self._first] if self._first else normed_ISD)
        rows_IHRD, keys_IHSD = (
            each.unflatten(2, (attention.num_heads, -1)).transpose(1, 2).float()
            for each in (queries_ISD, attention.k_proj(normed_ISD))
        )
        return rows_IHRD, keys_IHSD, float(attention.scale)

    def _keep_input(self, index: int) -> Any:
        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[index] = inputs[0]

        return keep

    def _keep_output(self, index: int) -> Any:
        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[index] = output

        return keep
