"""`parcelray benchmarks score`: answers that were made elsewhere, with the scores of the official scorers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

_SECTIONS = yaml.safe_load(
    (Path(__file__).parents[1] / "fixtures" / "cases" / "metrics.yaml").read_text(encoding="utf-8")
)
_COLORS = ["red", "green", "blue", "white"]


def _write(folder: Path, lines: list[dict[str, Any]]) -> str:
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def _known_scores() -> Iterator[Any]:
    """The benchmark, the options, the line of the file, and the score of each case of metrics.yaml."""
    option = ("ai2d", "--family", "llava", "--metric", "multiple_choice:option")
    for case in _SECTIONS["multiple_choice_text"]["cases"]:
        line = {key: case[key] for key in ("choices", "target", "target_index", "answer") if key in case}
        yield pytest.param(option, line, case["score"], id=f"multiple_choice_text {case['answer']}")
    letters = _SECTIONS["option_letter"]["letters"]
    for score in (0, 1):
        for template in _SECTIONS["option_letter"][f"templates_score_{score}"]:
            for letter in letters:
                line = {"choices": ["w", "x", "y", "z"], "target": letter, "answer": template.format(L=letter)}
                yield pytest.param(option, line, score, id=f"option_letter {line['answer']}")
    for case in _SECTIONS["by_family"]["cases"]:
        for name in case["benchmark"].split(", "):
            if "answer" in case and "note" not in case:
                # VQA accuracy compares with ten annotators; one answer is the same as ten equal ones elsewhere.
                target = case.get("target") or case["targets"][0].removesuffix(" x10")
                line = {"targets": [target] * 10, "answer": case["answer"]}
            else:
                line = {"choices": _COLORS, "target_index": 2, "answer": "C"}
            yield pytest.param((name, "--family", case["family"]), line, case["score"], id=f"by_family {name}")
    for case in _SECTIONS["anls"]["cases"]:
        for family, rule in (("paligemma", "paper"), ("llava", "server")):
            line = {"target": case["target"], "answer": case["answer"]}
            score = case.get(rule, 1 - 2 / 7)
            yield pytest.param(("docvqa_val", "--family", family), line, score, id=f"anls {rule} {case['answer']}")
    parts = [f"part {number}" for number in range(10)]
    line = {"target": ", ".join(parts), "answer": ", ".join(reversed(parts))}
    yield pytest.param(("infovqa_val",), line, 1, id="anls_permuted")
    for case in _SECTIONS["mmmu_open"]["cases"]:
        line = {"answer": case["answer"], "target": str(case.get("target") or case["parsed"])}
        line |= {"choices": case["options"]} if "options" in case else {}
        yield pytest.param(("mmmu_val", "--family", "llava"), line, case.get("score", 1), id=f"mmmu {case['answer']}")


@pytest.mark.parametrize(("arguments", "line", "score"), list(_known_scores()))
def test_known_answers_get_their_official_score(
    run: Any, tmp_path: Path, arguments: tuple[str, ...], line: dict[str, Any], score: float
) -> None:
    name, *options = arguments
    outcome = run("benchmarks", "score", name, *options, "--answers", _write(tmp_path, [line]), "--json")
    assert outcome.code == 0, outcome.err
    (split,) = json.loads(outcome.out)["splits"]
    assert split["value"] == pytest.approx(100 * score)


def test_the_constant_answer_on_nlvr(run: Any, tmp_path: Path, nlvr_dir: Path) -> None:
    """Accuracy and consistency by the corpus's own rule, over the ids of the real test split."""
    from parcelray.datasets.nlvr.source import NlvrSource

    case = _SECTIONS["nlvr_consistency"]["cases"][0]
    pictures = NlvrSource(nlvr_dir, "test", "all", questions=("statement",)).pictures
    lines = [
        {
            "id": row.id,
            "answer": "true",
            "target": row.label,
            "metric": "nlvr2:words",
            "task": "statement",
            "cluster": row.sentence_id,
            "identifier": row.identifier,
        }
        for row in pictures
    ]
    outcome = run("benchmarks", "score", "nlvr", "--answers", _write(tmp_path, lines), "--json")
    (split,) = json.loads(outcome.out)["splits"]
    assert (split["name"], split["n"]) == ("nlvr/statement", 5940)
    assert split["value"] == pytest.approx(100 * case["accuracy"], abs=0.05)
    assert split["totals"]["consistency"] == pytest.approx(100 * case["consistency"], abs=0.05)


