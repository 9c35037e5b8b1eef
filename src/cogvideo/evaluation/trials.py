"""Design of a blind study: the questions, and the trials of each rater in order. Nothing else is random."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Literal

from cogvideo.config import require

REAL, NOISE = "real", "noise"
"""Systems of catch trials; the others are letters."""

Kind = Literal["main", "repeat", "catch"]
QuestionSet = Literal["pairs", "axes", "paper"]


@dataclass(frozen=True)
class AnswerChoice:
    """An answer to a question."""

    value: int
    key: str
    label: str


@dataclass(frozen=True)
class Question:
    """A question about the clips of a trial."""

    name: str
    text: str
    choices: tuple[AnswerChoice, ...]

    def allows(self, value: int) -> bool:
        """True if one of the choices has this value."""
        return any(choice.value == value for choice in self.choices)


_PREFERENCES = (AnswerChoice(-1, "1", "Left"), AnswerChoice(0, "=", "Same"), AnswerChoice(1, "2", "Right"))


def _scale(num_grades: int) -> tuple[AnswerChoice, ...]:
    """Grades from 1, by the last digit of their key."""
    return tuple(AnswerChoice(grade, str(grade % 10), str(grade)) for grade in range(1, num_grades + 1))


QUESTIONS: dict[QuestionSet, tuple[Question, ...]] = {
    "pairs": (Question("preference", "Which clip is better?", _PREFERENCES),),
    "axes": (
        Question("looks", "Which clip has better frames, judged as still pictures?", _PREFERENCES),
        Question("motion", "Which clip moves more realistically?", _PREFERENCES),
        Question("relevance", "Which clip matches the text better?", _PREFERENCES),
    ),
    "paper": (
        Question("texture", "Frame texture, 1 (worst) to 5 (best)", _scale(5)),
        Question("motion", "Realism of motion, 1 to 5", _scale(5)),
        Question("relevance", "Relevance to the text, 1 to 5", _scale(5)),
        Question("overall", "Overall quality, 1 to 10", _scale(10)),
    ),
}
"""Sets of questions: a preference, preferences in three respects, or grades of single clips as in the paper.

In preferences, -1 is the left clip, 1 the right one, 0 neither.
"""


@dataclass(frozen=True)
class Trial:
    """Clips that are shown together."""

    kind: Kind
    prompt: int
    systems: tuple[str, ...]
    """Systems from left to right, one or two."""


@dataclass(frozen=True)
class Design:
    """Settings that determine the trials of every rater."""

    questions: QuestionSet
    num_prompts: int
    systems: tuple[str, ...]
    has_real: bool
    """True if there are real clips for catch trials."""
    num_shown: int | None
    """Trials per rater, without repeats and catch trials; None shows everything once."""
    num_catches: int
    num_repeats: int
    seed: int

    def __post_init__(self) -> None:
        fewest = 2 if self.is_paired else 1
        require(self.num_prompts > 0, f"got {self.num_prompts} prompts, expected at least one")
        require(len(self.systems) >= fewest, f"got {len(self.systems)} systems, expected at least {fewest}")
        require(self.num_shown is None or self.num_shown > 0, f"trials is {self.num_shown}, expected a positive number")
        require(self.num_catches >= 0, f"catches is {self.num_catches}, expected 0 or more")
        require(self.num_repeats >= 0, f"repeats is {self.num_repeats}, expected 0 or more")

    @property
    def is_paired(self) -> bool:
        """True if two clips are compared, rather than one graded."""
        return self.questions != "paper"

    def catches(self) -> list[tuple[int, str]]:
        """Prompts of catch trials, with the system whose clip is shown against noise; the same for all raters."""
        count = min(self.num_catches, self.num_prompts)
        prompts = Random(f"{self.seed} catches").sample(range(self.num_prompts), count)
        others = (REAL,) if self.has_real else self.systems
        return [(prompt, others[place % len(others)]) for place, prompt in enumerate(prompts)]

    def trials(self, rater: int) -> list[Trial]:
        """All trials of a rater, in order.

        For each pair of systems, a rater sees either one on the left half of the time. Successive raters divide the
        clips evenly, and see them with sides swapped once everything was shown. Raters are numbered from 0.
        """
        random = Random(f"{self.seed} rater {rater}")
        shown = self._shown(rater)
        random.shuffle(shown)
        half = len(shown) // 2
        again = random.sample(shown[:half], min(self.num_repeats, half))
        later = shown[half:] + [Trial("repeat", each.prompt, each.systems[::-1]) for each in again]
        random.shuffle(later)
        trials = shown[:half] + later
        for trial in self._catch_trials(rater):
            trials.insert(random.randint(1, len(trials)), trial)
        return trials

    def _shown(self, rater: int) -> list[Trial]:
        groups = list(combinations(self.systems, 2 if self.is_paired else 1))
        items = [(prompt, group) for prompt in range(self.num_prompts) for group in groups]
        Random(f"{self.seed} items").shuffle(items)
        before: Counter[tuple[str, ...]] = Counter()
        trials = []
        for prompt, group in items:  # every second pair of each group has its sides swapped
            trials.append(Trial("main", prompt, group[::-1] if before[group] % 2 else group))
            before[group] += 1
        count = len(trials) if self.num_shown is None else min(self.num_shown, len(trials))
        found = []
        for position in range(rater * count, (rater + 1) * count):
            turn, place = divmod(position, len(trials))
            trial = trials[place]
            found.append(Trial("main", trial.prompt, trial.systems[::-1]) if turn % 2 else trial)
        return found

    def _catch_trials(self, rater: int) -> list[Trial]:
        """A clip against noise; if single clips are graded, a trial of noise, and one of the real clip if any."""
        trials = []
        for place, (prompt, other) in enumerate(self.catches()):
            sides = (other, NOISE) if (place + rater) % 2 else (NOISE, other)
            if self.is_paired:
                trials.append(Trial("catch", prompt, sides))
            else:
                trials += [Trial("catch", prompt, (system,)) for system in sides if system in (REAL, NOISE)]
        return trials
