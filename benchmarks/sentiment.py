"""Real labelled text: movie-review snippets with a mean human score, from the source package of vaderSentiment.

The snippets are those of Hutto and Gilbert 2014 (ICWSM, the VADER paper), MIT licence, rated by people from -4 to 4.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PACKAGE = "vaderSentiment==3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MIN_ABS_SCORE = 0.5  # below this the raters did not agree on a side
HELD_OUT_EVERY = 5


class Snippet(NamedTuple):
    """One snippet: its id in the source, its mean human score in [-4, 4], its text."""

    id: int
    score: float
    text: str

    @property
    def label(self) -> str:
        return "positive" if self.score > 0 else "negative"


def _verified(path: Path) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != PACKAGE_SHA256:
        raise ValueError(f"{path}: sha256 is {found}; expected {PACKAGE_SHA256} ({PACKAGE}); delete it and run again")
    return path


def fetch(cache: Path = CACHE) -> Path:
    """The source package (2.4 MB), downloaded by pip into `cache` on the first call and verified on every call.

    Raises:
        ValueError: the file in `cache` is not the one expected.
        subprocess.CalledProcessError: pip could not download it; pip's own message is on stderr.
    """
    target = cache / "vaderSentiment-3.3.2.tar.gz"
    if target.exists():
        return _verified(target)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # pip runs the package's setup.py to read its name, so it must check the hash before that: hence the file.
        requirement = Path(folder, "requirement.txt")
        requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "vaderSentiment", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-r", str(requirement), "-d", folder]
        subprocess.run(command, check=True)
        os.replace(_verified(Path(folder, target.name)), target)
    return target


def read_table(archive: Path) -> list[Snippet]:
    """Every movie-review snippet in the source package, in file order; nothing is unpacked to disk."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(INNER).read())) as inner:
        lines = inner.extractfile(TABLE).read().decode().split("\n")
    fields = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    return [Snippet(int(id_), float(score), text.strip()) for id_, score, text in fields]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def split(snippets: list[Snippet]) -> tuple[list[Snippet], list[Snippet]]:
    """(train, held-out): one in five ids is held out, for ever the same ones.

    Snippets on which raters were undecided (|score| <= 0.5) are left out. Of snippets with the same words only
    the first id stays, so that no text is on both sides.
    """
    seen, train, held_out = set(), [], []
    for snippet in sorted(snippets):
        words = _words(snippet.text)
        if abs(snippet.score) <= MIN_ABS_SCORE or not words or words in seen:
            continue
        seen.add(words)
        (held_out if snippet.id % HELD_OUT_EVERY == 0 else train).append(snippet)
    return train, held_out


def load_split(cache: Path = CACHE) -> tuple[list[Snippet], list[Snippet]]:
    """(train, held-out) of the real snippets: about 8,000 and 2,000."""
    return split(read_table(fetch(cache)))


if __name__ == "__main__":
    for name, part in zip(("train", "held-out"), load_split(), strict=True):
        positive = sum(snippet.label == "positive" for snippet in part)
        print(f"{name}: {len(part)} snippets, {positive} of them positive")
