"""What the page opens with, and how its figures and first tables are drawn: on the trees of test_plot_results.py."""

import html
import itertools
import re

import browser
import matplotlib
import pytest
from matplotlib.figure import Figure as Canvas
from test_plot_results import (
    HAS_BROWSER,
    RUN,
    audit_record,
    extraction_line,
    mia_line,
    put,
    quickstart_tree,
    report,
    run_folder,
    scores,
    small_tree,
    synthetic_tree,
    titles,
)

from reporting import figures, load, svg
from reporting.style import Look

BASELINE = {"exact": {"A": {"gained": 7, "lost": 2, "p": 0.18}, "B": {"gained": 4, "lost": 1, "p": 0.375}}}


def words(page: str, start: str, end: str) -> str:
    """The text between two marks of a page, without tags."""
    part = page[page.index(start) : page.index(end)]
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", part)).split())


def drawn(tree) -> dict[str, svg.Figure]:
    return {figure.name: figure for figure in figures.build(load.read([tree]))}


def axes_of(panel: svg.Panel):
    with matplotlib.rc_context(svg.SETTINGS):
        axes = Canvas(figsize=panel.size, layout="constrained").subplots()
        svg.fill(axes, panel)
    return axes


def canary_tree(root):
    """synthetic_tree with the models of its canaries, the rows of single canaries and a second model of one seed."""
    synthetic_tree(root)
    for arm in ("no_dp", "with_dp"):
        run_folder(root / "u", f"{arm}-seed1")
        put(root / "u" / f"tiny/{arm}-seed1-lora/0e+00_2e-06/checkpoint-10/adapter_config.json", {"r": 1})
    singles = []
    for arm in ("no_dp", "with_dp"):
        own = {"arm": arm, "source": "model"}
        for times, bits in ((0, 0.5), (0, 1.5), (4, 3.5), (4, 3.7), (4, 9.9)):
            kind = "ladder" if times else "held_out"
            singles.append(own | {"kind": kind, "repetitions": times, "exposure": bits})
        for i in range(20):
            coin = {"kind": "audit", "repetitions": i % 2, "included": bool(i % 2)}
            singles.append(own | coin | {"audit_signal": float(i)})
    put(root / "canary" / "results_canary_rows.jsonl", *singles)
    named = [
        f"{arm}={root}/tiny/{folder}-lora/0e+00_2e-06/checkpoint-20"
        for arm, folder in (("no_dp", "synthetic-no_dp"), ("with_dp", "synthetic-dp"))
    ]
    put(root / "canary" / "run_canary.json", RUN | {"args": {"models": named}})
    utility = root / "utility" / "results_utility.jsonl"
    utility.write_text(utility.read_text().replace('"arm": "dp"', '"arm": "with_dp"'))
    return root


def test_the_page_opens_with_one_sentence_per_question(tmp_path):
    """Number, interval and control of each; the picture, the cautions and the tables follow in this order."""
    page = report(small_tree(tmp_path / "tree"), "--output", tmp_path / "out")[2]
    places = [page.index(mark) for mark in ('id="answers"', 'id="fig-overview"', 'id="cautions"', 'id="glance"')]
    assert places == sorted(places) and page.index('id="glance"') < page.index('id="extraction"')
    said = words(page, '<dl class="answers">', "</dl>")
    assert "Does it leak? Exact addresses (enron.jsonl, rows 0–99, temperature 0.2):" in said
    assert "original 15.0% (10.0%–21.0%); control:" in said
    assert "base 7.5% (10.0%–21.0%), name rule without a model 12.0% (" in said
    assert "AUC of attack ref (enron.jsonl): original 0.625 (0.595–0.655); control: chance 0.5, furthest" in said
    assert "furthest blind baseline 0.61 (0.55–0.66)" in said
    assert "Which ε holds? Not measured." in said
    assert "lower is better (enron.jsonl, rows 0–99): original 6.5 (5.5–7.5); control: base 9.5 (8.5–10.5)." in said


