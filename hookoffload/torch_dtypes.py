"""The dtypes of safetensors files as torch has them."""

from __future__ import annotations

import torch

from .safetensors_header import CheckpointError

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
# Older versions of torch lack the last ones.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in _NAMES.items()
    if isinstance(getattr(torch, name, None), torch.dtype)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_of(code: str, where: str) -> torch.dtype:
    """Returns the dtype that a header's code stands for.

    Args:
        code: One that the header may have.
        where: The file and the tensor, for the error.

    Raises:
        CheckpointError: This version of torch has no such dtype.
    """
    dtype = DTYPES.get(code)
    if dtype is None:
        raise CheckpointError(
            f"{where} has the dtype {code!r}, which torch {torch.__version__} cannot "
            f"hold. Known: {', '.join(sorted(DTYPES))}. Convert the tensor, or update "
            "torch."
        )
    return dtype
