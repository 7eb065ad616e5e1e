"""What every study shares: arms measured over seeds, checks decided by an interval, a verdict.

A study is a module with a docstring and one function:

- the docstring's first paragraph is the claim, the paragraph that begins with "Refuted if" is the rule;
- `run(seed, size)` returns `Findings`, and `@study` turns them into a `Verdict`;
- `Findings.parts` hold the rule, each part with the knock-outs that must break it; `Findings.gates` say which arms are
  trained.

No verdict is typed by hand: each check compares a 95 % interval over seeds with bounds that are written down beforehand.

- `checks`: arms, intervals, what holds; `rules`: knock-outs, gates, what follows from them; `registry`: the rules that a study
  has had, with the numbers that were known when they changed; `verdict`: findings and verdict; `figures`: how they are drawn;
- `runner`: find, run and keep studies; `pages`: pages and scoreboard; `sources`: which code measured a result;
- `batches`, `training`: small networks, one per seed, trained together;
- data and networks that two studies or more share: `data`, `photographs`, `tiles`, `window_cnn`, `global_cue`, `graphs`,
  `speech`.

What one study alone needs stands in that study.
"""

from cenote.study.harness.checks import (
    HOLDS,
    REFUTED,
    UNDECIDED,
    Arms,
    Check,
    Holds,
    above,
    below,
    between,
    decide,
    decided,
    t_interval,
)
from cenote.study.harness.figures import draw_arms, draw_curves, draw_picture
from cenote.study.harness.rules import UNREGISTERED, UNTRAINED, WITHOUT, Gate, KnockedOut, Part, Ruling, gate
from cenote.study.harness.verdict import SIZES, Findings, Size, Verdict, claim_and_rule, seeds_of, study

__all__ = [
    "HOLDS",
    "REFUTED",
    "SIZES",
    "UNDECIDED",
    "UNREGISTERED",
    "UNTRAINED",
    "WITHOUT",
    "Arms",
    "Check",
    "Findings",
    "Gate",
    "Holds",
    "KnockedOut",
    "Part",
    "Ruling",
    "Size",
    "Verdict",
    "above",
    "below",
    "between",
    "claim_and_rule",
    "decide",
    "decided",
    "draw_arms",
    "draw_curves",
    "draw_picture",
    "gate",
    "seeds_of",
    "study",
    "t_interval",
]
