"""A teacher answers prompts, and what it says becomes a data set."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_qlora.data.chat import Specials
from mlx_qlora.data.part import Split
from mlx_qlora.data.render import RenderConfig, Renderer
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.distilling import dataset
from mlx_qlora.distilling.answers import NAME, Kept, require_same
from mlx_qlora.distilling.card import card
from mlx_qlora.distilling.dataset import Generated
from mlx_qlora.distilling.filters import Answer, FilterConfig, checks, judged
from mlx_qlora.distilling.prompts import Prompt, Prompts, files_of, prompts_of
from mlx_qlora.errors import RunFolderError, require
from mlx_qlora.look.console import Console, many
from mlx_qlora.look.evaluation.answering import Progress
from mlx_qlora.look.evaluation.generate import Asking, answer
from mlx_qlora.look.samples import gone_on
from mlx_qlora.model import backend
from mlx_qlora.model.attached import attach_from
from mlx_qlora.model.load import Loaded, fingerprint, load, load_tokenizer, wired_memory
from mlx_qlora.resume import versions
from mlx_qlora.run import folder as run_folder


@dataclass(frozen=True)
class Wanted:
    """Who is asked what, how, and which answers are kept."""

    model: str
    source: SourceConfig
    output: Path
    adapters: Path | None = None
    chat_template: str = ""
    system: str = ""
    system_in_data: bool = True
    split: Split | None = None
    limit: int | None = None
    answers: int = 1
    max_answer_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    validation_share: float | None = None
    filters: FilterConfig = field(default_factory=FilterConfig)
    overwrite: bool = False
    matmul: str = "auto"

    def __post_init__(self) -> None:
        share, limit, rows = self.validation_share, self.limit, self.batch_size
        require(
            (limit is None or limit >= 1, "limit", limit, "a whole number from 1"),
            (self.answers >= 1, "answers", self.answers, "a whole number from 1"),
            (
                self.answers == 1 or self.temperature > 0,
                "temperature",
                self.temperature,
                "for several answers to a prompt a number above 0 (with 0 all of them are the same)",
            ),
            (self.max_answer_tokens >= 1, "max_answer_tokens", self.max_answer_tokens, "a whole number from 1"),
            (0 <= self.temperature < 100, "temperature", self.temperature, "a number from 0"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0, up to 1"),
            (
                self.top_p == 1 or self.temperature > 0,
                "top_p",
                self.top_p,
                "with temperature 0, where nothing is drawn, 1",
            ),
            (self.seed >= 0, "seed", self.seed, "a whole number from 0"),
            (rows is None or rows >= 1, "batch_size", rows, "a whole number from 1"),
            (share is None or 0 <= share < 1, "validation_share", share, "a number from 0 up to, not including, 1"),
        )

    @property
    def asking(self) -> Asking:
        return Asking(self.max_answer_tokens, self.temperature, self.seed, self.batch_size, self.top_p)

    @property
    def for_validation(self) -> float:
        """Several answers to one prompt must not stand on both sides, which a split by rows would do."""
        return (0.1 if self.answers > 1 else 0.0) if self.validation_share is None else self.validation_share


def generate(wanted: Wanted, console: Console) -> Generated:
    """Ask, judge, and write the data set; what is wrong with the input is said before anything takes long."""
    _require_folder(wanted.output)
    split, files = files_of(find(wanted.source, training=False), wanted.split)
    with run_folder.locked(wanted.output):
        tokenizer = load_tokenizer(wanted.model)
        renderer = Renderer(tokenizer, RenderConfig(chat_template=wanted.chat_template), wanted.source)
        prompts = prompts_of(files, renderer, wanted.source, wanted.system, wanted.limit)
        asked = checks(wanted.filters, prompts.asked)
        plain = _asked(wanted, prompts.asked)
        if not wanted.overwrite:  # what can be told without the teacher's weights is
            require_same(Kept(wanted.output, plain))
        loaded = load(wanted.model, wanted.matmul)
        console.fact("teacher", loaded.describe, backend.describe())
        own = attach_from(loaded.model, wanted.adapters) if wanted.adapters else ""
        if wanted.adapters:
            console.fact("adapters", str(wanted.adapters))
        kept = Kept(wanted.output, {"teacher": fingerprint(loaded.model), "adapters": own} | plain)
        _begin(kept, wanted)
        console.fact("prompts", *_told(prompts, split, wanted, loaded))
        _ask(loaded, prompts.asked, wanted, kept, console)
        said = [
            [kept.answers[place * wanted.answers + number] for number in range(wanted.answers)]
            for place in range(len(prompts.asked))
        ]
        verdicts = judged(prompts.asked, said, asked, wanted.filters)
        found = Generated(
            teacher=loaded.name,
            settings=_settings(wanted, split),
            of=kept.of,
            prompts=len(prompts.asked),
            verdicts=tuple(verdicts),
            tokens=kept.tokens,
            seconds=kept.seconds,
            for_validation=wanted.for_validation,
            seed=wanted.seed,
            fields=wanted.source.fields,
            without_system="" if wanted.system_in_data else wanted.system,
            versions=versions(),
        )
        dataset.write(found, wanted.output, card(found))
    return found


# The folder


def _require_folder(folder: Path) -> None:
    """Raise if it holds something that is no generation."""
    run_folder.check_free(folder, overwrite=True)
    if held := run_folder.held_by_a_run(folder):
        raise RunFolderError(
            f"output_dir: {folder} holds a run ({', '.join(held[:3])}). Name another folder with --output-dir."
        )
    strange = [name for name in dataset.FILES if (folder / name).exists()]
    if strange and not (folder / NAME).exists():
        raise RunFolderError(
            f"output_dir: {folder} holds {', '.join(strange)}, which no generation wrote (there is no {NAME}). "
            "Name another folder with --output-dir."
        )


def _begin(kept: Kept, wanted: Wanted) -> None:
    if wanted.overwrite and kept.changes:
        kept.clear()
        dataset.clear(wanted.output)
    require_same(kept)
    kept.begin()


def _asked(wanted: Wanted, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What answers depend on, besides the teacher's weights."""
    told = json.dumps([(each.id, each.tokens) for each in prompts])
    return {
        "prompts": f"{len(prompts)}, {hashlib.blake2b(told.encode('utf-8', 'replace'), digest_size=8).hexdigest()}",
        "answers": wanted.answers,
        "max_answer_tokens": wanted.max_answer_tokens,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "seed": wanted.seed if wanted.temperature else 0,
        "batch_size": wanted.batch_size,
    }