def test_the_answers_of_a_study_of_synthetic_text(tmp_path):
    page = report(canary_tree(tmp_path / "tree"), "--output", tmp_path / "out")[2]
    said = words(page, '<dl class="answers">', "</dl>")
    assert "Median exposure of canaries placed 16× in bits (quartiles): no_dp 9 (6.3–10.8), with_dp 3.4" in said
    assert "control: held out, no_dp 1 (0.7–1.2), chance 1." in said
    assert "ε proven by the PRV accountant: no_dp none (no noise: ε is infinite)" in said
    assert "with_dp ≤ 8.00 (δ 1e-05)" in said
    assert "no_dp ≥ 3.25 (one-sided 95 %)" in said
    assert "Accuracy on real rows after training on each (range over seeds): no_dp 0.76 (0.75–0.76)" in said
    assert "real rows 0.78 (0.77–0.78)" in said and "majority class 0.63 (0.58–0.68)" in said


def test_beside_an_audit_only_what_its_verdict_leaves_open(tmp_path):
    put(tmp_path / "tree/audit.json", audit_record())
    page = report(tmp_path / "tree", "--output", tmp_path / "out")[2]
    said = words(page, '<dl class="answers">', "</dl>")
    assert said.count("Not measured.") == 2 and "Does it leak" not in said
    assert page.index('id="verdict"') < page.index('id="answers"') < page.index('id="cautions"')


def test_paired_differences_and_the_floor_are_in_the_first_table(tmp_path):
    tree = small_tree(tmp_path / "tree")
    checkpoint = tree / "tiny/original-lora/0e+00_2e-06/checkpoint-20"
    line = extraction_line(checkpoint, baseline={"path": "base/results_purified.jsonl", **BASELINE})
    put(checkpoint / "results_purified.jsonl", line)
    page = report(tree, "--output", tmp_path / "out")[2]
    table = words(page, 'id="glance"', 'id="extraction"')
    assert "Gained, lost against base" in table
    assert "+11 −3 McNemar p: A 0.18, B 0.38" in table  # 7 + 4 gained, 2 + 1 lost
    assert "no model: name rule 12.0%" in table


def test_paired_differences_of_the_studies_are_in_the_first_table(tmp_path):
    root = tmp_path / "tree"
    run = run_folder(root, "enron", peft="lora-dp-eps8")
    put(run / "checkpoint-20" / "results_purified.jsonl", extraction_line(run / "checkpoint-20"))
    put(root / "run_quickstart.json", RUN)
    change = {"points": 2.5, "low": -0.75, "high": 5.75, "n": 20}
    put(root / "summary.json", {"against_base": {"ε = 8": {"trained": change}}}, indent=1)
    put(root / "foreign" / "summary.json", {"against_base": 7})  # of another program: no run_quickstart.json beside it
    status, _, page = report(root, "--output", tmp_path / "out")
    assert status == 0
    table = words(page, 'id="glance"', 'id="extraction"')
    assert "Exact, change in points paired with the base: trained" in table.replace(" ↕", "")
    assert "+2.5 -0.8–+5.8 n 20" in table
    tree = canary_tree(tmp_path / "reviews")
    put(tree / "run_quickstart.json", RUN)
    line = {
        "arm": "no_dp",
        "kind": "ladder",
        "repetitions": 16,
        "mean": 1.25,
        "low": 0.5,
        "high": 2.0,
        "n_canaries": 10,
    }
    put(tree / "summary.json", {"against_base": [line]}, indent=1)
    page = report(tree, "--output", tmp_path / "more")[2]
    table = words(page, 'id="glance"', 'id="privacy"')
    assert "Exposure − base bits, 16×, paired" in table and "+1.25 +0.50–+2.00 n 10" in table


def test_a_study_of_synthetic_text_fills_the_first_table(tmp_path):
    page = report(canary_tree(tmp_path / "tree"), "--output", tmp_path / "out")[2]
    table = words(page, 'id="glance"', 'id="privacy"')
    for head in ("ε ≤ PRV", "ε ≥ 95 %, Steinke", "Exposure bits, 16×", "Exposure bits, held out", "MAUVE", "Accuracy"):
        assert head in table
    lines = re.findall("<tr.*?</tr>", page[page.index('id="glance"') :], re.S)
    first, second = [one for one in lines if ">with_dp<" in one][:2]
    line, other = (" ".join(html.unescape(re.sub("<[^>]+>", " ", one)).split()) for one in (first, second))
    assert line.startswith("with_dp 8.00") and "2.50" in line and "3.4 2.38–4.08 n 10" in line
    assert other.startswith("with_dp 0.62 0.61–0.62 n 2") and "+3 −9 McNemar p 0.15" in other


