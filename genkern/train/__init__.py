"""Training in a page: `GANTrainer(G, D).step(real, labels)` and `LMTrainer(model).step(tokens)`.

Both take the user's own modules and batches from any DataLoader. `genkern train` is made of them.
"""

from genkern.nn.averaging import averaged
from genkern.train.gan_trainer import GANStep, GANTrainer
from genkern.train.lm_trainer import LMStep, LMTrainer

__all__ = ["GANStep", "GANTrainer", "LMStep", "LMTrainer", "averaged"]