def test_answers_are_joined_to_the_data_by_their_ids(run: Any, tmp_path: Path) -> None:
    reader_file = tmp_path / "data"
    reader_file.mkdir()
    catalog = tmp_path / "colors.yaml"
    columns = {
        "types": {"name": "string", "question": "string", "answer": "string", "image": "image"},
        "id": ["name"],
        "images": ["image"],
        "answers": {"column": "answer"},
    }
    catalog.write_text(
        yaml.safe_dump(
            {
                "name": "colors",
                "family": "general",
                "source": {"splits": ["test"]},
                "columns": columns,
                "prompts": {"paligemma": "answer en {question}"},
                "metric": "exact_match:raw",
            }
        )
    )
    rows: list[dict[str, Any]] = [
        {"name": str(number), "question": "what color", "answer": color, "image": "a.png"}
        for number, color in enumerate(_COLORS)
    ]
    rows.append({"name": "4", "question": "what color", "answer": None, "image": "a.png"})
    (reader_file / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reader_file / "a.png").write_bytes(b"not decoded")
    answers = [("0", "red"), ("1", "green"), ("1", "red"), ("2", "red"), ("9", "red"), ("8", "red"), ("4", "red")]
    file = _write(tmp_path, [{"id": name, "answer": text} for name, text in answers])
    options = ("--data", str(reader_file), "--catalog", str(catalog), "--answers", file)
    outcome = run("benchmarks", "score", "colors", *options, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert {key: found[key] for key in ("lines", "missing", "unknown", "doubled", "problems")} == {
        "lines": 7,
        "missing": ["3"],
        "unknown": ["9", "8"],
        "doubled": ["1"],
        "problems": ["4"],
    }
    (split,) = found["splits"]
    assert (split["value"], split["n"], split["empty"]) == (50, 4, 1)
    assert split["values"] == [1, 1, 0, 0]
    assert split["low"] < 50 < split["high"]
    shown = " ".join(run("benchmarks", "score", "colors", *options).out.split())
    assert "1 samples have no answer and are scored as an empty answer: 3" in shown
    assert "2 answers belong to no sample and are left out: 9, 8" in shown
    assert "1 ids have more than one answer, of which the first is scored: 1" in shown
    assert "1 rows of the data cannot be read and are left out: 4" in shown


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("gqa", {"answer": "red", "target": "red", "targets": ["red"]}, "line 1 has target and targets; set exactly"),
        ("gqa", {"target": "red"}, "answer is missing"),
        ("ai2d", {"answer": "A", "target_index": 3, "choices": ["a", "b"]}, "3 is not the index of a choice"),
        ("nlvr", {"answer": "true", "target": "true"}, "line 1 has no metric, and nlvr has several; set metric"),
        ("mmvet", {"answer": "a", "target": "a"}, "mmvet cannot be scored"),
        ("nothing", {"answer": "a", "target": "a"}, "There is no benchmark 'nothing'"),
    ],
)
def test_a_line_that_cannot_be_scored_is_explained(
    run: Any, tmp_path: Path, name: str, line: dict[str, Any], message: str
) -> None:
    outcome = run("benchmarks", "score", name, "--answers", _write(tmp_path, [line]))
    assert outcome.code == 2
    assert message in outcome.err


