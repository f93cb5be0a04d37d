"""The report says what the records say, whatever they hold, and looks right in a real browser."""

import ast
import functools
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import pytest

from assay.bench import wording
from assay.bench.comparison import Comparison, Settings, seconds_factor
from assay.bench.report import command, html_report, python_call

ENVIRONMENT = {
    "versions": {"assay": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
    "machine": {"system": "Linux", "processor": "A processor", "cores": 8},
}


def made(
    effects,
    *,
    trials=5,
    seeds=5,
    metric="accuracy",
    direction="max",
    task="digits",
    equal_seconds=True,
    baseline="adamw",
    level=0.96,
):
    """A comparison from hand-made records: ``effects`` has for each method its true gain and time ratio."""
    arms = [baseline, *effects]
    budget = {"steps": 300, "batch_size": 64, "evaluations": 10}
    settings = Settings(
        task, task, "500 images to train on", metric, direction, baseline, arms, trials, seeds, budget, "final",
        equal_seconds, "cpu", ENVIRONMENT, "0.1.0+0123456789",
    )  # fmt: skip
    draw = random.Random(7)
    sign = 1 if direction == "max" else -1
    records = []

    def run(arm, phase, trial, seed, shift, ratio, steps=300):
        final = level + sign * (shift + draw.gauss(0, 0.003))
        curve = [
            {
                "examples": 64 * steps * k // 10,
                "step": steps * k // 10,
                "seconds": 2.5 * ratio * steps / 300 * k / 10,
                "validation": final - sign * 0.5 * math.exp(-0.7 * k) + draw.gauss(0, 0.002),
            }
            for k in range(1, 11)
        ]
        family = arm.partition("(")[0]
        records.append(
            {
                "protocol": 1,
                "code": settings.code,
                "task": task,
                "base": baseline,
                "arm": arm,
                "phase": phase,
                "trial": trial,
                "seed": seed,
                "options": {f"{family}.lr": 0.001 * (trial + 1), f"{family}.weight_decay": 0.01},
                "budget": budget,
                "device": "cpu",
                "status": "finished",
                "steps": steps,
                "examples": 64 * steps,
                "seconds": 2.5 * ratio * steps / 300 * draw.uniform(0.97, 1.03),
                "preparation": 0.1,
                "curve": curve,
                "validation": curve[-1]["validation"],
                "test": None if phase == "tune" else final - sign * 0.01,
                "optimizer_bytes": 80_000,
                "parameters": 10_000,
                "fingerprint": f"{arm}{trial}{seed}",
                "peak_memory": round(26e6 * (0.8 + 0.3 * ratio)),
                "started": 1_795_249_543,
                **ENVIRONMENT,
            }
        )

    for arm, (shift, ratio) in {baseline: (0.0, 1.0), **effects}.items():
        for trial in range(trials):
            run(arm, "tune", trial, 1, shift - 0.004 * draw.random() * trial, ratio)
        for seed in settings.report_seeds:
            run(arm, "report", 0, seed, shift, ratio)
    comparison = Comparison(settings, records)
    for arm in arms[1:] if equal_seconds else []:
        shift, ratio = effects[arm]
        factor = seconds_factor(comparison, arm)
        for seed in settings.report_seeds if factor != 1.0 else []:
            run(arm, "seconds", 0, seed, shift - 0.01 * math.log(ratio), ratio, round(300 * factor))
    return comparison


def fail(comparison, arm, phase, status="diverged", message="", places=None, curve=3):
    """Turn runs of an arm (those at ``places``, or all) into failed ones, as the bench records them."""
    chosen = comparison.of(arm, phase)
    for place, record in enumerate(chosen):
        if places is not None and place not in places:
            continue
        record.update(status=status, test=None, validation=None)
        if status == "diverged":
            record["curve"] = record["curve"][:curve]
            continue
        record["message"] = message
        for name in (
            "curve",
            "steps",
            "examples",
            "seconds",
            "preparation",
            "optimizer_bytes",
            "parameters",
            "fingerprint",
        ):
            record.pop(name, None)


def zoo():
    """One comparison with every kind of outcome."""
    found = made(
        {
            "adamp": (0.012, 1.12),
            "adamp(delta=0.05)+ps-kd": (0.003, 1.35),
            "refined-schedule": (0.0, 1.0),
            "adadagrad": (-0.02, 0.9),
            "batch-group-norm": (0.006, 2.1),
            "grand-el2n": (-0.001, 1.4),
            "sgd": (0.001, 0.95),
        }
    )
    fail(found, "adadagrad", "tune", places=[3, 4])
    fail(found, "adadagrad", "report", places=[1])
    fail(found, "sgd", "tune", "error", "ValueError: lr = -1 is out of range: > 0")
    found.records = [r for r in found.records if not (r["arm"] == "sgd" and r["phase"] != "tune")]
    fail(
        found, "grand-el2n", "report", "out of memory", "[enforce fail at alloc_cpu.cpp:121] data. " * 12, places=[0, 3]
    )
    copy_of_baseline(found, "refined-schedule")
    found.damaged = 2
    return found


def copy_of_baseline(comparison, arm):
    base = comparison.settings.baseline
    for phase in ("tune", "report"):
        for mine, theirs in zip(comparison.of(arm, phase), comparison.of(base, phase), strict=True):
            mine.update({name: theirs[name] for name in ("test", "validation", "curve", "fingerprint", "seconds")})


class Page(HTMLParser):
    """A page's tags with their attributes, and its text outside of style sheets; refuses tags that do not match."""

    EMPTY = frozenset({"meta", "br", "wbr", "use", "path"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def only_baseline():
    return made({})


def two_seeds():
    return made({"adamp": (0.02, 1.2)}, seeds=2)


def defaults_only():
    return made({"adamp": (0.02, 1.2), "sgd": (0.0, 1.0)}, trials=0)


def lower_is_better():
    return made(
        {"adamp": (0.05, 1.2), "sgd": (-0.08, 0.8)}, metric="bits per byte", direction="min", task="text", level=2.5
    )


def equal_examples_only():
    return made({"adamp": (0.02, 1.2)}, equal_seconds=False)


def all_runs_failed():
    found = made({"adamp": (0.02, 1.2), "sgd": (0.0, 1.0)})
    fail(found, "adamp", "report", "out of memory", "no room")
    found.records = [r for r in found.records if (r["arm"], r["phase"]) != ("adamp", "seconds")]
    return found


def baseline_failed():
    found = made({"adamp": (0.02, 1.2)})
    fail(found, "adamw", "report", "error", "ValueError: it broke")
    return found


def everything_failed():
    found = made({"adamp": (0.02, 1.2)})
    for arm in found.settings.arms:
        fail(found, arm, "tune", curve=0)
    found.records = [r for r in found.records if r["phase"] == "tune"]
    return found


def stopped_while_tuning():
    found = made({"adamp": (0.02, 1.2), "sgd": (0.0, 1.0)})
    found.records, found.interrupted = [r for r in found.records if r["phase"] == "tune" and r["trial"] < 2], True
    return found


def stopped_while_reporting():
    found = made({"adamp": (0.02, 1.2), "sgd": (0.0, 1.0)})
    found.records = [r for r in found.records if r["phase"] == "tune" or (r["phase"] == "report" and r["seed"] < 102)]
    return found


def nothing_yet():
    found = made({"adamp": (0.02, 1.2)})
    found.records, found.interrupted = [], True
    return found


def nothing_known():
    found = made({"adamp": (0.02, 1.2), "sgd": (0.0, 0.5)})
    for record in found.records:
        record.update(peak_memory=None, optimizer_bytes=None, parameters=None, preparation=None, machine=None)
        record["curve"] = [{**point, "validation": None} for point in record["curve"]]
    return found


def nothing_timed():
    found = made({"adamp": (0.02, 1.2)})
    for record in found.records:
        record.update(seconds=None, started=None, versions={}, curve=[])
    return found


def fourteen_methods():
    return made({f"method-{i}(width={i})+another-one": (0.004 * (i - 7), 0.5 * 1.3**i) for i in range(14)}, trials=3)


def far_off():
    found = made({"adamp": (0.01, 1.0), "sgd": (-1e30, 1.2), "adadagrad": (0.0, 1.0)})
    return found


def evaluated_once():
    found = made({"adamp": (0.02, 1.2)})
    for record in found.records:
        record["curve"] = record["curve"][-1:]
    return found


SITUATIONS = [
    zoo, only_baseline, two_seeds, defaults_only, lower_is_better, equal_examples_only, all_runs_failed, baseline_failed,
    everything_failed, stopped_while_tuning, stopped_while_reporting, nothing_yet, nothing_known, nothing_timed,
    fourteen_methods, far_off, evaluated_once,
]  # fmt: skip


@functools.cache
def report_of(situation):
    return html_report(situation())


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
class TestEverySituation:
    def test_report_is_whole(self, situation):
        comparison = situation()
        page = Page(report_of(situation))
        assert " ".join(wording.answer(comparison).split()) in page.text
        assert page.count("tr") == 2 + len(comparison.settings.arms)
        assert page.count("table") == 1
        assert not re.search(r"\b(None|nan|inf|Undefined)\b", page.text)
        assert all(arm in page.text.replace(" ", "") for arm in comparison.settings.arms)
        for section in ("How it was measured", "Settings", "Repeat it", "assay compare"):
            assert section in page.text

    def test_report_loads_nothing(self, situation):
        html = report_of(situation)
        page = Page(html)
        loaders = {"script", "link", "img", "image", "iframe", "object", "embed", "base", "audio", "video", "source"}
        assert not loaders & {tag for tag, _ in page.tags}
        for _, attributes in page.tags:
            assert not {"src", "srcset", "data", "action", "poster", "background"} & attributes.keys()
            assert not [name for name in attributes if name.startswith("on")]
            assert (attributes.get("href") or "#").startswith("#")
        assert "@import" not in html and "http://" not in html and "https://" not in html
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", html))

    def test_plots_have_titles_and_ids_of_their_own(self, situation):
        page = Page(report_of(situation))
        plots = [attributes for tag, attributes in page.tags if tag == "svg"]
        assert page.count("desc") == len(plots)
        known = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
        for attributes in plots:
            assert attributes["role"] == "img"
            assert set(attributes["aria-labelledby"].split()) <= known
        used = [a["href"][1:] for _, a in page.tags if "href" in a]
        assert set(used) <= known
        assert len({a["aria-labelledby"] for a in plots}) == len(plots)

    def test_same_records_make_the_same_report(self, situation):
        assert html_report(situation()) == report_of(situation)


ANSWERS = {
    only_baseline: "Only the baseline, adamw, was measured on digits.",
    two_seeds: "Two seeds cannot tell adamp from the tuned adamw on digits.",
    lower_is_better: "Of 2 methods, 1 (adamp) is better than the tuned adamw on text and 1 (sgd) is worse.",
    baseline_failed: "The baseline, adamw, finished no run on digits, so nothing can be compared.",
    everything_failed: "The baseline, adamw, finished no run on digits, so nothing can be compared.",
    stopped_while_tuning: "So far: The baseline, adamw, has not been measured yet on digits, so nothing can be compared.",
    stopped_while_reporting: "So far: The seeds cannot tell any of 2 methods from the tuned adamw on digits.",
    all_runs_failed: "Of 2 methods, 1 (adamp) is worse than the tuned adamw on digits and for 1 of them five seeds cannot tell.",
}


@pytest.mark.parametrize("situation", ANSWERS, ids=lambda situation: situation.__name__)
def test_answer(situation):
    assert wording.answer(situation()) == ANSWERS[situation]


def test_answer_counts_all_outcomes():
    assert wording.answer(zoo()) == (
        "Of 7 methods, 2 (adamp, batch-group-norm) are better than the tuned adamw on digits, 1 (adadagrad) is worse, "
        "for 2 of them five seeds cannot tell, 1 (refined-schedule) had no effect, and 1 (sgd) finished no run."
    )


@pytest.mark.parametrize(
    ("shift", "answer"),
    [
        (0.05, "adamp is better than the untuned adamw on digits."),
        (-0.05, "adamp is worse than the untuned adamw on digits."),
        (0.0, "Five seeds cannot tell adamp from the untuned adamw on digits."),
    ],
)
def test_answer_about_one_method(shift, answer):
    assert wording.answer(made({"adamp": (shift, 1.0)}, trials=0)) == answer


def test_answer_at_equal_seconds():
    assert wording.answer_at_equal_seconds(zoo()) == (
        "At equal seconds, 1 (adamp) is better, 1 (adadagrad) is worse, and for 3 of them five seeds cannot tell."
    )
    assert wording.answer_at_equal_seconds(two_seeds()) == "At equal seconds, adamp is better."
    assert wording.answer_at_equal_seconds(stopped_while_reporting()) == (
        "At equal seconds, for 1 of them the seeds cannot tell and 1 (adamp) is not measured yet."
    )
    for situation in (only_baseline, equal_examples_only, everything_failed, nothing_yet):
        assert wording.answer_at_equal_seconds(situation()) == ""


def test_answer_where_all_agree():
    both = made({"adamp": (0.05, 1.0), "sgd": (0.05, 1.0)})
    assert wording.answer(both) == "Of 2 methods, both are better than the tuned adamw on digits."


def test_outcomes_and_flags():
    rows = {row["method"]: row for row in zoo().table}
    assert {arm: wording.outcome(row) for arm, row in rows.items()} == {
        "adamw": "baseline",
        "adamp": "better",
        "adamp(delta=0.05)+ps-kd": "cannot tell",
        "refined-schedule": "no effect",
        "adadagrad": "worse",
        "batch-group-norm": "better",
        "grand-el2n": "cannot tell",
        "sgd": "failed",
    }
    assert wording.flags(rows["adadagrad"]) == ["1 of 5 seeds failed", "2 trials failed"]
    assert wording.flags(rows["sgd"]) == ["every trial failed"]
    assert wording.flags(rows["refined-schedule"]) == ["no effect: the baseline's very weights"]
    assert wording.flags(rows["adamp"]) == []
    unfinished = stopped_while_reporting().table
    assert [wording.outcome(row, "_equal_seconds") for row in unfinished[1:]] == ["not measured", "cannot tell"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (wording.metric(0.5, 0.5, 0.5), "0.5000"),
        (wording.metric(1234567.0, 1234000.0, 1235134.0), "1\u202f234\u202f567 ± 567"),
        (wording.metric(0.0), "0.0000"),
        (wording.metric(-0.25, -0.35, -0.15), "−0.25 ± 0.10"),
        (wording.metric(1e30), "1e+30"),
        (wording.gain(-2e-12, -3e-12, -1e-12), "−2e−12 [−3e−12, −1e−12]"),
        (wording.gain(0.0, -1e-12, 1e-12), "0 [−1e−12, +1e−12]"),
        (wording.gain(None), "–"),
        (wording.gain(0.01, None, None), "+0.01000 [−∞, +∞]"),
        (wording.gain(-0.00001, -0.02, 0.02), "0.000 [−0.020, +0.020]"),
        (wording.gain(0.004, 0.004, 0.004), "+0.004000"),
        (wording.ratio(None), "–"),
        (wording.bytes_(None), "–"),
        (wording.bytes_(0), "0 B"),
        (wording.bytes_(5 * 2**50), "5120 TiB"),
        (wording.seconds(None), "–"),
        (wording.seconds(9000), "2.5 h"),
        (wording.per_parameter(None, 10), "–"),
        (wording.per_parameter(80, 0), "–"),
        (wording.options({}), ""),
    ],
)
def test_numbers_in_words(given, said):
    assert given == said


def test_seeds_needed_only_where_they_would_settle_something():
    found = zoo()
    assert wording.seeds_needed(found, "adamp") is None  # settled
    assert wording.seeds_needed(found, "grand-el2n") is None  # failed runs: no interval
    assert wording.seeds_needed(found, "refined-schedule") is None  # no difference at all
    assert wording.seeds_needed(found, "grand-el2n", "seconds") > 5


HOSTILE = "<script>alert('x')</script><b id=\"y\">&amp;$\\alpha$ </style>"


def test_text_from_tasks_and_records_is_only_text():
    found = made(
        {HOSTILE: (0.02, 1.2), "Ω≈ç√ 漢字 $x^2$": (0.0, 1.0)}, task=HOSTILE, metric=HOSTILE, baseline="<i>base</i>"
    )
    object.__setattr__(found.settings, "about", HOSTILE)
    fail(found, HOSTILE, "tune", "error", f"ValueError: {HOSTILE}", places=[1])
    for record in found.of(HOSTILE, "report"):
        record["options"] = {f"x.{HOSTILE}": HOSTILE}
    html = html_report(found)
    page = Page(html)
    assert not {"script", "b", "i"} & ({tag for tag, _ in page.tags} - {"i"})
    assert page.count("style") == 1
    assert not [a for tag, a in page.tags if tag == "i" and "swatch" not in a["class"] and a["class"] != "x"]
    assert f"ValueError: {HOSTILE}" in page.text
    assert html.count("<script") == 0 and "漢字" in html


def test_a_name_in_a_plot_stays_what_it_is():
    name = 'f(id="a", href="#b", c="#010101 font: 3px x")'
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", html_report(made({name: (0.02, 1.2)})))
    assert any(unescape(text).startswith(name[:30]) for text in texts)


def test_words_in_plots_are_text_and_colours_are_the_pages():
    html = report_of(zoo)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 2 + 6 + 6 + 7 + 2
    joined = "".join(plots)
    assert "<text" in joined and "font: " not in joined and "font-family" not in joined
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", joined)
    assert {"--method", "--baseline", "--better", "--worse", "--muted"} <= set(re.findall(r"var\((--[a-z]+)\)", joined))


def test_verdicts_are_told_by_words_and_signs_not_by_colour_alone():
    html = report_of(zoo)
    for word, sign in (("better", "▲"), ("worse", "▼"), ("cannot tell", "○"), ("no effect", "="), ("failed", "✕")):
        assert re.search(rf'aria-hidden="true">{sign}</span> {word}', html)


def test_failures_stand_with_their_messages():
    text = Page(report_of(zoo)).text
    assert "adadagrad · diverged · tuning, trials 3, 4" in text
    assert "adadagrad · diverged · fresh seeds, seed 101" in text
    assert "grand-el2n · out of memory · fresh seeds, seeds 100, 103" in text
    assert "sgd · error · tuning, trials 0, 1, 2, 3, 4" in text
    assert "ValueError: lr = -1 is out of range: > 0" in text
    assert "refined-schedule had no effect" in text
    assert "2 lines of the records could not be read and were left out." in text
    assert ">Failures<" not in report_of(two_seeds)


def test_what_was_not_done_is_said():
    assert "Nothing was tuned" in report_of(defaults_only)
    assert "Nothing was tuned" not in report_of(two_seeds)
    assert "lower is better" in report_of(lower_is_better)
    assert "Gain at equal seconds" not in report_of(equal_examples_only)
    text = Page(report_of(stopped_while_reporting)).text
    assert "Not complete. 15 of 15 tuning runs and 6 of 15 runs on fresh seeds are here." in text


def test_more_than_one_machine_is_said():
    found = two_seeds()
    assert "different machines" not in html_report(found)
    found.records[0]["machine"] = {"system": "Linux", "processor": "Another processor", "cores": 2}
    text = Page(html_report(found)).text
    assert "2 different machines" in text and "Another processor, 2 cores" in text


def test_times_of_a_busy_machine_are_called_rough():
    found = two_seeds()
    assert "Times are rough" not in html_report(found)
    for record in found.of("adamw", "report") + found.of("adamp", "report"):
        record["seconds"] *= 1 + record["seed"] % 2
    assert re.search(r"differed by a factor of (1\.9|2\.[01])", html_report(found))


@pytest.mark.parametrize("situation", [zoo, only_baseline, defaults_only, equal_examples_only])
def test_command_and_call_can_be_given_back(situation):
    import typer

    from assay.bench.protocol import compare
    from assay.cli import app

    comparison = situation()
    settings = comparison.settings
    call = ast.parse(python_call(comparison)).body[0].value
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    bound = inspect.signature(compare).bind(*map(ast.literal_eval, call.args), **arguments).arguments
    assert bound["task"] == settings.task and bound["seeds"] == settings.seeds and bound["trials"] == settings.trials
    assert bound["methods"] == (settings.arms[1:] or settings.arms)
    program, name, *words = shlex.split(command(comparison))
    assert (program, name) == ("assay", "compare")
    context = typer.main.get_command(app).commands["compare"].make_context("compare", words)
    assert context.params["methods"] == ",".join(bound["methods"])
    assert context.params["steps"] == bound["steps"] == settings.budget["steps"]
    assert context.params["equal_seconds"] == settings.equal_seconds


def test_a_task_of_the_users_own_is_not_called_by_its_title():
    comparison = made({"adamp": (0.02, 1.2)}, task="my own task")
    assert "--task FILE.py:NAME" in command(comparison)
    assert "the task itself" in html_report(comparison)


def test_report_needs_no_torch():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_report\n"
        "test_report.html_report(test_report.zoo()); assert 'torch' not in sys.modules"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_colours_can_be_read():
    css = report_of(two_seeds).partition("<style>")[2].partition("@media print")[0]
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in css.split("prefers-color-scheme: dark")
    )
    for colours in (light, {**light, **dark}):
        for ink, paper in (
            ("ink", "paper"), ("muted", "paper"), ("muted", "soft"), ("ink", "soft"), ("better", "better-soft"),
            ("worse", "worse-soft"), ("better", "paper"), ("worse", "paper"), ("worse", "soft"),
        ):  # fmt: skip
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for line in ("method", "baseline"):
            assert contrast(colours[line], colours["paper"]) >= 3


def contrast(one, other):
    """The contrast ratio of two colours as the accessibility guidelines define it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = shlex.split(
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --virtual-time-budget=5000"
)
MEASURE = """<script>addEventListener("load", () => {
  const box = document.querySelector(".scroll"), first = document.querySelector("tbody th");
  const rectangle = (e) => e.getBoundingClientRect();
  box.scrollLeft = 150;
  parent.postMessage(JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    table: [box.clientWidth, box.scrollWidth, box.scrollLeft], first: rectangle(first).left,
    rows: [...document.querySelectorAll("tbody tr")].map((row) => rectangle(row).height),
    plots: [...document.querySelectorAll("svg")].map((svg) => rectangle(svg).width),
    letters: Math.min(...[...document.querySelectorAll("svg text")].map(
      (text) => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)),
    family: getComputedStyle(document.querySelector("svg text")).fontFamily === getComputedStyle(document.body).fontFamily,
    inks: [".answer", "tbody th", "svg text"].map((s) => getComputedStyle(document.querySelector(s)).color),
    paper: getComputedStyle(document.body).backgroundColor,
    loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
  }), "*");
});</script></body>"""


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="no chromium found")
class TestInABrowser:
    """The page stands in a frame: a window of a headless browser cannot be as narrow as a phone."""

    @pytest.fixture
    def report(self):
        return report_of(zoo)

    def browse(self, folder, html, width, scheme, *arguments, height=900):
        (folder / "page.html").write_text(html, encoding="utf-8")
        (folder / "frame.html").write_text(
            "<!doctype html><title>nothing</title><style>body{margin:0}iframe{border:0;display:block}</style>"
            "<script>addEventListener('message', (event) => document.title = event.data)</script>"
            f"<iframe width={width} height={height} src=page.html></iframe>"
        )
        assert CHROMIUM, "no chromium found"
        done = subprocess.run(
            [
                CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(500, width)},{height}",
                f"--blink-settings=preferredColorScheme={ {'dark': 0, 'light': 1}[scheme] }", *arguments,
                (folder / "frame.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout

    def measure(self, folder, html, width, scheme):
        dom = self.browse(folder, html.replace("</body>", MEASURE), width, scheme, "--dump-dom")
        return json.loads(unescape(dom.partition("<title>")[2].partition("</title>")[0]))

    def picture(self, folder, html, width, scheme):
        from PIL import Image

        self.browse(folder, html, width, scheme, f"--screenshot={folder / 'picture.png'}")
        with Image.open(folder / "picture.png") as image:
            return image.convert("RGB").crop((0, 0, width, 900))

    def test_on_a_phone_only_the_table_scrolls_sideways(self, report, tmp_path):
        seen = self.measure(tmp_path, report, 390, "light")
        assert seen["width"] == 390
        assert seen["page"] <= 390
        shown, whole, scrolled = seen["table"]
        assert shown <= 390 < whole and scrolled == 150
        assert 0 <= seen["first"] <= 20, "the first column does not stay in sight"
        assert len(seen["rows"]) == 8 and min(seen["rows"]) > 20
        assert len(seen["plots"]) == 23 and 300 <= min(seen["plots"]) <= max(seen["plots"]) <= 390
        assert seen["letters"] >= 10
        assert seen["family"] and seen["loaded"] == []

    def test_on_a_desktop_the_table_fits_in_the_dark(self, report, tmp_path):
        seen = self.measure(tmp_path, report, 1280, "dark")
        assert seen["width"] == 1280
        assert seen["page"] <= 1280
        assert seen["table"][0] == seen["table"][1], "the table does not fit"
        assert min(seen["rows"]) > 20
        assert seen["paper"] == "rgb(20, 23, 27)"
        assert set(seen["inks"]) == {"rgb(231, 233, 236)"}

    def test_long_words_do_not_widen_a_phones_page(self, tmp_path):
        found = made({"x" * 300: (0.02, 1.2)}, task="t" * 200, metric="m" * 80)
        fail(found, "x" * 300, "tune", "error", "E" * 4000, places=[1])
        assert self.measure(tmp_path, html_report(found), 390, "light")["page"] <= 390

    @pytest.mark.parametrize("width", [1280, 390])
    def test_follows_the_readers_light_or_dark(self, report, tmp_path, width):
        light, dark = (self.picture(tmp_path, report, width, scheme) for scheme in ("light", "dark"))
        assert light.getpixel((3, 3)) == (255, 255, 255)
        assert dark.getpixel((3, 3)) == (20, 23, 27)
        for image, paper in ((light, 255), (dark, 23)):
            grey = image.convert("L").histogram()
            assert 0.01 < 1 - sum(grey[max(0, paper - 3) : paper + 4]) / sum(grey) < 0.5, "no text in sight"
