"""Images from folders: what is read, what is skipped, and how it is counted."""

import numpy as np
import pytest
import torch
from PIL import Image

from genkern.train.data.images import load_images
from genkern.train.errors import TrainError


def noise(seed, height=20, width=20, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes of five images each."""
    for label, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for i in range(5):
            noise(10 * label + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def everything(data):
    return torch.cat([data.train, data.held_out])


def test_a_folder(folder):
    data = load_images(str(folder), 16)
    assert data.classes == ["cats", "dogs"]
    assert data.train.shape == (8, 3, 16, 16) and data.held_out.shape == (2, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4
    assert data.held_out_labels.tolist() == [0, 1]
    assert data.train.dtype == torch.float32
    assert -1 <= data.train.min() < -0.5 and 0.5 < data.train.max() <= 1
    assert data.summary == (
        "10 RGB images of 2 classes, 16×16 pixels; skipped 0 broken files and 0 exact duplicates; "
        "2 of them held out"
    )


def test_broken_files_and_duplicates_are_skipped_and_counted(folder):
    (folder / "cats" / "empty.png").touch()
    (folder / "cats" / "text.jpg").write_text("this is no picture")
    whole = (folder / "dogs" / "0.png").read_bytes()
    (folder / "dogs" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dogs" / "copy.png").write_bytes(whole)
    # The same pixels in another format, under another class.
    Image.open(folder / "dogs" / "1.png").save(folder / "cats" / "same.bmp")
    (folder / "cats" / "notes.txt").write_text("not an image's name: not looked at")
    (folder / ".hidden").mkdir()
    data = load_images(str(folder), 16)
    assert len(everything(data)) == 10
    assert "skipped 3 broken files (cats/empty.png, cats/text.jpg, dogs/cut.png)" in data.summary
    assert "2 exact duplicates" in data.summary


def test_pixels_keep_their_values(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    data = load_images(str(tmp_path), 8)
    assert data.train.shape == (1, 1, 8, 8)
    torch.testing.assert_close(data.train[0, 0], torch.from_numpy(pixels) / 127.5 - 1)


def test_modes_and_shapes(tmp_path):
    """Grey, palette, 16 bit, transparent, wide: all become squares; transparency lies on white."""
    (tmp_path / "a").mkdir()
    noise(0, channels=1).save(tmp_path / "a" / "grey.png")
    noise(1).convert("P").save(tmp_path / "a" / "palette.png")
    noise(2, 30, 90).save(tmp_path / "a" / "wide.jpg")
    deep = np.full((20, 20), 0x8000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "a" / "deep.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "a" / "clear.png")
    images = everything(load_images(str(tmp_path), 24))
    assert images.shape == (5, 3, 24, 24)
    means = images.mean((1, 2, 3)).tolist()
    assert any(mean == 1.0 for mean in means)
    assert any(abs(mean) < 0.01 for mean in means)


def test_all_grey_images_get_one_channel(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        noise(i, channels=1).convert("RGB").save(tmp_path / "a" / f"{i}.png")
    data = load_images(str(tmp_path), 8)
    assert data.train.shape[1] == 1 and "3 grey images of 1 classes" in data.summary


def test_nothing_is_in_both_parts():
    data = load_images(None, None)
    kept = {image.numpy().tobytes() for image in data.train}
    assert len(data.train) + len(data.held_out) == 1797
    assert not kept & {image.numpy().tobytes() for image in data.held_out}
    shares = data.held_out_labels.bincount() / data.train_labels.bincount()
    assert shares.min() > 0.2 and shares.max() < 0.3


def test_bad_folders(tmp_path):
    with pytest.raises(TrainError, match=r"--data .*nowhere is not a folder"):
        load_images(str(tmp_path / "nowhere"), 8)
    noise(0).save(tmp_path / "loose.png")
    with pytest.raises(TrainError, match="no readable image in its subfolders"):
        load_images(str(tmp_path), 8)
    with pytest.raises(TrainError, match="digits have 8×8 pixels: --size 16 needs --data"):
        load_images(None, 16)
