"""How anchors and query tokens divide the work: their redundancy, the attention of the queries, and their overlap.

With a_q the attention of query q to the N patches after softmax, averaged over the heads, X the patch features, and
H the entropy:

- `effective_rank`, `mean_cosine`: see `redundancy`. The effective rank of `all` tokens minus that of the anchors is the
  rank that the queries add.
- `image_share`: `image_dependent_share` of `redundancy`. A learned constant has 0; tokens that all have the same mean
  over the images have 1.
- `attention_entropy`: mean over the queries of H(a_q), in nats; `attention_entropy_share`: divided by log N.
- `attention_spread`: H(mean_q a_q) minus the mean of H(a_q), in nats: how much the queries differ in where they look
  (the mutual information of query and patch). 0: all have the same attention; at most log of the number of queries.
- `coverage`: exp(H(mean_q a_q)) / N, the effective share of the patches to which the queries attend together.
- `own_place`: mean attention of a query to the patch at its own place, relative to uniform attention (1).
- `anchor_centres`: mean attention to the patches at which the anchors stand, relative to uniform attention (1).
- `anchor_overlap`: share of the attention's deviation from uniform, |a_q - 1 / N|^2, that is constant within the cells
  of the anchors. A query with 1 reads a weighted mean of the anchors; independent random weights have
  (P - 1) / (N - 1).
- `attended_by_anchors`: R^2 of the attended patches, a_q X, predicted by the anchors with the attention summed over
  each cell. Both are taken relative to the mean patch of the image. 1: the queries read nothing that the anchors lack.
- `tokens_by_anchors`, `tokens_by_patches`: R^2 of the image-dependent part of the query tokens, predicted by one linear
  map (the same for all queries) from the anchors under the query's attention, and from these and the attended patches.
  The maps are fitted on one half of the images and tested on the other. The second minus the first is what the queries
  carry beyond the anchors.

Sums are over the images, queries and channels, so that a ratio is one of means over images; its intervals are from
joint draws over images.

Shapes: B images of a batch, I images of the study, N patches, P anchors, Q queries, K tokens, C cells, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isqrt, log
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parcelray.analysis.redundancy import effective_rank, mean_pairwise_cosine
from parcelray.evaluation.scoring.estimate import ClusteredValues, Estimate, estimate_means, ratio
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.connectors import Connector
from parcelray.models.connectors.pooling import pool_grid

_BATCH = 16
_RIDGE = 1e-3
"""Penalty of the linear maps, relative to the mean variance of their inputs."""

_Row = tuple[Tensor, ...]
"""Values of each image [I], of which the mean is a measure; or two, of which the ratio of the means is."""


@dataclass(frozen=True)
class PartMeasures:
    """The measures of the anchors, the queries or all tokens at one budget."""

    part: str
    """`anchors`, `queries` or `all`; `all` only if there are both."""
    num_visual_tokens: int
    num_tokens: int
    """Number of tokens of this part."""
    measures: Mapping[str, Estimate]
    """Measures by name, see the module; those of attention only for queries, those of overlap only with anchors."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the measures as JSON-serialisable data."""
        return {
            "part": self.part,
            "num_visual_tokens": self.num_visual_tokens,
            "num_tokens": self.num_tokens,
            "measures": {name: each.interval._asdict() for name, each in self.measures.items()},
        }


@torch.inference_mode()
def token_measures(
    model: ElasticVLM, processor: ElasticProcessor, images: Sequence[Image.Image], budgets: Sequence[int]
) -> list[PartMeasures]:
    """Measures anchors and query tokens before the projection, at each budget.

    The patch features of all images stay in memory, and the tokens of one budget at a time.

    Args:
        model: model in evaluation mode.
        processor: processor of the same checkpoint.
        images: RGB images, at least 2.
        budgets: budgets that the model supports.
    """
    device = next(model.parameters()).device
    batches = [
        model.model.encode_patches(processor.pixel_values(images[start : start + _BATCH]).to(device, model.dtype))
        for start in range(0, len(images), _BATCH)
    ]
    return [part for budget in budgets for part in measure_budget(model.connector, batches, budget)]


