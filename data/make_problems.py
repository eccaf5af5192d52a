"""Word problems of the little world with rationales, made from a seed: what `make distill` and `make tiny-teacher` train on.

    python data/make_problems.py --output-dir runs/problems                          # train, valid and test, a few hundred KB
    python data/make_problems.py --output-dir runs/teacher --train 8000 --valid 100 # what the teacher learns from

    Rita tem 9 bolas, ganha 4 e perde 6. Com quantas fica?
    9 + 4 = 13. 13 - 6 = 7.
    #### 7

One to three steps of adding, taking away and rows of equal boxes, with whole numbers from 0 to 20. A problem's *sum*, its
operations with all their numbers, says into which part it falls, whatever the seed and however many are made: a sum of
valid or test is never trained in any words, by the teacher neither. Single steps do come back: 9 + 4 stands in many sums.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import little_world

SEED = 11
TRAIN, VALID, TEST = 320, 60, 500
CUE = "\n####"  # between rationale and answer, as in GSM8K
MOST = 20  # no number is greater; those of steps are single digits

# (plural, whether it is feminine)
COUNTED = [
    ("livros", False), ("bolas", True), ("barcos", False), ("chaves", True), ("cartas", True), ("gatos", False),
    ("camisas", True), ("cestos", False), ("bandeiras", True), ("sinos", False), ("queijos", False), ("bolos", False),
    ("laranjas", True), ("uvas", True), ("patos", False), ("velas", True), ("vacas", True), ("cavalos", False),
]  # fmt: skip
MORE = ["ganha {n}", "compra {n}", "recebe {n} de {friend}"]
LESS = ["perde {n}", "vende {n}", "dá {n} a {friend}"]
EASY_VERBS, EASY_STEPS = 2, (1, 2, 2)  # the first of each
ASKED = ["Com {how_many} fica?", "{How_many} {things} tem agora?", "{How_many} {things} são?"]


class Problem(NamedTuple):
    question: str
    rationale: str
    answer: int
    sum: tuple[int | str, ...]  # the first number, then operation and number in turn; with what kind of problem it is


class Words(NamedTuple):
    name: str
    friend: str
    things: str
    how_many: str


def _words(rng: random.Random) -> Words:
    name, friend = rng.sample(little_world.GIRLS + little_world.BOYS, 2)
    things, feminine = rng.choice(COUNTED)
    return Words(name, friend, things, "quantas" if feminine else "quantos")


def _counted(first: int, steps: list[tuple[str, int]]) -> tuple[str, int]:
    """The equations of a chain, and what comes out.

    >>> _counted(3, [("+", 4), ("-", 2)])
    ('3 + 4 = 7. 7 - 2 = 5.', 5)
    """
    told, value = [], first
    for sign, number in steps:
        result = {"+": value + number, "-": value - number, "x": value * number}[sign]
        told.append(f"{value} {sign} {number} = {result}.")
        value = result
    return " ".join(told), value


def _changes(rng: random.Random, value: int, count: int) -> list[tuple[str, int]]:
    """So many steps up or down from a value, between 0 and the greatest number."""
    made: list[tuple[str, int]] = []
    for _ in range(count):
        up = rng.random() < 0.5
        number = rng.randint(1, 6)
        if not 0 <= (value + number if up else value - number) <= MOST:
            up = not up
        if not 0 <= (value + number if up else value - number) <= MOST:
            number = 1
        value += number if up else -number
        made.append(("+" if up else "-", number))
    return made


def _told(rng: random.Random, words: Words, steps: list[tuple[str, int]], verbs: int | None = None) -> str:
    """What happens: ", ganha 4 e perde 2." or ". Depois ganha 4. Depois perde 2."."""
    done = [rng.choice((MORE if sign == "+" else LESS)[:verbs]).format(n=number, friend=words.friend) for sign, number in steps]
    if rng.random() < 0.3:
        return "".join(f". Depois {each}" for each in done) + "."
    *before, last = done
    return (", " + ", ".join(before) if before else "") + f" e {last}."


def _ask(rng: random.Random, words: Words) -> str:
    return rng.choice(ASKED).format(how_many=words.how_many, How_many=words.how_many.capitalize(), things=words.things)


def _in_a_row(rng: random.Random, counts: Sequence[int] = (1, 2, 2, 3), verbs: int | None = None) -> Problem:
    """Somebody has so many, and then it goes up and down."""
    words, first = _words(rng), rng.randint(2, 9)
    steps = _changes(rng, first, rng.choice(counts))
    rationale, answer = _counted(first, steps)
    question = f"{words.name} tem {first} {words.things}{_told(rng, words, steps, verbs)} {_ask(rng, words)}"
    return Problem(question, rationale, answer, ("row", first, *(part for step in steps for part in step)))


def _in_boxes(rng: random.Random) -> Problem:
    """Equal boxes, and then it goes up or down."""
    words, boxes, each = _words(rng), rng.randint(2, 4), rng.randint(2, 5)
    steps = [("x", each), *_changes(rng, boxes * each, rng.choice([1, 1, 2]))]
    rationale, answer = _counted(boxes, steps)
    begin = f"{words.name} tem {boxes} caixas com {each} {words.things}"
    question = f"{begin}{_told(rng, words, steps[1:])} {_ask(rng, words)}"
    return Problem(question, rationale, answer, ("boxes", boxes, *(part for step in steps for part in step)))


def _together(rng: random.Random) -> Problem:
    """Two people, of whom one has more than the other or less: the first number is needed twice."""
    words, first = _words(rng), rng.randint(2, 8)
    up, number = rng.random() < 0.5, rng.randint(1, 4)
    number = min(number, first) if not up else number
    other = first + number if up else first - number
    rationale = f"{first} {'+' if up else '-'} {number} = {other}. {first} + {other} = {first + other}."
    more = "mais" if up else "menos"
    question = (
        f"{words.name} tem {first} {words.things} e {words.friend} tem {number} a {more}. "
        f"{words.how_many.capitalize()} {words.things} são ao todo?"
    )
    return Problem(question, rationale, first + other, ("together", first, "+" if up else "-", number))


def part_of(problem: Problem) -> str:
    """Into which part a problem falls: of 20 sums, three are test's and one is valid's."""
    digest = hashlib.blake2b(repr(problem.sum).encode(), digest_size=4).digest()
    place = int.from_bytes(digest, "little") % 20
    return "test" if place < 3 else "valid" if place == 3 else "train"


def _easy(rng: random.Random) -> Problem:
    return _in_a_row(rng, EASY_STEPS, EASY_VERBS)


def _any(rng: random.Random) -> Problem:
    kinds: list[Callable[[random.Random], Problem]] = [_in_a_row, _in_boxes, _together]
    return rng.choices(kinds, weights=[6, 2, 2])[0](rng)


def problems(part: str, seed: int = SEED, easy: bool = False) -> Iterator[Problem]:
    """Problems of a part without end; no question comes twice."""
    rng, seen, make = random.Random(f"{seed} {part}"), set(), _easy if easy else _any
    while True:
        made = make(rng)
        if part_of(made) == part and made.question not in seen:
            seen.add(made.question)
            yield made


def row(problem: Problem) -> dict[str, str]:
    """A line of the files: the answer begins with its rationale, as in GSM8K."""
    return {"question": problem.question, "answer": f"{problem.rationale}{CUE} {problem.answer}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    for name, count in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--easy", action="store_true", help="one or two steps, up or down, in fewer words")
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid", "test"):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _, problem in zip(
                range(getattr(arguments, name)), problems(name, arguments.seed, arguments.easy), strict=False
            ):
                file.write(json.dumps(row(problem), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
