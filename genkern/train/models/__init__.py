"""Small models that `genkern train` uses: a class-conditional GAN and a byte transformer."""

from genkern.train.models.byte_transformer import ByteTransformer
from genkern.train.models.sagan import Discriminator, Generator

__all__ = ["ByteTransformer", "Discriminator", "Generator"]
