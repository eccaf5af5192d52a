"""The embedded teacher's beginning and end (`make tiny-teacher`): the tiny model with twice its layers, and its card.

    python data/make_teacher.py grow runs/tiny-teacher-grown  # each layer of the tiny model followed by a new one
    python data/make_teacher.py finish runs/tiny-teacher      # says how good it is, and writes README.md and curve.png
    python data/make_teacher.py finish runs/tiny-teacher --replace  # and puts it in the package

A model of this size that begins with random weights would spend most of a short training on learning to copy from its
question. The tiny model can, so the teacher begins as the tiny model does: the new layers add nothing at first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qlora.assets import embedded_model, embedded_teacher
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.part import open_part
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.look.history import read_history
from mlx_qlora.look.measure import measure
from mlx_qlora.look.pictures.figures import panel, save
from mlx_qlora.model.create import parameters
from mlx_qlora.model.load import load
from mlx_qlora.objectives.sft import sft

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_INTO_STREAM = ("self_attn.o_proj.weight", "mlp.down_proj.weight")

CARD = """# The embedded teacher

A Mistral of {parameters:,} parameters, in 4 bits with groups of 64: the embedded model with twice its layers, trained in full on
word problems of the little world. It writes a rationale and the answer, and knows nothing else. It is there to try distillation
without a download (`make distill`), and in the tests.

| | |
|---|---|
| made by | `make tiny-teacher`: `data/make_teacher.py`, `data/make_problems.py`, `mlx-qlora train --config examples/tiny-teacher.yaml`, `mlx_lm.convert` |
| seen | {examples:,} problems, {tokens:,} tokens, in {steps:,} updates, {minutes:.0f} minutes with much other work on two shared cores |
| loss, held-out problems | {whole:.4f} as trained, {quantised:.4f} in 4 bits |
| answers that are right, of {questions} | {right_whole:.1%} as trained, {right:.1%} in 4 bits |
| licence | that of this project; the problems are its own |

No sum of the held-out problems is among what it has seen, in any words; single steps such as 9 + 4 are.

![loss of training and validation](curve.png)
"""


def grown(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Each layer followed by a copy of itself that adds nothing yet: the same function with twice the layers."""
    made = {}
    for name, array in arrays.items():
        before, layers, rest = name.partition(".layers.")
        if not layers:
            made[name] = array
            continue
        number, inside = rest.split(".", 1)
        made[f"{before}.layers.{2 * int(number)}.{inside}"] = array
        made[f"{before}.layers.{2 * int(number) + 1}.{inside}"] = mx.zeros_like(array) if inside in _INTO_STREAM else array
    return made


def grow(folder: Path) -> None:
    from mlx_lm.utils import dequantize_model, load_model

    model, config = load_model(embedded_model())
    arrays = dict(tree_flatten(dequantize_model(model).parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), grown(arrays), {"format": "mlx"})
    kept = {key: value for key, value in config.items() if not key.startswith("quantization")}
    kept["num_hidden_layers"] *= 2
    (folder / "config.json").write_text(json.dumps(kept, indent=4) + "\n", encoding="utf-8")
    for name in TOKENIZER:
        shutil.copy(embedded_model() / name, folder / name)


def held_out_loss(model: str, data: str) -> tuple[float, int]:
    """(loss of the test's problems, parameters)."""
    loaded, config = load(model), SourceConfig(data=data, data_cache="off")
    tokenizer = loaded.tokenizer
    examples = open_part(find(config), config, RenderConfig(), tokenizer, seed=0, split="test").examples
    return measure(loaded.model, sft(), lay_out(examples, Layout(Kind.PACKED)), examples).mean, parameters(loaded.model)


def share_right(folder: Path) -> tuple[float, int]:
    """(share of answers whose last number is the expected one, how many were asked)."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    right = [each["answer"].rpartition("####")[2].strip() == each["expected"].rpartition("####")[2].strip() for each in rows]
    return sum(right) / len(right), len(right)


def finish(run: Path, replace: bool) -> None:
    history, made = read_history(run), run / "4bit"
    (whole, count), (quantised, _) = (held_out_loss(str(run / name), history.settings["data"]) for name in ("model", "4bit"))
    (right_whole, questions), (right, _) = (share_right(run / f"{name}-evaluated") for name in ("model", "4bit"))
    for extra in made.glob("*.md"):  # the converter's own, which asks for packages of others
        extra.unlink()
    for name in TOKENIZER:  # the same bytes as the student's
        shutil.copy(embedded_model() / name, made / name)
    save(panel([history], "loss", inches=(9.0, 4.0), dots=110), made / "curve.png")
    card = CARD.format(
        parameters=count, examples=history.step * history.settings["batch_size"], tokens=history.summary["tokens"],
        steps=history.step, minutes=history.summary["elapsed_s"] / 60, whole=whole, quantised=quantised, right=right,
        right_whole=right_whole, questions=questions,
    )  # fmt: skip
    (made / "README.md").write_text(card, encoding="utf-8")
    print(card)
    if replace:
        shutil.rmtree(embedded_teacher(), ignore_errors=True)
        shutil.copytree(made, embedded_teacher())
        print(f"it stands in {embedded_teacher()} now")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["grow", "finish"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--replace", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "grow":
        grow(arguments.folder)
    else:
        finish(arguments.folder, arguments.replace)


if __name__ == "__main__":
    main()
