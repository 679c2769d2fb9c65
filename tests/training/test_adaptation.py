"""Training with frozen parts, low-rank adapters and activation checkpointing."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.adaptation import PARTS
from parcelray.config.train import TrainJob
from parcelray.errors import UserError
from parcelray.models.adapters import part_modules
from parcelray.models.manifest import verify_manifest
from parcelray.models.vlm import load_vlm
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.training.run import run_training
from parcelray.training.start import build_resumed, build_start, check_device, prepare_model, step_reader
from parcelray.training.step import build_optimizer, losses, to_tensors
from parcelray.training.train_loop import fit_in_process, validate_checkpoint

from ..tiny import tiny_checkpoint
from .conftest import tiny_job
from .test_in_process import Recorder

AT_40 = {"type": "uniform", "budgets": [40]}
ONE_SAMPLE = {"samples": 1, "budgets": [16]}
LORA = {
    "tower": {"rank": 2, "dropout": 0.1},
    "projector": {"rank": 2},
    "decoder": {"rank": 4, "alpha": 4, "targets": ["q_proj", "down_proj"]},
}


def _run(job: TrainJob) -> Any:
    return run_training(job, Console(file=io.StringIO()))


def test_frozen_parts_do_not_change_and_others_do(tmp_path: Path) -> None:
    # At 16 tokens, the anchors alone need no weights of the connector.
    job = tiny_job(tmp_path, training={"steps": 1, "freeze": ["decoder", "tower"]}, budget=AT_40, validation=ONE_SAMPLE)
    assert job.training.freeze == ("tower", "decoder")
    before = build_start(job, None)[0]
    checkpoint, _ = fit_in_process(job, tmp_path, checkpoint=None, logger=NoMetrics())
    after = load_vlm(checkpoint / "model")
    for part in PARTS:
        pairs = [
            (one, two)
            for old, new in zip(part_modules(before, part), part_modules(after, part), strict=True)
            for one, two in zip(old.parameters(), new.parameters(), strict=True)
        ]
        assert all(torch.equal(one, two) for one, two in pairs) == (part in job.training.freeze), part


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"freeze": ["tower", "connector", "projector", "decoder"]}, "freeze has all parts"),
        ({"freeze": ["decoder"], "lora": {"decoder": {}}}, "lora.decoder has adapters, but freeze has decoder, too"),
        ({"lora": {}}, "no part of the model gets adapters"),
        ({"freeze": ["eyes"]}, "'tower', 'connector', 'projector' or 'decoder'"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, training: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_job(tmp_path, training=training)


def test_new_words_need_a_trained_decoder(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="new_words adds embeddings to the decoder"):
        tiny_job(tmp_path, new_words=["black"], training={"lora": {"decoder": {}}})


def test_a_model_without_trained_weights_is_refused(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path,
        connector={"type": "identity"},
        training={"freeze": ["tower", "projector", "decoder"]},
        budget={"type": "uniform", "budgets": [256]},
    )
    with pytest.raises(UserError, match=r"the connector identity has no weights of its own, so nothing is trained"):
        prepare_model(build_start(job, None)[0], job)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, Path]:
    """A finished training with adapters, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("adapted")
    start = tiny_checkpoint(folder, 5, connector={"type": "parcel", "num_heads": 2})
    job = tiny_job(
        folder, model={"type": "checkpoint", "reference": str(start)}, connector=None, training={"lora": LORA}
    )
    _run(job)
    return job, max((folder / "train" / "tiny" / "in-process").glob("checkpoint_*"))


def _start(job: TrainJob) -> Path:
    return Path(job.model.reference)  # type: ignore[union-attr]


def test_a_checkpoint_has_only_the_trained_weights(adapted: tuple[TrainJob, Path]) -> None:
    checkpoint = adapted[1]
    assert not (checkpoint / "model").exists()
    trained = load_file(checkpoint / "trained.safetensors")
    parts = {name: "lora_" in name for name in trained}
    assert all(is_adapter for name, is_adapter in parts.items() if ".connector." not in name)
    assert not any(is_adapter for name, is_adapter in parts.items() if ".connector." in name), "trained itself"
    assert {name.rpartition("_proj")[0][-2:] for name in trained if "language_model" in name} == {".q", "wn"}


def test_the_finished_model_is_an_ordinary_checkpoint_with_merged_adapters(adapted: tuple[TrainJob, Path]) -> None:
    job, checkpoint = adapted
    folder = checkpoint.parents[1] / "model"
    verify_manifest(folder)
    model = load_vlm(folder)
    start = load_vlm(_start(job))
    assert set(model.state_dict()) == set(start.state_dict())
    unmerged, processor = build_resumed(job, checkpoint, _start(job))
    batch = to_tensors(step_reader(job, processor, 0, 1).read(0), torch.device("cpu"), processor)
    with torch.no_grad():
        found, expected, before = (
            losses(each.eval(), batch, num_visual_tokens=40, image_token_id=processor.image_token_id).answer_sum
            for each in (model, unmerged, start)
        )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    assert abs(float(found - before)) > 0.01
    assert validate_checkpoint(job, checkpoint, _start(job))[0] == 6


