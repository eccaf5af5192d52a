"""What preparing a million chats costs, beside the bare tokenizer on the same text; and what starting again costs.

    python benchmarks/prepare_million.py --model FOLDER_WITH_TOKENIZER --rows 1000000

Each figure is measured in a process of its own. The rows are made from the words of the demo's chats: one to three
exchanges, half of them with a system prompt, about 300 tokens a row with a tokenizer of 32,000 words.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx_qlora  # noqa: F401  (first: it loads the fast BLAS)

# isort: split
from mlx_qlora.assets import embedded_data

HERE = Path(__file__).parent


def make(path: Path, rows: int) -> None:
    words = " ".join(
        message["content"] for line in (embedded_data() / "train.jsonl").open() for message in json.loads(line)["messages"][1:]
    ).split()
    rng = random.Random(0)

    def say(low: int, high: int) -> str:
        start = rng.randrange(len(words) - high)
        return " ".join(words[start : start + rng.randint(low, high)])

    systems = [say(20, 40) for _ in range(50)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = [{"role": "system", "content": rng.choice(systems)}] if rng.random() < 0.5 else []
            for _ in range(rng.choice((1, 1, 2, 3))):
                messages += [{"role": "user", "content": say(8, 60)}, {"role": "assistant", "content": say(20, 160)}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def bare(tokenizer: str, texts: str) -> dict[str, float]:
    """The tokenizer alone, called as transformers means it, on texts that are rendered already; nothing is kept."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    tokens, spent = 0, 0.0
    with Path(texts).open(encoding="utf-8") as file:
        while batch := [json.loads(line) for line, _ in zip(file, range(1000), strict=False)]:
            start = time.perf_counter()
            tokens += sum(map(len, loaded(batch, add_special_tokens=False)["input_ids"]))
            spent += time.perf_counter() - start
    return {"seconds": spent, "tokens": tokens}


def prepare(model: str, data: str) -> dict[str, float]:
    """From the rows to the prepared folder, or from the prepared folder to the first example."""
    from mlx_qlora.data.corpus import gather
    from mlx_qlora.data.render import RenderConfig
    from mlx_qlora.data.sources import SourceConfig
    from mlx_qlora.model.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    before = _memory()
    start = time.perf_counter()
    corpus = gather(SourceConfig(data=data), RenderConfig(max_seq_length=8192), tokenizer, seed=0)
    first = next(corpus.updates(mlx_qlora_batch(), 1))
    seconds = time.perf_counter() - start
    assert first.tokens
    account = corpus.accounts["train"]
    return {
        "seconds": seconds, "memory_mb": _peak() - before, "tokens": account.tokens, "warm": corpus.warm,
        "supervised_tokens": account.supervised_tokens, "rows": account.rows,
    }  # fmt: skip


def mlx_qlora_batch() -> object:
    from mlx_qlora.data.layout import BatchConfig

    return BatchConfig()


def _memory() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):  # what is mapped from files is the system's to take back
            return int(line.split()[1]) / 1024
    return 0.0


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def render(model: str, data: str, texts: str) -> None:
    """The text of every example, as the tokenizer gets it."""
    from mlx_qlora.data.formats import understand
    from mlx_qlora.data.render import RenderConfig, Renderer
    from mlx_qlora.data.sources import Row, SourceConfig
    from mlx_qlora.model.load import load_tokenizer

    renderer = Renderer(load_tokenizer(model), RenderConfig(), SourceConfig())
    with Path(data).open(encoding="utf-8") as rows, Path(texts).open("w", encoding="utf-8") as out:
        for line in rows:
            for piece in renderer.pieces(understand(Row("x:1", json.loads(line)))[1]):
                out.write(json.dumps(piece.text, ensure_ascii=False) + "\n")


def run(step: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(HERE.parent / "mlx_qlora" / "assets" / "mistral"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="prepare_million")
    parser.add_argument("--step", choices=["bare", "prepare", "render"])
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.step:
        made = {"bare": bare, "prepare": prepare, "render": render}[given.step](*given.rest)
        print(json.dumps(made) if made else "")
        return
    with tempfile.TemporaryDirectory() as scratch:
        data, texts = Path(scratch) / "data", Path(scratch) / "texts.jsonl"
        data.mkdir()
        make(data / "train.jsonl", given.rows)
        make(data / "valid.jsonl", 100)
        run("render", given.model, str(data / "train.jsonl"), str(texts))
        found = []
        for _ in range(given.repeats):  # in turn, so that a busy moment hits both
            shutil.rmtree(data / ".mlx_qlora", ignore_errors=True)
            alone = run("bare", given.model, str(texts))
            cold = run("prepare", given.model, str(data))
            warm = run("prepare", given.model, str(data))
            assert not cold["warm"]
            assert warm["warm"]
            found.append({"bare_s": alone["seconds"], "cold_s": cold["seconds"], "warm_s": warm["seconds"],
                          "ratio": cold["seconds"] / alone["seconds"], "memory_mb": cold["memory_mb"],
                          "warm_memory_mb": warm["memory_mb"]})  # fmt: skip
            print({name: round(value, 2) for name, value in found[-1].items()}, flush=True)
        middle = {name: sorted(one[name] for one in found)[len(found) // 2] for name in found[0]}
        size = (data / "train.jsonl").stat().st_size / 2**20
        kept = sum(file.stat().st_size for file in (data / ".mlx_qlora").rglob("*") if file.is_file()) / 2**20
    result = {
        "rows": given.rows, "tokens": cold["tokens"], "tokens_per_row": cold["tokens"] / given.rows,
        "data_mb": size, "prepared_mb": kept, "tokenizer": Path(given.model).name, "medians": middle, "runs": found,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: version(name) for name in ("mlx-qlora", "tokenizers", "transformers", "numpy")},
    }  # fmt: skip
    path = HERE / "results" / f"{given.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["medians"], indent=2))


if __name__ == "__main__":
    main()
