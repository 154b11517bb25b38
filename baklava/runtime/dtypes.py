"""Precisions by name, for options and settings. It imports nothing, so that `--help` is quick."""

from typing import Literal, get_args

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""`auto` is the checkpoint's own on a GPU, and on a CPU the faster of float32 and bfloat16."""

DTYPES: tuple[DType, ...] = get_args(DType)

DTYPE_HELP = (
    "precision of the model's products: float32, bfloat16, float16, or auto, the fastest on a CPU and the checkpoint's "
    "on a GPU (default: the checkpoint's on a GPU, and float32 on a CPU, so that scores compare)"
)