def test_an_interrupted_run_with_adapters_resumes_to_the_same_bits(
    adapted: tuple[TrainJob, Path], tmp_path: Path
) -> None:
    job, checkpoint = adapted
    settings: dict[str, Any] = {"checkpoint": _start(job)}
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(job, tmp_path, logger=Recorder(fail_at=5), **settings)
    resumed = Recorder()
    found, _ = fit_in_process(job, tmp_path, logger=resumed, **settings)
    assert list(resumed.curve("train/loss")) == [4, 5, 6]
    one, two = (load_file(each / "trained.safetensors") for each in (found, checkpoint))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_start_under_the_same_checkpoint_is_refused(adapted: tuple[TrainJob, Path], tmp_path: Path) -> None:
    job, checkpoint = adapted
    other = tiny_checkpoint(tmp_path, 6, connector={"type": "parcel", "num_heads": 2})
    with pytest.raises(
        UserError, match=r"frozen weights .* are not those of the checkpoint .*: its files have changed"
    ):
        build_resumed(job, checkpoint, other)


@pytest.mark.parametrize(
    ("model", "connector", "more"),
    [
        ({"type": "mini"}, {"type": "parcel", "num_heads": 2}, {}),
        ({"type": "mini_llava"}, {"type": "mqt", "num_heads": 2}, {"lora": {"decoder": {"rank": 2, "dropout": 0.2}}}),
        ({"type": "mini_llava", "tower": "siglip"}, {"type": "m3"}, {"freeze": ["tower"]}),
    ],
)
def test_activation_checkpointing_gives_the_same_gradients(
    tmp_path: Path, model: dict[str, Any], connector: dict[str, Any], more: dict[str, Any]
) -> None:
    sizes = {"vision_width": 24, "vision_layers": 2, "vision_heads": 2, "text_width": 24, "text_layers": 2}
    gradients = []
    saved = []
    for recompute in (False, True):
        job = tiny_job(
            tmp_path,
            model=model | sizes,
            connector=connector,
            training={"activation_checkpointing": recompute} | more,
            budget={"type": "uniform", "budgets": [16]},
        )
        built, processor = build_start(job, None)
        prepare_model(built.train(), job)
        batch = to_tensors(step_reader(job, processor, 0, 1).read(0), torch.device("cpu"), processor)
        bytes_saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_saved
            bytes_saved += tensor.nbytes
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses(built, batch, num_visual_tokens=16, image_token_id=processor.image_token_id).answer_sum
        saved.append(bytes_saved)
        loss.backward()
        gradients.append({name: each.grad for name, each in built.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert saved[1] < 0.75 * saved[0]


@pytest.mark.nightly
def test_activation_checkpointing_works_with_the_kernels_of_bf16_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parcelray.training.accelerator.has_bf16_products", lambda: True)
    curves = []
    for recompute in (False, True):
        training = {"steps": 2, "precision": "bf16", "activation_checkpointing": recompute}
        job = tiny_job(tmp_path, training=training, budget=AT_40, validation=ONE_SAMPLE)
        recorder = Recorder()
        fit_in_process(job, tmp_path / str(recompute), checkpoint=None, logger=recorder)
        curves.append(recorder.curve("train/loss"))
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"attention": "flex"}}, "training.attention is flex, which needs a GPU"),
        ({"optimizer": {"type": "adamw_8bit"}}, "optimizer.type is adamw_8bit, which needs a GPU"),
    ],
)
def test_what_needs_a_gpu_is_refused_before_the_start(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("a GPU", "GPUs; set scaling.gpus_per_worker")):
        tiny_job(tmp_path, scaling={"num_workers": 2}, **changes)
    job = tiny_job(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        check_device(job, cpu_only=True)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    job = tiny_job(tmp_path, optimizer={"type": "adamw_8bit"})
    with pytest.raises(UserError, match="the package bitsandbytes is not installed on this host"):
        check_device(job, cpu_only=False)
    check_device(tiny_job(tmp_path, training={"attention": "flex"}), cpu_only=False)


def test_fused_updates_are_those_of_the_plain_optimizer(tmp_path: Path) -> None:
    weights = []
    for fused in (False, True):
        job = tiny_job(tmp_path, optimizer={"type": "adamw", "fused": fused, "weight_decay": 0.1})
        model, _ = build_start(job, None)
        optimizer = build_optimizer(model, job.optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        weights.append({name: each.detach() for name, each in model.named_parameters()})
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_have_the_losses_of_plain_layers(tmp_path: Path) -> None:
    curves = []
    for compiled in (False, True):
        training = {"steps": 3, "compile": compiled, "activation_checkpointing": True}
        recorder = Recorder()
        fit_in_process(
            tiny_job(tmp_path, training=training, validation=ONE_SAMPLE),
            tmp_path / str(compiled),
            checkpoint=None,
            logger=recorder,
        )
        curves.append(recorder.curve("train/loss"))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
