"""The local start: query tokens are local averages of patch features at first, and everything can be trained."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parcelray.analysis.redundancy import image_dependent_share
from parcelray.config.connector import ConnectorConfig, MqtConnectorConfig, ParcelConnectorConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.models.backbones.base import read_connector
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.connectors import Connector, build_connector
from parcelray.models.connectors.blocks import OWN_PLACE_LOGIT, BlockDims, place_code, sincos_positions
from parcelray.models.connectors.query_path import QueryPath
from parcelray.models.vlm import load_processor, load_vlm


@pytest.fixture(scope="module")
def patches_BND() -> Tensor:
    """Patch features of a few images of the mini suite."""
    suite = MiniSuite(split="validation")
    images = [decode_image(suite.get("single", index).images[0]) for index in range(12)]
    path = resolve_checkpoint("mini_base").path
    base, processor = load_vlm(path).eval(), load_processor(path)
    with torch.no_grad():
        return base.model.encode_patches(processor.image_processor(images, return_tensors="pt")["pixel_values"])


def _inserted(config: ConnectorConfig) -> Connector:
    return load_vlm(resolve_checkpoint("mini_base").path, connector=config).eval().connector


@pytest.mark.parametrize("budget", [32, 256])
@pytest.mark.parametrize("config", [ParcelConnectorConfig(num_heads=6), MqtConnectorConfig(num_heads=6)])
def test_queries_start_as_local_averages_of_the_shipped_bases_patches(
    config: ConnectorConfig, budget: int, patches_BND: Tensor
) -> None:
    """Query tokens depend on the image as much as the patches do, which is 0.8 of their variance.

    The rest of the patches' variance is in their means over images, which differ by place. Measured on 24 images: the
    share of query tokens is 0.79 to 0.83, 0.99 of that of the patches at their places; the correlation with the own
    patch is 0.998, and the attention to it 0.95. At the random start, the share is 0.03.
    """
    connector = _inserted(config)
    num_anchors = connector.num_anchors(budget)
    places = list(connector.token_places(budget)[num_anchors:])
    own_BQD = patches_BND[:, places]
    with torch.no_grad():
        tokens_BQD = connector(patches_BND, num_visual_tokens=budget)[:, num_anchors:]
        attention_BQN = connector.query_attention(patches_BND, num_visual_tokens=budget)
    assert image_dependent_share(tokens_BQD) > 0.95 * image_dependent_share(own_BQD)
    tokens_BQD, own_BQD = (x_BQD - x_BQD.mean(dim=-1, keepdim=True) for x_BQD in (tokens_BQD, own_BQD))
    assert F.cosine_similarity(tokens_BQD, own_BQD, dim=-1).mean() > 0.9
    assert attention_BQN[:, range(len(places)), places].mean() > 0.8


def test_queries_of_the_random_start_depend_little_on_the_image(patches_BND: Tensor) -> None:
    connector = _inserted(ParcelConnectorConfig(num_heads=6, start="random"))
    with torch.no_grad():
        assert image_dependent_share(connector(patches_BND, num_visual_tokens=256)[:, 64:]) < 0.3


@pytest.mark.parametrize(
    ("head_width", "grid_size"), [(16, 16), (4, 16), (6, 16), (16, 24), (64, 24), (72, 32), (96, 16), (96, 1)]
)
def test_the_logit_of_the_own_place_is_the_same_for_every_width_and_the_largest(
    head_width: int, grid_size: int
) -> None:
    dims = BlockDims(width=2 * head_width, num_heads=2, mlp_width=1, layer_norm_eps=1e-6, local=True)
    code_ND = place_code(range(grid_size**2), grid_size, dims, like=torch.zeros(1))
    code_NE = code_ND[:, :head_width]
    assert torch.equal(code_ND[:, head_width:], code_NE)
    logits = code_NE @ code_NE.T / head_width**0.5
    torch.testing.assert_close(logits.diagonal(), torch.full((grid_size**2,), OWN_PLACE_LOGIT), atol=1e-3, rtol=0)
    assert (logits.fill_diagonal_(float("-inf")) < OWN_PLACE_LOGIT - 0.01).all()


def test_the_code_of_16_x_16_patches_is_that_of_the_recipe() -> None:
    """Heads of width 16: sine and cosine of 2 pi k x / 32 for k = 1, 3, 5, 7 and the row, then for the column."""
    dims = BlockDims(width=16, num_heads=1, mlp_width=1, layer_norm_eps=1e-6, local=True)
    angles = [torch.tensor([1.0, 3, 5, 7]) * 2 * torch.pi * line / 32 for line in (2, 5)]
    expected = torch.cat([part for each in angles for part in (each.sin(), each.cos())])
    code = place_code([2 * 16 + 5], 16, dims, like=torch.zeros(1))[0]
    torch.testing.assert_close(code, (3 * 16**0.5) ** 0.5 * expected)


def test_weight_decay_spares_bank_and_codes_of_the_local_start_only() -> None:
    for start, expected in (("local", {"query_path.bank.weight", "query_path.place_code.offset"}), ("random", set())):
        connector = build_connector(
            MqtConnectorConfig(num_heads=2, start=start), hidden_size=16, grid_size=16, mlp_width=8
        )
        spared = {
            f"{prefix}.{name}"
            for prefix, module in connector.named_modules()
            for name in getattr(module, "no_weight_decay", ())
        }
        assert spared == expected
        assert spared <= dict(connector.named_parameters()).keys()


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"type": "parcel"}, {"start": "random", "positions": "contiguous"}),
        ({"type": "parcel", "start": "local"}, {"start": "local", "positions": "contiguous"}),
        ({"type": "mqt", "positions": "image"}, {"start": "random", "positions": "image"}),
        ({"type": "m3"}, {"variant": "parcel_baseline", "positions": "contiguous"}),
        ({"type": "m3", "variant": None, "positions": "image"}, {"variant": None, "positions": "image"}),
        ({"type": "identity"}, {}),
        (None, {}),
    ],
)
def test_the_section_of_an_old_checkpoint_keeps_its_meaning(
    section: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    config = read_connector(section)
    assert {key: value for key, value in config if key in ("start", "positions", "variant")} == expected


def test_the_sine_cosine_start_of_mqt_is_a_grid_of_positions_in_raster_order() -> None:
    torch.manual_seed(0)
    connector = build_connector(
        MqtConnectorConfig(num_heads=2, num_queries=60, start="sincos"), hidden_size=16, grid_size=16, mlp_width=8
    )
    path = connector.query_path
    assert isinstance(path, QueryPath)
    queries_QD = path._conditioned(torch.zeros(1, 0, 16), 60)[0]
    positions_QD = sincos_positions(8, 16, like=queries_QD)[:60]
    assert (queries_QD - positions_QD).abs().max() < 0.1
    assert connector.token_places(3) == (16 + 1, 16 + 3, 16 + 5)
