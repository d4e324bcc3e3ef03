"""What a generator yields, and how it becomes a question: letters, options, seeds."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from g2vlm.data.qa.facts import SceneFacts
from g2vlm.data.qa.question import Mark, Question, letters
from g2vlm.data.qa.rules import Rules
from g2vlm.data.rooms.draws import Draws


@dataclass(frozen=True)
class Draft:
    """A question before its options have letters.

    Args:
        question: as asked.
        answer: the number's text, or the right option.
        wrong: the other options; none for a number.
        categories: of the objects named, in the question's order.
        marks: dots that the question speaks of.
    """

    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()


Generator = Callable[[SceneFacts, Rules, Draws], Iterator[Draft]]
"""Yields what can be asked about a scene in random order, each item once, drawing from its own stream only."""


def stream(*names: str | int) -> Draws:
    """The random draws that belong to these names."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return Draws(int.from_bytes(digest[:8], "big"))


class Letters:
    """Places for right options: shuffled decks, so that every place is used equally often."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._decks: dict[int, list[int]] = {}

    def place(self, count: int) -> int:
        """The place of the right one among so many options."""
        deck = self._decks.setdefault(count, [])
        if not deck:
            deck.extend(self._draws.shuffled(range(count)))
        return deck.pop()

    def options(self, right: str, wrong: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """Options with letters, and the letter of the right one."""
        texts = self._draws.shuffled(wrong)
        place = self.place(len(wrong) + 1)
        texts.insert(place, right)
        lettered = zip(letters()[: len(texts)], texts, strict=True)
        return tuple(f"{letter}. {text}" for letter, text in lettered), letters()[place]


def finish(draft: Draft, scene: str, task: str, index: int, places: Letters) -> Question:
    """The question of a draft."""
    options, answer = places.options(draft.answer, draft.wrong) if draft.wrong else ((), draft.answer)
    return Question(
        id=f"{scene}/{task}/{index}",
        scene=scene,
        task=task,
        question=draft.question,
        options=options,
        answer=answer,
        kind="choice" if draft.wrong else "number",
        categories=draft.categories,
        marks=draft.marks,
    )
