"""Golden values of the redundancy diagnostics."""

import math

import pytest
import torch

from parcelray.analysis.redundancy import effective_rank, image_dependent_share, mean_pairwise_cosine


def test_orthonormal_tokens_have_full_rank_and_no_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    tokens = basis[None, :8]
    assert effective_rank(tokens).item() == pytest.approx(8, abs=1e-9)
    assert mean_pairwise_cosine(tokens).item() == pytest.approx(0, abs=1e-9)


def test_identical_tokens_have_rank_one_and_cosine_one() -> None:
    tokens = torch.arange(1.0, 7.0).expand(2, 5, 6)
    torch.testing.assert_close(effective_rank(tokens), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean_pairwise_cosine(tokens), torch.ones(2))


def test_rank_is_the_exponential_of_the_singular_value_entropy() -> None:
    tokens = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))[None]
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(tokens).item() == pytest.approx(expected)


def test_cosine_equals_the_mean_over_all_pairs() -> None:
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1))
    cosines = torch.nn.functional.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    expected = cosines[:, ~torch.eye(7, dtype=torch.bool)].mean(dim=-1)
    torch.testing.assert_close(mean_pairwise_cosine(tokens), expected)


def test_opposite_pair_has_cosine_minus_one() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [-2.0, -4.0]]])
    assert mean_pairwise_cosine(tokens).item() == pytest.approx(-1)


def test_neither_depends_on_scale_or_order() -> None:
    tokens = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    changed = 1e-3 * tokens.flip(1)
    torch.testing.assert_close(effective_rank(changed), effective_rank(tokens))
    torch.testing.assert_close(mean_pairwise_cosine(changed), mean_pairwise_cosine(tokens))


def test_half_precision_is_computed_in_float32() -> None:
    tokens = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert effective_rank(tokens).dtype == torch.float32
    torch.testing.assert_close(effective_rank(tokens), effective_rank(tokens.float()))


def test_one_token_has_rank_one_and_no_pair() -> None:
    tokens = torch.ones(2, 1, 4)
    torch.testing.assert_close(effective_rank(tokens), torch.ones(2))
    assert mean_pairwise_cosine(tokens).isnan().all()


def test_no_tokens_and_zero_tokens_are_nan() -> None:
    assert effective_rank(torch.zeros(2, 0, 4)).isnan().tolist() == [True, True]
    assert mean_pairwise_cosine(torch.zeros(2, 0, 4)).isnan().tolist() == [True, True]
    assert effective_rank(torch.zeros(1, 3, 4)).isnan().all()


def test_gradients_do_not_flow() -> None:
    tokens = torch.randn(1, 3, 4, requires_grad=True)
    assert not effective_rank(tokens).requires_grad


def test_a_missing_batch_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="add a batch dimension"):
        effective_rank(torch.zeros(3, 4))


@pytest.mark.parametrize("num_images", [2, 8, 64])
@pytest.mark.parametrize(("constant_std", "expected"), [(0.0, 1.0), (1.0, 0.5), (3.0, 0.1)])
def test_the_image_share_of_constant_tokens_and_noise(num_images: int, constant_std: float, expected: float) -> None:
    generator = torch.Generator().manual_seed(0)
    constants = constant_std * torch.randn(1, 128, 64, generator=generator)
    tokens = constants + torch.randn(num_images, 128, 64, generator=generator) + 5
    # The grand mean is over 128 tokens, and the 8,192 values have a standard error of 2 %.
    assert image_dependent_share(tokens).item() == pytest.approx(expected, abs=0.03)


def test_tokens_that_do_not_depend_on_the_image_have_share_0() -> None:
    constants = torch.arange(12.0).view(1, 4, 3).expand(5, 4, 3)
    assert image_dependent_share(constants).item() == 0


def test_the_image_share_counts_what_is_common_to_all_tokens_of_an_image() -> None:
    tokens = torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(0)).expand(6, 4, 8)
    assert image_dependent_share(tokens).item() == pytest.approx(1)


def test_the_image_share_by_hand() -> None:
    # Token 0 is 0 or 2 (variance 2), token 1 is 10 or 10 (variance 0): 1 on average. The means 1 and 10 differ from 5.5
    # by 4.5; the noise of the means is 0.25 on average, as a deviation of 1 in one token is 0.5 from their mean.
    tokens = torch.tensor([[[0.0], [10.0]], [[2.0], [10.0]]])
    assert image_dependent_share(tokens).item() == pytest.approx(1 / (1 + 4.5**2 - 0.25))


@pytest.mark.parametrize("shape", [(1, 4, 3), (0, 4, 3), (3, 0, 3)])
def test_the_image_share_of_too_few_images_or_tokens_is_nan(shape: tuple[int, ...]) -> None:
    assert image_dependent_share(torch.ones(shape)).isnan()


def test_the_image_share_of_equal_tokens_is_nan() -> None:
    assert image_dependent_share(torch.ones(3, 4, 2)).isnan()
