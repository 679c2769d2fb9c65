"""Properties of every connector."""

import pickle
from math import isqrt
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from parcelray.errors import UnsupportedBudgetError, UserError, describe_values


def test_every_legal_budget_gives_exactly_that_many_tokens(case: Any) -> None:
    connector = case.build(width=16).eval()
    features = case.features(batch_size=1, width=16)
    # For the thousand budgets of the large grid, a sample with both sides of every change is enough: the code is the
    # same as for the small grid.
    step = 1 if case.grid_size < 32 else 16
    with torch.inference_mode():
        for budget in sorted({*connector.supported_budgets[::step], *case.some_budgets(connector)}):
            assert connector(features, num_visual_tokens=budget).shape == (1, budget, connector.hidden_size)


def test_budgets_ascend_and_the_name_is_the_type(case: Any) -> None:
    connector = case.build()
    assert list(connector.supported_budgets) == sorted(set(connector.supported_budgets))
    assert connector.name == case.config.type


def test_leading_tokens_are_the_average_pooled_grid(case: Any) -> None:
    connector = case.build()
    features = case.features()
    grid = features.transpose(1, 2).unflatten(2, (case.grid_size, case.grid_size))
    for budget in case.some_budgets(connector):
        num_anchors = connector.num_anchors(budget)
        tokens = connector(features, num_visual_tokens=budget)
        # The tokens of m3_self_attention start from pooled cells, then pass attention blocks.
        if num_anchors and connector.name != "m3_self_attention":
            pooled = F.avg_pool2d(grid, case.grid_size // isqrt(num_anchors)).flatten(2).transpose(1, 2)
            torch.testing.assert_close(tokens[:, :num_anchors], pooled, atol=1e-6, rtol=0)


def test_gradients_reach_exactly_the_parameters_that_the_budget_uses(case_16: Any) -> None:
    connector = case_16.build()
    start = getattr(case_16.config, "start", "")
    if start == "local":
        # At the start itself, the branches without output keep the gradients from the parameters inside them.
        after_a_step(connector)
    for budget in case_16.some_budgets(connector):
        connector.zero_grad(set_to_none=True)
        features = case_16.features().requires_grad_()
        tokens = connector(features, num_visual_tokens=budget)
        (tokens * torch.randn_like(tokens)).sum().backward()
        assert features.grad is not None
        num_queries = budget - connector.num_anchors(budget)
        largest = max(
            (float(each.grad.abs().max()) for each in connector.parameters() if each.grad is not None), default=0.0
        )
        # Gradients that are zero in exact arithmetic are below 1e-6 of the largest gradient (rounding); the smallest
        # other ones are above 1e-3 of it.
        rounding = 1e-4 * largest
        for name, parameter in connector.named_parameters():
            gradient = parameter.grad
            if name in {"query_path.bank.weight", "query_path.place_code.offset"} and num_queries:
                assert gradient is not None
                assert gradient[:num_queries].abs().amax(dim=1).min() > rounding
                assert gradient[num_queries:].abs().sum() == 0
            elif num_queries == 0 and connector.name != "m3_self_attention":
                assert gradient is None, f"{name} got a gradient at budget {budget}, which has no queries"
            else:
                assert gradient is not None, f"{name} got no gradient at budget {budget}"
                reached = float(gradient.abs().max()) > rounding
                assert reached != _is_cancelled(name, connector.name, budget, start), (
                    f"{name} at budget {budget}: {gradient.abs().max()}"
                )


def after_a_step(connector: nn.Module) -> None:
    """Changes every parameter a little, as a step of training does."""
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def _is_cancelled(parameter: str, connector: str, budget: int, start: str) -> bool:
    """Whether a softmax cancels the effect of the parameter, so that its gradient is zero in exact arithmetic."""
    # A shift of all keys changes all logits of a query by the same amount.
    if parameter.endswith("k_proj.bias"):
        return True
    # The same is true of a shift of the normed context where it is the input of keys only.
    if start == "local" and parameter == "query_path.cross_attention.context_norm.bias":
        return True
    # A softmax over one key is always 1: a single query without anchors attends only to itself.
    is_alone = connector == "mqt_self_attention" and budget == 1
    return is_alone and "conditioner" in parameter and ("q_proj" in parameter or "k_proj" in parameter)


def test_bfloat16_agrees_with_float32(case_16: Any) -> None:
    """Compares bfloat16 with float32; it keeps 8 bits (relative step 2 ** -8).

    After two blocks, the worst measured relative RMS error is 0.005. At the local start it is 0.026: queries and keys
    are rounded, and the logits of the places are up to 24.
    """
    allowed = 0.06 if getattr(case_16.config, "start", "") == "local" else 0.01
    connector = case_16.build().eval()
    features = case_16.features().bfloat16()
    budget = connector.supported_budgets[-1]
    with torch.no_grad():
        exact = connector(features.float(), num_visual_tokens=budget)
        rounded = connector.bfloat16()(features, num_visual_tokens=budget)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).pow(2).mean().sqrt() < allowed * exact.pow(2).mean().sqrt()


