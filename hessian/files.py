"""Writing files so that a reader never sees half of one."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write `content` beside `path` and rename it into place; an interrupted call leaves the old file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_checked(path: str | os.PathLike[str], content: bytes) -> None:
    """`write_atomically`, with the SHA-256 of the content in front."""
    write_atomically(path, hashlib.sha256(content).digest() + content)


def read_checked(path: str | os.PathLike[str]) -> bytes | None:
    """What `write_checked` wrote; None if there is no such file or it was damaged since (which is logged)."""
    path = Path(path)
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        logger.warning("%s is damaged and made anew", path)
        return None
    return content[32:]
