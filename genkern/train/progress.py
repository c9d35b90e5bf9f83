"""What a user sees while a run trains."""

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)


def say(line: str) -> None:
    """Prints a line as it is, however long: paths and brackets stay whole."""
    console.print(line, soft_wrap=True, markup=False)


@contextlib.contextmanager
def training_display(done: int, steps: int, labels: dict[str, str]):
    """A progress bar with the epoch and the values that `labels` names ({"loss_g": "G loss"}).
    Yields (on_step, on_save) for `Run.train`. Without a terminal, a line at every checkpoint."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    latest, started = {}, time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps, completed=done, epoch=0, losses="")

        def on_step(step, epoch, values):
            losses = "  ".join(f"{text} {values[name]:+.3f}" for name, text in labels.items())
            latest.update(epoch=epoch, losses=losses)
            progress.update(task, completed=step, **latest)

        def on_save(step):
            seconds = time.perf_counter() - started
            say(
                f"step {step:>{len(str(steps))}}/{steps}  epoch {latest['epoch']:>3}  "
                f"{latest['losses']}  {seconds:5.0f} s"
            )

        yield on_step, on_save
