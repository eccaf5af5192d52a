"""Distillation between different tokenizers: sorted probabilities, and the places of a row that belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlx_qlora.assets import embedded_data
from mlx_qlora.commands.distill import main as distill
from mlx_qlora.commands.distill_cache import main as cache
from mlx_qlora.data.chat import TrainOn
from mlx_qlora.data.kept_logits import KeptLogits
from mlx_qlora.data.layout import histories, padded, supervised_marks
from mlx_qlora.data.render import RenderConfig, Renderer
from mlx_qlora.data.sources import Row, SourceConfig
from mlx_qlora.data.templates import TEMPLATES
from mlx_qlora.data.vocabulary import train_tokenizer
from mlx_qlora.distilling.spans import Letters, aligned, marks_of
from mlx_qlora.model.create import CreateConfig, create
from mlx_qlora.model.full import model_files
from mlx_qlora.model.load import as_loaded, load, load_tokenizer
from mlx_qlora.objectives.distill import DistillConfig, distil
from mlx_qlora.objectives.sorted_probabilities import uld_and_gradient

# Sorted probabilities


def told(log_p: mx.array, k: int, temperature: float) -> tuple[mx.array, mx.array]:
    """What a cache knows of a teacher: its k greatest log-probabilities, and the rest at a temperature."""
    ordered = -mx.sort(-log_p, axis=-1)
    rest = mx.logsumexp(ordered[:, k:] / temperature, axis=-1) if k < log_p.shape[-1] else mx.full(len(log_p), -mx.inf)
    return ordered[:, :k], rest


def plain(student: mx.array, values: mx.array, rest: mx.array, temperature: float) -> mx.array:
    """The definition, for autograd: both sorted, the shorter padded with zeros, what is not known as one class."""
    q = -mx.sort(-mx.softmax(student / temperature, axis=-1), axis=-1)
    scores = mx.concatenate([values / temperature, rest[:, None]], axis=-1)
    p = mx.softmax(scores, axis=-1)
    p, other = p[:, :-1], p[:, -1:]
    k = p.shape[-1]
    if q.shape[-1] < k:
        q = mx.pad(q, [(0, 0), (0, k - q.shape[-1])])
    return mx.abs(q[:, :k] - p).sum(axis=-1) + mx.abs(q[:, k:].sum(axis=-1, keepdims=True) - other)[:, 0]


def some(rows: int, classes: int, seed: int, scale: float = 2.0) -> mx.array:
    return mx.random.normal((rows, classes), key=mx.random.key(seed)) * scale


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def test_a_case_by_hand() -> None:
    """Student 1/2, 1/4, 1/8, 1/8; teacher 1/8, 5/8 and 1/4 in two others: |1/2 - 5/8| + |1/4 - 1/8| + |1/4 - 1/4| = 1/4."""
    student = mx.log(mx.array([[0.125, 0.5, 0.125, 0.25]]))
    losses, gradient = uld_and_gradient(student, mx.log(mx.array([[0.625, 0.125]])), mx.log(mx.array([0.25])), 1.0)
    assert losses.item() == pytest.approx(0.25, abs=1e-6)
    # The likeliest wants up (-1), the second down (+1), the rest nothing: q * (g - mean), mean = -1/2 + 1/4.
    expected = [0.125 * 0.25, 0.5 * -0.75, 0.125 * 0.25, 0.25 * 1.25]
    assert np.allclose(np.array(gradient)[0], expected, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("classes", "others", "k"), [(40, 40, 40), (40, 55, 8), (40, 30, 30), (40, 60, 50), (12, 60, 30)])
def test_loss_and_gradient_are_those_of_the_definition(classes: int, others: int, k: int, temperature: float) -> None:
    student = some(6, classes, 1)
    values, rest = told(log_softmax(some(6, others, 2)), k, temperature)
    losses, gradient = uld_and_gradient(student, values, rest, temperature)
    assert mx.allclose(losses, plain(student, values, rest, temperature), atol=1e-6)
    by_autograd = mx.grad(lambda logits: plain(logits, values, rest, temperature).sum())(student)
    assert mx.allclose(gradient, by_autograd, atol=1e-6)
    assert mx.abs(gradient).max().item() > 1e-3


def test_the_gradient_is_that_of_finite_differences() -> None:
    student = np.array(some(2, 9, 3)).astype(np.float64)
    values, rest = told(log_softmax(some(2, 14, 4)), 5, 1.5)
    p = np.exp(np.array(values, np.float64) / 1.5)
    other = np.exp(np.array(rest, np.float64))
    p, other = p / (p.sum(1) + other)[:, None], other / (p.sum(1) + other)

    def loss(z: Any) -> Any:
        q = np.exp(z / 1.5)
        q = -np.sort(-q / q.sum(1, keepdims=True), axis=1)
        return np.abs(q[:, :5] - p).sum(1) + np.abs(q[:, 5:].sum(1) - other)

    _, gradient = uld_and_gradient(mx.array(student.astype(np.float32)), values, rest, 1.5)
    for place in range(2):
        for number in range(9):
            step = np.zeros_like(student)
            step[place, number] = 1e-6
            slope = (loss(student + step) - loss(student - step))[place] / 2e-6
            assert gradient[place, number].item() == pytest.approx(slope, abs=2e-6)


def test_ties_move_together() -> None:
    """The loss does not depend on the order of classes that are equally likely; what they get is a slope of it."""
    student = mx.array([[1.0, 1.0, 1.0, 0.0, 0.0, -1.0]])
    values, rest = mx.log(mx.array([[0.9, 0.02, 0.01, 0.01]])), mx.log(mx.array([0.06]))
    losses, gradient = uld_and_gradient(student, values, rest, 1.0)
    assert mx.allclose(losses, plain(student, values, rest, 1.0), atol=1e-6)
    shuffled = mx.array([4, 2, 0, 5, 1, 3])
    again, _ = uld_and_gradient(student[:, shuffled], values, rest, 1.0)
    assert mx.allclose(losses, again, atol=1e-7)
    low = mx.array([[0.5, 0.5, 0.5, 0.5]])  # all equal, and the teacher below them at each known rank
    values, rest = mx.log(mx.array([[0.1, 0.1, 0.1]])), mx.log(mx.array([0.7]))
    losses, gradient = uld_and_gradient(low, values, rest, 1.0)
    assert losses.item() == pytest.approx(0.9, abs=1e-6)
    assert np.allclose(np.sort(np.array(gradient)[0]), [-0.375, 0.125, 0.125, 0.125], atol=1e-6)
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("k", [5, 300])
def test_the_same_distribution_in_another_order_is_no_distance(k: int) -> None:
    student = some(4, 300, 5)
    order = mx.random.permutation(300, key=mx.random.key(6))
    values, rest = told(log_softmax(student)[:, order], k, 2.0)
    losses, gradient = uld_and_gradient(student, values, rest, 2.0)
    assert mx.abs(losses).max().item() < 1e-5
    assert mx.abs(gradient).max().item() == 0


def test_places_without_a_partner_are_nothing() -> None:
    student = some(3, 20, 7)
    values, rest = told(log_softmax(some(3, 30, 8)), 4, 1.0)
    alone = mx.array([False, True, False])
    values = mx.where(alone[:, None], -mx.inf, values).astype(mx.float16)
    losses, gradient = uld_and_gradient(student, values, mx.where(alone, -mx.inf, rest), 1.0)
    assert losses[1].item() == 0
    assert mx.abs(gradient[1]).max().item() == 0
    assert mx.isfinite(gradient).all().item()
    assert losses[0].item() > 0.01


def test_logits_at_their_limits_stay_finite() -> None:
    student = mx.concatenate([mx.full((1, 1), 50.0), mx.full((1, 30), -50.0)], axis=-1).astype(mx.float16)
    values, rest = mx.array([[0.0, -90.0]]), mx.array([-mx.inf])
    losses, gradient = uld_and_gradient(student, values, rest, 0.05)
    assert losses.item() == pytest.approx(0.0, abs=1e-6)
    assert mx.isfinite(gradient).all().item()
    assert gradient.dtype == mx.float32


# Places that belong together

TALK = {
    "messages": [
        {"role": "user", "content": "Quanto é 12 + 30?"},
        {"role": "assistant", "content": "São 42, não é? 🙂👍 Ok."},
        {"role": "user", "content": "E the total?"},
        {"role": "assistant", "content": "The total\n\nis   forty-two: 4242."},
    ]
}
TEXTS = ["the total is forty two", "São 42, não é?", "total total forty forty the the", "12 + 30 = 42"] * 4
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def byte_level() -> Any:
    """Bytes and few merges, another end of an answer, a template of role tokens."""
    return as_loaded(train_tokenizer(iter(TEXTS), 290, chat_template=TEMPLATES["plain"]))


def sentencepiece() -> Any:
    """Words that begin with a space, bytes for letters that it does not know, a template of brackets."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(strip)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator((word for text in TEXTS for word in text.split()), trainer)
    described = json.loads(core.to_str())
    vocab = described["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    core = Tokenizer.from_str(json.dumps(described))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    made.chat_template = BRACKETS
    return as_loaded(made)


def embedded() -> Any:
    return load_tokenizer("embedded")


class Slow:
    """A tokenizer of which no more is known than what it encodes and decodes."""

    backend_tokenizer = None

    def __init__(self, inner: Any):
        self._inner = inner
        self.eos_token_id, self.decode, self.get_vocab = inner.eos_token_id, inner.decode, inner.get_vocab


KINDS: list[Callable[[], Any]] = [embedded, byte_level, sentencepiece]


def rendered(tokenizer: Any, row: dict[str, Any] = TALK, **how: Any) -> list[Any]:
    return Renderer(tokenizer, RenderConfig(**how), SourceConfig()).render(Row("row", row))


def said_before(tokenizer: Any, example: Any, place: int) -> bytes:
    """The text of an answer up to a place, by decoding its tokens; a letter that is not whole yet is not there."""
    first = place + 1
    while example.weights[first - 1] > 0:
        first -= 1
    return str(tokenizer.decode(example.tokens[first : place + 1].tolist())).strip().encode()


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("own", KINDS)
def test_before_both_places_of_a_pair_the_same_was_said(own: Callable[[], Any], other: Callable[[], Any]) -> None:
    student, teacher = own(), other()
    mine, its = rendered(student), rendered(teacher)
    pairs = aligned(mine, its, Letters(student), Letters(teacher))
    for a, place, b, partner in pairs.tolist():
        one, two = said_before(student, mine[a], place), said_before(teacher, its[b], partner)
        if not any(text.endswith("\ufffd".encode()) for text in (one, two)):
            assert one == two
    assert len(pairs) == len({(a, place) for a, place, _, _ in pairs.tolist()}), "a place has one partner"
    ends = [(a, place) for a, place, _, _ in pairs.tolist() if mine[a].tokens[place + 1] == student.eos_token_id]
    assert len(ends) == 2, "the ends of both answers"
    if own is other:
        supervised = sum(int(np.count_nonzero(each.weights)) for each in mine)
        assert len(pairs) == supervised
        assert (pairs[:, :2] == pairs[:, 2:]).all()
    else:  # words begin at the same letters whatever is in them
        assert len(pairs) >= 20


def test_a_tokenizer_that_only_decodes_gives_the_same_pairs_but_for_parts_of_letters() -> None:
    student, teacher = embedded(), byte_level()
    mine, its = rendered(student), rendered(teacher)
    quick = aligned(mine, its, Letters(student), Letters(teacher)).tolist()
    slow = aligned(mine, its, Letters(Slow(student)), Letters(Slow(teacher))).tolist()
    assert [pair for pair in slow if pair in quick] == slow
    assert 0 <= len(quick) - len(slow) <= 8, "of two signs with four bytes each"


def test_an_answer_whose_beginning_or_end_was_cut_off_keeps_its_partners() -> None:
    """To 60 tokens of each: other letters are left of the talk in other tokens."""
    student, teacher = embedded(), byte_level()
    whole = aligned(rendered(student), rendered(teacher), Letters(student), Letters(teacher))
    for policy in ("keep_start", "keep_end"):
        mine, its = (rendered(each, max_seq_length=60, truncation=policy) for each in (student, teacher))
        pairs = aligned(mine, its, Letters(student), Letters(teacher))
        assert 0 < len(pairs) < len(whole)
        for a, place, b, partner in pairs.tolist():
            one, two = said_before(student, mine[a], place), said_before(teacher, its[b], partner)
            if policy == "keep_start" and not any(text.endswith("\ufffd".encode()) for text in (one, two)):
                assert one == two
            assert mine[a].weights[place + 1] > 0
            assert its[b].weights[partner + 1] > 0


def test_an_answer_that_one_of_both_lacks_has_no_partner() -> None:
    """The student learns both answers, the teacher's template is asked for the last one."""
    student, teacher = embedded(), byte_level()
    mine, its = rendered(student), rendered(teacher, train_on=TrainOn.LAST)
    both = aligned(mine, rendered(teacher), Letters(student), Letters(teacher))
    last = aligned(mine, its, Letters(student), Letters(teacher))
    second = int(np.flatnonzero(np.diff(mine[0].weights))[2])
    assert last.tolist() == [pair for pair in both.tolist() if pair[1] >= second]


def test_other_words_end_the_pairs() -> None:
    student, teacher = embedded(), byte_level()
    changed = {"messages": [TALK["messages"][0], {"role": "assistant", "content": "São 41 então."}]}
    short = {"messages": TALK["messages"][:2]}
    mine, its = rendered(student, short), rendered(teacher, changed)
    pairs = aligned(mine, its, Letters(student), Letters(teacher))
    said = [said_before(student, mine[0], place) for _, place, _, _ in pairs.tolist()]
    assert said == ["São".encode()[:0], "São".encode(), "São".encode(), "São 4".encode()] or said[-1] == "São 4".encode()
    assert student.eos_token_id not in [mine[0].tokens[place + 1] for _, place, _, _ in pairs.tolist()]


def test_marks_are_those_of_a_batch() -> None:
    student, teacher = embedded(), byte_level()
    mine, its = rendered(student), rendered(teacher)
    pairs = aligned(mine, its, Letters(student), Letters(teacher))
    marks = marks_of(mine, pairs)
    batch = padded(mine)
    own = np.array(batch.marks)[np.array(batch.positions)][np.array(batch.weights) > 0]
    assert set(marks.tolist()) <= set(own.tolist())
    assert len(set(marks.tolist())) == len(pairs)
    assert marks[0] == histories(mine[0].tokens[:-1])[pairs[0, 1]]


# A cache across tokenizers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model from nothing that reads by bytes and few merges."""
    from mlx_lm.utils import save_model

    folder = tmp_path_factory.mktemp("teacher")
    made = create(CreateConfig(preset="tiny"), byte_level(), 0, 512)
    save_model(folder, made.model)
    for name, content in model_files(made).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def asked(teacher: Path, tmp_path: Path) -> list[str]:
    """The words of `distill cache`, with a talk whose second answer the two tokenizers cut otherwise."""
    data = tmp_path / "data"
    data.mkdir()
    lines = [*(embedded_data() / "train.jsonl").read_text(encoding="utf-8").splitlines()[:3], json.dumps(TALK)]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("\n".join(lines if name == "train" else lines[:1]) + "\n", encoding="utf-8")
    given = {"model": "embedded", "data": data, "distill.teacher": teacher, "distill.cache": tmp_path / "cache"}
    flags = {"distill.loss": "uld", "distill.top-k": 20, "data-cache": "off"}
    return [word for name, value in (given | flags).items() for word in (f"--{name}", str(value))]


def student_examples(asked: list[str]) -> list[Any]:
    path = Path(asked[asked.index("--data") + 1]) / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [each for row in rows for each in rendered(embedded(), row)]


def test_a_record_is_what_the_teacher_says_at_the_partner(asked: list[str], teacher: Path, tmp_path: Path) -> None:
    assert cache(asked) == 0
    kept = KeptLogits.open(tmp_path / "cache")
    own, model = byte_level(), load(str(teacher)).model
    alone = partners = 0
    for row, mine in (("talk", rendered(embedded())),):
        its = rendered(own)
        pairs = aligned(mine, its, Letters(embedded()), Letters(own))
        partner = {place: other for _, place, _, other in pairs.tolist()}
        logits = model(mx.array(its[0].tokens[None]))[0].astype(mx.float32)
        logs = np.array(-mx.sort(-log_softmax(logits), axis=-1))
        marks = histories(mine[0].tokens[:-1])
        places = np.flatnonzero(mine[0].weights[1:])
        values, _, rests = kept.classes(marks[places], np.ones(len(places), np.float32), 2.0, None)
        for place, told_values, rest in zip(places.tolist(), values, rests, strict=True):
            if place in partner:
                at = logs[partner[place]]
                assert np.allclose(told_values, at[:20], atol=5e-3), row
                assert rest == pytest.approx(np.log(np.exp(at[20:] / 2).sum()), abs=2e-3)
                partners += 1
            else:
                assert np.isneginf(told_values).all()
                assert np.isneginf(rest)
                alone += 1
    assert partners > 20
    assert alone > 0, "the teacher has one token where the student has several"


def test_what_a_kill_took_is_made_again(asked: list[str], tmp_path: Path) -> None:
    small = [*asked, "--shard-mb", "0.002"]
    assert cache(small) == 0
    folder = tmp_path / "cache"
    before = KeptLogits.open(folder)
    marks = np.unique(np.concatenate([supervised_marks(each) for each in student_examples(asked)]))
    ones = np.ones(len(marks), np.float32)
    whole = before.classes(marks, ones, 1.0, None)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) == 2, "what the teacher said, and the places without a partner"
    shards[0].unlink()
    assert cache(small) == 0
    again = KeptLogits.open(folder).classes(marks, ones, 1.0, None)
    assert (whole[0] == again[0]).all()
    assert (whole[2] == again[2]).all()


