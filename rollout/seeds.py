"""Seeds of the engines' draws: one for each turn, made from numbers that a resumed run has again."""

from __future__ import annotations

import hashlib
from enum import Enum


class Domain(str, Enum):
    """What an episode is played for. The numbers of episodes begin at 0 in each domain."""

    train = "train"  # numbered by ticket: the attempts of a group have different tickets
    eval = "eval"  # numbered by row: every evaluation of a row draws alike, so that evaluations can be compared


def turn_seed(run_seed: int, domain: Domain, number: int, turn: int) -> int:
    """Return the sampling seed of a turn, in [0, 2^63): the first 63 bits of a SHA-256 of the four.

    `number`: of the episode in its domain. `turn`: index of the episode's call of the engine, from 0; an engine counts
    positions of the context, which are the same again after a compaction. Which attempt plays the episode is left
    out, so an episode that is played again, after a failure or a resume, meets the same draws.
    """
    name = f"{run_seed} {domain.value} {number} {turn}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
