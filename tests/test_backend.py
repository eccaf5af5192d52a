from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qlora.model import backend

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux's wheel of MLX needs another BLAS")


def describe_in(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code + "; from mlx_qlora.model import backend; print(backend.describe())"],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return done.stdout


@ON_LINUX
def test_a_fast_blas_is_in_use_here() -> None:
    assert backend.preload_blas().fast, "the tests need the cpu extra; they take an hour without it"


@ON_LINUX
def test_without_one_a_line_says_what_to_install() -> None:
    assert "pip install 'mlx-qlora[cpu]'" in describe_in("import mlx_qlora", MLX_QLORA_BLAS="none")
    assert "pip install 'mlx-qlora[cpu]'" in describe_in("import mlx_qlora", MLX_QLORA_BLAS="/no/such/library.so")


@ON_LINUX
def test_mlx_imported_first_is_said() -> None:
    assert "import mlx_qlora before mlx" in describe_in("import mlx.core, mlx_qlora")


@ON_LINUX
def test_an_mlx_without_its_library_is_said(tmp_path: Path) -> None:
    """As after `pip install mlx-qlora` without an extra: the package is there, libmlx.so is not."""
    assert backend.missing_mlx() == ""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_qlora", "train", "--demo"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("mlx-qlora: MLX has no library to compute with here. Install one: pip install")
    assert "Traceback" not in done.stderr


def test_the_cpu_computes_in_float32() -> None:
    if backend.on_cpu():
        assert {backend.compute_dtype(dtype) for dtype in (mx.bfloat16, mx.float16, mx.float32)} == {mx.float32}
    else:
        assert backend.compute_dtype(mx.bfloat16) == mx.bfloat16


def test_freed_memory_is_used_again() -> None:
    """Each 10 MB array costs 2,500 page faults where glibc takes it from the system and gives it back."""
    code = """
import resource, sys
import mlx_qlora
import mlx.core as mx
from mlx_qlora.model import backend
if sys.argv[1] == "reused":
    assert backend.reuse_memory() and backend.reuse_memory()
x = mx.ones((2_500_000,))
mx.eval([x + i for i in range(8)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    mx.eval([x + i for i in range(8)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)

    if not (sys.platform == "linux" and backend.on_cpu()):
        pytest.skip("glibc and MLX's CPU backend")
    assert 3 * faults("reused") < faults("plain")  # measured: 60 to 2,500 against 14,000 to 24,000
