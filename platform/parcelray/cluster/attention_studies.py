"""`parcelray analyze`: studies of attention and redundancy, from a model reference to tables, pictures and a record."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from parcelray.analysis.attention_maps import attention_maps
from parcelray.analysis.leave_token_out import Validity, leave_one_out, validity
from parcelray.analysis.redundancy_profile import RedundancyProfile, redundancy_profile
from parcelray.analysis.saliency import Agreement, SaliencyReport, saliency_report
from parcelray.cluster.study_inputs import MINI, mini_pairs, open_model, study_images, study_prompts
from parcelray.config.train import TrackingConfig
from parcelray.evaluation.intervals import Interval
from parcelray.reports.attention_plots import plot_heat_maps, plot_redundancy, plot_validity
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.store import ensure_store

_SHOWN_IMAGES = 4
_SAME = 0.9
"""Rank correlation between prompts above which attention is said not to follow them."""


def study_saliency(
    reference: str, console: Console, *, images: str = MINI, count: int = 24, prompts: Sequence[str] = (), folder: Path, tracking: TrackingConfig
) -> SaliencyReport:
    """Saliency against the prompt: rank agreement between prompts, images, layers and heads, what draws attention, and heat maps.

    Args:
        reference: a model reference.
        console: for the tables.
        images: `mini`, or a folder of images.
        count: images.
        prompts: asked of every image; of the mini suite none are needed.
        folder: for saliency.json, saliency.npz with all maps, and heat maps.
        tracking: MLflow.

    Raises:
        UserError: model, images or prompts are not as they must be.
    """
    opened = open_model(reference, tracking.uri)
    pictures = study_images(images, count, opened.processor.image_size)
    asked = study_prompts(images, count, prompts, opened.processor.image_size)
    maps = attention_maps(opened.model, opened.processor, pictures, asked)
    report = saliency_report(maps)
    folder.mkdir(parents=True, exist_ok=True)
    files = [_write_json(folder / "saliency.json", {"model": opened.checkpoint.pinned} | report.to_dict())]
    for index in range(min(_SHOWN_IMAGES, count)):
        path = folder / f"heat_maps_{index}.png"
        plot_heat_maps(pictures[index], asked[index], maps, index, path)
        files.append(path)
    console.print(_agreement_table(report))
    console.print(_drawn_table(report))
    for layer, each in enumerate(report.between_prompts):
        if each.spearman.low > _SAME:
            console.print(f"Failure sign: in layer {layer} the heat maps hardly change with the prompt (Spearman {each.spearman.value:.2f}).", highlight=False)
    metrics = {f"between_prompts/spearman_layer_{layer}": each.spearman.value for layer, each in enumerate(report.between_prompts)}
    metrics |= {f"between_images/spearman_layer_{layer}": each.spearman.value for layer, each in enumerate(report.between_images)}
    _record(tracking, f"analyze-saliency-{folder.name}", {"model": opened.checkpoint.pinned, "images": count}, metrics, files)
    console.print(f"Numbers and heat maps: {folder}", highlight=False)
    return report


def study_validity(
    reference: str, console: Console, *, count: int = 100, permutations: int = 1000, folder: Path, tracking: TrackingConfig
) -> dict[str, Validity]:
    """Attention against what the answer needs: leaves out each token of many image-question pairs of the mini suite.

    Raises:
        UserError: the model cannot be loaded, or compresses.
    """
    opened = open_model(reference, tracking.uri)
    found = [
        leave_one_out(opened.model, opened.processor, pair, seed=index)
        for index, pair in enumerate(track(mini_pairs(count, opened.processor.image_size), "Leaving out tokens", console=console))
    ]
    result = validity([losses for losses, _ in found], [measures for _, measures in found], permutations=permutations)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": opened.checkpoint.pinned, "pairs": count, "measures": {name: each.to_dict() for name, each in result.items()}}
    files = [_write_json(folder / "validity.json", content)]
    plot_validity(result, folder / "validity.png")
    files.append(folder / "validity.png")
    console.print(_validity_table(result, count))
    metrics = {f"{name}/correlation": each.correlation.value for name, each in result.items()}
    _record(tracking, f"analyze-validity-{folder.name}", {"model": opened.checkpoint.pinned, "pairs": count}, metrics, files)
    console.print(f"Numbers and picture: {folder}", highlight=False)
    return result


def study_redundancy(
    references: Sequence[str], console: Console, *, images: str = MINI, count: int = 64, folder: Path, tracking: TrackingConfig
) -> dict[str, RedundancyProfile]:
    """How redundant the tokens of several models are on the same images.

    Raises:
        UserError: a model or the images are not as they must be.
    """
    profiles = {}
    for reference in references:
        opened = open_model(reference, tracking.uri)
        profiles[reference] = redundancy_profile(opened.model, opened.processor, study_images(images, count, opened.processor.image_size))
    folder.mkdir(parents=True, exist_ok=True)
    files = [_write_json(folder / "redundancy.json", {name: each.to_dict() for name, each in profiles.items()})]
    plot_redundancy(profiles, folder / "redundancy.png")
    files.append(folder / "redundancy.png")
    console.print(_redundancy_table(profiles, count))
    metrics = {f"{Path(name).name}/{measure}": value.value for name, each in profiles.items() for measure, value in each.measures.items()}
    _record(tracking, f"analyze-redundancy-{folder.name}", {"models": ", ".join(references), "images": count}, metrics, files)
    console.print(f"Numbers and picture: {folder}", highlight=False)
    return profiles


def _agreement_table(report: SaliencyReport) -> Table:
    table = Table("layer", "pairs of", "Spearman", "Kendall", "Jaccard of the top 11 %", title="Do rankings by attention agree? [95 % over images]")
    for layer, (prompts, images) in enumerate(zip(report.between_prompts, report.between_images, strict=True)):
        for name, each in (("prompts, one image", prompts), ("images, one prompt", images)):
            table.add_row(str(layer), name, *_cells(each))
        table.add_row(str(layer), "heads, one image and prompt", "", "", _cell(report.between_heads[layer]))
        if report.with_class_attention:
            table.add_row(str(layer), "decoder and vision tower", _cell(report.with_class_attention[layer]), "", "")
    return table


def _drawn_table(report: SaliencyReport) -> Table:
    layers = [f"layer {layer}" for layer in range(len(report.between_prompts))]
    table = Table("property", *layers, title="What draws attention whatever the prompt? Spearman with the mean over prompts [95 % over images]")
    for name, each in report.drawn_by.items():
        table.add_row(name, *map(_cell, each))
    return table


def _validity_table(result: Mapping[str, Validity], count: int) -> Table:
    table = Table(
        "measure", "correlation with the loss", "p", "loss in its top 11 %", title=f"Do important tokens matter? {count} questions [95 % over questions]"
    )
    for name, each in sorted(result.items(), key=lambda item: -item[1].correlation.value):
        table.add_row(name, _cell(each.correlation), f"{each.p_value:.3f}", _cell(each.mass))
    return table


def _redundancy_table(profiles: Mapping[str, RedundancyProfile], count: int) -> Table:
    table = Table("measure", *profiles, title=f"Redundancy of the visual tokens, {count} images [95 % over images]")
    for name in next(iter(profiles.values())).measures:
        table.add_row(name, *(_cell(each.measures[name]) for each in profiles.values()))
    return table


def _cells(agreement: Agreement) -> tuple[str, str, str]:
    return _cell(agreement.spearman), _cell(agreement.kendall), _cell(agreement.jaccard)


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _record(tracking: TrackingConfig, name: str, params: Mapping[str, str | int], metrics: Mapping[str, float], files: Sequence[Path]) -> None:
    if tracking.uri is None:
        return
    uri = ensure_store(tracking.uri)
    with tracked_run(uri, tracking.experiment, name, params=dict(params)) as run_id:
        tracker = MlflowRunLogger(uri, run_id)
        tracker.log_metrics({key: value for key, value in metrics.items() if value == value}, 0)
        for file in files:
            tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
        tracker.close()
