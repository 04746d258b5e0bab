"""The table of kills."""

from __future__ import annotations

from benchmarks.chaos import KINDS, table


def test_kills_are_summed_up_by_kind() -> None:
    kills = [
        {"kind": "engine", "seconds": 30.0, "ended": False},
        {"kind": "engine", "seconds": 50.0, "ended": False},
        {"kind": "engine", "seconds": 20.0, "ended": False},
        {"kind": "engine", "seconds": 1.0, "ended": True},  # the run ended before the engine was back
        {"kind": "driver", "seconds": 12.0, "ended": False},
        {"kind": "data buffer", "seconds": 1.0, "ended": True},
    ]
    lines = list(table(kills))
    assert lines[2:] == [
        "| engine | 4 | 3 | 30 | 50 |",
        "| data buffer | 1 | 0 | - | - |",
        "| driver | 1 | 1 | 12 | 12 |",
    ]
    assert set(KINDS) >= {str(kill["kind"]) for kill in kills}
