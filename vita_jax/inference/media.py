"""The pictures, videos and sounds of a conversation: each is decoded once and goes through its tower once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vita_jax.data.audio import Clip
from vita_jax.data.examples import ExampleContext, TileTable, join_tables, prompt_example, tile_table
from vita_jax.data.records import PLACEHOLDERS, Media
from vita_jax.inference.generate import TILE_BUCKETS, bucket
from vita_jax.inference.listen import hear_whole, pad_frames
from vita_jax.inference.prefix import LIVE, MediaId, Prompt, example_prompt, live_id, media_id
from vita_jax.models.audio.tower import AudioTower
from vita_jax.training.families import Model


@functools.partial(jax.jit, static_argnames="model")
def _see(model: Model, params: Any, tiles: jax.Array) -> jax.Array:
    """tiles (n S S 3) -> (n k d), each tile's part of the feature table."""
    return model.apply({"params": params}, tiles[:, None], method="encode_tiles")


class KnownMedia:
    """What a conversation has seen and heard, as vectors of the language model."""

    def __init__(self, model: Model, params: Mapping[str, Any], context: ExampleContext) -> None:
        """
        Args:
          model, params: the whole model; its towers run here.
          context: how conversations become arrays.
        """
        self.model, self.context = model, context
        towers = {name: params[name] for name in ("vision", "projector", "audio") if name in params}
        self._params = jax.tree.map(jnp.asarray, towers)
        self._tables: dict[tuple[str, str | None, bytes], tuple[TileTable, list[MediaId], list[MediaId]]] = {}
        self.features: dict[MediaId, np.ndarray] = {}

    def prompt(self, turns: Sequence[Mapping[str, str]], media: Sequence[Media]) -> Prompt:
        """A conversation that ends with a question, and its files, as the engine takes it.

        Raises:
          UserError: see `prompt_example`.
        """
        known = [self._known(item) for item in media]
        table = join_tables([table for table, _, _ in known], self.context)
        example = prompt_example(turns, media, self.context, table=table)
        tiles = [name for _, names, _ in known for name in names]
        clips = [name for _, _, names in known for name in names]
        self._look(table, tiles)
        self._listen(table, clips)
        # A prompt keeps what it needs, whatever is forgotten or grows before it has been fed.
        features = {name: self.features[name] for name in (*tiles, *clips)}
        return example_prompt(example, self.context, features, tiles, clips)

    def decode(self, media: Media) -> None:
        """Does ahead what needs no model: a picture becomes tiles, a sound features. May be called in another thread,
        as long as it is the only one.

        Raises:
          UserError: see `tile_table`.
        """
        self._known(media)

    def begin_sound(self) -> Media:
        """A sound that is about to be spoken; it has one part, of no meaning, until `grow_sound` gives it some."""
        _, number = live_id()
        media = Media("audio", number, number.encode(), set=LIVE)
        self._set_sound(media, np.zeros((1, self.model.config.language.hidden_size), np.float32))
        return media

    def grow_sound(self, media: Media, tokens: np.ndarray) -> None:
        """All vectors of a spoken sound so far, (p d), p at least 1."""
        self._set_sound(media, tokens)

    def forget_sound(self, media: Media) -> None:
        """Drops a spoken sound that no prompt will ask for any more."""
        self._tables.pop(_key(media), None)
        self.features.pop(self.sound_name(media), None)

    def look(self, media: Media) -> None:
        """Sees a picture or video ahead of the prompt that it will be in. Raises UserError if it is damaged."""
        table, tiles, _ = self._known(media)
        self._look(table, tiles)

    def sound_name(self, media: Media) -> MediaId:
        """What the keys of a prompt call a spoken sound."""
        return LIVE, media.name

    def _set_sound(self, media: Media, tokens: np.ndarray) -> None:
        # So many frames have room for the tokens; what they hold is never looked at.
        bins = self.context.audio.config.filter_bank.num_mel_bins
        clip = Clip(np.zeros((8 * len(tokens) + 3, bins), np.float32), len(tokens))
        side = self.context.image.image_size
        slots = {kind: ((range(1),) if kind == "audio" else ()) for kind in PLACEHOLDERS}
        table = TileTable(np.zeros((0, side, side, 3), np.uint8), slots, (clip,))
        self._tables[_key(media)] = (table, [], [self.sound_name(media)])
        self.features[self.sound_name(media)] = tokens

    def _known(self, media: Media) -> tuple[TileTable, list[MediaId], list[MediaId]]:
        key = _key(media)
        if key not in self._tables:
            table = tile_table([media], self.context)
            names = [media_id("tile", tile) for tile in table.tiles]
            self._tables[key] = (table, names, [media_id("clip", clip.features) for clip in table.clips])
        return self._tables[key]

    def _look(self, table: TileTable, names: Sequence[MediaId]) -> None:
        new = {name: tile for name, tile in zip(names, table.tiles, strict=True) if name not in self.features}
        if not new:
            return
        tiles = np.stack(list(new.values()))
        room = bucket(len(tiles), TILE_BUCKETS) - len(tiles)
        seen = np.asarray(_see(self.model, self._params, np.pad(tiles, ((0, room), (0, 0), (0, 0), (0, 0)))))
        self.features.update(zip(new, seen, strict=False))

    def _listen(self, table: TileTable, names: Sequence[MediaId]) -> None:
        for name, clip in zip(names, table.clips, strict=True):
            if name not in self.features:
                tower = AudioTower(self.model.config.audio, self.model.dtype)
                lengths = np.full((1,), len(clip.features), np.int32)
                heard = hear_whole(tower, self._params["audio"], pad_frames(clip.features), lengths)
                self.features[name] = np.asarray(heard[0, : clip.num_tokens])


def _key(media: Media) -> tuple[str, str | None, bytes]:
    return media.kind, media.set, media.data
