"""--fail_on: conditions on the numbers of audit.json, for a pipeline."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
GATE = re.compile(r"([\w.-]+?)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.I)
ENDS = r"\.(?:value|low|high)"
PATHS = re.compile(
    rf"membership\.(?:auc|tpr_at_fpr_0\.1|tpr_at_fpr_0\.01|tpr_at_fpr_0\.001){ENDS}|membership\.p"
    rf"|extraction\.[\w-]+\.excess(?:{ENDS}|\.p)|extraction\.[\w-]+\.greedy_excess\.(?:value|p)"
    r"|extraction\.[\w-]+\.(?:train|heldout)\.greedy\.(?:tuned|base)\.(?:hits|rate|low|high)"
    r"|extraction\.[\w-]+\.(?:train|heldout)\.exposure\.(?:tuned|base|calibrated)\.median_bits"
    r"|verbatim\.excess\.(?:value|p)|verbatim\.(?:train|heldout)\.(?:near|greedy)\.(?:tuned|base)\.(?:hits|rate|low|high)"
    r"|untargeted\.excess\.(?:value|p)"
    r"|untargeted\.(?:train|heldout)\.(?:secrets|samples_with_secret|samples_with_run)\.(?:hits|rate|low|high)"
    rf"|canaries\.auc{ENDS}|canaries\.epsilon\.low|canaries\.p"
    r"|canaries\.bounds\.(?:one_run|f_dp_epsilon_delta|f_dp_gaussian)\.low\.(?:95|99\.9)"
)
EXAMPLES = "membership.tpr_at_fpr_0.01.low>0.05, extraction.email.excess.low>0, verbatim.train.near.tuned.hits>0"


@dataclass(frozen=True)
class Gate:
    expression: str
    path: str
    operator: str
    limit: float

    def result(self, audit: Mapping[str, Any]) -> dict[str, Any]:
        """{expression, value, holds}; holds is None where the audit has no such number."""
        value = look_up(audit, self.path)
        known = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        holds = OPERATORS[self.operator](value, self.limit) if known else None
        return {"expression": self.expression, "value": value if known else None, "holds": holds}


def parse(expression: str) -> Gate:
    """A Gate from `PATH > NUMBER`; ValueError says what is wrong with it."""
    match = GATE.fullmatch(expression.strip())
    if not match:
        raise ValueError(f"not a condition PATH > NUMBER (also >=, <, <=), for example {EXAMPLES}")
    path, sign, limit = match.groups()
    if not PATHS.fullmatch(path):
        raise ValueError(f"{path} is not a number in audit.json; for example {EXAMPLES}")
    return Gate(expression.strip(), path, sign, float(limit))


def look_up(item: Any, path: str) -> Any:
    """The value at a dotted path (keys may contain dots); None if there is none."""
    if not path:
        return item
    if not isinstance(item, Mapping):
        return None
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        key = ".".join(parts[:end])
        if key in item:
            return look_up(item[key], ".".join(parts[end:]))
    return None
