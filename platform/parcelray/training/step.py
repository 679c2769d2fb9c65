"""One training step, in torch only: no Ray, no MLflow, no accelerate.

Shapes: B prompts, I images, S text tokens, A answer tokens of all prompts, K visual tokens per image (the budget), V
vocabulary.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parcelray.config.optimizer import AdamW8bitConfig, AdamWConfig, OptimizerConfig, ScheduleConfig
from parcelray.datasets.collator import IGNORED, Batch
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.token_counts import TokenCounts, count_tokens


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """A collated batch on the device, before image placeholders are inserted."""

    pixel_values_ICHW: Tensor
    input_ids_BS: Tensor
    token_type_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BS: Tensor
    patch_labels_BN: Tensor | None = None
    """Target tokens of the patches of all images of each prompt, with N patches; None without patch supervision."""
    visual_offset: int = 0
    """Number of text tokens before the image placeholders."""
    samples_B: Tensor | None = None
    """Sample of each prompt, ascending from 0, whose images it shows; None: each prompt is a sample of its own."""

    @property
    def num_prompts(self) -> int:
        """Number of prompts B."""
        return self.input_ids_BS.shape[0]

    @property
    def num_samples(self) -> int:
        """Number of samples, each with its own images and one or more prompts."""
        return self.num_prompts if self.samples_B is None else int(self.samples_B[-1]) + 1

    @property
    def images_per_prompt(self) -> int:
        """Number of images that each prompt shows; prompts of one sample show the same images."""
        return self.pixel_values_ICHW.shape[0] // self.num_samples

    def tokens(self, num_visual_tokens: int) -> TokenCounts:
        """Counts the tokens of all prompts together, without padding, at a budget."""
        answers = int((self.token_type_ids_BS * self.attention_mask_BS).sum())
        prompts = int(self.attention_mask_BS.sum()) - answers
        return count_tokens(prompts, self.num_prompts * self.images_per_prompt, num_visual_tokens, answers)

    @property
    def num_answer_tokens(self) -> int:
        """Number of answer tokens of all prompts, which have a label each."""
        return int((self.labels_BS[:, 1:] != IGNORED).sum())

    def micro_batches(self, count: int, *, by_tokens: bool = False) -> list["TensorBatch"]:
        """Divides the samples, with their prompts and images, into at most `count` parts.

        Args:
            count: number of parts; there are fewer if there are fewer samples.
            by_tokens: whether a part has samples of similar length and is padded only to its own longest prompt. Else
                part i has every count-th sample, and the padding of the whole batch.
        """
        count = min(count, self.num_samples)
        if not by_tokens:
            return [self._select(torch.arange(part, self.num_samples, count)) for part in range(count)]
        lengths_B = self.attention_mask_BS.sum(1).cpu()
        longest = torch.zeros(self.num_samples, dtype=lengths_B.dtype)
        longest = longest.scatter_reduce(0, self._owners_B.cpu(), lengths_B, "amax")
        parts = longest.argsort(stable=True).tensor_split(count)
        return [self._select(part.sort().values)._trimmed(int(longest[part].max())) for part in parts]

    @property
    def _owners_B(self) -> Tensor:
        return torch.arange(self.num_prompts) if self.samples_B is None else self.samples_B

    def _select(self, samples: Tensor) -> "TensorBatch":
        """Returns the given samples, whose numbers are ascending, with their prompts and images."""
        samples = samples.to(self._owners_B.device)
        chosen = torch.isin(self._owners_B, samples).nonzero()[:, 0]
        pixels = self.pixel_values_ICHW.view(
            self.num_samples, self.images_per_prompt, *self.pixel_values_ICHW.shape[1:]
        )
        return TensorBatch(
            pixels[samples].flatten(0, 1),
            self.input_ids_BS[chosen],
            self.token_type_ids_BS[chosen],
            self.attention_mask_BS[chosen],
            self.labels_BS[chosen],
            self.patch_labels_BN[chosen] if self.patch_labels_BN is not None else None,
            self.visual_offset,
            None if self.samples_B is None else torch.searchsorted(samples, self.samples_B[chosen]),
        )

    def _trimmed(self, length: int) -> "TensorBatch":
        """Returns the batch without the padding after the given number of text tokens."""
        return replace(
            self,
            input_ids_BS=self.input_ids_BS[:, :length],
            token_type_ids_BS=self.token_type_ids_BS[:, :length],
            attention_mask_BS=self.attention_mask_BS[:, :length],
            labels_BS=self.labels_BS[:, :length],
        )

    def image_inputs(self) -> dict[str, Tensor]:
        """Inputs of the model for the images; empty for prompts without images."""
        images = self.images_per_prompt
        if not images:
            return {}
        inputs = {"pixel_values": self.pixel_values_ICHW}
        if self.samples_B is not None and self.num_samples < self.num_prompts:
            places = torch.arange(images, device=self.samples_B.device)
            inputs["image_index"] = (self.samples_B[:, None] * images + places).flatten()
        return inputs


def to_tensors(batch: Batch, device: torch.device, processor: ElasticProcessor) -> TensorBatch:
    """Move a collated batch to the device, and normalise its pixels as the model's image processor does."""
    mean_C11, std_C11 = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = torch.from_numpy(np.ascontiguousarray(batch["pixel_values"])).to(device)
    texts = {
        key: torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
        for key, values in batch.items()
        if key not in ("pixel_values", "skipped")
    }
    return TensorBatch(
        pixels.float().div_(255).sub_(mean_C11).div_(std_C11),
        texts["input_ids"],
        texts["token_type_ids"],
        texts["attention_mask"],
        texts["labels"],
        texts.get("patch_labels"),
        processor.visual_offset,
        texts["samples"],
    )


