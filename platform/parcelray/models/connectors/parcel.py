"""PARCEL: pooled anchors and pool-conditioned queries (arXiv 2605.30126, Section 3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parcelray.config.connector import AttentionConnectorConfig, ParcelConnectorConfig, RouteConfig
from parcelray.errors import UserError
from parcelray.models.connectors.base import Connector, VisionDims
from parcelray.models.connectors.blocks import BlockDims, block_dims
from parcelray.models.connectors.places import cell_centres, query_places
from parcelray.models.connectors.pooling import check_divides, pool_grid
from parcelray.models.connectors.query_path import QueryPath, SelfAttentionConditioner
from parcelray.models.connectors.routing import Split, bank_size, resolve_routing, routed_budgets, split_budget


class AnchoredQueryConnector(Connector):
    """Base of PARCEL and of its ablations that keep both kinds of token; outputs [anchors; query tokens].

    1. The routing gives the anchor grid of the budget; N_q = budget - number of anchors.
    2. Anchors: average pooling of the patch grid.
    3. Queries: the first N_q rows of the shared bank, conditioned on the anchors, then resampling the patches by
       cross-attention. Skipped if N_q = 0.

    Args:
        config: number of heads and MLP width.
        dims: sizes of the vision tower.
        routing: routing intervals; None for the paper's.
        anchor_grids: sides of anchor grids that a call may choose instead of the routing's (a supernet over splits).
        make_conditioner: builds the module that conditions the queries on the anchors; None for no conditioning.
    """

    def __init__(
        self,
        config: AttentionConnectorConfig,
        dims: VisionDims,
        *,
        routing: Sequence[RouteConfig] | None,
        make_conditioner: Callable[[BlockDims], nn.Module] | None,
        anchor_grids: Sequence[int] = (),
    ) -> None:
        routes = resolve_routing(routing, dims.grid_size)
        for side in anchor_grids:
            check_divides(side, dims.grid_size)
        self.anchor_grids = tuple(anchor_grids)
        super().__init__(dims, routed_budgets(routes))
        self.routing = routes
        block = block_dims(config, width=dims.hidden_size, mlp_width=dims.mlp_width, layer_norm_eps=dims.layer_norm_eps)
        # In a supernet, a budget may have as few anchors as the smallest grid.
        searched = dims.grid_size**2 - min(anchor_grids) ** 2 if anchor_grids else 0
        num_queries = max(bank_size(routes), searched)
        sides = (*(route.anchor_grid for route in routes), *anchor_grids)
        self.query_places = query_places(dims.grid_size, sides, num_queries)
        # A routing may use only anchors at every budget (a split search tries that). Then the query path must not
        # exist, because no budget would use its parameters.
        self.query_path: QueryPath | None = None
        if num_queries:
            conditioner = None if make_conditioner is None else make_conditioner(block)
            self.query_path = QueryPath(
                block, grid_size=dims.grid_size, places=self.query_places, conditioner=conditioner
            )

    def split(self, num_visual_tokens: int) -> Split:
        """Returns how the budget divides into anchors and queries."""
        self.check_budget(num_visual_tokens)
        return split_budget(self.routing, num_visual_tokens)

    def num_anchors(self, num_visual_tokens: int) -> int:
        """Returns the number of anchors N_p of the budget's interval."""
        return self.split(num_visual_tokens).num_anchors

    def check_split(self, num_visual_tokens: int, anchor_grid: int) -> None:
        """See `Connector.check_split`."""
        if anchor_grid not in self.anchor_grids:
            legal = ", ".join(map(str, self.anchor_grids)) or "none"
            raise UserError(
                f"anchor_grid {anchor_grid} is not one of this {self.name}'s anchor_grids ({legal}); choose one of"
                " them, or train a supernet with it."
            )
        if not max(1, anchor_grid**2) <= num_visual_tokens <= self.grid_size**2:
            raise UserError(
                f"{num_visual_tokens} visual tokens cannot be split into {anchor_grid**2} anchors and queries; choose"
                f" {max(1, anchor_grid**2)} to {self.grid_size**2} tokens, or a smaller anchor_grid."
            )

    def token_places(self, num_visual_tokens: int, anchor_grid: int | None = None) -> tuple[int, ...]:
        """See `Connector.token_places`: anchors at the centres of their cells, then the queries of the bank."""
        if anchor_grid is None:
            anchor_grid = self.split(num_visual_tokens).anchor_grid
        else:
            self.check_split(num_visual_tokens, anchor_grid)
        queries = self.query_places[: num_visual_tokens - anchor_grid**2]
        return cell_centres(self.grid_size, anchor_grid) + queries

    def forward(self, patch_features_BND: Tensor, *, num_visual_tokens: int, anchor_grid: int | None = None) -> Tensor:
        """Returns [anchors; query tokens] of shape [B, num_visual_tokens, D].

        Args:
            patch_features_BND: see `Connector.forward`.
            num_visual_tokens: the budget.
            anchor_grid: side of the anchor grid, one of `anchor_grids`; None: the routing's.
        """
        anchors_BPD, num_queries = self._anchors(patch_features_BND, num_visual_tokens, anchor_grid)
        if self.query_path is None or num_queries == 0:
            return anchors_BPD
        return torch.cat([anchors_BPD, self.query_path(anchors_BPD, patch_features_BND, num_queries)], dim=1)

    def query_attention(self, patch_features_BND: Tensor, *, num_visual_tokens: int) -> Tensor:
        """See `Connector.query_attention`."""
        anchors_BPD, num_queries = self._anchors(patch_features_BND, num_visual_tokens)
        if self.query_path is None or num_queries == 0:
            return super().query_attention(patch_features_BND, num_visual_tokens=num_visual_tokens)
        return self.query_path.attention_map(anchors_BPD, patch_features_BND, num_queries)

    def _anchors(
        self, patch_features_BND: Tensor, num_visual_tokens: int, anchor_grid: int | None = None
    ) -> tuple[Tensor, int]:
        if anchor_grid is None:
            self.check_inputs(patch_features_BND, num_visual_tokens)
            anchor_grid = split_budget(self.routing, num_visual_tokens).anchor_grid
        else:
            self.check_split(num_visual_tokens, anchor_grid)
            self.check_features(patch_features_BND)
        return (
            pool_grid(patch_features_BND, grid_size=self.grid_size, side=anchor_grid),
            num_visual_tokens - anchor_grid**2,
        )


class ParcelConnector(AnchoredQueryConnector):
    """PARCEL: anchors and queries share one self-attention block, then the queries resample the patches (PCQR).

    The tokens of a small budget are not a prefix of those of a larger budget, because all queries attend to one
    another. Never reuse a KV cache across budgets. Parameters at D = 1152, M = 4304 and 16 x 16 patches: 20,780,624, of
    which 221,184 are the bank of 192 queries.
    """

    name = "parcel"

    def __init__(self, config: ParcelConnectorConfig, dims: VisionDims) -> None:
        super().__init__(
            config,
            dims,
            routing=config.routing,
            make_conditioner=SelfAttentionConditioner,
            anchor_grids=config.anchor_grids,
        )
