"""Peak memory of one run, measured and not estimated; None where the platform cannot tell."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """``with PeakMemory(device) as peak: ...`` then ``peak.bytes``.

    On CUDA the allocator's own peak. On Linux the peak of the process's resident memory over what it held before,
    from a mark that the kernel resets at the start (memory that was free but still held is given back first, so that
    one run does not hide in what an earlier one left).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.bytes = device, None  # type: str, int | None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._before: int | None = None
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            ctypes.CDLL(None).malloc_trim(0)
            (_PROCESS / "clear_refs").write_text("5")
            self._before = self._resident("VmRSS")
        except (OSError, AttributeError, TypeError):
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.startswith("cuda"):
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._before is not None:
            self.bytes = max(0, self._resident("VmHWM") - self._before)

    @staticmethod
    def _resident(entry: str) -> int:
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith(entry + ":"):
                return int(line.split()[1]) * 1024
        raise OSError(f"no {entry}")
