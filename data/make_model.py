"""The end of `make tiny-model`: the new model in 4 bits beside the embedded one, its card and its curve.

python data/make_model.py runs/tiny-model            # says which is better, and writes README.md and curve.png
python data/make_model.py runs/tiny-model --replace  # and puts the new one in the package, if it is better
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from mlx_qlora.assets import embedded_model
from mlx_qlora.data.layout import Kind, Layout, lay_out
from mlx_qlora.data.part import open_part
from mlx_qlora.data.render import RenderConfig
from mlx_qlora.data.sources import SourceConfig, find
from mlx_qlora.look.history import read_history
from mlx_qlora.look.measure import Measured, measure, standard_error
from mlx_qlora.look.pictures.figures import panel, save
from mlx_qlora.model.load import load
from mlx_qlora.objectives.sft import sft
from mlx_qlora.records import Example

CARD = """# The embedded model

A Mistral of {parameters:,} parameters with {vocabulary:,} tokens, in 4 bits with groups of 64. It knows a little world of people,
animals, things and sums, in Portuguese and English, and answers in chats about it; nothing else, and nothing true. It is there
to try fine-tuning without a download, and in the tests.

| | |
|---|---|
| made by | `make tiny-model`: `data/make_world.py`, `mlx-qlora train --config examples/tiny-model.yaml`, `mlx_lm.convert` |
| texts | {tokens:,} tokens of the little world, made from a seed; what the assistant says counts four times as much as the rest |
| seen | {seen:,} tokens in {steps:,} updates, {minutes:.0f} minutes on two shared cores |
| loss, held-out rows | {whole:.4f} as trained, {quantised:.4f} in 4 bits (weighted as in training) |
| of the assistant's words alone | {spoken:.4f} in 4 bits |
| licence | that of this project; the texts are its own |

![loss of training and validation](curve.png)
"""


def held_out(folder: Path, tokenizer: object) -> list[Example]:
    config = SourceConfig(data=str(folder), data_cache="off")
    return open_part(find(config), config, RenderConfig(), tokenizer, seed=0, split="valid").examples  # type: ignore[arg-type]


def measured(model: str, data: Path, least: float = 0.0) -> Measured:
    """Its loss on held-out rows; of the tokens alone that weigh more than `least`."""
    loaded = load(model)
    examples = [
        Example(each.id, each.tokens, np.where(each.weights > least, each.weights, 0).astype(np.float32))
        for each in held_out(data, loaded.tokenizer)
    ]
    examples = [each for each in examples if each.weights.any()]
    return measure(loaded.model, sft(), lay_out(examples, Layout(Kind.PACKED)), examples)


def compared(new: Measured, old: Measured) -> str:
    weights = new.weights
    difference = (new.totals.sum() - old.totals.sum()) / weights.sum()
    error = standard_error(new.totals - old.totals, weights)
    return f"{new.mean:.4f} against {old.mean:.4f}, difference {difference:+.4f} ± {1.96 * error:.4f}"


def token_f1(demo: Path) -> float:
    """What the demo's answers were worth after training."""
    return float(read_history(demo).summary["answers"]["tuned"]["token_f1"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--replace", action="store_true")
    arguments = parser.parse_args()
    run: Path = arguments.run
    history = read_history(run)
    data, made = Path(history.settings["data"]), run / "4bit"
    whole, new, old = (measured(each, data) for each in (str(run / "model"), str(made), "embedded"))
    spoken, spoken_old = (measured(each, data, least=0.5) for each in (str(made), "embedded"))
    print(f"held-out rows   {compared(new, old)}")
    print(f"the assistant   {compared(spoken, spoken_old)}")
    for extra in made.glob("*.md"):  # the converter's own, which asks for packages of others
        extra.unlink()
    save(panel([history], "loss", inches=(9.0, 4.0), dots=110), made / "curve.png")
    card = CARD.format(
        parameters=history.summary["total_parameters"],
        vocabulary=json.loads((made / "config.json").read_text())["vocab_size"],
        tokens=history.account["tokens"],
        seen=history.summary["tokens"] - history.step * history.settings["batch_size"],
        steps=history.step,
        minutes=history.summary["elapsed_s"] / 60,
        whole=whole.mean,
        quantised=new.mean,
        spoken=spoken.mean,
    )
    (made / "README.md").write_text(card, encoding="utf-8")
    learnt, learnt_old = (token_f1(run / f"demo-{name}") for name in ("new", "embedded"))
    print(f"the demo        token F1 {learnt:.3f} against {learnt_old:.3f}")
    better = learnt > learnt_old
    print(f"{made} is {'better than' if better else 'no better than'} the embedded model")
    if arguments.replace and better:
        shutil.rmtree(embedded_model())
        shutil.copytree(made, embedded_model())
        print(f"it stands in {embedded_model()} now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
