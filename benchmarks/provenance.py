"""Where a result comes from: what every result file of a benchmark begins with."""

import os
import platform
import subprocess
import time

import torch


def provenance(device: str = "cpu") -> dict[str, object]:
    """Commit, date, hardware and version of PyTorch, of a benchmark on ``device``."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {name}",
        "torch": torch.__version__,
    }
