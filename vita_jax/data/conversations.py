"""A conversation as ids and labels, by the rules that its run is written with: VITA's (`prompts.py`) or LLaVA's
(`llava_prompts.py`). The kind of the options says whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from vita_jax.data import llava_prompts, prompts
from vita_jax.data.llava_prompts import LlavaPromptOptions
from vita_jax.data.prompts import EncodedConversation, EncodedPrompt, PromptOptions
from vita_jax.data.rendering import Message
from vita_jax.data.templates import SystemTexts, Template
from vita_jax.data.tokenizer import Tokenizer
from vita_jax.errors import UserError

WritingOptions = PromptOptions | LlavaPromptOptions


def encode_conversation(
    conversations: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system_texts: SystemTexts,
    options: WritingOptions,
    tile_counts: Sequence[int] = (),
    frame_counts: Sequence[int] = (),
    inserted_id: int | None = None,
    end_tag: bool = True,
    seed: int = 0,
) -> EncodedConversation:
    """A record's turns as ids and labels.

    Args:
      conversations: turns.
      tokenizer, template, system_texts, options: how they are written. LLaVA has one system text, `lang`; an empty one
        is left out.
      tile_counts, frame_counts: tiles of every picture and frames of every video, in text order.
      inserted_id, end_tag: of records with sound, see `prompts.encode_conversation`.
      seed: of the record, for orders that are drawn.

    Raises:
      UserError: turns, counts or a tokenizer that do not fit; see the two functions that this one calls.
    """
    if isinstance(options, PromptOptions):
        return prompts.encode_conversation(
            conversations,
            tokenizer=tokenizer,
            template=template,
            system_texts=system_texts,
            tile_counts=tile_counts,
            frame_counts=frame_counts,
            inserted_id=inserted_id,
            end_tag=end_tag,
            options=options,
        )
    _check_llava(conversations, tokenizer, template, options, tile_counts)
    return llava_prompts.encode_conversation(
        conversations,
        tokenizer=tokenizer,
        template=template,
        system=_one_text(system_texts, template),
        options=options,
        seed=seed,
    )


def encode_prompt(
    conversations: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: Template,
    system_texts: SystemTexts,
    options: WritingOptions,
    tile_counts: Sequence[int] = (),
    frame_counts: Sequence[int] = (),
) -> EncodedPrompt:
    """Turns that end with a question, as the ids of a prompt that ends with the open answer.

    Arguments and errors as in `encode_conversation`.
    """
    if isinstance(options, PromptOptions):
        return prompts.encode_prompt(
            conversations,
            tokenizer=tokenizer,
            template=template,
            system_texts=system_texts,
            tile_counts=tile_counts,
            frame_counts=frame_counts,
            options=options,
        )
    _check_llava(conversations, tokenizer, template, options, tile_counts)
    return llava_prompts.encode_prompt(
        conversations,
        tokenizer=tokenizer,
        template=template,
        system=_one_text(system_texts, template),
        options=options,
    )


def check_template(template: Template, options: WritingOptions) -> None:
    """Raises UserError for a template that LLaVA's conversations are not written in."""
    if isinstance(options, LlavaPromptOptions) and template.style not in llava_prompts.STYLES:
        raise UserError(
            f"template {template.name!r} is none of LLaVA's; use vicuna_v1, llava_v0, llava_llama_2 or plain"
        )


def sees_video(options: WritingOptions) -> bool:
    """Whether these rules have a place for videos."""
    return isinstance(options, PromptOptions)


def _one_text(system_texts: SystemTexts, template: Template) -> str | None:
    return system_texts.lang if template.system_slots and system_texts.lang else None


def _check_llava(
    conversations: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    options: LlavaPromptOptions,
    tile_counts: Sequence[int],
) -> None:
    """Raises UserError unless every picture has a placeholder and is one tile, and the tokenizer knows the markers."""
    images, videos, _ = prompts.count_placeholders(conversations)
    if videos:
        raise UserError(f"the messages hold {prompts.VIDEO}, but LLaVA sees no videos; give single pictures")
    # Of several in one message the original keeps one, and leaves the last pictures over.
    if images != len(tile_counts):
        raise UserError(
            f"the messages hold {images} {prompts.IMAGE} placeholders, but there are {len(tile_counts)} pictures; "
            "write one placeholder for each"
        )
    for number, tiles in enumerate(tile_counts):
        if tiles != 1:
            raise UserError(
                f"picture {number} has {tiles} tiles, but LLaVA reads a picture as one; set image.tiling to 'crop'"
            )
    _check_markers(tokenizer, template, options.image_markers)


@lru_cache(maxsize=64)
def _check_markers(tokenizer: Tokenizer, template: Template, image_markers: bool) -> None:
    """Raises UserError if a marker that has to be one token is not; `###` of the first templates is plain text."""
    markers = [template.end_marker] if template.style in ("TWO", "LLAMA_2") else []
    markers += [llava_prompts.IMAGE_START, llava_prompts.IMAGE_END] if image_markers else []
    for marker in markers:
        if marker not in tokenizer.special_tokens:
            raise UserError(
                f"template {template.name!r} needs {marker!r} as a special token of the tokenizer; use LLaMA's, or "
                "enlarge yours by it"
            )
