"""Predicts answers at any budget; the vision tower runs once per image for all budgets and all questions about it."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from parcelray.config.evaluate import BLIND
from parcelray.config.reducer import ReducerConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.errors import NotFiniteError, SystemFailure, UserError
from parcelray.evaluation.predict.confidence import UNKNOWN, Confidence, ConfidenceRecorder, entropy
from parcelray.evaluation.predict.generation import GREEDY, GenerationSettings
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.decoding import NOT_FINITE, answer_lengths, decode_answers, end_token_ids, generate
from parcelray.models.feature_cache import FeatureCache
from parcelray.models.model_reducer import ImageTokens, ModelReducer, joined_images
from parcelray.models.reduced_decoder import ReducedDecoder, VisualTokens, encode_prompts
from parcelray.models.token_counts import TokenCounts, count_tokens
from parcelray.models.token_reduction import TokenReducer
from parcelray.models.token_reduction.base import unreduced
from parcelray.models.token_reduction.encoder_view import EncoderView


class EncodedImages(NamedTuple):
    """A batch of images, encoded together."""

    images: tuple[bytes, ...]
    """Images that can be decoded, in the order of the view."""
    problems: Mapping[bytes, str]
    """Reasons why the other images cannot be decoded."""
    view: EncoderView | None
    """None for the blind model, and where no image can be decoded."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held."""
        return self.view.num_bytes if self.view is not None else 0


NO_TOKENS = TokenCounts(0, 0)
"""The counts of a sample without an answer."""


class Answer(NamedTuple):
    """A model's answer to one sample at one budget."""

    text: str
    num_new_tokens: int
    """Number of generated tokens, including the end token."""
    cut_off: bool
    """Whether the answer reached `max_new_tokens` without an end token."""
    problem: str = ""
    """Reason why there is no answer (an image that cannot be decoded, or logits that are not finite); empty: none."""
    confidence: Confidence = UNKNOWN
    """The model's confidence in the answer."""
    tokens: TokenCounts = NO_TOKENS
    """Visual and text tokens of the prompt, as the decoder got them."""


def _no_answer(problem: str) -> Answer:
    return Answer("", 0, False, problem)


