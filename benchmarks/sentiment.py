"""Real labelled text: movie-review snippets with a mean human score, from the source package of vaderSentiment.

The snippets are those of Hutto and Gilbert 2014 (ICWSM, the VADER paper), MIT licence, rated by people from -4 to 4.
"""

import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from . import packages
from .packages import CACHE

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


def fetch(cache: Path = CACHE) -> Path:
    """The source package (2.4 MB), as `packages.fetch` gets it: downloaded once, verified always."""
    options = ("--no-build-isolation", "--no-binary", "vaderSentiment")
    return packages.fetch(PACKAGE, "vaderSentiment-3.3.2.tar.gz", PACKAGE_SHA256, cache, options)


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
