"""One `genkern train`: new or resumed, from its options to its scores.

What is being trained is a task (`gan_task.GANTask`, `lm_task.LMTask`), which has

    KIND, DEFAULTS              "gan"; the options it knows, with their defaults
    task(config)                loads the data, completes `config` (plain JSON)
    .summary, .display          one line on the data; the values that the progress bar shows
    .items                      how many things an epoch has, for `data.order.Shuffled`
    .make_trainer()             a fresh trainer (its weights come from torch's random state)
    .stepper(trainer, order)    a function of a batch of indices that makes one step
    .schedule(steps)            the factor on the learning rates
    .on_save(trainer, folder)   pictures on the way; returns nothing
    .scores(trainer, folder)    a list of `Score`, or a sentence why there are none
"""

import contextlib
import copy
import json

import torch

import genkern
from genkern.train import checkpoint, timing
from genkern.train.data.order import Shuffled
from genkern.train.errors import TrainError
from genkern.train.progress import say, training_display
from genkern.train.run import CHECKPOINT, Run, folder_to_resume, fresh_folder

# A resumed run may change these; everything else would make it another run.
CHANGEABLE = {"steps", "threads", "backend", "device", "save_every"}


def train(task_type, options: dict, *, out, state_and_folder, scores, check) -> int:
    """Runs to the end, an error (TrainError) or a signal; returns the exit code. `options` are the
    ones that the user gave; `state_and_folder` is a checkpoint to go on from, or None."""
    state, folder = state_and_folder or (None, fresh_folder(task_type.KIND, out))
    config = {"kind": task_type.KIND, **task_type.DEFAULTS, **options}
    if state:
        # An option that is newer than the run has its default there.
        config = _resumed({**task_type.DEFAULTS, **state["config"]}, options)
    with _backend(config["backend"]):
        return _train(task_type, config, folder, state, scores, check)


def _train(task_type, config, folder, state, scores, check):
    task = task_type(config)
    if state and state["config"]["fingerprint"] != config["fingerprint"]:
        raise TrainError(
            f"the data is no longer what {folder} was trained on; a resumed run needs the same"
        )
    say(task.summary)
    _choose_threads(task)
    torch.manual_seed(config["seed"])
    trainer, order = task.make_trainer(), _order(task)
    step, save_every = task.stepper(trainer, order), config["save_every"]
    run = Run(folder, config, trainer, order, step, task.schedule)
    if state:
        run.restore(state)
        say(f"resumed {folder} at step {trainer.steps} of {config['steps']}")
    else:
        run.start()
        say(f"the run's folder: {folder}")
    with training_display(trainer.steps, config["steps"], task.display) as (on_step, told):

        def on_save(done):
            told(done)
            task.on_save(trainer, folder)

        signal = run.train(
            config["steps"],
            save_every=save_every or max(1, config["steps"] // 10),
            on_step=on_step,
            on_save=on_save,
        )
    if signal:
        say(
            f"stopped and saved at step {trainer.steps}: go on with "
            f"`genkern train {config['kind']} --resume {folder}`"
        )
        return 128 + signal
    passed = True
    if scores:
        passed = _finish(task, trainer, folder)
    return 0 if passed or not check else 1


def load_run(folder) -> dict:
    """The state in a run's folder, on any exception a TrainError."""
    state = checkpoint.load(folder / CHECKPOINT)
    if not isinstance(state.get("config"), dict) or "kind" not in state["config"]:
        raise TrainError(f"{folder / CHECKPOINT} holds no run of genkern train")
    return state


def find_run(kind, named):
    """(state, folder) of the run that --resume means; `kind` may be None where it is named."""
    folder = folder_to_resume(kind or "gan", named)
    return load_run(folder), folder


def _resumed(stored, options):
    for name, value in options.items():
        if name not in CHANGEABLE and value != stored.get(name):
            raise TrainError(
                f"--{name.replace('_', '-')} {value} differs from the run's "
                f"{stored.get(name)}: a resumed run keeps its own"
            )
    return {**stored, **{name: options[name] for name in CHANGEABLE & options.keys()}}


def _backend(name):
    return genkern.use_backend(name) if name else contextlib.nullcontext()


def _order(task):
    return Shuffled(task.items, task.config["batch_size"], task.config["seed"])


def _choose_threads(task):
    """Sets the number of threads: the one asked for, the run's own, or the fastest measured."""
    config = task.config
    if not config["threads"] and config["device"] != "cpu":
        return
    if not config["threads"]:
        medians = timing.calibrate_threads(lambda: _throwaway_step(task))
        config["threads"] = timing.fastest(medians)
        if len(medians) > 1:
            measured = ", ".join(f"{n}: {1e3 * s:.0f} ms" for n, s in medians.items())
            say(f"threads: {config['threads']} (a step takes, by threads, {measured})")
    torch.set_num_threads(config["threads"])


def _throwaway_step(task, weights_of=None):
    trainer, order = task.make_trainer(), _order(task)
    if weights_of is not None:
        # Adam takes the tensors that it is given as its own.
        trainer.load_state_dict(copy.deepcopy(weights_of.state_dict()))
    step = task.stepper(trainer, order)
    return lambda: step(order.next())


def _finish(task, trainer, folder):
    """Prints and writes the scores and the step times; whether every score passed."""
    result = task.scores(trainer, folder)
    if isinstance(result, str):
        say(f"no scores: {result}")
        passed = True
    else:
        for score in result:
            say(_line(score))
        passed = all(score.passed for score in result)
        table = {s.name: {**s._asdict(), "passed": bool(s.passed)} for s in result}
        text = json.dumps(table, indent=2, default=float)
        checkpoint.write_whole(folder / "scores.json", text.encode())
        if not passed:
            say(
                f"some scores fail after {trainer.steps} steps (a run of the default length is "
                f"{task.DEFAULTS['steps']} steps)"
            )
    fused = task.config["device"].split(":")[0]
    say(str(timing.compare_backends(lambda: _throwaway_step(task, weights_of=trainer), fused)))
    return passed


def _line(score):
    number = (lambda x: f"{100 * x:.1f} %") if score.share else (lambda x: f"{x:.2f}")
    line = f"{score.name:<20} {number(score.value):>8}   {score.beside} {number(score.real):>8}"
    if score.bar is None:
        return f"{line}   no bar"
    side = "<" if score.below else "≥"
    verdict = "pass" if score.passed else "FAIL"
    return f"{line}   bar {side} {number(score.bar):>8}   {verdict}"