def test_one_colour_per_arm_whatever_a_file_calls_it(tmp_path):
    study = load.read([canary_tree(tmp_path / "tree")])
    assert study.same == {
        "synthetic-no_dp": "no_dp",
        "synthetic-dp": "with_dp",
        "no_dp-seed1": "no_dp",
        "with_dp-seed1": "with_dp",
    }
    look = Look(study)
    assert look.of["synthetic-dp"] == look.of["with_dp"] == look.of["with_dp-seed1"] != look.of["no_dp"]
    assert look.colour("no_dp") == look.colour("synthetic-no_dp") and look.colour("base") == svg.BASE
    exposure = axes_of(drawn(tmp_path / "tree")["exposure"].panels[0])
    assert {look.colour("no_dp"), look.colour("with_dp")} <= {line.get_color() for line in exposure.get_lines()}


def test_the_legend_of_a_roc_has_each_auc_and_attacks_first(tmp_path):
    tree = small_tree(tmp_path / "tree")
    axes = axes_of(drawn(tree)["mia_roc"].panels[0])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["ref 0.625 (0.595–0.655)", "loss 0.51 (0.48–0.54)", "blind: bow 0.61 (0.55–0.66)"]
    page = report(tree, "--output", tmp_path / "out")[2]
    roles = re.findall(r'data-label="Of">(\w+)<', page[page.index('id="mia"') : page.index('id="training"')])
    per_file = [roles[: len(roles) // 2][i] for i in range(5)]
    assert per_file.index("blind") > max(i for i, role in enumerate(per_file) if role == "target")


def test_exposures_by_how_often_a_canary_was_placed(tmp_path):
    """Bars are shares of the row's canaries: of three placed 4×, two lie between 3 and 4 bits, one in the last bin."""
    figure = drawn(canary_tree(tmp_path / "tree"))["exposure_histogram"]
    assert [panel.title for panel in figure.panels] == ["no_dp", "with_dp"]
    axes = axes_of(figure.panels[0])
    heights = {(int(bar.get_x() + 0.5), bar.get_y()): bar.get_height() for bar in axes.patches}
    assert heights[3, 1.0] == pytest.approx(0.85 * 2 / 3) and heights[9, 1.0] == pytest.approx(0.85 / 3)
    assert heights[0, 0.0] == heights[1, 0.0] == pytest.approx(0.85 / 2)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["held out\nn 2", "4×\nn 3"]


def test_roc_of_canaries_placed_once(tmp_path):
    figure = drawn(canary_tree(tmp_path / "tree"))["canary_roc"]
    axes = axes_of(figure.panels[0])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["no_dp 0.7", "with_dp 0.7"]
    damaged = tmp_path / "tree/canary/results_canary_rows.jsonl"
    damaged.write_text(damaged.read_text() + '{"arm": 3}\n')
    study = load.read([tmp_path / "tree"])
    names = {one.name for one in figures.build(study)}
    assert "canary_roc" not in names and {one.file for one in study.damage} == {"canary/results_canary_rows.jsonl"}


def test_epsilon_against_utility(tmp_path):
    figure = drawn(canary_tree(tmp_path / "tree"))["epsilon_utility"]
    axes = axes_of(figure.panels[0])
    assert "∞" in [text.get_text() for text in axes.get_xticklabels()]  # no_dp, trained without noise
    single = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    points = {(round(line.get_xdata()[0], 2), line.get_marker()) for line in single}
    assert {(2.5, "^"), (2.0, "o"), (3.25, "^")} <= points  # with_dp: shown and proven; no_dp: shown
    assert "with_dp: accuracy 0.62 (0.61–0.62)" in figure.summary


def test_whiskers_lie_in_the_middle_of_their_bar(tmp_path):
    axes = axes_of(drawn(small_tree(tmp_path / "tree"))["extraction_bars"].panels[0])
    middles = sorted(bar.get_y() + bar.get_height() / 2 for bar in axes.patches)
    whiskers = sorted(path.vertices[0][1] for one in axes.collections for path in one.get_paths())
    assert whiskers == pytest.approx(middles) and len(set(middles)) == len(middles) == 4
    ends = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches)
    assert all(low >= high for (_, high), (low, _) in itertools.pairwise(ends))  # no bar covers another


@pytest.mark.parametrize("name", ["epsilon", "canary_counts", "exposure"])
def test_nothing_is_cut_off_at_zero(tmp_path, name):
    tree = canary_tree(tmp_path / "tree")
    lines = (tree / "canary/results_canary.jsonl").read_text()
    (tree / "canary/results_canary.jsonl").write_text(lines.replace('"95": 2.5', '"95": 0.0'))
    for panel in drawn(tree)[name].panels:
        axes = axes_of(panel)
        low, high = axes.get_ylim() if name == "exposure" else axes.get_xlim()
        assert -0.2 * high < low <= -0.03 * high


def test_lines_are_named_where_they_end(tmp_path):
    figure = drawn(quickstart_tree(tmp_path / "tree"))
    for name in ("extraction_epoch", "perplexity", "training"):
        texts = [text.get_text() for text in axes_of(figure[name].panels[0]).texts]
        assert {"original", "generated", "replaced"} <= set(texts), name
    points = [text.get_text() for text in axes_of(figure["privacy_utility"].panels[0]).texts]
    assert "base" in points and "original · epoch 2" in points


def test_an_attack_that_does_not_apply_drops_no_row(tmp_path):
    """Also if its line is the first of the file, which the blind baselines are read from."""
    tree = small_tree(tmp_path / "tree")
    checkpoint = tree / "tiny/original-lora/0e+00_2e-06/checkpoint-20"
    none = {"auc": None, "auc_ci": None, "tpr_at_fpr": {}, "points": {}, "undefined": "no token has a low entropy"}
    surp = mia_line(checkpoint, "surp", 0.5, n_scored=0, n_dropped=400) | none
    put(checkpoint / "results_mia.jsonl", surp, mia_line(checkpoint))
    assert "Rows were dropped" not in titles(tree)
    put(checkpoint / "results_mia.jsonl", mia_line(checkpoint, n_scored=393, n_dropped=7))
    assert "7 of 400" in titles(tree)


@HAS_BROWSER
@pytest.mark.parametrize("tree", [quickstart_tree, canary_tree])
def test_the_first_screen_has_every_answer(tmp_path, tree):
    report(tree(tmp_path / "tree"), "--output", tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    for width, height in ((1280, 900), (390, 844)):
        with browser.Browser(width, height) as screen:
            screen.open(page)
            parts = "Array.from(document.querySelectorAll('.answers dt, .answers dd'), {})"
            bottoms = screen.run(parts.format("e => e.getBoundingClientRect().bottom"))
            assert len(bottoms) >= 8 and max(bottoms) <= height
            assert screen.run("document.documentElement.scrollWidth") == width
            assert screen.errors == []


@HAS_BROWSER
def test_no_figure_leaves_its_right_half_empty(tmp_path):
    """In every figure at 1280 pixels, a panel reaches into the last fifth of its box."""
    put(tmp_path / "tree/results_mia.jsonl", mia_line("models/a"))
    scores(tmp_path / "tree/scores_mia.jsonl")
    canary_tree(tmp_path / "tree/c")
    quickstart_tree(tmp_path / "tree/q")
    report(tmp_path / "tree", "--output", tmp_path / "out")
    with browser.Browser(1280, 900) as desk:
        desk.open(tmp_path / "out" / "report.html")
        right = "Math.max(...Array.from(f.querySelectorAll('.panel svg'), s => s.getBoundingClientRect().right))"
        share = f"(box => ({right} - box.left) / box.width)(f.getBoundingClientRect())"
        every = "Object.fromEntries(Array.from(document.querySelectorAll('figure'), f => [f.id, {}]))"
        reach = desk.run(every.format(share))
    assert {name: share for name, share in reach.items() if share < 0.78} == {}
