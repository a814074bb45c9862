"""What a run says while it trains: config.json, metrics.jsonl and TensorBoard events in its folder, a table's rows."""

import json
from pathlib import Path

from ..files import write_atomically

HEADER = "epoch   train loss   first stage   last stage   KL(y|p_L)   certificate   images/s   seconds"


class Log:
    """One row an epoch. `rows` are those a resumed run has already; without a folder nothing is written.

    TensorBoard's package may be missing; then there are no events, and a line says so.
    """

    def __init__(self, folder: Path | None, about: dict, rows: list[dict], quiet: bool):
        self.folder, self.about, self.rows, self.quiet = folder, about, list(rows), quiet
        self.board, self.head = None, False

    def __enter__(self) -> "Log":
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.about, indent=2)
            write_atomically(self.folder / "config.json", lambda file: file.write(text.encode()))
            self.write_rows()
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                if not self.quiet:
                    print("no TensorBoard events: the package tensorboard is not installed")
            else:
                self.board = SummaryWriter(str(self.folder), purge_step=len(self.rows) + 1)
        return self

    def __exit__(self, *error) -> None:
        if self.board:
            self.board.close()

    def write_rows(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(text.encode()))

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if self.folder:
            self.write_rows()
        if self.board:
            for name, value in row.items():
                numbers = enumerate(value, 1) if isinstance(value, list) else [(None, value)]
                for stage, number in numbers:
                    if isinstance(number, int | float) and name != "epoch":
                        self.board.add_scalar(f"{name}/{stage}" if stage else name, number, row["epoch"])
        if not self.quiet:
            if not self.head:
                print(HEADER)
            self.head = True
            certificate = sum(row["certificate"]) / len(row["certificate"])
            print(
                f"{row['epoch']:5d} {row['train_loss']:12.4f} {row['stage_accuracy'][0]:13.2%}"
                f" {row['test_accuracy']:12.2%} {row['stage_kl'][-1]:11.4f} {certificate:13.1%}"
                f" {row['images_per_second']:10.0f} {row['seconds']:9.1f}",
                flush=True,
            )
