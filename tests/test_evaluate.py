"""Scoring: what prompts have in common is computed once, and the answers are the same."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_qlora.data.render import Question
from mlx_qlora.look.evaluation import generate
from mlx_qlora.look.evaluation.generate import generate_answers
from mlx_qlora.model.load import Loaded


@pytest.mark.parametrize("prefix", [0, 8, 40])
def test_answers_behind_a_shared_beginning_are_the_same(embedded: Loaded, prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    system = embedded.tokenizer.encode("O clube de futebol joga em casa aos domingos. " * 20, add_special_tokens=False)[:prefix]
    tails = ["Quem joga?", "Quem joga hoje", "A cidade", "O gato mia e o cachorro late."]
    prompts = [tuple(system + embedded.tokenizer.encode(tail, add_special_tokens=False)) for tail in tails]
    questions = [Question(str(number), "", prompt, "") for number, prompt in enumerate(prompts)]
    seen = []
    model, whole = embedded.model, type(embedded.model).__call__
    monkeypatch.setattr(type(model), "__call__", lambda self, x, *a, **k: seen.append(x.size) or whole(self, x, *a, **k))
    shared = generate_answers(model, embedded.tokenizer, questions, 12)
    computed = sum(seen)
    seen.clear()
    monkeypatch.setattr(generate, "_WORTH", 10**9)
    assert generate_answers(model, embedded.tokenizer, questions, 12) == shared
    assert len(set(shared)) > 1
    assert sum(seen) - computed >= (2 * prefix if prefix >= 16 else 0)
    assert mx.isfinite(model(mx.array([[3, 4]]))).all()
