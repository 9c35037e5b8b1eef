"""Results of a blind study: tables of figures, with and without the raters who failed catch trials, page and CSV."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from cogvideo.config import require
from cogvideo.evaluation import preferences
from cogvideo.evaluation.preferences import (
    Interval,
    PairwiseComparison,
    bootstrap,
    outcomes,
    sample_size,
    share,
    strengths,
)
from cogvideo.evaluation.study import Answer, Rater, Study
from cogvideo.evaluation.trials import NOISE, REAL
from cogvideo.files import check_place, write_csv
from cogvideo.report.page import count, percent, write_page

PAGE, RESULTS, ANSWERS = "report.html", "results.csv", "answers.csv"
ALL, CAREFUL = "all raters", "raters who passed"
SHARE, STRENGTH, GRADE, BEST, AGREEMENT = "share", "strength", "grade", "best", "agreement"
NOTHING = "–"
OVERALL = "overall"
"""Question whose grades decide the best system and catch trials."""


class Result(NamedTuple):
    """A figure with its 95% confidence interval."""

    raters: str
    question: str
    measure: str
    subject: str
    interval: Interval
    num_answers: int


class RaterSummary(NamedTuple):
    """Summary of a rater's answers."""

    rater: Rater
    num_caught: int
    """Number of catch trials answered correctly."""
    num_catches: int
    num_equal: int
    """Number of repeated trials answered as before."""
    num_repeats: int
    left: Interval
    """Share of the left clip among preferences."""
    seconds: float
    """Median time per answer."""

    def passes(self, num_slips: int) -> bool | None:
        """True with at most this many wrong answers to catch trials; None if the rater has met none yet."""
        return self.num_catches - self.num_caught <= num_slips if self.num_catches else None


def report(folder: Path, out: Path, margin: float, num_slips: int) -> None:
    """Write the page and both tables, and print the figures.

    The sample size is given for intervals with the half-width `margin`; `num_slips` wrong catch trials are forgiven.
    """
    require(num_slips >= 0, f"slips is {num_slips}, expected 0 or more")
    sample_size(0.5, margin)
    study = Study(folder)
    check_place(out / PAGE, "the page")
    answers = study.answers()
    require(len(answers) > 0, f"{folder} has no answers yet: `cogvideo study serve {folder}` prints links for raters")
    conducts = [conduct(rater, answers) for rater in study.raters() if rater.num_answered > 0]
    passed = {each.rater.number: each.passes(num_slips) for each in conducts}
    careful = [each for each in answers if passed[each.rater]]
    results = list(figures(study, answers, ALL))
    if 0 < len(careful) < len(answers):
        results += figures(study, careful, CAREFUL)
    title = f"{folder.resolve().name}: a blind study"
    lead = f"{count(len(answers), 'answer')} of {count(conducts, 'rater')} on {count(study.prompts, 'prompt')}."
    facts = page_facts(study, results, conducts, passed, margin)
    write_page(out / PAGE, "study report", title, lead, "study.html", facts)
    rows = ([*start, *(f"{each:.6g}".replace("nan", "") for each in values), num] for *start, values, num in results)
    write_csv(out / RESULTS, [_HEADS, *rows])
    write_csv(out / ANSWERS, [_COLUMNS, *_answer_rows(study, answers)])
    print("\n".join(_lines(results)))
    print(_failures(passed))
    print("\n".join(f"written: {out / name}" for name in (PAGE, RESULTS, ANSWERS)))


# From answers to figures


def figures(study: Study, answers: Sequence[Answer], raters: str) -> Iterator[Result]:
    """All figures of some answers; `raters` names who gave them."""
    shown = [each for each in answers if each.trial.kind == "main"]
    systems = study.design.systems
    for question in study.questions:
        is_graded = not study.design.is_paired
        pairs = list((_graded_pairs if is_graded else _pairs)(shown, question.name))
        if is_graded:
            yield from _grades(shown, question.name, raters, systems)
        if question.name == OVERALL:
            yield from _best(shown, raters, systems)
        yield from _shares(pairs, question.name, raters)
        yield from _strengths(pairs, question.name, raters, systems)
        ratings: list[tuple[int, object, int]]
        ratings = [(each.rater, (each.prompt, each.first, each.second), each.outcome) for each in pairs]
        if is_graded:
            ratings = [(each.rater, each.trial, each.values[question.name]) for each in shown]
        alpha = preferences.agreement(ratings)
        yield Result(raters, question.name, AGREEMENT, "alpha", Interval(alpha, math.nan, math.nan), len(ratings))


def _pairs(answers: Iterable[Answer], question: str) -> Iterator[PairwiseComparison]:
    """Preferences, regardless of the side on which a system was shown."""
    for each in answers:
        left, right = each.trial.systems
        outcome = -each.values[question]
        if left < right:
            yield PairwiseComparison(each.rater, each.trial.prompt, left, right, outcome)
        else:
            yield PairwiseComparison(each.rater, each.trial.prompt, right, left, -outcome)


