"""`python -m helpers.rank_main WORDS` is `sid WORDS`, whose rank 0 sends torchrun a SIGTERM before its step SID_STOP_AT.

The step starts once the signal has come back: torchrun passes it on to every rank.
"""

import os
import signal
import sys
import time

from sid_trainer.cli import main
from sid_trainer.training.trainer import Trainer

train_step, calls = Trainer.train_step, []


def signal_torchrun(trainer, *batch):
    calls.append(1)
    if len(calls) == int(os.environ["SID_STOP_AT"]) and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
        while not trainer.strategy.stop_signals:
            time.sleep(0.01)
    return train_step(trainer, *batch)


if __name__ == "__main__":
    Trainer.train_step = signal_torchrun
    raise SystemExit(main(sys.argv[1:]))
