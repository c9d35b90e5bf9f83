"""Whole runs by the command line: resumed bit for bit, stopped, damaged, scored."""

import csv
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from genkern.train import checkpoint
from genkern.train.gan_task import GANTask
from genkern.train.lm_task import LMTask
from genkern.train.run import Run

TINY = {
    "gan": ("--width", 8, "--batch-size", 180, "--threads", 1, "--seed", 3),
    "lm": ("--width", 16, "--layers", 1, "--context", 16, "--batch-size", 4, "--threads", 1),
}

SMALL = ("--width", 8, "--batch-size", 8, "--threads", 1)


def state_of(folder):
    return checkpoint.load(folder / "checkpoint.safetensors")


def leaves(tree, path=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def assert_same_state(one, other):
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif not name.startswith("/config/"):
            assert value == other[name], name


@pytest.mark.parametrize("kind", ["gan", "lm"])
def test_resumes_bit_for_bit(command, tmp_path, kind):
    """20 steps are 10 steps and 10 more: weights, averages, moments, random states, metrics. The
    GAN's epoch has 7 batches, so epochs end on the way."""
    quick = ("--no-scores", "--save-every", 100)
    assert command("train", kind, "--steps", 20, *TINY[kind], *quick, "--out", "straight")[0] == 0
    assert command("train", kind, "--steps", 10, *TINY[kind], *quick, "--out", "halves")[0] == 0
    # What happens in between must not matter.
    torch.manual_seed(99)
    code, said = command("train", kind, "--resume", "halves", "--steps", 20, "--no-scores")
    assert code == 0 and "resumed halves at step 10 of 20" in said
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert state_of(straight)["trainer"]["steps"] == 20
    assert_same_state(state_of(straight), state_of(halves))
    assert (straight / "metrics.csv").read_text() == (halves / "metrics.csv").read_text()
    if kind == "gan":
        assert (straight / "samples.png").read_bytes() == (halves / "samples.png").read_bytes()


def test_lazy_r1_resumes_in_step(command, tmp_path):
    """R1 in every third step; the second half begins between two of them."""
    options = (*TINY["gan"], "--r1", 1, "--r1-every", 3, "--no-scores")
    assert command("train", *options, "--steps", 7, "--out", "straight")[0] == 0
    assert command("train", *options, "--steps", 4, "--out", "halves")[0] == 0
    assert command("train", "--resume", "halves", "--steps", 7, "--no-scores")[0] == 0
    assert_same_state(state_of(tmp_path / "straight"), state_of(tmp_path / "halves"))
    with (tmp_path / "halves/metrics.csv").open() as file:
        penalties = [float(row["penalty"]) for row in csv.DictReader(file)]
    assert [penalty > 0 for penalty in penalties] == [i % 3 == 0 for i in range(7)]


def test_a_run_from_before_an_option(command, tmp_path):
    assert command("train", *TINY["gan"], "--steps", 1, "--no-scores", "--out", "old")[0] == 0
    file = tmp_path / "old/checkpoint.safetensors"
    state = checkpoint.load(file)
    del state["config"]["r1_every"]
    checkpoint.save(file, state)
    assert command("train", "--resume", "old", "--steps", 2, "--no-scores")[0] == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(command, tmp_path, monkeypatch, number, code):
    step = GANTask.stepper

    def interrupted(task, trainer, order):
        make = step(task, trainer, order)

        def one_step(batch):
            result = make(batch)
            if trainer.steps == 5:
                os.kill(os.getpid(), number)
            return result

        return one_step

    options = ("--steps", 9, *TINY["gan"], "--no-scores")
    command("train", *options, "--out", "straight")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(GANTask, "stepper", interrupted)
        result, said = command("train", *options, "--save-every", 100)
    assert result == code
    assert "stopped and saved at step 5: go on with `genkern train gan --resume runs/gan`" in said
    assert signal.getsignal(number) is before
    assert state_of(tmp_path / "runs/gan")["trainer"]["steps"] == 5
    assert command("train", "--resume", "--no-scores")[0] == 0
    assert_same_state(state_of(tmp_path / "runs/gan"), state_of(tmp_path / "straight"))


def test_killed_after_the_checkpoint(command, tmp_path, monkeypatch):
    """Steps after the last checkpoint are lost, and metrics.csv forgets them and any half row."""
    options = ("--steps", 6, *TINY["lm"], "--no-scores", "--save-every", 4)
    command("train", "lm", *options, "--out", "straight")

    class Killed(BaseException):
        pass

    def save(run, save=Run.save):
        if run.trainer.steps == 6:
            raise Killed
        save(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        with pytest.raises(Killed):
            command("train", "lm", *options)
    metrics = tmp_path / "runs/lm/metrics.csv"
    assert len(metrics.read_text().splitlines()) == 7
    metrics.write_text(metrics.read_text() + "7,0,1.2")
    assert command("train", "lm", "--resume", "--no-scores")[0] == 0
    assert metrics.read_text() == (tmp_path / "straight/metrics.csv").read_text()
    assert_same_state(state_of(tmp_path / "runs/lm"), state_of(tmp_path / "straight"))


def test_kill_minus_nine(command, tmp_path):
    """A training process that is killed while it saves after every step goes on exactly."""
    options = ("--save-every", 1, "--no-scores", *TINY["lm"])
    words = [str(word) for word in ("train", "lm", "--steps", 100_000, "--out", "killed", *options)]
    process = subprocess.Popen(
        [sys.executable, "-m", "genkern", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        next(line for line in process.stdout if line.strip().startswith("step     12/"))
    finally:
        process.kill()
        process.wait()
    steps = state_of(tmp_path / "killed")["trainer"]["steps"] + 3
    assert steps >= 15
    command("train", "--resume", "killed", "--steps", steps, "--no-scores")
    command("train", "lm", "--steps", steps, "--out", "straight", *options)
    assert_same_state(state_of(tmp_path / "killed"), state_of(tmp_path / "straight"))


def test_a_full_disk_keeps_the_last_checkpoint(command, tmp_path):
    """The first checkpoint has no moments yet: it fits a limit that the second exceeds."""
    options = ("--steps", 2, "--save-every", 1, "--no-scores", *TINY["lm"])
    command("train", "lm", *options, "--out", "straight")
    size = (tmp_path / "straight/checkpoint.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, before[1]))
    try:
        code, said = command("train", "lm", *options, "--out", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert "could not write full/checkpoint.safetensors: File too large; the checkpoint" in said
    assert command("train", "--resume", "full", "--no-scores")[0] == 0
    assert_same_state(state_of(tmp_path / "full"), state_of(tmp_path / "straight"))


def test_a_short_run_of_a_gan(command, tmp_path):
    """It ends with honest scores, exits with 0, and with 1 under --check."""
    options = ("--steps", 4, *SMALL, "--dtype", "float64", "--backend", "reference")
    code, said = command("train", *options)
    assert code == 0
    for name in ("requested class", "diversity", "precision", "recall", "copies"):
        assert re.search(rf"^{name} +[\d.]+.* real +[\d.]+", said, re.MULTILINE), name
    assert re.search(r"^requested class .*FAIL$", said, re.MULTILINE)
    assert re.search(r"step time: eager [\d.]+ ms, genkern [\d.]+ ms \([\d.]+x", said)
    scores = json.loads((tmp_path / "runs/gan/scores.json").read_text())
    assert scores["requested class"]["passed"] is False
    with open(tmp_path / "runs/gan/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert {"epoch", "loss_g", "loss_d"} <= rows[0].keys()
    # 10 rows and columns of 40 pixels, a gap of 4 around each.
    assert Image.open(tmp_path / "runs/gan/samples.png").size == (444, 444)
    assert command("train", "--resume", "--check")[0] == 1
    second = command("train", *SMALL, "--steps", 1, "--no-scores")[1]
    assert "the run's folder: runs/gan-2" in second


def test_a_short_run_of_an_lm(command):
    code, said = command("train", "lm", "--steps", 3, *TINY["lm"])
    assert code == 0
    assert re.search(r"perplexity a byte +[\d.]+ +Witten-Bell bigram +[\d.]+ +bar < .*FAIL", said)


def test_images_of_a_folder(command, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(16):
            image = Image.effect_noise((20, 30), 60 + i).convert("RGB")
            image.save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data/a/broken.png").write_bytes(b"no")
    options = ("--data", "data", "--size", 24, "--width", 8, "--steps", 2, "--batch-size", 4)
    code, said = command("train", *options, "--r1", 1, "--threads", 1)
    assert code == 0 and "skipped 1 broken file (a/broken.png)" in said
    assert re.search(r"^copies ", said, re.MULTILINE)
    code, said = command("sample", "runs/gan", "--class", "b", "-n", 3, "--out", "b.png")
    assert code == 0 and "3 images, 3 a class, in b.png" in said
    (tmp_path / "data/b/0.png").unlink()
    code, said = command("train", "--resume", "--steps", 4)
    assert code == 1 and "the data is no longer what runs/gan was trained on" in said


def test_samples(command, tmp_path):
    command("train", *TINY["gan"], "--steps", 1, "--no-scores")
    assert command("sample", "runs/gan", "--seed", 1)[0] == 0
    first = (tmp_path / "runs/gan/drawn.png").read_bytes()
    command("sample", "runs/gan", "--seed", 1, "--out", "again.png")
    command("sample", "runs/gan", "--seed", 2, "--out", "other.png")
    assert (tmp_path / "again.png").read_bytes() == first
    assert (tmp_path / "other.png").read_bytes() != first
    code, said = command("sample", "runs/gan", "--class", "11")
    assert code == 1 and "--class 11 is not one of the run's: 0, 1, 2" in said
    command("train", "lm", *TINY["lm"], "--steps", 1, "--no-scores")
    code, said = command("sample", "runs/lm", "--prompt", "Größe ", "--length", 30)
    assert code == 0 and said.startswith("Größe ") and len(said) > 10
    assert command("sample", "runs/lm", "--prompt", "Größe ", "--length", 30)[1] == said


def test_a_loss_that_is_no_number_keeps_the_checkpoint(command, tmp_path):
    code, said = command("train", "lm", *TINY["lm"], "--steps", 9, "--save-every", 1, "--lr", 1e30)
    assert code == 1
    assert re.search(r"became (nan|inf) at step \d: try a lower --lr", said)
    weights = state_of(tmp_path / "runs/lm")["trainer"]["model"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_calibration_measures_every_thread_count(command, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    code, said = command("train", "--width", 8, "--steps", 1, "--no-scores", "--batch-size", 16)
    assert code == 0
    assert re.search(r"threads: [12] \(a step takes, by threads, 1: \d+ ms, 2: \d+ ms\)", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--resume"), "there is no run to resume in runs/gan"),
        (("train", "--resume", "nowhere"), "there is no checkpoint nowhere/checkpoint.safetensors"),
        (("sample", "nowhere"), "there is no checkpoint nowhere/checkpoint.safetensors"),
        (("train", "--size", 16), "the digits have 8×8 pixels"),
        (("train", "--size", 12), "--size must be a multiple of 8, not 12"),
        (("train", "--width", 12), "--width must be a multiple of 8, not 12"),
        (("train", "--r1", -1), "--r1 must be 0 or positive, not -1.0"),
        (("train", "--ema", 1), "--ema must be at least 0 and below 1, not 1.0"),
        (("train", "--context", 8), "--context is no option of `genkern train gan`"),
        (("train", "lm", "--r1", 1), "--r1 is no option of `genkern train lm`"),
        (("train", "lm", "--width", 10), "--width 10 must be a multiple of --heads 4"),
        (("train", "lm", "--data", "nowhere"), "could not read --data nowhere"),
        (("train", "--data", "nowhere"), "--data nowhere is not a folder"),
        (("train", "--device", "warp"), "--device warp can't be used here"),
    ],
)
def test_errors_are_one_sentence(command, words, message):
    code, said = command(*words)
    assert code == 1
    assert message in said
    assert said.startswith(f"genkern {words[0]}: ") or len(said.splitlines()) <= 2


def test_errors_of_existing_runs(command, tmp_path):
    command("train", *TINY["gan"], "--steps", 1, "--no-scores", "--out", "here")
    assert "here already holds a run: continue it" in command("train", "--out", "here")[1]
    code, said = command("train", "--resume", "here", "--batch-size", 5)
    assert code == 1 and "--batch-size 5 differs from the run's 180" in said
    code, said = command("train", "lm", "--resume", "here")
    assert code == 1 and "here is a run of `genkern train gan`, not lm" in said
    file = tmp_path / "here/checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    code, said = command("train", "--resume", "here")
    assert code == 1 and said.startswith("genkern train: here/checkpoint.safetensors is damaged")


def test_a_missing_extra(command, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "PIL" else find(name, *rest),
    )
    code, said = command("train")
    assert code == 1
    assert said == "genkern train: Pillow must be installed: pip install 'genkern[train]'\n"


def test_defaults_have_the_same_common_options():
    gan, lm = GANTask.DEFAULTS.keys(), LMTask.DEFAULTS.keys()
    assert {"data", "steps", "batch_size", "seed", "dtype", "threads", "backend"} <= gan & lm
