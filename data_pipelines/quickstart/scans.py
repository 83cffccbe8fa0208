"""Real handwriting: scikit-learn's 1,797 digit scans (8x8, 17 grey levels), and how they are held out.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI; the 1,797 scans are that set's test
part. The last 360 scans come from writers who wrote none of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_UNSEEN_WRITER_SCANS = 360
HELD_OUT_FRACTION = 0.2
SPLITS = ("train", "held_out", "unseen_writers")


@dataclass(frozen=True)
class ScanSplit:
    """Scans of one split: `ink` (n 8 8) float32 in [0, 1], `digits` (n,) int64, `indices` (n,) into the 1,797 scans."""

    ink: np.ndarray
    digits: np.ndarray
    indices: np.ndarray

    def of_digit(self, digit: int) -> np.ndarray:
        """Positions, within this split, of the scans that show `digit`."""
        return np.flatnonzero(self.digits == digit)


def load_scan_splits(seed: int) -> dict[str, ScanSplit]:
    """The scans as three disjoint splits, keyed by the names in `SPLITS`.

    `unseen_writers` is the last 360 scans. `held_out` is 20 % of all scans, drawn at random with the classes in
    proportion from the remaining ones; its writers occur in training. No scan of either is ever used for training.
    """
    bunch = load_digits()
    ink = (bunch.images / 16.0).astype(np.float32)
    digits = bunch.target.astype(np.int64)
    everything = np.arange(len(digits))
    known_writers, unseen_writers = np.split(everything, [len(digits) - NUM_UNSEEN_WRITER_SCANS])
    train, held_out = train_test_split(
        known_writers,
        test_size=round(HELD_OUT_FRACTION * len(digits)),
        random_state=seed,
        stratify=digits[known_writers],
    )
    return {
        name: ScanSplit(ink[indices], digits[indices], indices)
        for name, indices in zip(SPLITS, (np.sort(train), np.sort(held_out), unseen_writers), strict=True)
    }
