"""What the report has found out, kept in the user's cache folder: a run that is cut off goes on
where it was, and the next one makes only what changed."""

import hashlib
import json
import os
from pathlib import Path

from genkern.static import sass


def folder():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "genkern" / "static"


def digest(*parts):
    """A name for what depends on these: bytes, or what str() tells apart."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else f"{part}\n".encode())
    return found.hexdigest()[:20]


def reader():
    """A name for the rules by which machine code is read: what was read by others is no more."""
    return digest(Path(sass.__file__).read_bytes())


def kept(name, make):
    """make()'s plain values: from the file of that name, or made now."""
    path = folder() / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(found))
    part.rename(path)
    return found
