"""A model is asked all questions, and what it says is kept as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlx_qlora.data.render import Question
from mlx_qlora.look.console import Console
from mlx_qlora.look.evaluation.answering import Progress, SoFar
from mlx_qlora.look.evaluation.chains import after, after_given, is_chain, longest_rationale, thoughts
from mlx_qlora.look.evaluation.generate import Asking, write
from mlx_qlora.model.load import Loaded, wired_memory


@dataclass(frozen=True)
class Answers:
    """What was said to all questions, by model; and to chains of thought the thinking, by question."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    thinking: dict[int, dict[str, tuple[str, bool, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Asker:
    """One model that is asked all questions."""

    loaded: Loaded
    asked: Sequence[Question]
    how: Asking
    longest: int | None  # tokens of a rationale; None: as the data tell
    so_far: SoFar
    console: Console
    which: str
    title: str

    def ask(self, found: Answers) -> None:
        """Chains of thought in two turns: a rationale, and after these very tokens the answer; and once more the answer, after
        the data's rationale."""
        chains = [number for number, each in enumerate(self.asked) if is_chain(each)]
        most = self.longest or longest_rationale(self.asked)
        tokenizer, decode = self.loaded.tokenizer, self._decoded
        questions = list(self.asked)
        if chains:
            self._phase("rationales", "rationale", questions, chains, most, _in_digits)
            kept = self.so_far.answers[f"{self.which} rationale"]
            own = thoughts(self.asked, {number: _of_digits(kept[number]) for number in chains}, most, tokenizer)
            for number in chains:
                questions[number] = after(questions[number], own[number][2])
        self._phase("", "", questions, range(len(questions)), self.how.max_tokens, decode)
        found.texts[self.which] = self.so_far.texts(self.which)
        if chains:
            given = [after_given(each) for each in self.asked]
            self._phase("after given rationales", "given", given, chains, self.how.max_tokens, decode)
            said = self.so_far.answers[f"{self.which} given"]
            for number in chains:
                text, ended, _ = own[number]
                found.thinking.setdefault(number, {})[self.which] = (text, ended, said[number])

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.loaded.tokenizer.decode(tokens)).strip() if tokens else ""

    def _phase(
        self, title: str, name: str, questions: Sequence[Question], among: Sequence[int], most: int,
        form: Callable[[list[int]], str],
    ) -> None:  # fmt: skip
        """Ask what was not asked before it was broken off."""
        which = f"{self.which} {name}".strip()
        left, say = self.so_far.left(which, among), self.console.say
        if not left:
            return
        progress = Progress(f"{self.title}, {title}" if title else self.title, len(left), "answers", say)
        with self.so_far.keeping(which, left) as keep, progress, wired_memory(self.loaded.model):

            def tell(found: Mapping[int, list[int]]) -> None:
                keep({place: form(tokens) for place, tokens in found.items()})
                progress.add(len(found))

            def told(tokens: int) -> None:
                say(f"memory ended: answers of at most {tokens:,} tokens at once from now on")

            prompts, ids = ([getattr(questions[number], name) for number in left] for name in ("prompt", "id"))
            write(self.loaded.model, self.loaded.tokenizer, prompts, replace(self.how, max_tokens=most), tell, told, ids)


def _in_digits(tokens: list[int]) -> str:
    """Tokens as they are kept: the very ones lead to the answer, and letters could be others."""
    return " ".join(map(str, tokens))


def _of_digits(text: str) -> list[int]:
    return list(map(int, text.split()))
