"""Where the arithmetic of task vectors is done: the processor, unless another device is named.

Models are read on the CPU. Vectors moves the changes of one weight to its device when they are asked for, what is
made of them is computed there, and storage.tensor_files moves it back to write it.
"""

from __future__ import annotations

import torch

from ..errors import ParameterError
from .run import current

KINDS = ("cpu", "cuda")


def find_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``. Of several processes on a machine each takes a GPU of its own with ``cuda``.

    Raises ParameterError, with what to do, for a device that is not there.
    """
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ParameterError(f"--device: {name!r} is unknown; choose cpu, cuda, or one of several as cuda:1")
    if kind == "cpu":
        return torch.device(kind)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is built without it)"
        raise ParameterError(
            f"--device {name}: torch sees no CUDA device{built}; leave --device out to compute on the CPU, or install "
            "a torch with CUDA and check that nvidia-smi shows a GPU"
        )
    number = int(index) if index else current().team.local_rank % count
    if number >= count:
        raise ParameterError(f"--device {name}: there are {count} CUDA devices, the first is cuda:0; choose another")
    return torch.device(kind, number)
