"""No compression."""

from torch import Tensor

from parcelray.config.connector import IdentityConnectorConfig
from parcelray.models.connectors.base import Connector, VisionDims


class IdentityConnector(Connector):
    """Passes every patch; the only budget is the number of patches. The reference for retention."""

    name = "identity"

    def __init__(self, config: IdentityConnectorConfig, dims: VisionDims) -> None:
        super().__init__(dims, (dims.grid_size**2,))

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Every token sits at a patch."""
        self.check_budget(num_visual_tokens)
        return num_visual_tokens

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns the patch features themselves."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return patch_features_BND
