"""The command line as its --help says; every bad input gets one clear sentence and exit status 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from assay import catalogue
from assay.cli import app, main

HERE = Path(__file__).parent


def assay(*words, cwd=None):
    """Run the real command and return (status, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "assay.cli", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def said(monkeypatch, capsys, *words):
    """The same without a new process, for what fails before any work."""
    monkeypatch.setattr(sys, "argv", ["assay", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", ["list", "show", "run", "compare", "report"])
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_list_is_one_line_per_method_and_filters():
    status, out, _ = assay("list")
    assert status == 0
    assert [line.split("\t")[0] for line in out.splitlines()] == [card.id for card in catalogue.cards()]
    assert assay("list", "*adam*", "--family", "optim")[1].startswith("adamp\toptim\tupdate\t")


def test_show_renders_the_card():
    status, out, _ = assay("show", "adamp")
    assert status == 0
    assert "2006.08217" in out and "What it does" in out


TASK = f"{HERE}/my_task.py:task"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "nothing-like-this"], "no method matches 'nothing-like-this'"),
        (["show", "adampp"], "unknown method 'adampp'. Did you mean adamp"),
        (["run", "adampp"], "unknown method 'adampp'. Did you mean adamp"),
        (["run", "adamp", "--record", "--quick"], "--quick cannot be recorded"),
        (["compare", "--methods", "adampp"], "unknown method 'adampp'. Did you mean adamp"),
        (["compare", "--methods", "adamp(lr=-1)"], "lr = -1 is out of range"),
        (["compare", "--methods", "adamp(speed=1)"], "adamp has no option 'speed'; allowed: lr, betas"),
        (["compare", "--methods", "adamp("], "cannot read 'adamp('"),
        (
            ["compare", "--methods", "adamp", "--task", "digit"],
            "unknown task (or FILE.py:NAME) 'digit'. Did you mean digits",
        ),
        (
            ["compare", "--methods", "adamp", "--task", "digits(model='rnn')"],
            "model = 'rnn' is out of range: one of cnn",
        ),
        (["compare", "--methods", "adamp", "--task", "nowhere.py:task"], "no task file 'nowhere.py'"),
        (["compare", "--methods", "adamp", "--task", f"{HERE}/my_task.py:tusk"], "has no 'tusk'"),
        (
            ["compare", "--methods", "adamp", "--task", f"{HERE}/my_task.py:torch"],
            "torch is a module, not an assay.Task",
        ),
        (["compare", "--methods", "adamp", "--seeds", "1"], "seeds = 1 is out of range: an integer >= 2"),
        (["compare", "--methods", "adamp", "--trials", "-1"], "trials = -1 is out of range"),
        (["compare", "--methods", "adamp", "--steps", "0", "--task", TASK], "steps = 0 is out of range"),
        (["compare", "--methods", "adamp", "--select", "luck"], "select = 'luck' is out of range: one of final, best"),
        (["compare", "--methods", "adamp", "--engine", "abacus"], "engine = 'abacus' is out of range"),
        (["report", "nowhere"], "nowhere holds no comparison"),
    ],
)
def test_bad_input_gets_one_sentence(monkeypatch, capsys, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    status, _, err = said(monkeypatch, capsys, *words)
    assert status == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nothing_like_this\n", "ModuleNotFoundError"),
        ("def task(:\n", "SyntaxError"),
        ("task = 3\n", "task is a int, not an assay.Task"),
        (
            "import my_task, dataclasses\ntask = lambda: dataclasses.replace(my_task.task, train=[])\n",
            "the train dataset is empty",
        ),
    ],
)
def test_an_unreadable_task_file_is_said(monkeypatch, capsys, tmp_path, source, sentence):
    (tmp_path / "t.py").write_text(source)
    (tmp_path / "my_task.py").write_text((HERE / "my_task.py").read_text())
    monkeypatch.chdir(tmp_path)
    status, _, err = said(monkeypatch, capsys, "compare", "--methods", "adamp", "--task", "t.py:task")
    assert status == 2
    assert sentence in err


def test_compare_and_report_on_the_users_own_task(tmp_path):
    out = tmp_path / "out"
    words = ["--task", TASK, "--methods", "adamp", "--trials", "2", "--seeds", "2", "--steps", "10", "--out", out]
    status, text, err = assay("compare", *words, "--json", out / "t.json", "--csv", out / "t.csv")
    assert status == 0, err
    assert "adamp" in text and "accuracy" in text
    assert err == "", "quiet where nobody watches"
    assert {path.name for path in out.iterdir()} == {"records.jsonl", "settings.json", "report.html", "t.json", "t.csv"}
    (out / "report.html").unlink()
    status, again, _ = assay("report", out)
    table = slice(0, 7)  # what follows names the files written
    assert (status, again.splitlines()[table]) == (0, text.splitlines()[table])
    assert (out / "report.html").exists()


def test_run_quick_prints_the_verdict_and_draws(tmp_path):
    status, out, err = assay("run", "adamp", "--quick", "--out", tmp_path)
    assert status == 0, err
    assert "verdict:" in out and "its verdict means nothing" in out
    assert (tmp_path / "adamp.png").stat().st_size > 5000


def test_a_task_that_cannot_be_trained_says_why(tmp_path):
    source = "import dataclasses, torch, my_task\n"
    source += "task = dataclasses.replace(my_task.task, model=lambda: torch.nn.Linear(5, 2))\n"
    source += "nan = dataclasses.replace(my_task.task, loss=lambda o, t: my_task.task.loss(o, t) * float('nan'))\n"
    (tmp_path / "bad.py").write_text(source)
    (tmp_path / "my_task.py").write_text((HERE / "my_task.py").read_text())
    for name, why in (("task", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"), ("nan", "diverged")):
        words = ["--methods", "adamp", "--trials", "2", "--seeds", "2", "--steps", "3", "--engine", "sequential"]
        status, out, err = assay("compare", "--task", f"{tmp_path}/bad.py:{name}", *words, "--out", tmp_path / name)
        assert status == 1 and f"adamp: {'error: ' if name == 'task' else ''}{why}" in out, out + err
        assert "no effect" not in out
