"""Rows that end in a chain of thought become text: both tasks in one piece, or a piece for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mlx_qlora.data.chain import Chain, ChainConfig, Link
from mlx_qlora.data.chat import Piece, Span
from mlx_qlora.data.formats import Pair, RowError, Talk

Writer = Callable[[Talk | Pair], list[Piece]]


def chained(chain: Chain, config: ChainConfig, write: Writer) -> list[Piece]:
    """The pieces of a chain. `write` gives those of a row whose last answer is trained."""
    if config.kind == "step_by_step":
        return _two_pieces(chain, config, write)
    if config.alpha == 0:  # nothing of the answer is trained, so nothing of it needs to be read
        return [replace(piece, share=1.0) for piece in write(chain.answered(chain.rationale))]
    return [linked(chain, config, write)]


def _two_pieces(chain: Chain, config: ChainConfig, write: Writer) -> list[Piece]:
    tasks = zip(("rationale", "answer"), config.words, (chain.rationale, chain.answer), shares(config), strict=True)
    return [
        replace(piece, share=share, name=name)
        for name, word, text, share in tasks
        if share
        for piece in write(chain.answered(text, word))
    ]


def shares(config: ChainConfig) -> tuple[float, float]:
    """Of rationale and answer in a row's loss."""
    return 1 - config.alpha, config.alpha


def linked(chain: Chain, config: ChainConfig, write: Writer) -> Piece:
    """The prompt with the rationale as a piece, and what follows as its link."""
    (piece,) = write(chain.answered(chain.rationale + config.cue + chain.answer))
    if not any(span.weight for span in piece.spans):  # nothing of the row is trained
        return replace(piece, spans=[], eos=None)
    begin, weight = piece.spans[0].begin, piece.spans[0].weight
    whole = chain.rationale + config.cue + chain.answer
    place = piece.text.find(whole, begin)  # not the last one: the end of the turn may begin with letters of the answer
    if place < 0:
        raise RowError("the chat template does not write this chain of thought as it stands; another chain.cue may help.")
    stop, cut = piece.text[place + len(whole) :].strip(), place + len(chain.rationale)
    if stop and piece.eos is not None:
        raise RowError(
            f"the chat template ends answers with the text {stop!r}, so that a rationale can't be ended in the same pass; "
            "--chain.kind step_by_step does not need that."
        )
    rationale, answer = shares(config)
    link = Link(config.cue, chain.answer, stop, (weight * rationale, weight * answer))
    return replace(piece, text=piece.text[:cut], spans=[Span(begin, cut)], eos=None, goes_on=True, link=link)
