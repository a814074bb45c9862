"""Export a trained network as a `torch.export` program and run it with nothing but PyTorch."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

INFERENCE = """
import sys
import torch

program = torch.export.load(sys.argv[1]).module()
logits = program(torch.rand(5, 1, 8, 8))
assert not any(name.startswith(("sid_kernels", "sid_trainer")) for name in sys.modules)
print("logits without sid_kernels:", tuple(logits.shape))
"""


def main(folder: Path) -> str:
    """Train, export and run a network in a folder, and return what the exported program prints."""
    sid = [sys.executable, "-m", "sid_trainer"]
    subprocess.run([*sid, "train", "--train-images", "400", "--epochs", "1", "--out", str(folder / "run")], check=True)
    subprocess.run([*sid, "export", str(folder / "run"), "--out", str(folder / "network.pt2")], check=True)
    command = [sys.executable, "-c", INFERENCE, str(folder / "network.pt2")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(printed, end="")
    return printed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the run and the program (default: a temporary one)")
    folder = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        main(folder or Path(temporary))