def _graded_pairs(answers: Iterable[Answer], question: str) -> Iterator[PairwiseComparison]:
    """Preferences that follow from grades: the better one is preferred."""
    for (rater, prompt), grades in _grades_by_prompt(answers, question).items():
        for first, second in combinations(sorted(grades), 2):
            difference = grades[first] - grades[second]
            yield PairwiseComparison(rater, prompt, first, second, (difference > 0) - (difference < 0))


def _grades_by_prompt(answers: Iterable[Answer], question: str) -> dict[tuple[int, int], dict[str, int]]:
    """Grades by system, for each rater and prompt."""
    grades: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for each in answers:
        grades[each.rater, each.trial.prompt][each.trial.systems[0]] = each.values[question]
    return grades


def _shares(pairs: Sequence[PairwiseComparison], question: str, raters: str) -> Iterator[Result]:
    for first, second in sorted({(each.first, each.second) for each in pairs}):
        outcomes = [each.outcome for each in pairs if (each.first, each.second) == (first, second)]
        subjects = {f"{first} > {second}": 1, f"{first} = {second}": 0, f"{second} > {first}": -1}
        for subject, outcome in subjects.items():
            part = share(outcomes.count(outcome), len(outcomes))
            yield Result(raters, question, SHARE, subject, part, len(outcomes))


def _strengths(
    pairs: Sequence[PairwiseComparison], question: str, raters: str, systems: Sequence[str]
) -> Iterator[Result]:
    """Bradley-Terry strengths; none if there are too few answers to compare all systems."""
    won = outcomes(pairs, systems)
    try:
        start = strengths(won.sum(-1))
    except ValueError:
        return
    raters_of, prompts = [each.rater for each in pairs], [each.prompt for each in pairs]
    found = bootstrap(lambda weights: strengths(won @ weights, start), raters_of, prompts)
    for system, interval in zip(systems, found, strict=True):
        involved = sum(system in (each.first, each.second) for each in pairs)
        yield Result(raters, question, STRENGTH, system, interval, involved)


def _grades(answers: Sequence[Answer], question: str, raters: str, systems: Sequence[str]) -> Iterator[Result]:
    for system in systems:
        own = [each for each in answers if each.trial.systems == (system,)]
        values = np.array([each.values[question] for each in own], dtype=float)
        if not own:
            continue

        def estimate(weights: Float64[np.ndarray, " answers"], values: Any = values) -> Float64[np.ndarray, " values"]:
            require(bool(weights.any()), "no answers were drawn")
            return np.array([np.average(values, weights=weights)])

        (interval,) = bootstrap(estimate, [each.rater for each in own], [each.trial.prompt for each in own])
        yield Result(raters, question, GRADE, system, interval, len(own))


def _best(answers: Sequence[Answer], raters: str, systems: Sequence[str]) -> Iterator[Result]:
    """Shares of the highest overall grade, over prompts for which a rater graded all systems."""
    complete = [each for each in _grades_by_prompt(answers, OVERALL).values() if len(each) == len(systems)]
    for system in systems:
        others = ([grade for other, grade in grades.items() if other != system] for grades in complete)
        best = sum(grades[system] > max(rest, default=-1) for grades, rest in zip(complete, others, strict=True))
        yield Result(raters, OVERALL, BEST, system, share(best, len(complete)), len(complete))


# Raters


def conduct(rater: Rater, answers: Sequence[Answer]) -> RaterSummary:
    """Reliability of a rater with at least one answer."""
    own = [each for each in answers if each.rater == rater.number]
    checks = list(_checks(own))
    first = {(each.trial.prompt, frozenset(each.trial.systems)): each for each in own if each.trial.kind == "main"}
    repeats = [each for each in own if each.trial.kind == "repeat"]
    equal = 0
    for each in repeats:
        before = first[each.trial.prompt, frozenset(each.trial.systems)].values
        sign = -1 if len(each.trial.systems) == 2 else 1  # sides were swapped
        equal += each.values == {name: sign * value for name, value in before.items()}
    sides = [value for each in own if len(each.trial.systems) == 2 for value in each.values.values() if value != 0]
    return RaterSummary(
        rater=rater,
        num_caught=sum(checks),
        num_catches=len(checks),
        num_equal=equal,
        num_repeats=len(repeats),
        left=share(sides.count(-1), len(sides)),
        seconds=median(each.seconds for each in own),
    )


