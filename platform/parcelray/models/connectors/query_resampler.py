"""MQT: a query resampler with nested dropout of its query bank (baseline of arXiv 2605.30126, Appendix E)."""

from torch import Tensor

from parcelray.config.connector import MqtConnectorConfig
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.blocks import block_dims
from parcelray.models.connectors.places import query_places, raster_places
from parcelray.models.connectors.query_path import QueryPath


class MqtConnector(Connector):
    """The first K queries of the bank cross-attend to the patches, independently of one another; no anchors.

    The tokens of a small budget are therefore exactly a prefix of those of a larger one. Every budget from 1 to the
    size of the bank is legal; the paper trains on even budgets, which is a setting of the budget sampler. For a fair
    comparison, the block is PARCEL's cross-attention block including its MLP. Parameters at D = 1152, M = 4304 and 256
    queries: 15,539,024 (PARCEL: 20,780,624).

    Departures from the released code of MQT-LLaVA (arXiv 2405.19315):

    - The released code has only an attention layer and norms, without MLP and residual connection.
    - Its queries have the positions of a 16 x 16 grid. Here, only the keys have positions.
    - Its keys are the positions alone, so that a query reads the same patches in every image. This is the setting
      `keys: position`; the default keys contain the patch features.
    - One learned matrix replaces LLaVA's projector there. Here, the tokens pass the model's own projector.
    """

    name = "mqt"

    def __init__(self, config: MqtConnectorConfig, dims: VisionDims) -> None:
        super().__init__(dims, tuple(range(1, config.num_queries + 1)))
        sincos = config.start == "sincos"
        self.query_places = (
            raster_places(dims.grid_size, config.num_queries)
            if sincos
            else query_places(dims.grid_size, (), config.num_queries)
        )
        block = block_dims(config, width=dims.hidden_size, mlp_width=dims.mlp_width, layer_norm_eps=dims.layer_norm_eps)
        self.query_path = QueryPath(
            block,
            grid_size=dims.grid_size,
            places=self.query_places,
            content_keys=config.keys == "content",
            sincos_bank=sincos,
        )

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns 0."""
        self.check_budget(num_visual_tokens)
        return 0

    def token_places(self, num_visual_tokens: int, anchor_grid: int | None = None) -> tuple[int, ...]:
        """See `Connector.token_places`."""
        if anchor_grid is not None:
            self.check_split(num_visual_tokens, anchor_grid)
        self.check_budget(num_visual_tokens)
        return self.query_places[:num_visual_tokens]

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """Returns query tokens [B, num_visual_tokens, D]."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        tokens_BKD: Tensor = self.query_path(patch_features_BND[:, :0], patch_features_BND, num_visual_tokens)
        return tokens_BKD

    def query_attention(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """See `Connector.query_attention`."""
        self.check_inputs(patch_features_BND, num_visual_tokens)
        return self.query_path.attention_map(patch_features_BND[:, :0], patch_features_BND, num_visual_tokens)
