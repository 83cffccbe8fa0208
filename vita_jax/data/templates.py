"""Chat templates of VITA and LLaVA and the three system texts, as immutable data.

Source: the original conversation definitions (`vita/conversation.py`, `llava/conversation.py`), restated as values.
System texts are no part of a template: the user supplies them, VITA's selected by modality. Nothing here is ever
modified in place; the original writes the selected system text into its shared template and so has to copy it before
every use.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

from vita_jax.errors import UserError

MODALITIES = ("image", "video", "lang")


@dataclass(frozen=True)
class StateSymbols:
    """The first token of every answer: what kind of query the model took its input for.

    audio: a spoken query meant for the model; noise: speech not meant for it; text: a typed query.
    """

    audio: str
    noise: str
    text: str


@dataclass(frozen=True)
class Template:
    """How turns are written.

    roles: names of (human, gpt). sep, sep2: separators as the original names them. style: the rule that joins
    turns. system_slots: number of system texts it takes (3: image, video, lang; 1: one text; 0: none).
    state_symbols: None where the original never puts any.
    """

    name: str
    roles: tuple[str, str]
    sep: str
    sep2: str | None
    style: str
    version: str
    system_slots: int
    state_symbols: StateSymbols | None = None

    @property
    def end_marker(self) -> str:
        """The string that ends an answer and is supervised with it."""
        return _QWEN_TURN_END if self.style == "Qwen2p5Instruct" else (self.sep2 or self.sep)


@dataclass(frozen=True)
class SystemTexts:
    """The system text for each modality; `lang` is everything without pictures, speech included."""

    image: str
    video: str
    lang: str

    def select(self, modality: str) -> str:
        """The text of one modality. Raises UserError for an unknown one."""
        if modality not in MODALITIES:
            raise UserError(f"modality {modality!r} is unknown; expected one of {', '.join(MODALITIES)}")
        return getattr(self, modality)

    def to_dict(self) -> dict[str, str]:
        """The three texts by modality."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, str], name: str = "system texts") -> "SystemTexts":
        """From {"image": ..., "video": ..., "lang": ...}. Raises UserError for a missing, extra or non-text entry."""
        expected = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != expected:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise UserError(f"{name}: expected the three entries {sorted(expected)}, got {found}")
        for key, text in values.items():
            if not isinstance(text, str):
                raise UserError(f"{name}: {key} must be a string, got {type(text).__name__}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "SystemTexts":
        """From a UTF-8 JSON file with the three entries. Raises UserError when it cannot be read as such."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"system text file {path} cannot be read: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"system text file {path} is not UTF-8 JSON: {error}") from error
        return cls.from_dict(values, str(path))


_QWEN_TURN_END = "<|im_end|>"
_ADDED_SYMBOLS = StateSymbols(audio="<1>", noise="<2>", text="<3>")
# Single tokens that the Qwen2 vocabulary already has, so VITA-1.5 needs no new ones.
_QWEN_SYMBOLS = StateSymbols(audio="☞", noise="☟", text="☜")


def _mixtral(name: str, version: str, style: str, slots: int) -> Template:
    symbols = _ADDED_SYMBOLS if slots == 3 else None
    return Template(name, ("user", "bot"), "</s>", "</s>", style, version, slots, symbols)


def _two(name: str, end: str) -> Template:
    return Template(name, ("USER", "ASSISTANT"), " ", end, "TWO", name, 1)


def _llava(name: str, style: str, sep: str, sep2: str, version: str) -> Template:
    return Template(name, ("USER", "ASSISTANT"), sep, sep2, style, version, 1)


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        template.name: template
        for template in (
            _mixtral("default", "mixtral_two", "MixtralTwo", 3),
            Template("nemo", ("USER", "ASSISTANT"), "[/INST]", "</s>", "Nemo", "nemo", 3, _ADDED_SYMBOLS),
            Template(
                "qwen2p5_instruct",
                ("user", "assistant"),
                "<|im_start|>",
                "<|im_start|>",
                "Qwen2p5Instruct",
                "qwen2p5_instruct",
                3,
                _QWEN_SYMBOLS,
            ),
            _mixtral("mixtral_zh", "mixtral_zh", "MixtralZh", 1),
            _mixtral("mixtral_two", "mixtral_two", "MixtralTwo", 3),
            _two("phi3", "<|endoftext|>"),
            Template("plain", ("", ""), "\n", None, "PLAIN", "Unknown", 0),
            _two("minicpm", "</s>"),
            _two("llama", "<|end_of_text|>"),
            # LLaVA's; v1 and vicuna_v1 are two names, and llava_v1 differs by its system text only.
            *(_llava(name, "TWO", " ", "</s>", "v1") for name in ("v1", "vicuna_v1", "llava_v1")),
            Template("llava_v0", ("Human", "Assistant"), "###", None, "SINGLE", "Unknown", 1),
            _llava("llava_llama_2", "LLAMA_2", "<s>", "</s>", "llama_v2"),
        )
    }
)


def get_template(name: str) -> Template:
    """The template of that name. Raises UserError naming the nearest one."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name, TEMPLATES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TEMPLATES)}"
    raise UserError(f"template {name!r} is unknown; {hint}")
