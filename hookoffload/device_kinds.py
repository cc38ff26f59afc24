"""The kinds of devices that models compute on, by torch's names."""

from __future__ import annotations

DEVICE_KINDS = ("cpu", "cuda", "xpu", "mps", "npu", "hpu", "mtia")
LISTED = ", ".join(DEVICE_KINDS)