def _checks(answers: Sequence[Answer]) -> Iterator[bool]:
    """True for each catch trial that was answered correctly.

    Noise must never be preferred or rated equal; its overall grade must be below the mean of the real clips, or if
    there are none, of all clips.
    """
    noisy = [each for each in answers if NOISE in each.trial.systems]
    grades = [each.values[OVERALL] for each in answers if each.trial.systems == (REAL,)]
    grades = grades or [each.values.get(OVERALL, 0) for each in answers if each.trial.kind == "main"]
    for each in noisy:
        if len(each.trial.systems) == 2:
            right = -1 if each.trial.systems[1] == NOISE else 1
            yield all(value == right for value in each.values.values())
        elif grades:
            yield each.values[OVERALL] < fmean(grades)


def _failures(passed: Mapping[int, bool | None]) -> str:
    if set(passed.values()) == {None}:
        return "No catch trial was answered."
    groups = {
        "Raters who failed catch trials": [number for number, has_passed in passed.items() if has_passed is False],
        "Raters without a catch trial so far": [number for number, has_passed in passed.items() if has_passed is None],
    }
    told = [f"{title}: {', '.join(str(each + 1) for each in found)}." for title, found in groups.items() if found]
    return " ".join(told) or "All raters passed their catch trials."


# The page


def page_facts(
    study: Study,
    results: Sequence[Result],
    conducts: Sequence[RaterSummary],
    passed: Mapping[int, bool | None],
    margin: float,
) -> dict[str, Any]:
    """Everything that the template of the page needs."""
    groups = [_group(raters, [each for each in results if each.raters == raters], margin) for raters in (ALL, CAREFUL)]
    groups = [group for group in groups if group["questions"]]
    return {
        "titles": {group["key"]: group["title"] for group in groups} | {"raters": "Raters", "design": "Design"},
        "groups": groups,
        "systems": list(study.sources.items()),
        "design": study.design,
        "rater_rows": [_rater_row(each, passed[each.rater.number]) for each in conducts],
        "failures": _failures(passed),
        "margin": percent(margin),
        "enough": sample_size(0.5, margin),
    }


def _group(raters: str, results: Sequence[Result], margin: float) -> dict[str, Any]:
    """Tables by question and measure."""
    questions: dict[str, dict[str, list[list[str | float]]]] = defaultdict(lambda: defaultdict(list))
    for each in results:
        questions[each.question][each.measure].append(_row(each, margin))
    return {"key": raters.replace(" ", "-"), "title": f"Results of {raters}", "questions": questions}


def _row(result: Result, margin: float) -> list[str | float]:
    value, low, high = result.interval
    if result.measure not in (SHARE, BEST):
        return [result.subject, _number(value), _range(low, high, _number), result.num_answers]
    part = 0.0 if math.isnan(value) else value
    enough = [sample_size(part, margin)] if result.measure == SHARE else []
    return [result.subject, part, _share(value), _range(low, high, _share), result.num_answers, *enough]


def _rater_row(conduct: RaterSummary, has_passed: bool | None) -> list[str]:
    rater, left = conduct.rater, conduct.left
    return [
        str(rater.number + 1),
        f"{rater.num_answered} of {rater.num_trials}",
        f"{conduct.num_caught} of {conduct.num_catches}",
        f"{conduct.num_equal} of {conduct.num_repeats}",
        NOTHING if math.isnan(left.value) else f"{_share(left.value)} ({_range(left.low, left.high, _share)})",
        f"{conduct.seconds:.1f} s",
        {True: "yes", False: "no", None: NOTHING}[has_passed],
    ]


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # no minus before zero


def _share(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.1f}%"


def _range(low: float, high: float, show: Any) -> str:
    return NOTHING if math.isnan(low) else f"{show(low)} to {show(high)}"


# Tables and lines

_HEADS = ("raters", "question", "measure", "subject", "value", "low", "high", "answers")
_COLUMNS: tuple[str, ...] = (
    "rater",
    "place",
    "kind",
    "prompt",
    "text",
    "left",
    "right",
    "question",
    "value",
    "preferred",
    "seconds",
    "time",
)


def _answer_rows(study: Study, answers: Iterable[Answer]) -> Iterator[list[Any]]:
    for each in answers:
        left, right = (*each.trial.systems, "")[:2]
        for question, value in each.values.items():
            preferred = (left, "same", right)[value + 1] if right else ""
            start = [each.rater + 1, each.place + 1, each.trial.kind, each.trial.prompt + 1]
            text = study.prompts[each.trial.prompt]
            yield [*start, text, left, right, question, value, preferred, f"{each.seconds:.3f}", each.time]


def _lines(results: Iterable[Result]) -> Iterator[str]:
    for each in results:
        value, low, high = each.interval
        show = _share if each.measure in (SHARE, BEST) else _number
        told = show(value) if math.isnan(low) else f"{show(value)} ({_range(low, high, show)})"
        start = f"{each.raters}, {each.question}: {each.measure} {each.subject}"
        yield f"{start} {told}, {count(each.num_answers, 'answer')}"
