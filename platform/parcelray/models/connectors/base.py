"""What every connector shares: the interface, its checks, and the sizes it takes from the vision tower.

Shape suffixes: B batch, N patches, P anchors, Q queries, K visual tokens (the budget), D vision width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.connectors.blocks import OutputNorm


class VisionDims(NamedTuple):
    """The sizes of the vision tower that a connector is built from."""

    hidden_size: int
    """Width D_v of the patch features."""
    grid_size: int
    """Side of the square patch grid."""
    mlp_width: int
    """Width of the vision tower's own MLP, used where the connector's configuration names none."""
    layer_norm_eps: float = 1e-6


class Connector(nn.Module, ABC):
    """Turns the patch features of one image into exactly `num_visual_tokens` tokens of the same width.

    The linear projection D_v -> D_l is not part of it: the VLM applies its stock `multi_modal_projector` afterwards.

    Attributes:
        name: the `type` of the configuration, for messages and records.
        hidden_size: width D_v of patch features and tokens.
        grid_size: side of the square patch grid; N = grid_size ** 2.
    """

    name: str

    def __init__(self, dims: VisionDims, supported_budgets: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size = dims.hidden_size
        self.grid_size = dims.grid_size
        self._supported_budgets = tuple(supported_budgets)

    @property
    def supported_budgets(self) -> tuple[int, ...]:
        """The legal values of `num_visual_tokens`, ascending."""
        return self._supported_budgets

    @abstractmethod
    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Compresses patch features to the budget.

        Args:
            patch_features_BND: output of the vision tower's post_layernorm, row-major patches.
            num_visual_tokens: the budget per image.

        Returns:
            Tokens of shape [B, num_visual_tokens, D]; the anchors come first.

        Raises:
            UnsupportedBudgetError: when the budget is not in `supported_budgets`.
            UserError: when the features do not fit the grid and the width.
        """

    @abstractmethod
    def num_anchors(self, num_visual_tokens: int) -> int:
        """How many of the leading output tokens are bound to fixed cells of the patch grid."""

    def query_attention(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Post-softmax attention of the query tokens over the patches, averaged over the heads (for the spectral diagnostics).

        Returns:
            [B, Q, N], rows sum to 1; Q = 0 for a connector without queries.
        """
        self.check_inputs(patch_features_BND, num_visual_tokens)
        batch_size, num_patches, _ = patch_features_BND.shape
        return patch_features_BND.new_zeros(batch_size, 0, num_patches)

    def match_scale(self, gain_D: Tensor, bias_D: Tensor | None) -> None:
        """Starts the learned tokens at the scale of the patch features; does nothing where no token is learned.

        The projector and the language model were trained on patch features, and the projector can multiply a wrong
        scale up to tens of times the text embedding's standard deviation. With the vision tower's own post_layernorm
        affine in the connector's output norm, anchors and query tokens enter the projector with the statistics it
        knows.

        Args:
            gain_D: weight of the vision tower's post_layernorm.
            bias_D: its bias; None is read as zero.
        """
        for module in self.modules():
            if isinstance(module, OutputNorm):
                module.match_scale(gain_D, bias_D)

    def check_budget(self, num_visual_tokens: int) -> None:
        """Raises `UnsupportedBudgetError` unless the budget is legal."""
        if num_visual_tokens not in self._supported_budgets:
            raise UnsupportedBudgetError(num_visual_tokens, self._supported_budgets, self.name)

    def check_split(self, num_visual_tokens: int, anchor_grid: int) -> None:
        """Raises `UserError` unless the connector takes `anchor_grid` and can split the budget so."""
        raise UserError(
            f"{self.name} has no anchor grid to choose; splits are searched with the connector parcel and its"
            " anchor_grids."
        )

    def check_inputs(self, patch_features_BND: Tensor, num_visual_tokens: int) -> None:
        """Refuses an illegal budget and features that are not [B, grid_size ** 2, hidden_size]."""
        self.check_budget(num_visual_tokens)
        self.check_features(patch_features_BND)

    def check_features(self, patch_features_BND: Tensor) -> None:
        """Refuses features that are not [B, grid_size ** 2, hidden_size]."""
        expected = (self.grid_size**2, self.hidden_size)
        if patch_features_BND.ndim != 3 or tuple(patch_features_BND.shape[1:]) != expected:
            raise UserError(
                f"{self.name} got patch features of shape {tuple(patch_features_BND.shape)}, but a {self.grid_size} x"
                f" {self.grid_size} grid needs [batch, {expected[0]}, {expected[1]}]; match the image size to the grid,"
                " or build the connector for this vision tower."
            )