def with_placeholders(batch: TensorBatch, num_visual_tokens: int, image_token_id: int) -> dict[str, Tensor]:
    """Model inputs of a batch at a budget: each prompt gets K image placeholders per image at `visual_offset`."""
    prompts = batch.num_prompts
    count = batch.images_per_prompt * num_visual_tokens

    def inserted(values_BS: Tensor, value: int) -> Tensor:
        before_BO, after_BS = values_BS[:, : batch.visual_offset], values_BS[:, batch.visual_offset :]
        return torch.cat([before_BO, values_BS.new_full((prompts, count), value), after_BS], dim=1)

    return {
        **batch.image_inputs(),
        "input_ids": inserted(batch.input_ids_BS, image_token_id),
        "token_type_ids": inserted(batch.token_type_ids_BS, 0),
        "attention_mask": inserted(batch.attention_mask_BS, 1),
    }


class Losses(NamedTuple):
    """The losses of one forward pass, summed over its prompts; the caller divides by the number of prompts.

    The loss of a prompt is the mean over its positions, so that long answers have the same weight as short ones (as in
    PaliGemma's training). With `token_weight`, all answer tokens of a step have the same weight instead (as in LLaVA).
    """

    answer_sum: Tensor
    """Cross-entropy of the answers."""
    patch_sum: Tensor | None
    """Cross-entropy of the labelled patches; None without labelled patches."""
    distillation_sum: Tensor | None
    """KL divergence of the answers from the teacher's logits; None without a teacher."""
    answer_logits_AV: Tensor | None
    """Detached logits at the answer positions, the teacher of other budgets of the same batch; None unless kept."""

    def objective(self, patch_supervision: float, distillation: float) -> Tensor:
        """The loss to minimise.

        Args:
            patch_supervision: weight of the patches.
            distillation: weight of the KL divergence, if there is a teacher; the answers have the rest of 1.
        """
        loss = self.answer_sum
        if self.distillation_sum is not None:
            loss = (1 - distillation) * loss + distillation * self.distillation_sum
        return loss if self.patch_sum is None else loss + patch_supervision * self.patch_sum


