"""Which precision the products run in: bf16 by autocast where the processor multiplies it faster, else fp32.

fp16 is never chosen: on CPUs it is hundreds of times slower, and training in it needs loss scaling. Autocast keeps the
trained fp32 weights and casts them once per micro-batch; norms, softmax and the loss stay in fp32.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import torch

_CPU_FLAGS: Final = frozenset({"avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve_bf16", "arm_bf16"})


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_cpu_flags() & _CPU_FLAGS)


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The dtype of the products for the setting `dtype`: `auto`, `float32` or `bfloat16`."""
    if asked == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`; nothing at all for fp32 and fp64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def choose_device(asked: str) -> torch.device:
    """The device for the setting `device`: `auto` takes cuda where there is one, else the CPU.

    MPS is taken only when asked for: not everything here has been tried on it.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(asked)


def _cpu_flags() -> set[str]:
    """The processor's features that torch or the kernel names."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    flags = {name for name, value in capabilities().items() if value is True} if capabilities is not None else set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags.update(line.partition(":")[2].split())
                break
    return flags


def empty_cache(device: torch.device) -> None:
    """Give back what an accelerator's allocator keeps of freed tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
