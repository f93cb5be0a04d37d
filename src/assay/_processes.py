"""Tests on two real processes of one machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

START = """
import sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
"""
END = """
dist.barrier()
dist.destroy_process_group()
"""


def run_on_two(script: str, folder: Path, timeout: float = 180) -> None:
    """Run ``script`` as rank 0 and rank 1 of a gloo group; it finds ``rank``, ``torch`` and ``dist``.

    Raises:
        AssertionError: one of them failed; with what both wrote to standard error.
    """
    command = [sys.executable, "-c", START + script + END]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=timeout)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
