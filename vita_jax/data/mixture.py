"""What a data set of Flamingo's training is: which documents, how much of each, how many of them a step takes.

Every step has one batch of each data set; gradients of their weighted mean losses are added (arXiv 2204.14198, section
3.2.2: better than taking turns).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from vita_jax.data.interleaved import DOCUMENT_TOKENS
from vita_jax.data.loader import SourceConfig
from vita_jax.errors import UserError

Kind = Literal["documents", "pairs", "text"]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set of a mixture.

    Attributes:
      name: of its metrics and arrays.
      sources: folders of documents.
      weight: of its mean loss (lambda in the paper).
      batch_size: packed rows of one optimiser step, over all devices.
      row_length, row_images: tokens and pictures (or clips) of a packed row.
      kind: "documents": what follows a picture is learnt, up to the end of its chunk. "pairs": captioned pictures or
        clips, whose end of text is learnt, too. "text": no pictures, all of it is learnt.
      frames: of a clip, evenly spread over it; 1 = pictures, which are no clips.
      max_tokens: what a document is cut to.
      window: where it is cut: at the "start", as in open_flamingo, or "random", as in the paper.
      max_images: pictures of a document beyond these are left out, their tags with them.
      min_images: documents with fewer pictures, once they are cut, are not used.
      drop_single: share of the documents with a single picture that is not used; open_flamingo drops half.
      next_picture: share of the documents whose text sees the picture after it instead of the one before; half in the
        paper, none in open_flamingo.
      flip: share of the documents whose pictures are mirrored, all together.
    """

    name: str
    sources: tuple[SourceConfig, ...]
    weight: float = 1.0
    batch_size: int = 8
    row_length: int = DOCUMENT_TOKENS
    row_images: int = 6
    kind: Kind = "documents"
    frames: int = 1
    max_tokens: int = DOCUMENT_TOKENS
    window: Literal["start", "random"] = "start"
    max_images: int = 6
    min_images: int = 1
    drop_single: float = 0.5
    next_picture: float = 0.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        where = f"data set {self.name!r}"
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name):
            raise UserError(f"{where} is no valid name; use a letter, then letters, digits, _ and -")
        if not self.sources:
            raise UserError(f"{where} has no sources; name at least one folder of documents")
        for name, least in (
            ("batch_size", 1),
            ("row_length", 1),
            ("row_images", 0 if self.kind == "text" else 1),
            ("frames", 1),
            ("max_tokens", 2),
            ("max_images", 1),
            ("min_images", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{where}: {name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("drop_single", "next_picture", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{where}: {name} is {getattr(self, name)}; it is a share, 0 to 1")
        if not self.weight > 0:
            raise UserError(f"{where}: weight is {self.weight}; it must be positive, or leave the data set out")
        if self.max_tokens > self.row_length:
            raise UserError(f"{where}: max_tokens {self.max_tokens} does not fit a row of row_length {self.row_length}")
        if self.kind != "text" and self.images_of_document > self.row_images:
            raise UserError(
                f"{where}: a document may have {self.images_of_document} pictures, a row has row_images "
                f"{self.row_images}; raise it, or lower max_images"
            )

    @property
    def images_of_document(self) -> int:
        """The most pictures that a document gives."""
        return {"documents": self.max_images, "pairs": 1, "text": 0}[self.kind]


def check_mixture(sets: tuple[DataSet, ...]) -> None:
    """Raises UserError if there is no data set, or two have one name."""
    if not sets:
        raise UserError("the mixture has no data set; give at least one")
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"data set {name!r} is there {names.count(name)} times; names must be unique")
