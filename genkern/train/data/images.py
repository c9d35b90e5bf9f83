"""Labelled images: scikit-learn's digits, or a folder with one subfolder of images a class."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkern.train.errors import TrainError

HELD_OUT = 0.2  # the share of each class that training never sees


class LabelledImages(NamedTuple):
    """Images [N, C, size, size], float32 in [-1, 1], and labels [N], int64."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: list
    summary: str  # one line for the user: what was found and what was left out


def load_images(source: str | None, size: int | None) -> LabelledImages:
    """The digits (source None), or the images of a folder; scaled to size × size pixels. The same
    images are held out every time, so that scores of different runs compare."""
    if source is None:
        images, labels, classes, summary = _digits(size)
    else:
        images, labels, classes, summary = _folder(Path(source), size)
    kept, held = _split(labels)
    summary = f"{summary}; {len(held)} of them held out"
    return LabelledImages(images[kept], labels[kept], images[held], labels[held], classes, summary)


def _digits(size):
    from sklearn.datasets import load_digits

    if size not in (None, 8):
        raise TrainError(f"the digits have 8×8 pixels: --size {size} needs --data FOLDER")
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    summary = f"{len(images)} handwritten digits of 8×8 pixels (scikit-learn)"
    return images, labels, [str(name) for name in digits.target_names], summary


def _folder(folder, size):
    from PIL import Image

    if not folder.is_dir():
        raise TrainError(f"--data {folder} is not a folder")
    size = size or 32
    known = Image.registered_extensions()
    pixels, labels, classes = [], [], []
    seen, broken, duplicates = set(), [], 0
    for subfolder in sorted(path for path in folder.iterdir() if _visible_folder(path)):
        files = sorted(path for path in subfolder.rglob("*") if path.suffix.lower() in known)
        found = len(pixels)
        for file in files:
            image = _read(file)
            if image is None:
                broken.append(file)
                continue
            digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            pixels.append(_scaled(image, size))
            labels.append(len(classes))
        if len(pixels) > found:
            classes.append(subfolder.name)
    if not classes:
        raise TrainError(
            f"--data {folder} holds no readable image in its subfolders: it takes one folder of "
            "images a class"
        )
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    if (images == images[:, :1]).all():
        images = images[:, :1]
    summary = (
        f"{len(images)} {'grey' if images.shape[1] == 1 else 'RGB'} images of {len(classes)} "
        f"classes, {size}×{size} pixels; skipped {_broken(broken)} and {duplicates} exact "
        f"duplicate{'' if duplicates == 1 else 's'}"
    )
    return images.float() / 127.5 - 1, torch.tensor(labels), classes, summary


def _visible_folder(path):
    return path.is_dir() and not path.name.startswith(".")


def _broken(files):
    if not files:
        return "0 broken files"
    plural = "s" if len(files) > 1 else ""
    first = ", ".join(f"{path.parent.name}/{path.name}" for path in files[:3])
    return f"{len(files)} broken file{plural} ({first}{', …' if len(files) > 3 else ''})"


def _read(file):
    """The picture as RGB, upright, on white; None for a file that can't be decoded."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            layer = image.convert("RGBA")
    # Decoders of broken files raise whatever their format's code raises.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return None
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")


def _scaled(image, size):
    """The largest square in the middle, at size × size: [size, size, 3] uint8."""
    from PIL import Image, ImageOps

    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def _split(labels):
    """Indices to train on and indices held out: of every class the same share, at least one image
    on each side where the class has two."""
    generator = torch.Generator().manual_seed(0)
    kept, held = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values
