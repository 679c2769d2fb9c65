"""Studies of attention and redundancy for `parcelray analyze`: tables, pictures and an MLflow run of each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parcelray.analysis.attention_maps import AttentionMaps, attention_maps
from parcelray.analysis.leave_token_out import Validity, leave_one_out, validity
from parcelray.analysis.redundancy_profile import RedundancyProfile, redundancy_profile
from parcelray.analysis.saliency import SaliencyReport, saliency_reports
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.train import TrackingConfig
from parcelray.evaluation.inputs import (
    MINI,
    Pair,
    benchmark_pairs,
    benchmark_prompts,
    mini_pairs,
    open_model,
    study_images,
    study_prompts,
)
from parcelray.studies.attention_plots import plot_agreement, plot_heat_maps, plot_redundancy, plot_validity
from parcelray.studies.output import interval_cell, record_study, write_json

_NUM_HEAT_MAPS = 4
"""Number of images for which heat maps are drawn."""
_SAME_RANKING = 0.9
"""Rank correlation between prompts above which a warning states that the attention ignores the prompt."""


def study_saliency(
    reference: str,
    console: Console,
    *,
    images: str = MINI,
    count: int = 24,
    prompts: Sequence[str] = (),
    job: EvaluateJob | None = None,
    folder: Path,
    tracking: TrackingConfig,
) -> dict[str, SaliencyReport]:
    """Measures how much the saliency of image patches depends on the prompt.

    The study gives the rank agreement between prompts, images, layers and heads, the patch properties that attract
    attention, and heat maps.

    Args:
        reference: a model reference.
        console: prints the tables.
        images: `mini`, or a folder of images.
        count: number of images.
        prompts: prompts used with every image; not needed for the mini suite.
        job: evaluation job whose benchmarks replace `images` and `prompts`. Only samples with one image are used; each
            image gets its own prompt and those of two other images.
        folder: folder for saliency.json, saliency.npz with all maps, agreement.png and the heat maps.
        tracking: MLflow settings.

    Returns:
        The report of each definition of saliency: attention of the last word, and mean attention of all words.

    Raises:
        UserError: the model, the images or the prompts cannot be used.
    """
    opened = open_model(reference, tracking.uri)
    side = opened.processor.image_size
    if job is None:
        pictures, prompts_of = study_images(images, count, side), study_prompts(images, count, prompts, side)
    else:
        pictures, prompts_of = benchmark_prompts(job, count, side)
    maps = attention_maps(opened.model, opened.processor, pictures, prompts_of)
    reports = saliency_reports(maps)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": opened.checkpoint.pinned} | {name: report.to_dict() for name, report in reports.items()}
    files = [
        write_json(folder / "saliency.json", content),
        _write_maps(folder / "saliency.npz", maps),
        folder / "agreement.png",
    ]
    plot_agreement(reports, folder / "agreement.png")
    for index in range(min(_NUM_HEAT_MAPS, count)):
        path = folder / f"heat_maps_{index}.png"
        plot_heat_maps(pictures[index], prompts_of[index], maps, index, path)
        files.append(path)
    for name, report in reports.items():
        console.print(_agreement_table(name, report), _layers_table(name, report), _properties_table(name, report))
        for layer, each in enumerate(report.between_prompts):
            if each.spearman.low > _SAME_RANKING:
                value = each.spearman.value
                console.print(
                    f"Warning: in layer {layer} the maps of {name} hardly change with the prompt (Spearman"
                    f" {value:.2f}).",
                )
    metrics = {
        key: value
        for name, report in reports.items()
        for key, value in _saliency_metrics(name.replace(" ", "_"), report)
    }
    record_study(
        tracking,
        f"analyze-saliency-{folder.name}",
        {"model": opened.checkpoint.pinned, "images": count},
        metrics,
        files,
    )
    console.print(f"Numbers and heat maps: {folder}")
    return reports


def study_validity(
    reference: str,
    console: Console,
    *,
    count: int = 100,
    permutations: int = 1000,
    job: EvaluateJob | None = None,
    folder: Path,
    tracking: TrackingConfig,
) -> dict[str, Validity]:
    """Measures whether important tokens matter, by leaving out each visual token of many image-question pairs.

    Args:
        reference: a model reference.
        console: prints progress and the table.
        count: number of image-question pairs.
        permutations: number of permutations of the permutation test.
        job: evaluation job whose benchmarks provide the samples with one image; None: the mini suite.
        folder: folder for validity.json and validity.png.
        tracking: MLflow settings.

    Raises:
        UserError: the model cannot be loaded, or compresses its visual tokens; or there are too few samples.
    """
    opened = open_model(reference, tracking.uri)
    side = opened.processor.image_size
    pairs: Sequence[Pair] = mini_pairs(count, side) if job is None else benchmark_pairs(job, count, side)
    measured = [
        leave_one_out(opened.model, opened.processor, pair, seed=index)
        for index, pair in enumerate(track(pairs, "Leaving out tokens", console=console))
    ]
    result = validity(
        [losses for losses, _ in measured], [measures for _, measures in measured], permutations=permutations
    )
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model": opened.checkpoint.pinned,
        "pairs": count,
        "measures": {name: each.to_dict() for name, each in result.items()},
    }
    files = [write_json(folder / "validity.json", content)]
    plot_validity(result, folder / "validity.png")
    files.append(folder / "validity.png")
    console.print(_validity_table(result, count))
    metrics = {f"{name}/correlation": each.correlation.value for name, each in result.items()}
    metrics |= {f"{name}/p_holm": each.p_holm for name, each in result.items()}
    record_study(
        tracking, f"analyze-validity-{folder.name}", {"model": opened.checkpoint.pinned, "pairs": count}, metrics, files
    )
    console.print(f"Numbers and picture: {folder}")
    return result


def study_redundancy(
    references: Sequence[str],
    console: Console,
    *,
    images: str = MINI,
    count: int = 64,
    folder: Path,
    tracking: TrackingConfig,
) -> dict[str, RedundancyProfile]:
    """Measures the redundancy of the visual tokens of several models on the same images.

    Args:
        references: model references.
        console: prints the table.
        images: `mini`, or a folder of images.
        count: number of images.
        folder: folder for redundancy.json and redundancy.png.
        tracking: MLflow settings.

    Raises:
        UserError: a model or the images cannot be used.
    """
    profiles = {}
    for reference in references:
        opened = open_model(reference, tracking.uri)
        profiles[reference] = redundancy_profile(
            opened.model, opened.processor, study_images(images, count, opened.processor.image_size)
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_json(folder / "redundancy.json", {name: each.to_dict() for name, each in profiles.items()})]
    plot_redundancy(profiles, folder / "redundancy.png")
    files.append(folder / "redundancy.png")
    console.print(_redundancy_table(profiles, count))
    metrics = {
        f"{Path(name).name}/{measure}": value.value
        for name, each in profiles.items()
        for measure, value in each.measures.items()
    }
    record_study(
        tracking,
        f"analyze-redundancy-{folder.name}",
        {"models": ", ".join(references), "images": count},
        metrics,
        files,
    )
    console.print(f"Numbers and picture: {folder}")
    return profiles


def _agreement_table(name: str, report: SaliencyReport) -> Table:
    table = Table(
        "layer",
        "pairs of",
        "Spearman",
        "Kendall",
        "Jaccard of the top 11 %",
        title=f"Do rankings by {name} agree? [95 % over images]",
    )
    for layer, (prompts, images) in enumerate(zip(report.between_prompts, report.between_images, strict=True)):
        for pairs, each in (("prompts, heads averaged", prompts), ("images, one prompt", images)):
            table.add_row(str(layer), pairs, *map(interval_cell, each))
        by_head = sorted(enumerate(report.by_head[layer]), key=lambda item: item[1].spearman.value)
        for which, (head, overlap) in (("least", by_head[0]), ("most", by_head[-1])):
            table.add_row(
                str(layer),
                f"prompts, head {head} ({which} stable)",
                interval_cell(overlap.spearman),
                "",
                interval_cell(overlap.jaccard),
            )
        table.add_row(
            str(layer),
            "heads, one image and prompt",
            interval_cell(report.between_heads[layer].spearman),
            "",
            interval_cell(report.between_heads[layer].jaccard),
        )
        if report.with_class_attention:
            table.add_row(
                str(layer), "decoder and vision tower", interval_cell(report.with_class_attention[layer]), "", ""
            )
    return table


def _layers_table(name: str, report: SaliencyReport) -> Table:
    """Returns a table of neighbouring layers, and of the first and the last; saliency.json has all pairs."""
    last = len(report.between_layers) - 1
    table = Table(
        "layers", "Spearman", "Jaccard of the top 11 %", title=f"Do layers agree on {name}? [95 % over images]"
    )
    for first, second in dict.fromkeys([*((layer, layer + 1) for layer in range(last)), (0, last)]):
        each = report.between_layers[first][second]
        table.add_row(f"{first} and {second}", interval_cell(each.spearman), interval_cell(each.jaccard))
    return table


def _properties_table(name: str, report: SaliencyReport) -> Table:
    layers = [f"layer {layer}" for layer in range(len(report.between_prompts))]
    table = Table(
        "property",
        *layers,
        title=f"Which patch properties attract {name}? Spearman with the mean over prompts [95 % over images]",
    )
    for measured, each in report.drawn_by.items():
        table.add_row(measured, *map(interval_cell, each))
    return table


def _saliency_metrics(name: str, report: SaliencyReport) -> Iterator[tuple[str, float]]:
    for layer, each in enumerate(report.between_prompts):
        yield f"{name}/between_prompts/spearman_layer_{layer}", each.spearman.value
        yield f"{name}/between_prompts/jaccard_layer_{layer}", each.jaccard.value
        yield f"{name}/between_images/spearman_layer_{layer}", report.between_images[layer].spearman.value
        yield f"{name}/between_heads/spearman_layer_{layer}", report.between_heads[layer].spearman.value
        for head, overlap in enumerate(report.by_head[layer]):
            yield f"{name}/between_prompts/spearman_layer_{layer}_head_{head}", overlap.spearman.value
            yield f"{name}/between_prompts/jaccard_layer_{layer}_head_{head}", overlap.jaccard.value


def _validity_table(result: Mapping[str, Validity], count: int) -> Table:
    table = Table(
        "measure",
        "correlation with the loss",
        "p",
        "p, Holm",
        "loss in its top 11 %",
        title=f"Do important tokens matter? {count} samples [95 % over samples]",
    )
    for name, each in sorted(result.items(), key=lambda item: -item[1].correlation.value):
        table.add_row(
            name, interval_cell(each.correlation), f"{each.p_value:.3f}", f"{each.p_holm:.3f}", interval_cell(each.mass)
        )
    return table


def _redundancy_table(profiles: Mapping[str, RedundancyProfile], count: int) -> Table:
    table = Table("measure", *profiles, title=f"Redundancy of the visual tokens, {count} images [95 % over images]")
    for name in next(iter(profiles.values())).measures:
        table.add_row(name, *(interval_cell(each.measures[name]) for each in profiles.values()))
    return table


def _write_maps(path: Path, maps: AttentionMaps) -> Path:
    """Writes all maps; the shape of each is given by the suffix of its name, as in `AttentionMaps`."""
    arrays = {
        "last_word_IPLHN": maps.last_word_IPLHN,
        "mean_word_IPLHN": maps.mean_word_IPLHN,
        "contrast_IN": maps.contrast_IN,
    }
    if maps.class_attention_IN is not None:
        arrays["class_attention_IN"] = maps.class_attention_IN
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for allow_pickle
    return path
