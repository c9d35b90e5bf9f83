"""`genkern train lm`: a byte transformer on Python's help topics or on a text file."""

import codecs
import zlib
from typing import ClassVar

import torch

from genkern.train.data import text
from genkern.train.errors import TrainError
from genkern.train.lm_trainer import LMTrainer
from genkern.train.models import ByteTransformer
from genkern.train.models.byte_transformer import continue_text


class LMTask:
    KIND = "lm"
    DEFAULTS: ClassVar = {
        "data": None,
        "context": 128,
        "width": 128,
        "layers": 3,
        "heads": 4,
        "lr": 3e-3,
        "steps": 1200,
        "batch_size": 8,
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
        "threads": None,
        "backend": None,
        "save_every": None,
    }
    display: ClassVar = {"loss": "loss"}

    def __init__(self, config: dict) -> None:
        self.config = config
        if config["context"] < 2:
            raise TrainError(f"--context must be at least 2, not {config['context']}")
        self.data = text.load_text(config["data"], config["context"])
        self.summary = self.data.summary
        self.items = text.window_count(self.data.train, config["context"])
        config["fingerprint"] = zlib.crc32(self.data.train.numpy())

    def make_trainer(self) -> LMTrainer:
        model = make_model(self.config)
        model.to(self.config["device"], getattr(torch, self.config["dtype"]))
        return LMTrainer(model, lr=self.config["lr"])

    def stepper(self, trainer, order):
        context, device = self.config["context"], self.config["device"]

        def step(batch):
            # Every epoch cuts the text at other places.
            shift = torch.randint(context, (1,), generator=order.generator()).item()
            return trainer.step(text.windows(self.data.train, batch, context, shift).to(device))

        return step

    def schedule(self, steps: int) -> float:
        return min(1.0, (steps + 1) / 50) * (1 + steps / 400) ** -0.5

    def on_save(self, trainer, folder) -> None:
        """There are no pictures of a language model."""

    def scores(self, trainer, folder):
        from genkern.train.scores import Score

        context = self.config["context"]
        perplexity = text.model_perplexity(trainer.model, self.data.held_out, context)
        bigram = text.bigram_perplexity(self.data.train, self.data.held_out)
        name, beside = "perplexity a byte", "Witten-Bell bigram"
        return [Score(name, perplexity, bigram, bigram, below=True, share=False, beside=beside)]


def make_model(config: dict) -> ByteTransformer:
    """The transformer of a run, from its configuration."""
    if config["width"] % config["heads"]:
        raise TrainError(
            f"--width {config['width']} must be a multiple of --heads {config['heads']}"
        )
    return ByteTransformer(
        config["context"],
        width=config["width"],
        layers=config["layers"],
        heads=config["heads"],
    )


def sample(config, state, *, prompt, length, temperature, seed):
    """Yields the prompt and `length` bytes that a run's model puts after it, as text."""
    model = make_model(config)
    model.load_state_dict(state["trainer"]["model"])
    generator = torch.Generator().manual_seed(seed)
    # A character of several bytes is shown when its last byte has come.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield prompt
    following = continue_text(
        model.eval(), prompt.encode(), length, temperature=temperature, generator=generator
    )
    for byte in following:
        yield decoder.decode(bytes([byte]))
    yield decoder.decode(b"", final=True)