def test_training_from_it_is_the_loss_by_hand(asked: list[str], tmp_path: Path) -> None:
    assert cache(asked) == 0
    kept = KeptLogits.open(tmp_path / "cache")
    student = load("embedded").model
    mine = rendered(embedded())
    batch = padded(mine)
    config = DistillConfig(cache="x", loss="uld", temperature=(1.5,), alpha=(0.4,), logit_clip=0)
    values, ids, rests = kept.classes(np.array(batch.marks[batch.positions]), np.array(batch.weights), 1.5, None)
    beside = (mx.array(1.5), mx.array(0.4), *map(mx.array, (values, ids, rests)))
    loss = distil(config, 2048)(student, batch._replace(beside=beside))
    logits = student(batch.rows)[0][batch.positions].astype(mx.float32)
    real = np.array(batch.weights) > 0
    there = real & np.isfinite(values).any(axis=-1)
    where = mx.array(np.flatnonzero(there))
    far = plain(logits[where], mx.array(values)[where].astype(mx.float32), mx.array(rests)[where], 1.5).sum()
    entropy = (-mx.take_along_axis(log_softmax(logits), batch.targets[:, None], axis=-1)[:, 0] * batch.weights).sum()
    assert there.sum() < real.sum()
    assert loss.total.item() == pytest.approx(0.4 * far.item() + 0.6 * entropy.item(), rel=1e-5)


