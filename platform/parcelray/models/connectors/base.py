"""Base class of the connectors: the interface, its checks, and the sizes taken from the vision tower.

Shape suffixes: B batch, N patches, P anchors, Q queries, K visual tokens (the budget), D vision width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from torch import Tensor, nn

from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.connectors.blocks import OutputNorm
from parcelray.models.connectors.places import cell_centres


class VisionDims(NamedTuple):
    """The sizes of the vision tower that a connector is built from."""

    hidden_size: int
    """Width D_v of the patch features."""
    grid_size: int
    """Side of the square patch grid."""
    mlp_width: int
    """Width of the vision tower's MLP, used if the connector's configuration does not set one."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the connector's LayerNorms."""
    projector_layers: int = 1
    """Number of linear layers of the projector between vision tower and language model."""


class Connector(nn.Module, ABC):
    """Compresses the patch features of an image to exactly `num_visual_tokens` tokens of the same width.

    The projection D_v -> D_l is not part of the connector: the VLM applies its stock `multi_modal_projector`
    afterwards, or before if `after_projector` is true.

    Attributes:
        name: `type` of the configuration, used in messages and records.
        after_projector: whether the connector reduces projected tokens of width D_l instead of patch features.
        hidden_size: width D_v of patch features and tokens.
        grid_size: side of the square patch grid; N = grid_size ** 2.
    """

    name: str
    after_projector: bool = False

    def __init__(self, dims: VisionDims, supported_budgets: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size = dims.hidden_size
        self.grid_size = dims.grid_size
        self._supported_budgets = tuple(supported_budgets)

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """The legal values of `num_visual_tokens` in ascending order."""
        return self._supported_budgets

    @abstractmethod
    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Compresses patch features to the budget.

        Args:
            patch_features_BND: patch features of the vision tower, row-major.
            num_visual_tokens: budget per image.

        Returns:
            Tokens [B, num_visual_tokens, D]; the anchors come first.

        Raises:
            UnsupportedBudgetError: the budget is not in `supported_budgets`.
            UserError: the features do not match the grid and the width.
        """

    @abstractmethod
    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns the number of leading output tokens that are bound to fixed cells of the patch grid."""

    def token_places(self, num_visual_tokens: int, anchor_grid: int | None = None) -> tuple[int, ...]:
        """Returns the place of every output token: the raster index of a patch, in output order.

        Pooled tokens stand at the centres of their cells, which is what this method gives by itself.

        Args:
            num_visual_tokens: budget per image.
            anchor_grid: side of the anchor grid in a supernet over splits; None: the connector's routing.

        Raises:
            UnsupportedBudgetError: the budget is not in `supported_budgets`.
            UserError: the connector does not support the anchor grid.
        """
        if anchor_grid is not None:
            self.check_split(num_visual_tokens, anchor_grid)
        self.check_budget(num_visual_tokens)
        return cell_centres(self.grid_size, isqrt(num_visual_tokens))

    def query_attention(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the attention of the query tokens to the patches after softmax, averaged over the heads.

        It is used for spectral diagnostics.

        Returns:
            Attention [B, Q, N], rows sum to 1; Q = 0 for a connector without queries.
        """
        self.check_inputs(patch_features_BND, num_visual_tokens)
        batch_size, num_patches, _ = patch_features_BND.shape
        return patch_features_BND.new_zeros(batch_size, 0, num_patches)

    def match_scale(self, gain_D: Tensor, bias_D: Tensor | None) -> None:
        """Initialises the learned tokens at the scale of the patch features; no effect without learned tokens.

        The projector and the language model were trained on patch features. The projector can amplify a wrong scale to
        tens of times the standard deviation of the text embeddings. The connector's output norm therefore gets the
        affine parameters of the vision tower's post_layernorm. Anchors and query tokens then enter the projector with
        the statistics that it was trained on.

        Args:
            gain_D: weight of the vision tower's post_layernorm.
            bias_D: its bias; None means zero.
        """
        for module in self.modules():
            if isinstance(module, OutputNorm):
                module.match_scale(gain_D, bias_D)

    def check_budget(self, num_visual_tokens: int) -> None:
        """Raises `UnsupportedBudgetError` unless the budget is legal."""
        if num_visual_tokens not in self._supported_budgets:
            raise UnsupportedBudgetError(num_visual_tokens, self._supported_budgets, self.name)

    def check_split(self, num_visual_tokens: int, anchor_grid: int) -> None:
        """Raises `UserError` unless the connector supports `anchor_grid` and this split of the budget."""
        raise UserError(
            f"{self.name} does not support a choice of the anchor grid; use the connector parcel with anchor_grids to"
            " search splits."
        )

    def check_inputs(self, patch_features_BND: Tensor, num_visual_tokens: int) -> None:
        """Raises an error for an illegal budget and for features that are not [B, grid_size ** 2, hidden_size]."""
        self.check_budget(num_visual_tokens)
        self.check_features(patch_features_BND)

    def check_features(self, patch_features_BND: Tensor) -> None:
        """Raises `UserError` for features that are not [B, grid_size ** 2, hidden_size].

        A connector after the projector has no parameters, so the width of its input is not checked.
        """
        width = patch_features_BND.shape[-1] if self.after_projector else self.hidden_size
        expected = (self.grid_size**2, width)
        if patch_features_BND.ndim != 3 or tuple(patch_features_BND.shape[1:]) != expected:
            raise UserError(
                f"{self.name} got patch features of shape {tuple(patch_features_BND.shape)}, but a {self.grid_size} x"
                f" {self.grid_size} grid needs [batch, {expected[0]}, {expected[1]}]; match the image size to the grid,"
                " or build the connector for this vision tower."
            )
