"""What to do when a phase of the smallest step fails. Apart from the step, which needs MLX to be there."""

from __future__ import annotations

import re

REPORT = (
    "This is a fault of this package or of MLX. Please report it: mlx-qlora doctor --bundle doctor.zip makes what to attach."
)
NOT_FINITE = (
    "The weights hold numbers that are none, or the device computes wrongly. If the checksums above are right, "
    "try another conversion of the model; if they are not, download it again."
)
WORSE = (
    "Worse than guessing: tokenizer and weights may be of different models, or the quantisation is damaged. "
    "A tiny model that has never seen such a sentence may be so, too."
)
# What to try when a phase raises, by phase; what an error says of itself goes before it.
_REMEDIES = {
    "load": "If the files above are whole, a newer mlx-lm may load it: pip install -U mlx-lm. Otherwise fetch the model again.",
    "adapters": "This model's layers are not of the kind that adapters go on. Choose another model, or report it.",
    "tokenise": "Fetch tokenizer.json and tokenizer_config.json again; then: pip install -U transformers tokenizers.",
    "batch": REPORT,
    "forward": "mlx-lm's code and these weights do not fit together. If mlx_lm.generate --model FOLDER works, report it.",
    "loss": REPORT,
    "backward": "MLX can't differentiate something in this model. Try a newer mlx and mlx-lm; then report it.",
    "accumulate": REPORT,
    "update": REPORT,
}
_TOO_LARGE = (
    "Most likely memory ran out. Take a smaller or a 4-bit model, or close other programs; "
    "mlx-qlora plan says what a run needs."
)
_OTHER_WEIGHTS = (
    "config.json and the weights are not of one model, or a file of weights is missing. Fetch all of it from one place."
)


def remedy_of(phase: str, error: str) -> str:
    """What to do about an error in a phase, or about a process that died in it."""
    if any(word in error.lower() for word in ("sigkill", "memory", "alloc")):
        return _TOO_LARGE
    if phase == "load" and re.search(r"Missing \d+ parameters|parameters not in model|Expected shape", error):
        return _OTHER_WEIGHTS
    if "SIGILL" in error:
        return "This MLX was built for another processor. On an old x86 there is none; on a Mac, see the line on Python above."
    if error.startswith("died with"):
        return (
            f"Native code crashed, not Python. Try a newer mlx; with MLX_QLORA_BLAS=none it computes without our BLAS. {REPORT}"
        )
    if error.startswith("gave no sign"):
        return f"It hangs, or the disk or the device is very slow. Restart the machine and try again; then report it. {REPORT}"
    return _REMEDIES.get(phase, REPORT)
