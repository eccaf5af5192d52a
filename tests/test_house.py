"""The rules of the house: who may import whom, and which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mlx_qlora

PACKAGE = Path(mlx_qlora.__file__).parent
ROOMS = {"data", "model", "engine", "run"}
# From the ground up: a part may import from its own floor or a lower one, and the four rooms never from each other.
FLOORS = [
    {"records", "errors", "findings", "files", "assets"},
    ROOMS,
    {"objectives", "look"},
    {"config"},
    {"foresee", "outlook"},
    {"plan"},
    {"resume"},
    {"teaching"},
    {"build", "keep"},
    {"going", "evaluating", "pace", "repeat", "distilling"},
    {"train"},
    {"bench"},
    {"commands", "__main__"},
]
# Packages that are large or optional: imported where they are used, inside a function.
LATE = {
    "mlx_lm", "transformers", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "tqdm",
    "matplotlib", "mlx_lm_lora", "mlx_tune", "rouge_score", "sacrebleu", "lm_eval", "tensorboard", "wandb", "trackio",
    "mlflow", "IPython",
}  # fmt: skip


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of all that a file imports, but for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "mlx_qlora" else [str(node.module)]
            )
            found += [(name, id(node) in top) for name in names]
    return found


def files() -> list[tuple[str, Path]]:
    """(part, file) of every module but the package's own face."""
    inside = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in inside]


def floor(part: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def test_imports_point_down_only() -> None:
    wrong = []
    for part, path in files():
        for module, _ in imports(path):
            if not module.startswith("mlx_qlora."):
                continue
            other = module.split(".")[1]
            if other != part and (floor(other) > floor(part) or (part in ROOMS and other in ROOMS)):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_large_packages_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for _, path in files()
        for module, top in imports(path)
        if top and module.split(".")[0] in LATE
    ]
    assert not wrong


def test_below_train_nothing_sees_the_run_config() -> None:
    for part, path in files():
        if floor(part) < floor("config"):
            assert "RunConfig" not in path.read_text(encoding="utf-8"), path


def test_the_public_names() -> None:
    assert sorted(mlx_qlora.__all__) == [
        "ChainConfig",
        "DistillConfig",
        "EarlyStoppingConfig",
        "EarlyStoppingMonitor",
        "GradientAccumulator",
        "LoraConfig",
        "RunConfig",
        "attach_lora",
        "compare",
        "curves",
        "dropout_keys",
        "live_curves",
        "load",
        "next_token_cross_entropy",
        "read_history",
        "supervised_logits",
        "train",
    ]
    assert all(callable(getattr(mlx_qlora, name)) for name in mlx_qlora.__all__)


def test_train_is_the_function_however_it_was_imported_before() -> None:
    code = "import mlx_qlora.train; from mlx_qlora import train; assert callable(train), train"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_alone_does_not_wait_for_mlx() -> None:
    code = "import sys, mlx_qlora; assert 'mlx.core' not in sys.modules and 'mlx_lm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
