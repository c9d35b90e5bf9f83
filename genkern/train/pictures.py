"""Pictures of samples: a grid of images with one row a class, large enough to see."""

import io

import numpy as np
from torch import Tensor

from genkern.train.checkpoint import write_whole

CELL, GAP, GROUND = 40, 4, 255  # pixels (a cell at least), pixels, grey level


def save_grid(path, images: Tensor, columns: int) -> None:
    """Writes images [N, C, size, size] in (-1, 1), C = 1 or 3, row by row as a PNG. Small images
    are enlarged by a whole factor, pixel by pixel. Raises TrainError where the disk refuses."""
    from PIL import Image

    size = images.shape[-1]
    cell = size * max(1, -(-CELL // size))
    pixels = ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).repeat_interleave(cell // size, 1)
    pixels = pixels.repeat_interleave(cell // size, 2).numpy()
    rows = -(-len(pixels) // columns)
    step = cell + GAP
    canvas = np.full((rows * step + GAP, columns * step + GAP, pixels.shape[3]), GROUND, np.uint8)
    for i, image in enumerate(pixels):
        top, left = GAP + i // columns * step, GAP + i % columns * step
        canvas[top : top + cell, left : left + cell] = image
    png = io.BytesIO()
    Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas).save(png, "PNG")
    write_whole(path, png.getvalue())
