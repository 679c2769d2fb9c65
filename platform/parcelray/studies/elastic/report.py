"""Tables, figures and page of the elastic study, from finished evaluations."""

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.train import TrainJob
from parcelray.console import markdown_table
from parcelray.errors import UserError
from parcelray.evaluation.frontier import draw_frontier
from parcelray.evaluation.scoring.evaluation import load_evaluation
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.files import write_json
from parcelray.plotting import new_figure
from parcelray.studies.elastic.results import (
    OVERALL,
    PARCEL,
    ElasticResults,
    anchor_answer,
    shown,
    signed,
    targets,
)
from parcelray.studies.elastic.runs import SYSTEMS, VANILLA, Run, evaluation_of
from parcelray.tracking.run_folder import RunFolder

Rows = list[list[str]]


def load_results(runs: Sequence[Run], job: TrainJob, evaluation: EvaluateJob) -> ElasticResults:
    """Scores the stored predictions of evaluated runs.

    Raises:
        UserError: a run is not trained or not evaluated, or the vanilla model is missing.
    """
    splits: dict[str, list[Sequence[SplitScores]]] = defaultdict(list)
    for run in runs:
        splits[run.system].append(scored_splits(run, job, evaluation))
    if VANILLA not in splits:
        raise UserError(f"systems are {', '.join(splits)}; add {VANILLA}, which retention is relative to.")
    return ElasticResults(splits, tuple(each for each in evaluation.budgets if isinstance(each, int)))


def scored_splits(run: Run, job: TrainJob, evaluation: EvaluateJob) -> Sequence[SplitScores]:
    """Scores the stored predictions of one run.

    Raises:
        UserError: the run is not trained or not evaluated.
    """
    folder = RunFolder(evaluation_of(run, job, evaluation))
    if folder.result() is None:
        raise UserError(
            f"{run.name} is not evaluated; run `python pipelines/elastic.py evaluate --systems {run.system} --seeds"
            f" {run.seed} --steps {run.steps}` first."
        )
    return load_evaluation(Path(folder.path)).score()


def write_report(results: ElasticResults, steps: int, folder: Path, page: Path | None, console: Console) -> None:
    """Prints the tables, and writes them with the figure and all numbers into a folder, and into a page of the docs.

    Args:
        results: the scores.
        steps: training steps of the systems, part of the names of the files.
        folder: folder to write to.
        page: Markdown page with a block for each table, see `fill_page`; the figure is written next to it.
        console: for the tables.
    """
    tables = {f"{name}-{steps}": markdown_table(rows) for name, rows in tables_of(results).items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
        console.print(f"{name}\n\n{text}\n", markup=False, soft_wrap=True)
    write_json(folder / f"results-{steps}.json", _numbers(results))
    picture = folder / f"elastic-{steps}.png"
    plot_results(results, picture)
    console.print(f"Tables, figure and numbers: {folder}")
    if page is not None:
        fill_page(page, tables)
        shutil.copyfile(picture, page.parent / picture.name)


def tables_of(results: ElasticResults) -> dict[str, Rows]:
    """Returns the tables by name; the first row of each is its header."""
    budgets = [str(budget) for budget in results.budgets]
    systems = results.systems
    return {
        "scores": [
            ["system", *budgets],
            *([SYSTEMS[name].label, *_cells(results, name, OVERALL, "score")] for name in (VANILLA, *systems)),
        ],
        "retention": [
            ["system", *budgets],
            *([SYSTEMS[name].label, *_cells(results, name, OVERALL, "retention")] for name in systems),
        ],
        "families": [
            ["family", "system", *budgets],
            *(
                [family, SYSTEMS[name].label, *_cells(results, name, family, "retention")]
                for family in results.families
                for name in systems
            ),
        ],
        "differences": [
            ["PARCEL minus", *budgets],
            *(
                [
                    SYSTEMS[name].label,
                    *(signed(results.advantage(PARCEL, name, budget).interval) for budget in results.budgets),
                ]
                for name in systems
                if name != PARCEL
            ),
        ],
        "targets": [
            ["target", "result", "measured"],
            *([each.text, "met" if each.met else "not met", each.numbers] for each in targets(results)),
            ["Does PARCEL's anchor path add anything to the local start?", "-", anchor_answer(results)],
        ],
    }


def _cells(results: ElasticResults, system: str, family: str, number: str) -> list[str]:
    cells = []
    for budget in results.budgets:
        used = results.used(system, budget)
        if used > budget:
            cells.append("-")
        elif used < budget:
            cells.append(f"as {used}")
        else:
            cells.append(shown(_interval(results, number, system, budget, family)))
    return cells


def _interval(results: ElasticResults, number: str, system: str, budget: int, family: str) -> Interval:
    of = results.score if number == "score" else results.retention
    return of(system, budget, family).interval


def _numbers(results: ElasticResults) -> dict[str, object]:
    """All numbers as JSON-serialisable values: by system, family and budget, the score and the retention."""
    systems = {
        system: {
            family: {
                str(budget): {
                    number: _interval(results, number, system, budget, family)._asdict()
                    for number in (("score",) if system == VANILLA else ("score", "retention"))
                }
                for budget in results.budgets
                if results.used(system, budget) == budget
            }
            for family in (OVERALL, *results.families)
        }
        for system in results.splits
    }
    seeds = {system: len(each) for system, each in results.splits.items()}
    return {"seeds": seeds, "systems": systems, "targets": [each._asdict() for each in targets(results)]}


def fill_page(page: Path, tables: Mapping[str, str]) -> None:
    """Replaces the text between `<!-- NAME -->` and `<!-- end -->` in a page, for each table.

    Raises:
        UserError: the page has no block of that name.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not block.search(text):
            raise UserError(
                f"{page} has no block `<!-- {name} -->` ... `<!-- end -->`; add it where the table belongs."
            )
        text = block.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


def plot_results(results: ElasticResults, path: Path) -> None:
    """Plots retention against visual tokens per image, overall and by family.

    Args:
        results: the scores.
        path: PNG to write.
    """
    figure = new_figure(13, 7.5)
    panels = list(figure.subplots(2, 3).flat)
    names = [OVERALL, *results.families]
    for name, axes in zip(names, panels, strict=False):
        draw_frontier(axes, results.frontier(name))
        axes.axhline(100, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(name)
        axes.set_ylabel("retention (%), 95 % intervals")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
