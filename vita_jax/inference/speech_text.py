"""Text on its way to the speech decoder: markers out, formulas into words, pieces of a speakable length.

Functions on strings, with the originals' order of replacements, which decides what comes out: formula words also hit
ordinary ones ("second" becomes " secant ond"). Sources: `web_demo/server.py` and `web_ability_demo.py` of VITA-1.5,
`bin/inference.py` and `bin/server.py` of Freeze-Omni.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# State symbols and what a tokenizer may leave in an answer.
MARKERS = ("☞", "☟", "☜", "<unk>", "<|im_end|>")

# Pieces of an answer end at these.
PIECE_ENDS = frozenset(",，.。?\n？!！、")
MIN_PIECE_LENGTH = 5  # characters

FUNCTION_WORDS = (
    ("sin", " sine "),
    ("cos", " cosine "),
    ("tan", " tangent "),
    ("cot", " cotangent "),
    ("sec", " secant "),
    ("csc", " cosecant "),
    ("log", " logarithm "),
    ("exp", "e^"),
    ("sqrt", "根号 "),
    ("abs", "绝对值 "),
)
# The two-character operators come after their parts, so the originals never reach them; kept for the order's sake.
OPERATOR_WORDS = (
    ("+", "加"),
    ("-", "减"),
    ("*", "乘"),
    ("/", "除"),
    ("=", "等于"),
    ("!=", "不等于"),
    (">", "大于"),
    ("<", "小于"),
    (">=", "大于等于"),
    ("<=", "小于等于"),
)
GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron 派 rho sigma tau upsilon phi chi "
    "psi omega"
).split()
GREEK_WORDS = tuple((letter, f"{name} ") for letter, name in zip("αβγδεζηθικλμνξοπρστυφχψω", GREEK_NAMES, strict=True))

NEGATIVE_NUMBER = re.compile(r"(?<![\d)])-(\d+)")
PRODUCT = re.compile(r"\(?(\d+)\)?\((\d+)\)")
POWER = re.compile(r"\(?(\w+)\)?\^\(?(\w+)\)?")

COMMON_PUNCTUATION = ".,!?;:()[]，。！？、：；（） "
UNCOMMON = re.compile(rf"[^\w\s{re.escape(COMMON_PUNCTUATION)}]")
SENTENCE_ENDS = re.compile(r"[，。？\n！、,?.!]")

CHINESE = re.compile("[一-龥]")
FULL_STOPS = "。？！.?!"
SOFT_STOPS = ",，;；:：、"
DELETED = str.maketrans("、()（）", "，,,，，", "\n\r\t*_`~")


def remove_markers(text: str) -> str:
    """Without state symbols, `<unk>` and the end of turn."""
    for marker in MARKERS:
        text = text.replace(marker, "")
    return text


def verbalise_formulas(text: str) -> str:
    """Signs, function names and Greek letters as words, products and powers spelled out (`replace_equation`)."""
    text = NEGATIVE_NUMBER.sub(r"负\1", text.replace("**", " "))
    for symbol, word in (*FUNCTION_WORDS, *OPERATOR_WORDS, *GREEK_WORDS):
        text = text.replace(symbol, word)
    return POWER.sub(r"\1的\2次方", PRODUCT.sub(r"\1乘\2", text))


def clean_for_speech(text: str) -> str:
    """What VITA-1.5's server gives to the tokenizer of the speech side: no markers, no formulas, lower case."""
    return verbalise_formulas(remove_markers(text)).lower()


def soften_first_sentence(text: str) -> str:
    """The first sentence's commas as full stops, so that it is spoken to its end at once."""
    return text.replace("，", "。").replace(",", "。")


def remove_uncommon_punctuation(text: str) -> str:
    """Keeps letters, digits, underscores, white space and the usual punctuation of English and Chinese."""
    return UNCOMMON.sub("", text)


def split_sentences(text: str) -> list[str]:
    """Pieces between punctuation marks, without the marks, stripped, none of them empty (the Gradio demo's pieces)."""
    return [piece.strip() for piece in SENTENCE_ENDS.split(text) if piece.strip()]


def clean_for_freeze_omni(text: str) -> str:
    """Freeze-Omni's `post_process`: plain punctuation, numbered lists with a colon, a full stop at the end."""
    text = re.sub(r"(\.|\:)\s+", r"\1", text.translate(DELETED))
    if CHINESE.search(text):
        text = re.sub(r"(\d+)\.\s*([一-龥A-Za-z])", r"\1：\2", text)
    else:
        text = re.sub(r"(\d+)\.\s*(\w)", r"\1:\2", text)
    if not text or text[-1] in FULL_STOPS:
        return text
    return (text[:-1] if text[-1] in SOFT_STOPS else text) + "。"


@dataclass
class PieceCutter:
    """Cuts text at punctuation while it is written, as soon as a piece is long enough to be spoken.

    min_length: characters; a shorter piece waits for the next mark. rest: what is not a whole piece yet.
    """

    min_length: int = MIN_PIECE_LENGTH
    rest: str = ""

    def push(self, text: str) -> list[str]:
        """More text, of any length -> the pieces that it completes."""
        pieces = []
        for character in text:
            self.rest += character
            if character in PIECE_ENDS and len(self.rest) >= self.min_length:
                pieces.append(self.rest)
                self.rest = ""
        return pieces

    def flush(self) -> list[str]:
        """The text is over -> its tail without a mark, if there is one (the original drops it)."""
        rest, self.rest = self.rest, ""
        return [rest] if rest.strip() else []


def speakable_pieces(characters: Iterable[str], min_length: int = MIN_PIECE_LENGTH) -> Iterator[str]:
    """The pieces of a text that comes in strings of any length, each as soon as it is complete; see `PieceCutter`."""
    cutter = PieceCutter(min_length)
    for text in characters:
        yield from cutter.push(text)
    yield from cutter.flush()


def ends_sentence(piece: str, before: str, *, commas: bool = False) -> bool:
    """Whether Freeze-Omni speaks what it has once a text piece arrives.

    Args:
      piece: the new piece of text.
      before: the text before it; a full stop after a digit may be a decimal point and does not count.
      commas: also stop at commas and colons (the server does for the first sentence and for long ones).
    """
    if not piece or (piece.endswith(".") and before[-1:].isdigit()):
        return False
    return piece[-1] in ("。：？！.?!\n,，:" if commas else "。：？！.?!\n")
