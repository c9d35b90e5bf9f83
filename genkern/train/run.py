"""A run: a folder with metrics.csv and checkpoint.safetensors, and the loop that fills it.

Everything that decides the next step (weights, averages, moments, steps done, position in the data,
random states) is in the checkpoint, so a run that is continued goes on bit for bit on the CPU, at
the same number of threads.
"""

import contextlib
import csv
import io
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from genkern.train import checkpoint
from genkern.train.data.order import Shuffled
from genkern.train.errors import TrainError

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.csv"


class Run:
    """Trains, in `folder`, what `trainer` holds (state_dict, load_state_dict, steps, optimizers).

    Args:
        config: plain JSON: what a later process needs to build the same trainer and data.
        step: makes one training step on a batch of indices and returns a NamedTuple of 0-dim
            tensors, whose names are the columns of metrics.csv.
        schedule: from steps done to the factor on the optimizers' learning rates. It must not
            depend on where the run will end, or a run could not be made longer.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        trainer,
        order: Shuffled,
        step: Callable,
        schedule: Callable,
    ) -> None:
        self.folder, self.config = Path(folder), config
        self.trainer, self.order, self.step, self.schedule = trainer, order, step, schedule
        self._rates = [[g["lr"] for g in opt.param_groups] for opt in trainer.optimizers]

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def start(self) -> None:
        """Makes the folder and the checkpoint of step 0."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"could not make {self.folder}: {error.strerror}") from None
        self.save()

    def save(self) -> None:
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state_all()
        state = {
            "config": self.config,
            "trainer": self.trainer.state_dict(),
            "order": self.order.state_dict(),
            "random": random,
        }
        checkpoint.save(self.checkpoint, state)

    def restore(self, state: dict) -> None:
        """Goes back to a checkpoint; metrics.csv forgets what came after it."""
        try:
            self.trainer.load_state_dict(state["trainer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise TrainError(f"{self.checkpoint} does not fit this model: {reason}") from None
        self.order.load_state_dict(state["order"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and "cuda" in state["random"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self._cut_metrics()

    def train(self, steps: int, *, save_every: int, on_step: Callable, on_save: Callable) -> int:
        """Trains until `steps` are done in all. Calls on_step(done, epoch, values) after each and
        on_save(done) after each checkpoint. Returns 0, or the number of the signal (SIGINT,
        SIGTERM) that ended it early; either way the last step is in the checkpoint."""
        saved = self.trainer.steps
        with _Signals() as signals, _Metrics(self.folder / METRICS) as metrics:
            while self.trainer.steps < steps and not signals.received:
                self._set_rates()
                result = self.step(self.order.next())
                values = {name: value.item() for name, value in result._asdict().items()}
                done = self.trainer.steps
                self._check_finite(values, done)
                metrics.write({"step": done, "epoch": self.order.epoch, **values})
                on_step(done, self.order.epoch, values)
                if done % save_every == 0:
                    saved = self._save_and_tell(on_save)
            if self.trainer.steps != saved:
                self._save_and_tell(on_save)
            return signals.received

    def _save_and_tell(self, on_save):
        try:
            self.save()
        except TrainError as error:
            raise TrainError(
                f"{error}; the checkpoint from before is whole: go on with --resume {self.folder}"
            ) from None
        on_save(self.trainer.steps)
        return self.trainer.steps

    def _set_rates(self):
        factor = self.schedule(self.trainer.steps)
        for optimizer, rates in zip(self.trainer.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def _check_finite(self, values, done):
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainError(
                    f"{name} became {value} at step {done}: try a lower --lr; the checkpoint from "
                    f"before is whole ({self.checkpoint})"
                )

    def _cut_metrics(self):
        path = self.folder / METRICS
        if not path.exists():
            return
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        kept = io.StringIO()
        writer = csv.writer(kept, lineterminator="\n")
        # A row that a kill cut short has no full step number or too few columns.
        writer.writerows(rows[:1])
        for row in rows[1:]:
            if len(row) == len(rows[0]) and int(row[0]) <= self.trainer.steps:
                writer.writerow(row)
        checkpoint.write_whole(path, kept.getvalue().encode())


class _Metrics:
    """Appends rows to a CSV file, whole lines at a time; the first row brings the header."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        with self._clear_errors():
            self._file = open(self.path, "a", newline="", buffering=1)
        return self

    def write(self, row: dict):
        with self._clear_errors():
            writer = csv.DictWriter(self._file, list(row), lineterminator="\n")
            if self._file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._file.close()

    @contextlib.contextmanager
    def _clear_errors(self):
        try:
            yield
        except OSError as error:
            raise TrainError(f"could not write {self.path}: {error.strerror}") from None


class _Signals:
    """Inside the `with`, the first SIGINT or SIGTERM only sets `received`, so that the step at hand
    is finished and saved; the second acts as it always does."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.received = 0
        self._before = {}
        # Python gives signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._receive) for n in self.NUMBERS}
        return self

    def _receive(self, number, frame):
        self.received = int(number)
        self._give_back()

    def _give_back(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._give_back()


def fresh_folder(kind: str, out: str | None) -> Path:
    """Where a new run goes: --out, or runs/gan, runs/gan-2, … the first that holds no run."""
    if out is not None:
        if any((Path(out) / name).exists() for name in (CHECKPOINT, METRICS)):
            raise TrainError(
                f"{out} already holds a run: continue it with --resume {out}, or name another "
                "folder with --out"
            )
        return Path(out)
    return next(folder for folder in _default_folders(kind) if not folder.exists())


def folder_to_resume(kind: str, named: str) -> Path:
    """The folder that --resume names, or, for a bare --resume, the newest of runs/gan, runs/gan-2,
    … that has a checkpoint."""
    if named:
        return Path(named)
    newest = None
    for folder in _default_folders(kind):
        if not folder.exists():
            break
        if (folder / CHECKPOINT).exists():
            newest = folder
    if newest is None:
        raise TrainError(f"there is no run to resume in runs/{kind}: name one with --resume RUN")
    return newest


def _default_folders(kind):
    yield Path("runs", kind)
    number = 2
    while True:
        yield Path("runs", f"{kind}-{number}")
        number += 1