def test_blank_lines_count_in_the_number_of_a_line(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "spaced.jsonl"
    good, bad = json.dumps({"target": "red", "answer": "red"}), json.dumps({"target": "red"})
    file.write_text(f"\n{good}\n\n{bad}\n", encoding="utf-8")
    outcome = run("benchmarks", "score", "gqa", "--answers", str(file))
    assert "spaced.jsonl, line 4: " in outcome.err


def _score(run: Any, folder: Path, lines: list[dict[str, Any]], *arguments: str) -> dict[str, Any]:
    outcome = run("benchmarks", "score", *arguments, "--answers", _write(folder, lines), "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out, parse_constant=pytest.fail)
    return found


def test_a_single_answer_of_a_corpus_metric_has_an_unknown_interval(run: Any, tmp_path: Path) -> None:
    line = {"target": "yes", "answer": "Yes", "category": "random"}
    (split,) = _score(run, tmp_path, [line], "pope_random", "--family", "llava")["splits"]
    assert (split["value"], split["low"], split["high"]) == (100, None, None)


def test_a_sample_without_targets_is_unscored(run: Any, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"targets": [], "answer": ""}, {"target": "red", "answer": "red"}]
    (split,) = _score(run, tmp_path, lines, "gqa")["splits"]
    assert (split["value"], split["unscored"], split["values"]) == (100, 1, [None, 1])


def test_lines_without_an_id_are_told_apart(run: Any, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"id": 2, "target": "red", "answer": "red"}, {"target": "red", "answer": "blue"}]
    found = _score(run, tmp_path, lines, "gqa")
    assert (found["doubled"], found["splits"][0]["n"]) == ([], 2)


def test_questions_about_one_image_are_a_cluster(run: Any, tmp_path: Path) -> None:
    lines = [{"target": "yes", "answer": "yes", "category": "count", "image_id": f"{n // 2}"} for n in range(80)]
    lines[0]["answer"] = "no"
    named = [line | {"cluster": line["image_id"]} for line in lines]
    first, second = (_score(run, tmp_path, each, "mme_perception", "--family", "llava") for each in (lines, named))
    assert first["splits"] == second["splits"]


def test_a_metric_of_the_command_line_needs_none_in_the_lines(run: Any, tmp_path: Path) -> None:
    found = _score(run, tmp_path, [{"target": "a", "answer": "A"}], "mmvet", "--metric", "exact_match:raw")
    assert (found["splits"][0]["metric"], found["splits"][0]["value"]) == ("exact_match:raw", 0)


def test_a_box_is_a_target(run: Any, tmp_path: Path) -> None:
    line = {"box": [0.1, 0.2, 0.6, 0.8], "answer": "[0.2, 0.1, 0.8, 0.6]"}
    (split,) = _score(run, tmp_path, [line], "refcoco_val", "--family", "llava")["splits"]
    assert split["value"] == 100


def test_data_and_ids_are_no_markup(run: Any, tmp_path: Path) -> None:
    lines = [{"id": "[/b]x[bold]", "target": "red", "answer": "red"}] * 2
    outcome = run("benchmarks", "score", "gqa", "--answers", _write(tmp_path, lines))
    assert (outcome.code, "[/b]x[bold]" in outcome.out) == (0, True)


def test_ids_of_another_benchmark_are_refused(run: Any, tmp_path: Path) -> None:
    file = _write(tmp_path, [{"id": "x1", "answer": "red"}])
    outcome = run("benchmarks", "score", "mini", "--answers", file)
    assert outcome.code == 2
    assert "(the first is 'x1') is an id of mini" in outcome.err
    missing = run("benchmarks", "score", "mini", "--answers", str(tmp_path / "none.jsonl"))
    assert (missing.code, "is not a file" in missing.err) == (2, True)


def test_doubled_ids_in_the_data_are_refused(run: Any, tmp_path: Path) -> None:
    row = {"question_id": "1", "question": "is it red", "answer": "yes", "image_source": "a", "category": "random"}
    data = tmp_path / "pope.jsonl"
    data.write_text("".join(json.dumps(row | {"id": "1", "image": None}) + "\n" for _ in range(2)))
    file = _write(tmp_path, [{"id": "random/1", "answer": "yes"}])
    outcome = run("benchmarks", "score", "pope_random", "--family", "llava", "--data", str(data), "--answers", file)
    assert (outcome.code, "more than one row has the id" in outcome.err) == (2, True)
