"""The device and the threads of a process that runs networks; set once, before the first tensor."""

import torch

from shared.errors import Unavailable


def prepare(device: str, threads: int) -> torch.device:
    """The torch device called `device`; inference then uses `threads` threads (0: torch's choice).

    device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.
    Raises Unavailable for a device that does not exist here.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise Unavailable(f"device is {device!r}; expected one of this machine: {error}") from None
    return found
