"""`genkern train` and `genkern sample`: their options, and errors as one sentence."""

import argparse
import importlib.util
import sys
from pathlib import Path

from genkern.backend import BACKENDS
from genkern.losses.adversarial import NAMES as LOSSES
from genkern.train.errors import TrainError

EXTRA = {"sklearn": "scikit-learn", "PIL": "Pillow", "safetensors": "safetensors", "rich": "rich"}

TRAIN_HELP = """\
Trains a GAN on scikit-learn's digits or on a folder of images (gan, the default), or a language
model on Python's help topics or on a text file (lm). With no options either takes about two minutes
on two cores. The run's folder (runs/gan, runs/gan-2, …; never one that holds a run) gets
metrics.csv, checkpoint.safetensors and, for gan, samples.png. Ctrl-C saves and stops; --resume goes
on, bit for bit on the CPU at the same number of threads."""


def add_train_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a GAN on images or a language model on text",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", choices=("gan", "lm"), help="gan if not given")
    parser.add_argument(
        "--data", metavar="PATH", help="gan: a folder, one subfolder a class; lm: a text file"
    )
    parser.add_argument("--steps", type=_positive, help="how many steps in all")
    parser.add_argument("--batch-size", type=_positive)
    parser.add_argument("--lr", type=float, help="learning rate (of G; D's is twice that)")
    parser.add_argument("--width", type=_positive, help="channels of the model")
    parser.add_argument("--seed", type=int, help="of weights, data order and noise (0)")
    parser.add_argument("--dtype", choices=("float32", "float64"))
    parser.add_argument("--device", help="cpu (the default) or cuda")
    parser.add_argument("--backend", choices=BACKENDS, help="reference: eager PyTorch ops")
    parser.add_argument("--threads", type=_positive, help="instead of measuring which is fastest")
    run = parser.add_argument_group("the run")
    where = run.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="FOLDER", help="a new run's folder")
    where.add_argument(
        "--resume", metavar="RUN", nargs="?", const="", help="go on with a run (the newest)"
    )
    run.add_argument("--save-every", type=_positive, metavar="STEPS", help="a tenth of the run")
    run.add_argument("--no-scores", action="store_true", help="skip scores and step times")
    run.add_argument("--check", action="store_true", help="exit with 1 if a score fails")
    gan = parser.add_argument_group("gan only")
    gan.add_argument("--size", type=_positive, help="pixels, a multiple of 8 (32 with --data)")
    gan.add_argument("--loss", choices=LOSSES)
    gan.add_argument("--r1", type=float, metavar="GAMMA", help="R1 penalty, gamma/2 · |∇D|² (0)")
    gan.add_argument(
        "--r1-every", type=_positive, metavar="STEPS", help="lazy R1, as in StyleGAN2 (1)"
    )
    gan.add_argument("--ema", type=float, metavar="DECAY", help="of the averaged generator")
    gan.add_argument("--z-dim", type=_positive, help="length of the noise")
    lm = parser.add_argument_group("lm only")
    lm.add_argument("--context", type=_positive, help="bytes that the model sees")
    lm.add_argument("--layers", type=_positive)
    lm.add_argument("--heads", type=_positive)
    parser.set_defaults(func=_guarded("train", _train))


def add_sample_parser(subparsers) -> None:
    parser = subparsers.add_parser("sample", help="draw images or continue a text with a run")
    parser.add_argument("run", metavar="RUN", help="the folder of a run, like runs/gan")
    parser.add_argument("--seed", type=int, default=0)
    gan = parser.add_argument_group("for a gan run")
    gan.add_argument("--class", dest="class_name", metavar="NAME", help="one class, not all")
    gan.add_argument("-n", dest="count", type=_positive, default=10, help="images a class (10)")
    gan.add_argument("--out", metavar="PNG", help="RUN/drawn.png if not given")
    lm = parser.add_argument_group("for an lm run")
    lm.add_argument("--prompt", default="The ", help="the text to continue")
    lm.add_argument("--length", type=_positive, default=400, help="bytes to add (400)")
    lm.add_argument("--temperature", type=_above_zero, default=0.8, help="lower is tamer (0.8)")
    parser.set_defaults(func=_guarded("sample", _sample))


def _train(args) -> int:
    from genkern.train import session
    from genkern.train.gan_task import GANTask
    from genkern.train.lm_task import LMTask

    resumed = None
    if args.resume is not None:
        resumed = session.find_run(args.kind, args.resume)
        kind = resumed[0]["config"]["kind"]
        if args.kind not in (None, kind):
            raise TrainError(f"{resumed[1]} is a run of `genkern train {kind}`, not {args.kind}")
    else:
        kind = args.kind or "gan"
    task_type = {"gan": GANTask, "lm": LMTask}[kind]
    options = _given(args, (GANTask, LMTask), task_type)
    _check_device(options.get("device", "cpu"))
    return session.train(
        task_type,
        options,
        out=args.out,
        state_and_folder=resumed,
        scores=not args.no_scores,
        check=args.check,
    )


def _given(args, all_types, task_type):
    """The options that the user gave and that the task knows; TrainError for those of another."""
    known = {name for other in all_types for name in other.DEFAULTS}
    given = {name: getattr(args, name) for name in known if getattr(args, name) is not None}
    foreign = sorted(given.keys() - task_type.DEFAULTS.keys())
    if foreign:
        option = foreign[0].replace("_", "-")
        raise TrainError(f"--{option} is no option of `genkern train {task_type.KIND}`")
    return given


def _check_device(name):
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(f"--device {name} can't be used here: {reason}") from None


def _sample(args) -> int:
    from genkern.train import gan_task, lm_task, session

    folder = Path(args.run)
    state = session.load_run(folder)
    config = state["config"]
    if config["kind"] == "gan":
        out = Path(args.out or folder / "drawn.png")
        print(
            gan_task.sample(
                config, state, class_name=args.class_name, count=args.count, out=out, seed=args.seed
            )
        )
    else:
        pieces = lm_task.sample(
            config,
            state,
            prompt=args.prompt,
            length=args.length,
            temperature=args.temperature,
            seed=args.seed,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def _guarded(command, function):
    """`function`, with what is missing, broken or interrupted said in a sentence."""

    def guarded(args) -> int:
        missing = [EXTRA[name] for name in EXTRA if importlib.util.find_spec(name) is None]
        try:
            if missing:
                raise TrainError(
                    f"{', '.join(missing)} must be installed: pip install 'genkern[train]'"
                )
            return function(args)
        except TrainError as error:
            print(f"genkern {command}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\ngenkern {command}: interrupted", file=sys.stderr)
            return 130

    return guarded


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _above_zero(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value
