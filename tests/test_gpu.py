"""Results on a GPU compared with a CPU: clustering, every reducer, offline answers, serving engine and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parcelray.bench.kmeans import photograph_tokens
from parcelray.bench.overhead import REDUCERS
from parcelray.config.connector import M3ConnectorConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini import FAMILIES, family_samples
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.base import ReductionContext, gather_tokens
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.kmeans import cluster_sums, kmeans
from parcelray.models.vlm import load_processor, load_vlm
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import answer_all
from parcelray.training.train_loop import fit_in_process
from tests.serving.conftest import Asker
from tests.training.conftest import TINY, tiny_job
from tests.training.test_in_process import Recorder

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes convolutions in full float32, as on a CPU; the default on a GPU is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [sample for family in FAMILIES for sample in family_samples("test", family, 8)]


def overlap(one_BN: Tensor, two_BN: Tensor) -> float:
    """Returns how similar two assignments of tokens are, independent of the numbering of the output tokens.

    It is the number of token pairs that share an output token in both assignments, divided by the number in either.
    """
    together = [(each[:, :, None] == each[:, None]) & (each >= 0)[:, None] for each in (one_BN.cpu(), two_BN.cpu())]
    return float((together[0] & together[1]).sum() / (together[0] | together[1]).sum())


@pytest.mark.parametrize("num_clusters", [1, 13, 64, 192, 575])
@pytest.mark.parametrize("seeding", ["greedy", "plain"])
def test_clusters_of_photographs_match_the_cpu(num_clusters: int, seeding: Any) -> None:
    tokens = photograph_tokens(3, 256)
    expected, result, again = (
        kmeans(each, num_clusters, seeding=seeding) for each in (tokens, tokens.cuda(), tokens.cuda())
    )
    # A token halfway between two centroids may be assigned to either.
    assert overlap(result.assignment_BN, expected.assignment_BN) >= 0.97
    assert result.inertia_B.tolist() == pytest.approx(expected.inertia_B.tolist(), rel=1e-3, abs=1e-2)
    assert int(result.sizes_BK.min()) >= 1
    assert torch.equal(
        result.sizes_BK, torch.stack([each.bincount(minlength=num_clusters) for each in result.assignment_BN])
    )
    assert torch.equal(result.assignment_BN, again.assignment_BN)


@pytest.mark.parametrize("num_clusters", [32, 128])
def test_half_precision_clusters_are_as_good(num_clusters: int) -> None:
    tokens = photograph_tokens(4, 1024)
    expected, result = kmeans(tokens, num_clusters), kmeans(tokens.cuda().bfloat16(), num_clusters)

    def inertia(assignment_BN: Tensor) -> float:
        means_BKD = (
            cluster_sums(tokens, assignment_BN, num_clusters)
            / torch.stack([each.bincount() for each in assignment_BN])[:, :, None]
        )
        return float((tokens - gather_tokens(means_BKD, assignment_BN)).square().sum())

    assert inertia(result.assignment_BN.cpu()) == pytest.approx(inertia(expected.assignment_BN), rel=0.01)


def test_as_many_clusters_as_tokens() -> None:
    assert kmeans(photograph_tokens(2, 64).cuda(), 576).sizes_BK.unique().tolist() == [1]


def test_clusters_that_lose_all_their_tokens_are_filled() -> None:
    kernels = pytest.importorskip("parcelray.models.token_reduction.kmeans_triton")
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(4, 120, 3, generator=generator)
    gram = points @ points.transpose(1, 2)
    # Each cluster is spread over all tokens, so the means nearly coincide and many clusters lose all their tokens.
    start = (torch.arange(120, dtype=torch.int32) % 60).repeat(4, 1)
    result = kernels.iterate(gram.cuda(), start.cuda(), 60, 0.0, torch.zeros(4, device="cuda"), 50)
    for each in result.assignment_BN:
        assert sorted(each.unique().tolist()) == list(range(60))


@pytest.mark.parametrize("name", REDUCERS)
def test_reductions_match_the_cpu(name: str, samples: list[Sample]) -> None:
    config = REDUCERS[name]
    path = resolve_checkpoint("mini_llava").path
    processor = load_processor(path)
    reducer = build_reducer(config)
    budget = min(reducer.budgets_of(256, load_vlm(path).config.depths), key=lambda each: abs(each - 64))
    if reducer.reads == "prompt":
        settings = GenerationSettings(max_new_tokens=6, reducer=config.model_dump_json())
        answers = []
        for device in DEVICES:
            model = load_vlm(path).to(device).eval()
            answers.append(
                Predictor(model, processor, device=device, settings=settings).generate(
                    samples, num_visual_tokens=budget
                )
            )
        assert sum(one == two for one, two in zip(*answers, strict=True)) >= 0.95 * len(samples)
        return
    images = [decode_image(sample.images[0]) for sample in samples[:12]]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    result: list[Tensor] = []
    for device in DEVICES:
        model = load_vlm(path).to(device).eval()
        with torch.no_grad():
            view = EncoderView(model.model, pixels.to(device))
            reduction = reducer(
                view.project(view.patch_features_IND), num_visual_tokens=budget, context=ReductionContext(encoder=view)
            )
        assert reduction.tokens_BKD.shape[1] == budget
        result.append(reduction.assignment_BN)
    assert overlap(*result) >= 0.9


def test_answers_at_every_budget_match_the_cpu(samples: list[Sample]) -> None:
    path = resolve_checkpoint("mini_base").path
    processor = load_processor(path)
    budgets = [0, 16, 64, 256]
    answers = []
    for device in DEVICES:
        model = load_vlm(path, connector=M3ConnectorConfig()).to(device).eval()
        answers.append(
            Predictor(model, processor, device=device, settings=GenerationSettings(max_new_tokens=8)).generate_budgets(
                samples, budgets
            )
        )
    for budget in budgets:
        same = sum(one == two for one, two in zip(answers[0][budget], answers[1][budget], strict=True))
        assert same >= 0.95 * len(samples), budget


def test_the_engine_matches_offline_answers(samples: list[Sample]) -> None:
    path = resolve_checkpoint("mini_base").path
    processor = load_processor(path)
    model = load_vlm(path, connector=M3ConnectorConfig()).to("cuda").eval()
    offline = Predictor(
        model, processor, device="cuda", settings=GenerationSettings(max_new_tokens=8)
    ).generate_budgets(samples, [16, 256])
    engine = ContinuousEngine(model, processor)
    ask = Asker(processor)
    result = answer_all(engine, [ask(sample, budget) for budget in (16, 256) for sample in samples])
    engine.close()
    same = sum(one.text == two for one, two in zip(result, [*offline[16], *offline[256]], strict=True))
    assert same >= 0.97 * len(result)


def test_training_in_bf16_follows_float32(tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        recorder, folder = Recorder(), tmp_path / precision
        checkpoint, _ = fit_in_process(
            tiny_job(folder, training={"precision": precision}), folder, checkpoint=None, logger=recorder
        )
        losses.append(list(recorder.curve("train/loss").values()))
        assert (checkpoint / "model" / "model.safetensors").is_file()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mini", "mini_llava"])
def test_training_with_flex_attention_has_the_losses_of_eager_attention(tmp_path: Path, family: str) -> None:
    losses = []
    model = {**TINY["model"], "type": family, "text_head_dim": 16}
    for attention in ("eager", "flex"):
        recorder, folder = Recorder(), tmp_path / attention
        job = tiny_job(folder, model=model, training={"attention": attention, "steps": 3})
        fit_in_process(job, folder, checkpoint=None, logger=recorder)
        losses.append(list(recorder.curve("train/loss").values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