def measure_budget(connector: Connector, batches: Sequence[Tensor], num_visual_tokens: int) -> list[PartMeasures]:
    """Measures the tokens of one budget.

    Args:
        connector: the connector; if it pools after the projector, it is given the patch features all the same.
        batches: patch features [B, N, D] of all images.
        num_visual_tokens: the budget.
    """
    tokens_IKD = torch.cat([connector(each, num_visual_tokens=num_visual_tokens).float() for each in batches])
    num_anchors = connector.num_anchors(num_visual_tokens)
    parts = {"anchors": tokens_IKD[:, :num_anchors], "queries": tokens_IKD[:, num_anchors:], "all": tokens_IKD}
    found = []
    for name, part_IKD in parts.items():
        num_tokens = part_IKD.shape[1]
        if num_tokens == 0 or (name == "all" and num_anchors in (0, num_visual_tokens)):
            continue
        rows = _redundancy(part_IKD)
        if name == "queries":
            rows |= _attention(connector, batches, part_IKD, num_visual_tokens)
        found.append(PartMeasures(name, num_visual_tokens, num_tokens, _estimates(rows)))
    return found


def _redundancy(tokens_IKD: Tensor) -> dict[str, _Row]:
    # The two parts of `image_dependent_share` as means over images: each image's share of the variance over the images,
    # and of the variance of all tokens, corrected for the noise of the means.
    count = len(tokens_IKD)
    deviations_IKD = tokens_IKD - tokens_IKD.mean(dim=0)
    common_I1D = deviations_IKD.mean(dim=1, keepdim=True)
    over_images_I = _mean_square(deviations_IKD) * count / (count - 1)
    noise_I = _mean_square(deviations_IKD - common_I1D) / (count - 1)
    total_I = _mean_square(tokens_IKD - tokens_IKD.mean(dim=(0, 1))) + over_images_I / count - noise_I
    return {
        "effective_rank": (effective_rank(tokens_IKD),),
        "mean_cosine": (mean_pairwise_cosine(tokens_IKD),),
        "image_share": (over_images_I, total_I),
    }


def _mean_square(deviations_IKD: Tensor) -> Tensor:
    return deviations_IKD.square().sum(dim=2).mean(dim=1)


def _attention(
    connector: Connector, batches: Sequence[Tensor], tokens_IQD: Tensor, num_visual_tokens: int
) -> dict[str, _Row]:
    """Measures the attention of the queries, and with anchors its overlap with these."""
    num_anchors, side = connector.num_anchors(num_visual_tokens), connector.grid_size
    places_K = torch.tensor(connector.token_places(num_visual_tokens), device=tokens_IQD.device)
    found: list[dict[str, _Row]] = []
    by_anchors, by_patches = [], []
    for features_BND in batches:
        maps_BQN = connector.query_attention(features_BND, num_visual_tokens=num_visual_tokens).float()
        rows = _entropies(maps_BQN)
        own_BQ = maps_BQN.gather(2, places_K[num_anchors:].expand(len(maps_BQN), -1)[..., None]).squeeze(2)
        rows["own_place"] = (side**2 * own_BQ.mean(dim=1),)
        if num_anchors:
            rows["anchor_centres"] = (side**2 * maps_BQN[:, :, places_K[:num_anchors]].mean(dim=(1, 2)),)
            pooled_side = isqrt(num_anchors)
            # The attention is summed over each cell, and the anchor is the cell's mean.
            cells_BPQ = pool_grid(maps_BQN.transpose(1, 2), grid_size=side, side=pooled_side)
            mean_B1D = features_BND.mean(dim=1, keepdim=True).float()
            centred_BND = features_BND.float() - mean_B1D
            anchors_BPD = pool_grid(centred_BND, grid_size=side, side=pooled_side)
            size = side**2 // num_anchors
            through_anchors_BQD = size * cells_BPQ.transpose(1, 2) @ anchors_BPD
            attended_BQD = maps_BQN @ centred_BND
            rows["anchor_overlap"] = (
                size * (cells_BPQ - 1 / side**2).square().sum(dim=(1, 2)),
                (maps_BQN - 1 / side**2).square().sum(dim=(1, 2)),
            )
            rows["attended_by_anchors"] = _explained(attended_BQD, attended_BQD - through_anchors_BQD)
            # The rows of the attention sum to 1, so this adds the mean patch to the inputs that are not centred.
            by_anchors.append(through_anchors_BQD + mean_B1D)
            by_patches.append(torch.cat([by_anchors[-1], attended_BQD + mean_B1D], dim=2))
        found.append(rows)
    joined = {name: tuple(map(torch.cat, zip(*(rows[name] for rows in found), strict=True))) for name in found[0]}
    for name, inputs in (("tokens_by_anchors", by_anchors), ("tokens_by_patches", by_patches)):
        if inputs:
            joined[name] = predicted_share(torch.cat(inputs), tokens_IQD)
    return joined


