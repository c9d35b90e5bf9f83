"""`genkern train gan`: a class-conditional GAN on digits or on a folder of images."""

import zlib
from typing import ClassVar

import torch

from genkern.train.data.images import load_images
from genkern.train.errors import TrainError
from genkern.train.gan_trainer import GANTrainer
from genkern.train.models import Discriminator, Generator
from genkern.train.pictures import save_grid

PICTURE = "samples.png"
PICTURE_ROWS, PICTURE_COLUMNS = 20, 10  # at most, so that it can be looked at
SCORED_SAMPLES = 1000


class GANTask:
    KIND = "gan"
    DEFAULTS: ClassVar = {
        "data": None,
        "size": None,
        "width": 32,
        "z_dim": 64,
        "loss": "hinge",
        "r1": 0.0,
        "r1_every": 1,
        "ema": 0.995,
        "lr": 1e-3,
        "steps": 2000,
        "batch_size": 32,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "threads": None,
        "backend": None,
        "save_every": None,
    }
    display: ClassVar = {"loss_g": "G loss", "loss_d": "D loss"}

    def __init__(self, config: dict) -> None:
        self.config = config
        _check(config)
        self.data = load_images(config["data"], config["size"])
        self.summary, self.items = self.data.summary, len(self.data.train)
        config["size"], config["channels"] = self.data.train.shape[3], self.data.train.shape[1]
        config["classes"] = self.data.classes
        config["fingerprint"] = zlib.crc32(self.data.train.numpy())
        dtype = getattr(torch, config["dtype"])
        self._images = self.data.train.to(config["device"], dtype)
        self._labels = self.data.train_labels.to(config["device"])

    def make_trainer(self) -> GANTrainer:
        config = self.config
        dtype = getattr(torch, config["dtype"])
        discriminator = Discriminator(
            config["size"],
            len(config["classes"]),
            channels=config["channels"],
            width=config["width"],
            dtype=dtype,
        )
        return GANTrainer(
            make_generator(config).to(config["device"], dtype),
            discriminator.to(config["device"]),
            loss=config["loss"],
            r1=config["r1"],
            r1_every=config["r1_every"],
            ema=config["ema"],
            lr_G=config["lr"],
            # Heusel et al. 2017: a discriminator that learns faster leaves out less of the data.
            lr_D=2 * config["lr"],
        )

    def stepper(self, trainer, order):
        return lambda batch: trainer.step(self._images[batch], self._labels[batch])

    def schedule(self, steps: int) -> float:
        return (1 + steps / 400) ** -0.5

    def on_save(self, trainer, folder) -> None:
        classes = min(len(self.config["classes"]), PICTURE_ROWS)
        labels = torch.arange(classes).repeat_interleave(PICTURE_COLUMNS)
        save_grid(folder / PICTURE, draw(trainer.ema, labels, seed=0), PICTURE_COLUMNS)

    def scores(self, trainer, folder):
        from genkern.train import scores

        data = self.data
        reason = scores.too_few(data.train_labels.numpy(), data.held_out_labels.numpy())
        if reason:
            return reason
        classes = len(self.config["classes"])
        labels = torch.arange(classes).repeat_interleave(-(-SCORED_SAMPLES // classes))
        samples = draw(trainer.ema, labels, seed=1)
        return scores.measure(
            scores.Labelled.of(data.train, data.train_labels),
            scores.Labelled.of(data.held_out, data.held_out_labels),
            scores.Labelled.of(samples, labels),
        )


def _check(config):
    for name in ("size", "width"):
        if config[name] is not None and config[name] % 8:
            raise TrainError(f"--{name} must be a multiple of 8, not {config[name]}")
    if not config["r1"] >= 0:
        raise TrainError(f"--r1 must be 0 or positive, not {config['r1']}")
    if not 0 <= config["ema"] < 1:
        raise TrainError(f"--ema must be at least 0 and below 1, not {config['ema']}")


def make_generator(config: dict) -> Generator:
    """The generator of a run, from its configuration."""
    return Generator(
        config["size"],
        len(config["classes"]),
        channels=config["channels"],
        width=config["width"],
        z_dim=config["z_dim"],
    )


@torch.no_grad()
def draw(generator, labels, seed: int, batch_size=250):
    """Images [N, C, size, size] on the CPU, one a label; the noise depends on `seed` alone."""
    like = next(generator.parameters())
    # An averaged model keeps the model inside it.
    z_dim = getattr(generator, "module", generator).z_dim
    z = torch.randn(len(labels), z_dim, generator=torch.Generator().manual_seed(seed))
    parts = [
        generator(noise.to(like), part.to(like.device)).cpu()
        for noise, part in zip(z.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def sample(config, state, *, class_name, count, out, seed) -> str:
    """Draws `count` images of one class, or of each, from a run's checkpoint into the file `out`;
    returns a sentence about it."""
    generator = make_generator(config)
    # The average's names are the generator's below `module.`
    weights = state["trainer"]["ema"]
    generator.load_state_dict(
        {k.removeprefix("module."): v for k, v in weights.items() if k.startswith("module.")}
    )
    classes = list(config["classes"])
    if class_name is not None and class_name not in classes:
        raise TrainError(f"--class {class_name} is not one of the run's: {', '.join(classes)}")
    wanted = range(len(classes)) if class_name is None else [classes.index(class_name)]
    labels = torch.tensor(list(wanted)).repeat_interleave(count)
    save_grid(out, draw(generator.eval(), labels, seed), count)
    return f"{len(labels)} images, {count} a class, in {out}"
