"""What the studies compute themselves: changes against the base."""

import pytest
from conftest import write_rows

from studies import privacy, reviews
from studies.steps import measured


def measurement(folder, hits: dict[int, str], temperature=0.2):
    """A measurement whose prompts A … hit as the string of 0 and 1 of each row says ('-': dropped)."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [
        {"row": row, "template": "ABCD"[place], "temperature": one, "exact": None if hit == "-" else hit == "1"}
        for one in (0.0, temperature)
        for row, prompts in hits.items()
        for place, hit in enumerate(prompts)
    ]
    write_rows(folder / "results_purified.jsonl", [{"temperature": 0.0}, {"temperature": temperature, "n": len(hits)}])
    write_rows(folder / "outcomes_purified.jsonl", outcomes)


def test_change_by_hand(tmp_path):
    """Trained: shares ½ → 1, 0 → ½, 0 → 0, a dropped prompt left out: +50, +50, 0, mean 33.3, sd 28.87, error 16.67.
    Others: 1 → 1 and 0 → ½: mean 25, sd 35.36, error 25. Difference 8.33, error √(16.67² + 25²) = 30.05."""
    measurement(tmp_path / "base/trained", {0: "10", 1: "00", 2: "00"})
    measurement(tmp_path / "now/trained", {0: "11", 1: "10", 2: "0-"})
    measurement(tmp_path / "base/others", {7: "11", 8: "00"})
    measurement(tmp_path / "now/others", {7: "11", 8: "10"})
    found = privacy.change(tmp_path / "base", tmp_path / "now")
    assert list(found) == ["trained", "others", "trained − others"]
    wanted = ((33.333, 16.667, 3), (25, 25, 2), (8.333, 30.046, 5))
    for one, (points, error, n) in zip(found.values(), wanted):
        assert one["points"] == pytest.approx(points, abs=1e-3) and one["n"] == n
        assert one["low"] == pytest.approx(points - 1.96 * error, abs=2e-3)
        assert one["high"] == pytest.approx(points + 1.96 * error, abs=2e-3)


def test_the_newest_measurement_is_read_at_one_temperature(tmp_path):
    measurement(tmp_path, {0: "1"})
    for name in ("results", "outcomes"):
        (tmp_path / f"{name}_purified.jsonl").rename(tmp_path / f"{name}_purified10.jsonl")
    measurement(tmp_path, {0: "0", 1: "0"})
    for name in ("results", "outcomes"):
        (tmp_path / f"{name}_purified.jsonl").rename(tmp_path / f"{name}_purified9.jsonl")
    (tmp_path / "results_purified10_rows.jsonl").write_text("{}\n")
    line, outcomes = measured(tmp_path)
    assert line == {"temperature": 0.2, "n": 1} and [one["exact"] for one in outcomes] == [True]


def test_against_base_by_hand():
    """Canary by canary: +1, +2, +3 bits, mean 2, sd 1, t(0.975, 2) = 4.3027: ± 2.484."""
    rows = []
    for arm, bits in (("dp", (2.0, 4.0, 6.0)), ("base", (1.0, 2.0, 3.0))):
        rows += [
            {"source": "model", "arm": arm, "kind": "ladder", "repetitions": 8, "id": id, "exposure": value}
            for id, value in enumerate(bits)
        ]
        rows.append({"source": "model", "arm": arm, "kind": "audit", "repetitions": 1, "id": 9, "audit_signal": 1.0})
        rows.append({"source": "text", "arm": arm, "kind": "ladder", "repetitions": 8, "id": 0, "2-gram": 1.0})
    (found,) = reviews.against_base(rows)
    assert (found["arm"], found["kind"], found["repetitions"], found["n_canaries"]) == ("dp", "ladder", 8, 3)
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.4841, abs=1e-4) == 2 - found["low"]
