"""Texts of the little world and a tokenizer for them: what the embedded model is made of (`make tiny-model`).

    python data/make_world.py --output-dir runs/tiny-model-data
    python data/make_world.py --output-dir runs/world --plain     # train.txt and valid.txt, without roles, weights, tokenizer

Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

from mlx_qlora.data.vocabulary import BEGIN, CHAT_TEMPLATE, END, ROLES, train_tokenizer

import little_world

SEED = 7
VOCABULARY = 2048
OTHERS = 0.25  # the weight of what the assistant does not say: much of it is chance


def texts(documents: Iterator[little_world.Document]) -> Iterator[str]:
    """What a tokenizer is trained on: no roles, no ends."""
    for document in documents:
        if "messages" in document:
            yield from (message["content"] for message in document["messages"])  # type: ignore[index]
        else:
            yield str(document["text"])


def make_tokenizer(folder: Path) -> None:
    documents = islice(little_world.documents(SEED), 20_000)
    tokenizer = train_tokenizer(texts(documents), VOCABULARY, ROLES, CHAT_TEMPLATE, begins=False)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


def row(document: little_world.Document) -> dict[str, object]:
    """A document as text, with the weights of its parts: the assistant's turns count four times as much as the rest."""
    if "messages" not in document:
        return {"text": document["text"], "weight": OTHERS}
    text, marks = BEGIN, []
    for message in document["messages"]:
        begin = len(text) + len(f"<|{message['role']}|>")  # type: ignore[index]
        text += f"<|{message['role']}|>{message['content']}{END}"  # type: ignore[index]
        if message["role"] == "assistant":  # type: ignore[index]
            marks.append((begin, len(text)))
    edges = [0, *(edge for mark in marks for edge in mark), len(text)]
    parts = [[a, b, 1.0 if (a, b) in marks else OTHERS] for a, b in pairwise(edges) if a < b]
    return {"text": text, "train": parts}


def plain(document: little_world.Document) -> str:
    """What is said, a line each, and the end of the document."""
    said = [document["text"]] if "text" in document else [message["content"] for message in document["messages"]]  # type: ignore[index]
    return "\n".join([*map(str, said), "<|endoftext|>", ""])


def make_plain(path: Path, seed: int, letters: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in little_world.documents(seed):
            letters -= file.write(plain(document))
            if letters < 0:
                return


def make_texts(folder: Path, name: str, seed: int, letters: int) -> None:
    written = 0
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for document in little_world.documents(seed):
            made = row(document)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            written += len(str(made["text"]))
            if written > letters:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--letters", type=int, default=20_000_000)
    parser.add_argument("--plain", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.plain:
        make_plain(folder / "train.txt", SEED + 1, arguments.letters)
        make_plain(folder / "valid.txt", SEED + 1001, arguments.letters // 50)
        return
    make_tokenizer(folder / "tokenizer")
    make_texts(folder, "train", SEED + 1, arguments.letters)
    make_texts(folder, "valid", SEED + 1001, arguments.letters // 100)


if __name__ == "__main__":
    main()