def _settings(wanted: Wanted, split: str) -> dict[str, Any]:
    source = {name: getattr(wanted.source, name) for name in ("data", "format", "fields", "malformed", "malformed_limit")}
    plain = asdict(wanted) | {"output": str(wanted.output), "adapters": str(wanted.adapters or ""), "split": split}
    filters = plain.pop("filters")
    del plain["overwrite"], plain["source"]
    settings: dict[str, Any] = plain | source | filters | {"validation_share": wanted.for_validation}
    return settings


# Asking


def _told(prompts: Prompts, split: str, wanted: Wanted, loaded: Loaded) -> list[str]:
    """How many, and what a person should know of them."""
    lengths = sorted(len(prompt.tokens) for prompt in prompts.asked)
    each = f", {wanted.answers} answers to each" if wanted.answers > 1 else ""
    most = loaded.config.get("max_position_embeddings")
    most = most if isinstance(most, int) else sys.maxsize
    long = sum(length + wanted.max_answer_tokens > most for length in lengths)
    beyond = f"with the answer may be longer than the {most:,} tokens that the teacher was made for"
    notes = {
        f"{many(prompts.again, 'row')} with a prompt that was there before: it is asked once": prompts.again,
        f"{many(prompts.malformed, 'row')} left out, because there is nothing in them that can be asked": prompts.malformed,
        f"WARNING: {many(prompts.own_system, 'row')} with an own system message, where --system is not put": (
            wanted.system and prompts.own_system
        ),
        f"WARNING: {many(long, 'prompt')} {beyond}": long,
    }
    told = f"{split}: {many(len(prompts.asked), 'prompt')}{each}, of {lengths[0]:,} to {lengths[-1]:,} tokens"
    return [told, *(note for note, holds in notes.items() if holds)]


def _ask(loaded: Loaded, prompts: Sequence[Prompt], wanted: Wanted, kept: Kept, console: Console) -> None:
    """Answers to all prompts that have none yet; they are kept as their groups are whole."""
    total = len(prompts) * wanted.answers
    taken_over = len(kept.answers)
    if taken_over:
        console.say(f"{taken_over:,} of {total:,} answers are there already, in {kept.path}")
    if taken_over == total:
        return
    tokens = [list(prompt.tokens) for prompt in prompts for _ in range(wanted.answers)]
    names = [f"{prompt.id} {number}" for prompt in prompts for number in range(1, wanted.answers + 1)]
    control = _control_tokens(loaded.tokenizer)
    begun = time.perf_counter()

    def tell(number: int, said: list[int]) -> None:
        inside = next((control[token] for token in said if token in control), "")
        prompt = prompts[number // wanted.answers]
        goes_on = isinstance(prompt.said, str)  # then a space between both belongs to the answer
        text = gone_on(loaded.tokenizer, prompt.tokens, said) if goes_on else loaded.tokenizer.decode(said).strip()
        kept.add(number, Answer(text, len(said), len(said) < wanted.max_answer_tokens, inside))
        progress.add(1)

    def settled() -> None:
        nonlocal begun
        now = time.perf_counter()
        kept.settle(now - begun)
        begun = now

    def told(now: int) -> None:
        console.say(f"memory ended: answers of at most {now:,} tokens at once from now on")

    try:
        with Progress("teacher", total - taken_over, "answers", console.say) as progress, wired_memory(loaded.model):
            known = kept.answers.keys()
            answer(loaded.model, loaded.tokenizer, tokens, wanted.asking, tell, told, names=names, known=known, settled=settled)
    except KeyboardInterrupt:
        _interrupted(kept, total, console)
        raise


def _interrupted(kept: Kept, total: int, console: Console) -> None:
    console.say()
    half = f"; {kept.unsettled:,} of a group that was not whole are answered again" if kept.unsettled else ""
    if kept.answers:
        console.say(f"{len(kept.answers):,} of {total:,} answers are kept in {kept.path}; the same command goes on{half}")
    else:
        console.say(f"no group of answers was whole, so none of {total:,} is kept; a smaller --batch-size has smaller groups")


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that belong to templates, and never into an answer, by their ids."""
    return {tokenizer.convert_tokens_to_ids(text): text for text in Specials(tokenizer).strings}
