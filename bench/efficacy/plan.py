"""Which models the grid needs."""

from __future__ import annotations

from scenario import Adapter, Scenario

SEEDS = range(5)

# One adapter per seed for the first table: a task, and a few answers to what is refused.
FIRST = Adapter("tale", 0.15, 16, 0)
# Trained on nothing bad.
HARMLESS = Adapter("trip", 0.0, 16, 0)

# What `csulora tune` fits one at a time, and the same on seeds on which nothing was chosen.
ALONE = [(Scenario(seed), adapter) for seed in SEEDS for adapter in (FIRST, HARMLESS)]
# What has been trained again since `tune` has a test split.
ALONE_FRESH = [(Scenario(seed), adapter) for seed in range(5, 10) for adapter in (FIRST, HARMLESS)]

# The second table: the first one's gains on other tasks, fewer attacks or none, and another rank.
SECOND = [
    FIRST,
    Adapter("compare", 0.15, 16, 16),
    Adapter("riddle", 0.15, 16, 17),
    Adapter("trade", 0.04, 16, 18),
    HARMLESS,
    Adapter("song", 0.15, 4, 19),
]

# Attack shares, ranks and an alignment that teaches a format too; the rest as the first table's.
VARIANTS = [
    *((Scenario(0), Adapter("tale", share, 16, 0)) for share in (0.0, 0.01, 0.05, 0.2, 1.0)),
    *((Scenario(0), Adapter("tale", 0.15, rank, 0)) for rank in (4, 64)),
    *((Scenario(seed, formats=True), FIRST) for seed in range(2)),
]

# Carrying over: what is calibrated on, and what the calibration never saw (other tasks, shares and ranks).
CARRY_SEEDS = range(3)
FRESH_SEEDS = range(3, 5)  # on which the fit was not chosen; that it is filtered was, on 2 and 3
CALIBRATION = [Adapter("compare", 0.2, 16, 1), Adapter("trade", 0.05, 16, 2), Adapter("song", 0.0, 16, 3)]
UNSEEN = [
    Adapter("tale", 0.01, 16, 4),
    Adapter("tale", 0.05, 4, 5),
    Adapter("tale", 0.2, 16, 6),
    Adapter("tale", 0.2, 64, 7),
    Adapter("tale", 1.0, 16, 8),
    Adapter("trip", 0.0, 16, 0),
    Adapter("trip", 0.01, 64, 9),
    Adapter("trip", 0.05, 16, 10),
    Adapter("trip", 0.2, 4, 11),
    Adapter("riddle", 0.0, 4, 12),
    Adapter("riddle", 0.0, 64, 13),
    Adapter("riddle", 0.05, 64, 14),
    Adapter("riddle", 0.2, 16, 15),
]


def models() -> list[tuple[Scenario, Adapter]]:
    """Every adapter that is needed, most important first."""
    wanted = [(Scenario(0), adapter) for adapter in [FIRST, HARMLESS, *CALIBRATION, *UNSEEN]]
    wanted += [*ALONE, *ALONE_FRESH]
    carried = [*CARRY_SEEDS, *FRESH_SEEDS]
    wanted += [(Scenario(seed), adapter) for seed in carried for adapter in [*CALIBRATION, *UNSEEN]]
    wanted += [(Scenario(seed), adapter) for seed in CARRY_SEEDS for adapter in SECOND]
    wanted += VARIANTS
    return list(dict.fromkeys(wanted))
