"""Where a model runs: the device that was named, or the best that this machine has."""

import warnings
from typing import Any

import torch

from mechvlm.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def best_device() -> str:
    """What `device="auto"` means here: "cuda" where there is one, else "mps", else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of(device: Any) -> torch.device:
    """The device by its name, "auto" resolved.

    Raises:
        ModelError: for what is no device, or one that this machine does not have.
    """
    words = f"cannot be put on the device {str(device)!r}"
    advice = f"Here there is {best_device()}; device='auto' takes the best that there is."
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ModelError(f"A model {words}: a device is a name, 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'. {advice}")
    try:
        named = torch.device(best_device() if device == "auto" else device)
        if named.type == "meta":
            raise ModelError(f"A model {words}, which holds no numbers. {advice}")
        torch.zeros(1, device=named)  # torch names devices that the machine does not have
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        reason = reason if len(reason) <= 80 else "this machine has none"  # lists of backends
        raise ModelError(f"A model {words} ({reason}). {advice}") from error
    return named


def dtype_of(dtype: Any, default: str) -> torch.dtype | str:
    """The dtype by its name; "auto" stays, which is the checkpoint's own.

    Raises:
        ModelError: for what is no dtype that a model can run in.
    """
    dtype = default if dtype is None else dtype
    if dtype == "auto":
        return dtype
    named: Any = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if named not in DTYPES.values():
        raise ModelError(f"There is no dtype {str(dtype)!r}. Choose float32, bfloat16 or float16.")
    return named


def warn_of_idle_gpu(name: str) -> None:
    """Say that a model was put on the CPU where nobody asked for it, and a GPU is there."""
    if (best := best_device()) != "cpu":
        warnings.warn(
            f"{name} runs on the CPU, and this machine has a GPU: load it with device='auto' (or device={best!r}; --device "
            "auto on the command line) to use it, with device='cpu' to leave it there.",
            stacklevel=3,
        )