def test_a_run_learns_from_it_and_memory_is_foreseen(asked: list[str], tmp_path: Path, capsys: Any) -> None:
    assert cache(asked) == 0
    words = [word for word in asked if word not in ("--distill.teacher", asked[asked.index("--distill.teacher") + 1])]
    out = ["--output-dir", str(tmp_path / "run"), "--max-steps", "2", "--batch-size", "2"]
    words = [word for word in words if word not in ("--distill.top-k", "20")]
    assert distill([*words, *out]) == 0
    said = capsys.readouterr().out
    assert "sorted probabilities; temperature 2 -> 1.5 -> 1" in said
    assert "memory is not foreseen" not in said
    assert "divergence" in said
    plainly = [word for word in words if word not in ("--distill.loss", "uld")]
    assert distill([*plainly, "--output-dir", str(tmp_path / "other"), "--max-steps", "1"]) == 2
    assert "a teacher with other tokens (distill.loss: uld) is what is kept" in capsys.readouterr().err


def test_what_can_not_be_asked_across_tokenizers(asked: list[str], capsys: Any, tmp_path: Path) -> None:
    assert cache([*asked, "--samples", "8"]) == 2
    assert "distill.loss: uld came with samples" in capsys.readouterr().err
    assert cache([word for word in asked if word not in ("--distill.loss", "uld")]) == 2
    assert "283 of 286 ids differ" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
