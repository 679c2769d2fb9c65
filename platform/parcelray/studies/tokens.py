"""Studies of anchors and query tokens for `parcelray analyze`: spectra, and the division of the work between both."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from parcelray.analysis.spectra import (
    ANCHORS,
    PATCHES,
    Floats,
    GridOf,
    SpectralDifference,
    Spectrum,
    normalised_spectra,
    radial_powers,
    spectral_differences,
)
from parcelray.analysis.token_analysis import PartMeasures, token_measures
from parcelray.config.train import TrackingConfig
from parcelray.errors import UserError, describe_values
from parcelray.evaluation.inputs import MINI, StudyModel, open_model, study_images
from parcelray.studies.output import interval_cell, record_study, write_json
from parcelray.studies.token_plots import plot_spectra, plot_tokens

POOLED_BUDGET = 64
"""Budget of the figure of pooled grids in the paper."""
BUDGET = 256
"""Budget of the figure of anchors and queries in the paper."""
_TOKEN_BUDGETS = (16, 32, 64, 128, 256)


class SpectralStudy(NamedTuple):
    """The spectra of both figures, and the differences between the spectra of the second one."""

    pooled: Sequence[Spectrum]
    """Anchors at the budget of the first figure."""
    spectra: Sequence[Spectrum]
    """Anchors, queries and attention maps at the budget of the second figure, and the patch grids."""
    differences: Sequence[SpectralDifference]
    """Differences between pooled grids, then those between the spectra of the second figure."""

    def to_dict(self) -> dict[str, list[dict[str, object]]]:
        """Returns the spectra as JSON-serialisable data."""
        return {name: [each.to_dict() for each in members] for name, members in self._asdict().items()}


def study_spectra(
    references: Sequence[str],
    console: Console,
    *,
    images: str = MINI,
    count: int = 64,
    pooled_budget: int = POOLED_BUDGET,
    budget: int = BUDGET,
    folder: Path,
    tracking: TrackingConfig,
) -> SpectralStudy:
    """Measures the spatial spectra of anchors and queries of several models on the same images (arXiv 2605.30126, A).

    A model that lacks one of the budgets is left out of that figure.

    Args:
        references: model references.
        console: prints the tables.
        images: `mini`, or a folder of images.
        count: number of images.
        pooled_budget: budget of the cumulative concentration of the anchors.
        budget: budget of the radial power of anchors and queries.
        folder: folder for spectral.json and spectral.png.
        tracking: MLflow settings.

    Raises:
        UserError: a model or the images cannot be used, or a model supports neither budget.
    """
    powers: dict[GridOf, Floats] = {}
    for reference in dict.fromkeys(references):
        opened = open_model(reference, tracking.uri)
        budgets = _supported(reference, opened, (pooled_budget, budget), console)
        pictures = study_images(images, count, opened.processor.image_size)
        found = radial_powers(opened.model, opened.processor, pictures, budgets)
        powers |= {GridOf(reference, part, number): power_IR for (part, number), power_IR in found.items()}
    every = normalised_spectra(powers)
    pooled = [each for each in every if (each.grid.part, each.grid.num_visual_tokens) == (ANCHORS, pooled_budget)]
    spectra = [each for each in every if each.grid.part == PATCHES or each.grid.num_visual_tokens == budget]
    differences = spectral_differences(pooled) if pooled_budget != budget else []
    study = SpectralStudy(pooled, spectra, [*differences, *spectral_differences(spectra)])
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_json(folder / "spectral.json", study.to_dict()), folder / "spectral.png"]
    plot_spectra(pooled, spectra, files[1], pooled_budget=pooled_budget, budget=budget)
    console.print(_spectra_table([*pooled, *spectra], count), _differences_table(study.differences, count))
    metrics = {
        f"{Path(grid.model).name}/{grid.part}_{grid.num_visual_tokens}/centroid": each.centroid().value
        for each in every
        for grid in (each.grid,)
    }
    params: dict[str, str | int] = {"models": ", ".join(references), "images": count}
    record_study(tracking, f"analyze-spectral-{folder.name}", params, metrics, files)
    console.print(f"Numbers and picture: {folder}")
    return study


def study_tokens(
    references: Sequence[str],
    console: Console,
    *,
    images: str = MINI,
    count: int = 256,
    budgets: Sequence[int] = (),
    folder: Path,
    tracking: TrackingConfig,
) -> dict[str, list[PartMeasures]]:
    """Measures how anchors and queries divide the work, for several models on the same images.

    Args:
        references: model references.
        console: prints the tables.
        images: `mini`, or a folder of images.
        count: number of images.
        budgets: budgets, of which each model gets those that it supports; default: 16, 32, 64, 128 and 256, or the
            smallest and the largest budget of a model that supports none of these.
        folder: folder for tokens.json and tokens.png.
        tracking: MLflow settings.

    Returns:
        The measures by model reference.

    Raises:
        UserError: a model or the images cannot be used, or a model supports none of the given budgets.
    """
    found = {}
    for reference in dict.fromkeys(references):
        opened = open_model(reference, tracking.uri)
        legal = opened.model.supported_budgets
        default = [each for each in _TOKEN_BUDGETS if each in legal] or sorted({legal[0], legal[-1]})
        own = _supported(reference, opened, budgets, console) if budgets else default
        pictures = study_images(images, count, opened.processor.image_size)
        found[reference] = token_measures(opened.model, opened.processor, pictures, own)
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: [each.to_dict() for each in parts] for name, parts in found.items()}
    files = [write_json(folder / "tokens.json", content), folder / "tokens.png"]
    plot_tokens(found, files[1])
    for name, parts in found.items():
        console.print(_tokens_table(name, parts, count))
    metrics = {
        f"{Path(name).name}/{each.part}_{each.num_visual_tokens}/{measure}": estimate.value
        for name, parts in found.items()
        for each in parts
        for measure, estimate in each.measures.items()
    }
    params: dict[str, str | int] = {"models": ", ".join(references), "images": count}
    record_study(tracking, f"analyze-tokens-{folder.name}", params, metrics, files)
    console.print(f"Numbers and picture: {folder}")
    return found


def _supported(reference: str, opened: StudyModel, budgets: Sequence[int], console: Console) -> list[int]:
    """Returns the budgets that a model supports, and prints those that it lacks."""
    legal = opened.model.supported_budgets
    lacking = [each for each in dict.fromkeys(budgets) if each not in legal]
    if not lacking:
        return list(dict.fromkeys(budgets))
    if len(lacking) == len(set(budgets)):
        raise UserError(
            f"{reference} supports none of the budgets {', '.join(map(str, lacking))} (visual tokens per image); choose"
            f" from {describe_values(legal)}."
        )
    console.print(f"{reference} does not support {', '.join(map(str, lacking))} visual tokens; they are left out.")
    return [each for each in dict.fromkeys(budgets) if each in legal]


def _spectra_table(spectra: Sequence[Spectrum], count: int) -> Table:
    table = Table(
        "model",
        "grid",
        "tokens",
        "rings",
        "mean frequency, cycles per image",
        "as share of the largest",
        title=f"Spatial spectra before the projection, {count} images [95 % over images]",
    )
    for each in spectra:
        centroid, relative = each.centroid().interval, each.relative_centroid.interval
        model, part, budget = each.grid
        table.add_row(model, part, str(budget), str(len(each.power)), interval_cell(centroid), interval_cell(relative))
    return table


def _differences_table(differences: Sequence[SpectralDifference], count: int) -> Table:
    table = Table(
        "first",
        "second",
        "cycles per image",
        "as share of the largest",
        "cycles per image, rings of both",
        title=f"Difference of the mean frequencies, first - second, {count} images [95 % over images]",
    )
    for each in differences:
        values = (each.centroid, each.relative_centroid, each.common_centroid)
        table.add_row(
            *(f"{grid.model} {grid.part} ({grid.num_visual_tokens})" for grid in (each.first, each.second)),
            *(interval_cell(value.interval) for value in values),
        )
    return table


def _tokens_table(name: str, parts: Sequence[PartMeasures], count: int) -> Table:
    headers = [f"{each.num_visual_tokens}: {each.num_tokens} {each.part}" for each in parts]
    table = Table("measure", *headers, title=f"Tokens of {name}, {count} images [95 % over images]")
    for measure in dict.fromkeys(measure for each in parts for measure in each.measures):
        cells = [each.measures.get(measure) for each in parts]
        table.add_row(measure.replace("_", " "), *(interval_cell(cell.interval) if cell else "" for cell in cells))
    return table