class Predictor:
    """Predicts answers to samples with one model.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        batch_size: images per batch of the encoder and of the decoder; each frame of a video counts.
        settings: how answers are generated.
        device: device of the model.
        features: cache of patch features, shared with other predictors of the same model; None: no cache.
    """

    def __init__(
        self,
        model: ElasticVLM,
        processor: ElasticProcessor,
        *,
        batch_size: int = 64,
        settings: GenerationSettings = GREEDY,
        device: str = "cpu",
        features: FeatureCache[EncodedImages] | None = None,
    ) -> None:
        self._model = model
        self._features = features
        self._processor = processor
        self._end_ids = end_token_ids(model, processor.tokenizer)
        self._batch_size = batch_size
        self._settings = settings
        self._device = torch.device(device)
        self._reducer = (
            ModelReducer(model, TypeAdapter(ReducerConfig).validate_json(settings.reducer))
            if settings.reducer is not None
            else None
        )
        if settings.decoding == "beam" and self._reducer is not None and self._reducer.needs_decoder:
            reducer = self._reducer.reducer
            raise UserError(
                f"The reducer {reducer.name} with positions {reducer.positions} does not support beam search; set"
                " decoding to greedy or likelihood."
            )

    def without_features(self) -> "Predictor":
        """Returns the same predictor without its feature cache."""
        other = copy.copy(self)
        other._features = None
        return other

    def generate(self, samples: Sequence[Sample], *, num_visual_tokens: int) -> list[str]:
        """Predicts the answers at one budget (0: blind), in the order of the samples."""
        return self.generate_budgets(samples, [num_visual_tokens])[num_visual_tokens]

    def generate_budgets(self, samples: Sequence[Sample], budgets: Sequence[int]) -> dict[int, list[str]]:
        """Returns the texts of `answer_budgets`.

        Raises:
            UserError: an image cannot be decoded.
            NotFiniteError: the model's logits for a sample are not finite.
        """
        found = self.answer_budgets(samples, budgets)
        for sample, *answers in zip(samples, *found.values(), strict=True):
            for answer in answers:
                if answer.problem:
                    error = NotFiniteError if answer.problem == NOT_FINITE else UserError
                    raise error(f"Sample {sample.id!r} of {sample.benchmark}: {answer.problem}")
        return {budget: [answer.text for answer in answers] for budget, answers in found.items()}

    @torch.inference_mode()
    def answer_budgets(self, samples: Sequence[Sample], budgets: Sequence[int]) -> dict[int, list[Answer]]:
        """Predicts answers at several budgets; each image is encoded once, even if several samples show it.

        A sample with an image that cannot be decoded has a problem instead of an answer at every budget, and a sample
        whose logits are not finite has one at the budgets where they are not.

        Raises:
            UnsupportedBudgetError: the model's connector does not support a budget.
            SystemFailure: the prompt holds another number of visual tokens than the budget.
        """
        answers = self._answer_chunks(samples, _chunks(samples, self._batch_size), budgets)
        return {budget: [given[index] for index in range(len(samples))] for budget, given in answers.items()}

    def _answer_chunks(
        self, samples: Sequence[Sample], chunks: Iterable[list[int]], budgets: Sequence[int]
    ) -> dict[int, dict[int, Answer]]:
        """Predicts the answers by budget and index of the sample, one chunk of indices after the other."""
        answers: dict[int, dict[int, Answer]] = {budget: {} for budget in budgets}
        for chunk in chunks:
            try:
                given = self._answer_chunk(samples, chunk, budgets)
            except NotFiniteError:
                # A reducer refuses a whole batch, so each sample is tried alone.
                if len(chunk) > 1:
                    given = self._answer_chunks(samples, [[index] for index in chunk], budgets)
                else:
                    given = {budget: {chunk[0]: _no_answer(NOT_FINITE)} for budget in budgets}
            for budget in budgets:
                answers[budget] |= given[budget]
        return answers

    def _answer_chunk(
        self, samples: Sequence[Sample], chunk: list[int], budgets: Sequence[int]
    ) -> dict[int, dict[int, Answer]]:
        """Predicts the answers to samples whose images are encoded together."""
        shown = tuple(dict.fromkeys(image for index in chunk for image in samples[index].images))
        encoded = self._encoded(shown, blind=all(budget == BLIND for budget in budgets))
        problems = {
            index: _no_answer(encoded.problems[image])
            for index in chunk
            for image in samples[index].images
            if image in encoded.problems
        }
        good = [index for index in chunk if index not in problems]
        answers = {}
        for budget in budgets:
            tokens = self._image_tokens(encoded, budget)
            answers[budget] = problems.copy()
            for indices in _batches(samples, good, self._batch_size):
                given = self._decode([samples[index] for index in indices], tokens, budget)
                answers[budget] |= zip(indices, given, strict=True)
        return answers

    def _encoded(self, images: tuple[bytes, ...], *, blind: bool) -> EncodedImages:
        """Encodes images with the vision tower, or takes them from the cache."""
        watch = self._reducer is not None and self._reducer.reads_encoder

        def encode() -> EncodedImages:
            fitted, problems = _fitted(images, self._processor)
            if blind or not fitted:
                return EncodedImages(tuple(fitted), problems, None)
            pixels = self._processor.normalised(list(fitted.values()))
            return EncodedImages(
                tuple(fitted),
                problems,
                EncoderView(self._model.model, pixels.to(self._device, self._model.dtype), watch=watch),
            )

        if self._features is None:
            return encode()
        key = (images, blind, watch)
        encoded = self._features.get(key)
        if encoded is None:
            encoded = encode()
            self._features.put(key, encoded)
        return encoded

    def _image_tokens(self, encoded: EncodedImages, budget: int) -> dict[bytes, ImageTokens]:
        """Compresses each image to its visual tokens; returns none for the blind baseline."""
        images, view = encoded.images, encoded.view
        if budget == BLIND or not images:
            return {}
        assert view is not None
        if self._reducer is None:
            tokens_UKL = self._model.model.compress(
                view.patch_features_IND, num_visual_tokens=budget, anchor_grid=self._settings.anchor_grid
            )
            reduction = unreduced(tokens_UKL)
        else:
            reduction = self._reducer.reduce(view.patch_features_IND, budget, view)
        return {
            image: ImageTokens(*each)
            for image, *each in zip(
                images, reduction.tokens_BKD, reduction.position_ids_BK, reduction.sizes_BK, strict=True
            )
        }

    def _decode(self, batch: Sequence[Sample], tokens: dict[bytes, ImageTokens], budget: int) -> list[Answer]:
        if self._settings.decoding == "likelihood":
            return self._choose(batch, tokens, budget)
        recorder = ConfidenceRecorder(self._settings.num_beams)
        options: dict[str, Any] = {
            "max_new_tokens": self._settings.max_new_tokens,
            "end_ids": self._end_ids,
            "pad_token_id": self._processor.tokenizer.pad_token_id,
        }
        if (decoder := self._reduced_decoder(budget)) is not None:
            prompts = encode_prompts(self._processor, [sample.prompt for sample in batch], None, self._device)
            lengths_B = prompts.valid_BT.sum(1) + len(prompts.before_O)
            new_BS = decoder.generate(
                prompts,
                self._visual_of(batch, tokens),
                reducer=self._prompt_reducer,
                budget=self._total(batch, budget),
                on_logits=recorder.record,
                **options,
            )
            return self._answers(new_BS, recorder, self._counts(batch, lengths_B, budget))
        inputs: dict[str, Any] = dict(
            self._processor.prompts(
                [sample.prompt for sample in batch], len(batch[0].images), num_visual_tokens=budget
            ).to(self._device)
        )
        self._check_count(inputs["input_ids"], len(batch) * len(batch[0].images) * budget)
        lengths_B = inputs["attention_mask"].sum(1) - len(batch[0].images) * budget
        inputs |= self._images_of(batch, tokens)
        new_BS = generate(self._model, inputs, num_beams=self._settings.num_beams, on_scores=recorder.record, **options)
        return self._answers(new_BS, recorder, self._counts(batch, lengths_B, budget))

    def _counts(self, batch: Sequence[Sample], text_lengths_B: Tensor, budget: int) -> list[TokenCounts]:
        """Counts the tokens of each prompt from the number of text tokens in the decoder's input."""
        return [count_tokens(length, len(batch[0].images), budget) for length in text_lengths_B.tolist()]

    def _answers(self, new_BS: Tensor, recorder: ConfidenceRecorder, counts: list[TokenCounts]) -> list[Answer]:
        lengths, ended = answer_lengths(new_BS, self._end_ids)
        texts = decode_answers(self._processor.tokenizer, new_BS, lengths, ended)
        return [
            (
                _no_answer(NOT_FINITE)
                if confidence is None
                else Answer(text, length, not has_end, confidence=confidence, tokens=tokens)
            )
            for text, length, has_end, confidence, tokens in zip(
                texts, lengths, ended, recorder.confidences(lengths), counts, strict=True
            )
        ]

    def _choose(self, batch: Sequence[Sample], tokens: dict[bytes, ImageTokens], budget: int) -> list[Answer]:
        """Returns the likeliest choice of each sample.

        It has the largest sum of the log-probabilities of its tokens and its end token.
        """
        pairs = [(index, choice) for index, sample in enumerate(batch) for choice in _choices(sample)]
        scores: list[float] = []
        lengths: list[int] = []
        counts: list[TokenCounts] = []
        size = max(1, self._batch_size // max(1, len(batch[0].images)))
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            shown = [batch[index] for index, _ in part]
            logs_BS, answers_BS, lengths_B = self._log_likelihoods(
                shown, [choice for _, choice in part], tokens, budget
            )
            counts += self._counts(shown, lengths_B, budget)
            scores += logs_BS.where(answers_BS, 0.0).sum(1).tolist()
            lengths += answers_BS.sum(1).tolist()
        chosen = []
        for sample_index in range(len(batch)):
            own = [index for index, (owner, _) in enumerate(pairs) if owner == sample_index]
            if not all(math.isfinite(scores[index]) for index in own):
                chosen.append(_no_answer(NOT_FINITE))
                continue
            best = max(own, key=lambda index: scores[index])
            spread = float(entropy(torch.tensor([scores[index] for index in own]).log_softmax(0)))
            chosen.append(
                Answer(
                    pairs[best][1],
                    lengths[best],
                    False,
                    confidence=Confidence(scores[best] / lengths[best], spread),
                    tokens=counts[best],
                )
            )
        return chosen

    def _log_likelihoods(
        self, batch: Sequence[Sample], answers: list[str], tokens: dict[bytes, ImageTokens], budget: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the log-probabilities of the answer tokens [B, S].

        Returns:
            The log-probabilities, the mask of the answer positions [B, S], and the number of text tokens of each prompt
            without its answer [B].
        """
        texts = [sample.prompt for sample in batch]
        if (decoder := self._reduced_decoder(budget)) is not None:
            prompts = encode_prompts(self._processor, texts, answers, self._device)
            logits_BSV = decoder.logits(
                prompts, self._visual_of(batch, tokens), reducer=self._prompt_reducer, budget=self._total(batch, budget)
            ).float()
            ids_BS, answers_BS = prompts.after_BT[:, 1:], (prompts.answer_BT & prompts.valid_BT)[:, 1:]
            lengths_B = (prompts.valid_BT & ~prompts.answer_BT).sum(1) + len(prompts.before_O)
        else:
            inputs = dict(
                self._processor.prompts(texts, len(batch[0].images), num_visual_tokens=budget, answers=answers).to(
                    self._device
                )
            )
            self._check_count(inputs["input_ids"], len(batch) * len(batch[0].images) * budget)
            everywhere_BS = inputs["token_type_ids"].bool() & inputs["attention_mask"].bool()
            first = int(everywhere_BS.int().argmax(1).min())
            keep = everywhere_BS.shape[1] - first + 1
            logits_BSV = self._model(
                **inputs, **self._images_of(batch, tokens), logits_to_keep=keep, use_cache=False
            ).logits.float()
            ids_BS, answers_BS = inputs["input_ids"][:, first:], everywhere_BS[:, first:]
            lengths_B = (inputs["attention_mask"] - everywhere_BS.long()).sum(1) - len(batch[0].images) * budget
        return logits_BSV[:, :-1].log_softmax(-1).gather(2, ids_BS[:, :, None]).squeeze(2), answers_BS, lengths_B

    def _reduced_decoder(self, budget: int) -> ReducedDecoder | None:
        return self._reducer.decoder_at(budget) if self._reducer is not None else None

    @property
    def _prompt_reducer(self) -> TokenReducer | None:
        return self._reducer.in_decoder if self._reducer is not None else None

    def _total(self, batch: Sequence[Sample], budget: int) -> int:
        """Number of visual tokens of a prompt with all its images."""
        return budget * len(batch[0].images)

    def _visual_of(self, batch: Sequence[Sample], tokens: dict[bytes, ImageTokens]) -> VisualTokens:
        """Joins the visual tokens of each prompt's images; position ids continue from image to image."""
        rows = [
            joined_images([tokens[image] for image in sample.images], self._processor.num_patches) for sample in batch
        ]
        return VisualTokens(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def _images_of(self, batch: Sequence[Sample], tokens: dict[bytes, ImageTokens]) -> dict[str, Any]:
        if not tokens:
            return {}
        return self._model.image_inputs(
            torch.stack([tokens[image].tokens_KL for sample in batch for image in sample.images]),
            self._settings.anchor_grid,
        )

    def _check_count(self, input_ids_BS: Tensor, expected: int) -> None:
        found = int((input_ids_BS == self._model.config.image_token_id).sum())
        if found != expected:
            raise SystemFailure(
                f"The prompt holds {found} visual tokens, but the budget requires {expected}; the processor does not"
                " match the model."
            )


def _fitted(images: Iterable[bytes], processor: ElasticProcessor) -> tuple[dict[bytes, Image.Image], dict[bytes, str]]:
    """Decodes each distinct image to the model's input size; returns the images, and the problems of the others."""
    fitted: dict[bytes, Image.Image] = {}
    problems: dict[bytes, str] = {}
    for image in images:
        if image not in fitted and image not in problems:
            try:
                fitted[image] = processor.fitted(decode_image(image))
            except UserError as error:
                problems[image] = str(error)
    return fitted, problems


def _choices(sample: Sample) -> list[str]:
    choices = sample.metadata.get("candidates") or sample.metadata.get("choices")
    if not choices:
        raise UserError(
            f"Sample {sample.id!r} of {sample.benchmark} has no choices, which decoding by likelihood needs; give the"
            " benchmark a column of choices, or set decoding to greedy."
        )
    return [str(choice) for choice in choices if str(choice).strip()]


def _chunks(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Yields indices of samples with at most `batch_size` distinct images, or of one sample.

    Samples that show the same images are in one chunk where possible.
    """
    first_with: dict[tuple[bytes, ...], int] = {}
    owners = [first_with.setdefault(sample.images, index) for index, sample in enumerate(samples)]
    chunk: list[int] = []
    images: set[bytes] = set()
    for index in sorted(range(len(samples)), key=lambda index: (owners[index], index)):
        if chunk and len(images.union(samples[index].images)) > batch_size:
            yield chunk
            chunk, images = [], set()
        chunk.append(index)
        images.update(samples[index].images)
    if chunk:
        yield chunk


def _batches(samples: Sequence[Sample], chunk: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yields a chunk's indices in batches with the same number of images and with prompts of similar length."""
    groups: dict[int, list[int]] = {}
    for index in chunk:
        groups.setdefault(len(samples[index].images), []).append(index)
    for num_images, indices in sorted(groups.items()):
        size = max(1, batch_size // max(1, num_images))
        indices.sort(key=lambda index: (len(samples[index].prompt), index))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