def losses(
    model: nn.Module,
    batch: TensorBatch,
    *,
    num_visual_tokens: int,
    image_token_id: int,
    anchor_grid: int | None = None,
    teacher_logits_AV: Tensor | None = None,
    keep_logits: bool = False,
    token_weight: Tensor | None = None,
) -> Losses:
    """Run the model on a batch at a budget and compute its losses.

    Without patch labels, logits are computed only at text positions, because those of the visual tokens are not used.
    Patch labels are used only if each visual token is one patch.

    Args:
        model: the model, possibly wrapped for distributed training.
        batch: the batch.
        num_visual_tokens: the budget K.
        image_token_id: id of the image placeholders.
        anchor_grid: side of the anchor grid; None: the connector's routing decides.
        teacher_logits_AV: `answer_logits_AV` of the batch at the largest budget, for in-place distillation (Yu and
            Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019).
        keep_logits: whether to return the logits at the answer positions.
        token_weight: weight of each answer token: prompts per answer token in the whole step, so that the sum of all
            losses, divided by the number of prompts, is the mean over the tokens. None: the inverse of the number of
            answer tokens of its prompt.
    """
    length = batch.input_ids_BS.shape[1]
    inputs = with_placeholders(batch, num_visual_tokens, image_token_id)
    num_visual = inputs["input_ids"].shape[1] - length
    patch_labels = batch.patch_labels_BN
    if patch_labels is not None and (patch_labels.shape[1] != num_visual or not bool((patch_labels != IGNORED).any())):
        patch_labels = None
    keep = length if patch_labels is None else 0
    logits_BSV = model(
        **inputs, num_visual_tokens=num_visual_tokens, anchor_grid=anchor_grid, logits_to_keep=keep, use_cache=False
    ).logits.float()
    text_BSV, labels_BS = logits_BSV[:, -length:-1], batch.labels_BS[:, 1:]
    patch_sum = None
    if patch_labels is not None:
        visual_BNV = logits_BSV[:, batch.visual_offset : batch.visual_offset + num_visual]
        patch_sum = _means(_cross_entropy(visual_BNV, patch_labels), patch_labels).sum()
    is_answer_BS = labels_BS != IGNORED
    divergence = None
    if teacher_logits_AV is not None:
        divergence = distillation_sum(text_BSV[is_answer_BS], teacher_logits_AV, labels_BS, token_weight)
    kept_AV = text_BSV.detach()[is_answer_BS] if keep_logits else None
    each_BS = _cross_entropy(text_BSV, labels_BS)
    answer_sum = _means(each_BS, labels_BS).sum() if token_weight is None else each_BS.sum() * token_weight
    return Losses(answer_sum, patch_sum, divergence, kept_AV)


def distillation_sum(
    student_logits_AV: Tensor, teacher_logits_AV: Tensor, labels_BS: Tensor, token_weight: Tensor | None = None
) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, in nats.

    It is the mean over the answer tokens of each prompt, summed over the prompts, as the cross-entropy is.

    Args:
        student_logits_AV: logits at the answer positions, in row-major order of `labels_BS`.
        teacher_logits_AV: the teacher's logits at the same positions.
        labels_BS: labels; the answer positions are those that are not ignored.
        token_weight: see `losses`.
    """
    each_A = F.kl_div(
        student_logits_AV.log_softmax(-1), teacher_logits_AV.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    if token_weight is not None:
        return each_A.sum() * token_weight
    is_answer_BS = labels_BS != IGNORED
    counts_A = is_answer_BS.sum(1, keepdim=True).expand_as(is_answer_BS)[is_answer_BS]
    return (each_A / counts_A).sum()


def _cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy of each position, [B, S]; 0 at ignored ones."""
    return F.cross_entropy(
        logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels_BS)


def _means(values_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean over the labelled positions of each prompt: [B], 0 for a prompt without labels."""
    return values_BS.sum(1) / (labels_BS != IGNORED).sum(1).clamp(min=1)


def parameter_groups(model: ElasticVLM, config: OptimizerConfig) -> list[dict[str, object]]:
    """Optimiser groups: connector and shared weights, each with weight decay and without.

    Weight decay applies to matrices, except those that a module names in its attribute `no_weight_decay`.
    """
    undecayed = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in undecayed
            members.setdefault((".connector." in name, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * (config.connector_multiplier if connector else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (connector, decays), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: ElasticVLM, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimiser of a job."""
    groups = parameter_groups(model, config)
    if isinstance(config, AdamWConfig):
        # Without `fused`, torch chooses between its other implementations.
        fused = config.fused or None
        return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused)
    if isinstance(config, AdamW8bitConfig):
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=(config.beta1, config.beta2), eps=config.epsilon)
        return optimizer
    return torch.optim.SGD(groups, momentum=config.momentum)


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Factor on the peak learning rate at step `step` (0-based)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.type == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    shape = 1 - progress if config.type == "linear" else 0.5 * (1 + float(np.cos(np.pi * progress)))
    return config.final_fraction + (1 - config.final_fraction) * shape