def _entropies(maps_BQN: Tensor) -> dict[str, _Row]:
    most = log(maps_BQN.shape[2])
    entropy_B = torch.special.entr(maps_BQN).sum(dim=2).mean(dim=1)
    joint_B = torch.special.entr(maps_BQN.mean(dim=1)).sum(dim=1)
    return {
        "attention_entropy": (entropy_B,),
        "attention_entropy_share": (entropy_B / most,),
        "attention_spread": (joint_B - entropy_B,),
        "coverage": ((joint_B - most).exp(),),
    }


def predicted_share(inputs_IQE: Tensor, tokens_IQD: Tensor) -> tuple[Tensor, Tensor]:
    """Predicts the image-dependent part of tokens by one linear map, from inputs of the same image and token.

    The map is fitted on the images with an even index and tested on the others, and the reverse. The mean of each token
    over the images of the fit is removed, so that a part which is the same in all images counts for nothing.

    Args:
        inputs_IQE: inputs.
        tokens_IQD: tokens to predict.

    Returns:
        Explained and total variance of each image's tokens, [I] each.
    """
    inputs_IQE, tokens_IQD = inputs_IQE.double(), tokens_IQD.double()
    explained_I, total_I = (tokens_IQD.new_zeros(len(tokens_IQD)) for _ in range(2))
    for fit, test in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        mean_QE, mean_QD = inputs_IQE[fit].mean(dim=0), tokens_IQD[fit].mean(dim=0)
        fit_ME, fit_MD = (inputs_IQE[fit] - mean_QE).flatten(0, 1), (tokens_IQD[fit] - mean_QD).flatten(0, 1)
        gram_EE = fit_ME.T @ fit_ME
        # The floor keeps the system solvable for inputs that are equal in all images; their map is zero.
        gram_EE.diagonal().add_((_RIDGE * gram_EE.diagonal().mean()).clamp(min=1e-30))
        map_ED = torch.linalg.solve(gram_EE, fit_ME.T @ fit_MD)
        target_TQD = tokens_IQD[test] - mean_QD
        rest_TQD = target_TQD - (inputs_IQE[test] - mean_QE) @ map_ED
        explained_I[test], total_I[test] = _explained(target_TQD, rest_TQD)
    return explained_I, total_I


def _explained(target_BQD: Tensor, rest_BQD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the explained and the total sum of squares of each image, given the residuals."""
    total_B = target_BQD.square().sum(dim=(1, 2))
    return total_B - rest_BQD.square().sum(dim=(1, 2)), total_B


def _estimates(rows: Mapping[str, _Row]) -> dict[str, Estimate]:
    """Returns the mean over the images of a single row, and the ratio of the means of two rows."""
    values = [
        ClusteredValues(each.tolist(), list(map(str, range(len(each)))), share=False) for each in chain(*rows.values())
    ]
    estimates = iter(estimate_means(values, seed=0))
    found = {}
    for name, row in rows.items():
        first, *second = [next(estimates) for _ in row]
        if second:
            # Every ratio is a share, which the estimates from a few images can exceed.
            first = ratio(first, second[0])
            first = Estimate(min(first.value, 1.0), np.minimum(first.draws, 1.0), first.n)
        found[name] = first
    return found
