"""What the vision tower's attention looked at, for the reducers that go by it."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parcelray.errors import UserError
from parcelray.models.backbones.base import ElasticModel


class EncoderView:
    """One run of a vision tower over some images.

    Attention maps are computed when they are asked for, from the inputs of the two layers that reducers look at: the one whose output
    the patch features are, and the tower's last one. The fused kernels that the run itself uses do not give them.

    Args:
        model: the inner model.
        pixel_values_ICHW: normalised pixels.
    """

    def __init__(self, model: ElasticModel, pixel_values_ICHW: Tensor) -> None:
        self.model = model
        self.pixel_values_ICHW = pixel_values_ICHW
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        if model.feature_layer is None:
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

    def again(self) -> "EncoderView":
        """The same run, with its attention maps still to be computed."""
        other = object.__new__(EncoderView)
        for name in ("model", "pixel_values_ICHW", "patch_features_IND", "_inputs", "_outputs"):
            setattr(other, name, getattr(self, name))
        return other

    @cached_property
    def class_features_ID(self) -> Tensor | None:
        """Feature of the class token, at the layer of the patch features; None where there is no such token."""
        if not self.model.has_class_token:
            return None
        assert self.model.feature_layer is not None
        return self._outputs[self.model.feature_layer][:, 0]

    def project(self, features_IKD: Tensor) -> Tensor:
        """From the vision tower's width to the decoder's: [I, K, D] -> [I, K, L]."""
        projected: Tensor = self.model.multi_modal_projector(features_IKD)
        return projected

    @cached_property
    def attention_IHN(self) -> Tensor:
        """Attention that each patch gets at the layer of the features, per head: from the class token, or without one from a patch on average.

        Raises:
            UserError: the tower has no attention.
        """
        attention, _, _ = self._heads(self._feature_layer)
        return attention

    @cached_property
    def keys_IHND(self) -> Tensor:
        """Keys of the patches at the layer of the features, per head."""
        _, keys, _ = self._heads(self._feature_layer)
        return keys

    @cached_property
    def joint_attention_IN(self) -> Tensor:
        """As `attention_IHN`, at the tower's last layer, with all heads as one of the whole width (LLaVA-PruMerge)."""
        _, _, joint = self._heads(self._last_layer)
        return joint

    @cached_property
    def joint_keys_IND(self) -> Tensor:
        """Keys of the patches at the tower's last layer, heads side by side."""
        _, keys_IHND, _ = self._heads(self._last_layer)
        return keys_IHND.transpose(1, 2).flatten(2)

    @property
    def _feature_layer(self) -> int:
        if self.model.feature_layer is None:
            raise UserError("This reducer goes by the vision tower's attention, and a convolutional tower has none; choose one that goes by the tokens.")
        return self.model.feature_layer

    @property
    def _last_layer(self) -> int:
        return max(self._inputs, default=self._feature_layer)

    def _heads(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.model.vision_tower.encoder.layers[index]
        attention = layer.self_attn
        normed_ISD = layer.layer_norm1(self._inputs[index])
        queries_IHSD, keys_IHSD = (
            projection(normed_ISD).unflatten(2, (attention.num_heads, -1)).transpose(1, 2).float() for projection in (attention.q_proj, attention.k_proj)
        )
        start = int(self.model.has_class_token)
        rows_IHSD = queries_IHSD[:, :, :1] if start else queries_IHSD
        weights_IHN = (rows_IHSD @ keys_IHSD.transpose(2, 3) * attention.scale).softmax(dim=3).mean(dim=2)[:, :, start:]
        joint_queries_ISD, joint_keys_ISD = (each.transpose(1, 2).flatten(2) for each in (rows_IHSD, keys_IHSD))
        joint_ISS = joint_queries_ISD @ joint_keys_ISD.transpose(1, 2) * joint_keys_ISD.shape[2] ** -0.5
        return weights_IHN, keys_IHSD[:, :, start:], joint_ISS.softmax(dim=2).mean(dim=1)[:, start:]

    def _keep_input(self, index: int) -> Any:
        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[index] = inputs[0]

        return keep

    def _keep_output(self, index: int) -> Any:
        def keep(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[index] = output

        return keep
