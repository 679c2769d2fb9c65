"""Tables, figure, page and model cards of the elastic study, on made-up scores."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.console import markdown_table
from parcelray.errors import UserError
from parcelray.models.manifest import Manifest
from parcelray.studies.elastic.choice import Outcome, choice_markdown
from parcelray.studies.elastic.report import fill_page, tables_of, write_report
from parcelray.studies.elastic.runs import SYSTEMS, Run, training_of
from parcelray.studies.elastic.ship import SHIPPED, model_card

from .made_up import BUDGETS, made_results, made_splits

ROOT = Path(__file__).resolve().parents[3]


def test_tables_have_a_row_per_system_and_a_column_per_budget() -> None:
    tables = tables_of(made_results())
    labels = [system.label for system in SYSTEMS.values()]
    assert [row[0] for row in tables["scores"][1:]] == labels
    assert [row[0] for row in tables["differences"][1:]] == labels[2:]
    assert len(tables["families"]) == 1 + 2 * 4
    assert {len(row) for rows in tables.values() for row in rows} == {3, 10, 11}
    vanilla, m3 = tables["scores"][1], tables["scores"][3]
    assert vanilla[1] == "-"
    assert vanilla[-1].startswith("50.2 [")
    assert m3[2:5] == ["as 16"] * 3
    assert tables["targets"][-1][0].startswith("Does PARCEL's anchor path")


def test_a_report_fills_the_page_of_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "elastic.md").read_text(encoding="utf-8")
    page = tmp_path / "elastic.md"
    page.write_text(text, encoding="utf-8")
    results = made_results(seeds=1)
    write_report(results, 1500, tmp_path / "tables", page, Console(file=io.StringIO()))
    fill_page(page, {f"{name}-4000": markdown_table(rows) for name, rows in tables_of(results).items()})
    outcome = Outcome("local", "uniform", "no", 300, dict.fromkeys((16, 32, 64, 128, 256), 0.5), {16: 40.0})
    fill_page(page, {"choice": choice_markdown([outcome])})
    filled = page.read_text(encoding="utf-8")
    assert filled.count("| PARCEL | 48.0 [") == 2, "one row in the table of scores of each length of training"
    assert "| local | uniform | no | 300 | 0.500 |" in filled
    assert filled.count("<!-- end -->") == text.count("<!-- end -->")
    with Image.open(tmp_path / "elastic-1500.png") as image:
        assert image.width > 1000
    numbers = json.loads((tmp_path / "tables" / "results-1500.json").read_text())
    assert numbers["systems"]["parcel"]["overall"]["64"]["score"]["value"] == pytest.approx(48)
    with pytest.raises(UserError, match=r"has no block `<!-- other -->`"):
        fill_page(page, {"other": ""})


@pytest.mark.parametrize("system", list(SHIPPED))
def test_a_model_card_states_training_and_scores(system: str) -> None:
    run = Run(system, 4, 4000)
    job = training_of(run, load_job_of(TrainJob, ROOT / "jobs" / "train" / "elastic.yaml"))
    manifest = Manifest(
        created="",
        parcelray_version="",
        git_commit="abc",
        seed=4,
        data=job.data.model_dump(mode="json"),
        config={},
        extra={"identity": "train-x-1", "start": "sha256:1"},
        files={},
    )
    card = model_card(run, job, manifest, made_results(seeds=1), made_splits({0: 30}))
    assert f"--systems {system} --seeds 4 --steps 4000" in card
    assert "**steps** 4,000 of 32 images, bf16 arithmetic, AdamW at 0.0005" in card
    assert "| majority class | - | 15.0 [" in card
    budgets = {"vanilla": (256,), "m3": (16, 64, 256)}.get(system, BUDGETS)
    assert [line.split(" tokens")[0] for line in card.splitlines() if " tokens | " in line] == [
        f"| {budget}" for budget in budgets
    ]
    assert all(len(line) <= 120 for line in card.splitlines() if not line.startswith("|"))
