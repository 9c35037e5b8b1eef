"""Reports of studies, from known answers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cogvideo.cli import main
from cogvideo.evaluation import preferences
from cogvideo.evaluation.study import Study
from cogvideo.evaluation.trials import NOISE
from rating import make_study

GRADES = {"a": 4, "b": 2, NOISE: 1}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten bootstraps."""
    monkeypatch.setattr(preferences, "NUM_DRAWS", 50)


def results(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows of the table by raters, question, measure and subject."""
    with (folder / "results.csv").open() as file:
        return {(row["raters"], row["question"], row["measure"], row["subject"]): row for row in csv.DictReader(file)}


def answer_all(folder: Path, rater: int, careless: bool = False) -> None:
    """Answer every trial: a before b before noise; a careless rater always picks the left clip or grade 3."""
    study = Study(folder)
    study.add_raters(rater + 1)
    for place, trial in enumerate(study.design.trials(rater)):
        if len(trial.systems) == 2:
            best = sorted(trial.systems, key=list(GRADES).index)[0]
            value = -1 if careless or trial.systems[0] == best else 1
            values = {question.name: value for question in study.questions}
        else:
            grade = 3 if careless else GRADES[trial.systems[0]]
            values = {question.name: grade for question in study.questions}
        assert study.answer(rater, place, values, 2.0)


def test_preferences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the figures: which system is preferred, which raters failed, and what changes without them."""
    folder = make_study(tmp_path, 6, "--catches", "3", "--repeats", "2", "--questions", "axes")
    answer_all(folder, 0)
    answer_all(folder, 1, careless=True)
    assert main(["study", "report", str(folder)]) == 0
    printed = capsys.readouterr().out
    found = results(folder)
    for question in ("looks", "motion", "relevance"):
        assert float(found["all raters", question, "share", "a > b"]["value"]) == pytest.approx(9 / 12)
        assert float(found["raters who passed", question, "share", "a > b"]["value"]) == 1
        strength = found["raters who passed", question, "strength", "a"]
        assert float(strength["value"]) > 0
        assert strength["low"] == ""  # unanimous
        assert found["raters who passed", question, "agreement", "alpha"]["value"] == ""
        assert f"all raters, {question}: share a > b 75.0% (46.8% to 91.1%), 12 answers" in printed
    page = (folder / "report.html").read_text()
    assert "Raters who failed catch trials: 2." in page
    assert "2 of 2" in page  # the careful rater answered repeats consistently
    assert "0 of 2" in page  # the careless one picked the left clip again
    with (folder / "answers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 11 * 3
    assert {row["preferred"] for row in rows if row["rater"] == "1" and row["kind"] == "main"} == {"a"}
    assert main(["study", "report", str(folder), "--slips", "3"]) == 0
    assert "All raters passed their catch trials." in (folder / "report.html").read_text()
    assert ("raters who passed", "looks", "share", "a > b") not in results(folder)


def test_a_rater_who_met_no_catch_trial_has_not_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks raters who have just begun: they are named, and their answers do not count as careful ones."""
    folder = make_study(tmp_path, 6, "--catches", "3")
    answer_all(folder, 0)
    study = Study(folder)
    study.add_raters(2)
    (first, *_) = study.design.trials(1)
    assert first.kind == "main"
    assert study.answer(1, 0, {"preference": 0}, 1.0)
    assert main(["study", "report", str(folder)]) == 0
    assert "Raters without a catch trial so far: 2." in capsys.readouterr().out
    found = results(folder)
    num_careful = int(found["raters who passed", "preference", "share", "a = b"]["answers"])
    assert num_careful == int(found["all raters", "preference", "share", "a = b"]["answers"]) - 1


def test_grades(tmp_path: Path) -> None:
    """Checks the four questions of the paper: mean grades, the best system, and preferences derived from grades."""
    folder = make_study(tmp_path, 4, "--catches", "1", "--repeats", "1", "--questions", "paper")
    answer_all(folder, 0)
    answer_all(folder, 1)
    answer_all(folder, 2, careless=True)
    assert main(["study", "report", str(folder)]) == 0
    found = results(folder)
    everyone = {name: found["all raters", "texture", "grade", name] for name in ("a", "b")}
    assert [float(each["value"]) for each in everyone.values()] == pytest.approx([11 / 3, 7 / 3], abs=1e-4)
    assert float(found["all raters", "overall", "best", "a"]["value"]) == pytest.approx(8 / 12)
    assert float(found["all raters", "overall", "share", "a = b"]["value"]) == pytest.approx(4 / 12)
    assert float(found["raters who passed", "overall", "best", "a"]["value"]) == 1
    assert float(found["raters who passed", "overall", "agreement", "alpha"]["value"]) == 1
    assert "Raters who failed catch trials: 3." in (folder / "report.html").read_text()


def test_one_answer_is_enough(tmp_path: Path) -> None:
    """Reports an ongoing study: one answer gives shares but no interval of strength, and always the same bytes."""
    folder = make_study(tmp_path, 1, "--catches", "0")
    study = Study(folder)
    study.add_raters(1)
    assert study.answer(0, 0, {"preference": 0}, 1.0)
    assert main(["study", "report", str(folder)]) == 0
    found = results(folder)
    assert float(found["all raters", "preference", "share", "a = b"]["value"]) == 1
    assert found["all raters", "preference", "strength", "a"]["low"] == ""
    page = (folder / "report.html").read_text()
    assert "No catch trial was answered." in page
    assert main(["study", "report", str(folder)]) == 0
    assert (folder / "report.html").read_text() == page
