"""A whole training state in one .safetensors file, replaced in one step.

Tensors (weights, averages, optimizer moments, random states) are the file's tensors, named by their
path in the state ("G/norm.weight", "opt_G/state/0/exp_avg"). The rest (step, epoch, position in the
data, configuration) is JSON in the file's metadata. One file, so one rename switches everything:
whoever is killed at any moment leaves the old checkpoint or the new one, never a mixture.
"""

import contextlib
import json
import os
import zlib
from pathlib import Path

import torch

from genkern.train.errors import TrainError

_TENSOR, _PAIRS = "<tensor>", "<pairs>"


def save(path, state: dict) -> None:
    """Writes `state` (dicts, lists, numbers, strings, tensors) beside `path`, then renames."""
    from safetensors.torch import save as serialize

    tensors = {}
    tree = _split(state, (), tensors)
    metadata = {"genkern": json.dumps(tree), "crc32": str(_checksum(tensors))}
    write_whole(path, serialize(tensors, metadata))


def load(path) -> dict:
    """The state that `save` wrote. Raises TrainError for a missing, foreign or damaged file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise TrainError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainError(f"{path} is damaged or not a safetensors file ({error})") from None
    if "genkern" not in metadata:
        raise TrainError(f"{path} is a safetensors file, but not one that genkern train wrote")
    if metadata.get("crc32") != str(_checksum(tensors)):
        raise TrainError(f"{path} is damaged: its tensors do not match their checksum")
    return _join(json.loads(metadata["genkern"]), tensors)


def write_whole(path, data: bytes) -> None:
    """Writes a file so that it appears whole or, on any failure, not at all (the old one stays).
    Raises TrainError where the disk refuses."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise TrainError(f"could not write {path}: {error.strerror}") from None


def _sync_folder(folder):
    """Without this a power cut may undo the rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(value, path, tensors):
    """The JSON half of `value`; its tensors go into `tensors` under their path."""
    if isinstance(value, torch.Tensor):
        name = "/".join(map(str, path))
        # A copy: two names of one memory (tied weights) are more than safetensors takes.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        halves = [[key, _split(item, (*path, key), tensors)] for key, item in value.items()]
        return dict(halves) if all(isinstance(key, str) for key in value) else {_PAIRS: halves}
    if isinstance(value, (list, tuple)):
        return [_split(item, (*path, i), tensors) for i, item in enumerate(value)]
    return value


def _join(tree, tensors):
    if isinstance(tree, list):
        return [_join(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _PAIRS in tree:
        return {key: _join(item, tensors) for key, item in tree[_PAIRS]}
    return {key: _join(item, tensors) for key, item in tree.items()}


def _checksum(tensors):
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return total