def test_the_error_for_an_illegal_budget_names_the_legal_ones(case: Any) -> None:
    connector = case.build()
    features = case.features(batch_size=1)
    for budget in (0, -1, connector.supported_budgets[-1] + 1):
        with pytest.raises(UnsupportedBudgetError) as caught:
            connector(features, num_visual_tokens=budget)
        assert f"{connector.name} does not support {budget} visual tokens" in str(caught.value)
        assert describe_values(connector.supported_budgets) in str(caught.value)
        with pytest.raises(UnsupportedBudgetError):
            connector.num_anchors(budget)
        with pytest.raises(UnsupportedBudgetError):
            connector.query_attention(features, num_visual_tokens=budget)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.supported) == (str(caught.value), connector.supported_budgets)


def test_features_of_another_grid_or_width_are_refused(case_16: Any) -> None:
    connector = case_16.build()
    budget = connector.supported_budgets[0]
    for shape in ((1, 255, 24), (1, 256, 28), (256, 24)):
        with pytest.raises(UserError, match=r"16 x 16 grid needs \[batch, 256, 24\]"):
            connector(torch.zeros(shape), num_visual_tokens=budget)


def test_permuting_the_patches_changes_the_tokens(case_16: Any) -> None:
    """Anchors are cells of the grid and keys carry positions, so no connector treats the patches as a set."""
    connector = case_16.build().eval()
    features = case_16.features(batch_size=1)
    permuted = features[:, torch.randperm(256)]
    with torch.no_grad():
        for budget in case_16.some_budgets(connector):
            before, after = (connector(x, num_visual_tokens=budget) for x in (features, permuted))
            changed = (before - after).abs().amax(dim=(0, 2)) > 1e-4
            assert changed.all(), f"{int((~changed).sum())} tokens of budget {budget} did not change"


def test_query_attention_is_a_distribution_over_the_patches(case_16: Any) -> None:
    connector = case_16.build().eval()
    features = case_16.features()
    is_query_free = connector.name in {"identity", "m3", "anchors_only", "m3_self_attention"}
    with torch.no_grad():
        for budget in case_16.some_budgets(connector):
            weights = connector.query_attention(features, num_visual_tokens=budget)
            num_queries = 0 if is_query_free else budget - connector.num_anchors(budget)
            assert weights.shape == (2, num_queries, 256)
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, num_queries))


def test_weights_survive_construction_on_meta(case_16: Any) -> None:
    """As in transformers: create on meta, materialise, initialise each submodule, innermost first."""
    with torch.device("meta"):
        connector = case_16.build()
    connector.to_empty(device="cpu")
    for parameter in connector.parameters():
        nn.init.constant_(parameter, float("nan"))

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):  # transformers does this itself
            module.reset_parameters()
        init_weights = getattr(module, "init_weights", None)
        if init_weights is not None:
            init_weights()

    torch.manual_seed(1)
    connector.apply(initialise)
    fresh = case_16.build()
    for (name, parameter), expected in zip(connector.named_parameters(), fresh.parameters(), strict=True):
        assert parameter.isfinite().all(), f"{name} was not initialised"
        torch.testing.assert_close(
            parameter.float().std(correction=0), expected.float().std(correction=0), rtol=0.25, atol=1e-6
        )
    assert connector(case_16.features(), num_visual_tokens=connector.supported_budgets[-1]).isfinite().all()
