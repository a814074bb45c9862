"""Write the log of a run: config.json, metrics.jsonl, TensorBoard events and a printed table."""

import json
from pathlib import Path
from typing import Any

from ..files import CONFIG, METRICS, PIPELINE, write_atomically

HEADER = "epoch   train loss   first stage   last stage   KL(y|p_L)   certificate   images/s   seconds"


class Log:
    """A context that writes one row per epoch to a run's folder, and prints it unless `quiet`.

    `rows` holds the epochs before a resume. A folder of None writes nothing. TensorBoard events need the package
    tensorboard.
    """

    def __init__(self, folder: Path | None, metadata: dict, rows: list[dict], quiet: bool):
        self.folder, self.metadata, self.rows, self.quiet = folder, metadata, list(rows), quiet
        self.board: Any = None
        self.header_printed = False

    def __enter__(self) -> "Log":
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write(CONFIG, json.dumps(self.metadata, indent=2, allow_nan=False))
            self.write_rows()
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                if not self.quiet:
                    print("no TensorBoard events: the package tensorboard is not installed")
            else:
                self.board = SummaryWriter(str(self.folder), purge_step=len(self.rows) + 1)
        return self

    def __exit__(self, *error: object) -> None:
        if self.board:
            self.board.close()

    def write(self, name: str, text: str) -> None:
        if self.folder:
            write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def write_rows(self) -> None:
        self.write(METRICS, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows))

    def write_pipeline(self, pipeline: dict | None) -> dict:
        """Write the times of the ranks to pipeline.json; return them for the epoch's row, without single batches."""
        if pipeline is None:
            return {}
        self.write(PIPELINE, json.dumps(pipeline, allow_nan=False))
        ranks = [{name: value for name, value in rank.items() if name != "batches"} for rank in pipeline["ranks"]]
        return {"pipeline": pipeline | {"ranks": ranks}}

    def add(self, row: dict) -> None:
        """Append the row of an epoch: write it, and print it unless quiet."""
        self.rows.append(row)
        self.write_rows()
        if self.board:
            for name, value in row.items():
                numbers = enumerate(value, 1) if isinstance(value, list) else [(None, value)]
                for stage, number in numbers:
                    if isinstance(number, int | float) and name != "epoch":
                        self.board.add_scalar(f"{name}/{stage}" if stage else name, number, row["epoch"])
        if self.quiet:
            return
        if not self.header_printed:
            print(HEADER.replace("images", self.metadata["unit"]))
        self.header_printed = True
        certificate = sum(row["certificate"]) / len(row["certificate"])
        print(
            f"{row['epoch']:5d} {row['train_loss']:12.4f} {row['stage_accuracy'][0]:13.2%}"
            f" {row['test_accuracy']:12.2%} {row['stage_kl'][-1]:11.4f} {certificate:13.1%}"
            f" {row[self.metadata['unit'] + '_per_second']:10.0f} {row['seconds']:9.1f}",
            flush=True,
        )
