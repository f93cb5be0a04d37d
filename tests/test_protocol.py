"""The comparison's protocol: what is run, what is reused after a crash, what failures become."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import assay
from assay.bench import protocol
from assay.bench.arms import DEFAULT_RECIPE, resolve
from assay.bench.comparison import load
from assay.bench.memory import PeakMemory
from assay.bench.records import PROTOCOL, RecordError, Records, key
from assay.bench.space import draw, trial_options
from assay.bench.spec import parse_specs

from .my_task import task

HERE = Path(__file__).parent
FAST = {"trials": 3, "seeds": 3, "steps": 10, "engine": "sequential"}
CLOCKS = ("seconds", "time", "preparation", "peak", "equal_seconds", "steps_equal")


def deterministic(table):
    """The table without what a clock or a memory meter says."""
    return [{name: value for name, value in row.items() if not any(c in name for c in CLOCKS)} for row in table]


@pytest.fixture(scope="module")
def comparison():
    return assay.compare(task, "sgd, sgd(momentum=0.5)", **FAST)


class TestProtocol:
    def test_equal_tuning_for_all_and_trial_0_is_the_defaults(self, comparison):
        for arm in comparison.settings.arms:
            trials = comparison.of(arm, "tune")
            assert [record["trial"] for record in trials] == [0, 1, 2]
            assert {record["seed"] for record in trials} == {protocol.TUNING_SEED}
        assert comparison.of("adamw", "tune")[0]["options"] == {"adamw.lr": 1e-3, "adamw.weight_decay": 1e-2}

    def test_report_seeds_are_fresh_and_the_same_for_all(self, comparison):
        seeds = [[record["seed"] for record in comparison.of(arm, "report")] for arm in comparison.settings.arms]
        assert seeds == [[100, 101, 102]] * 3

    def test_selection_is_on_validation_and_tuning_never_sees_the_test_data(self, comparison):
        for arm in comparison.settings.arms:
            trials = comparison.of(arm, "tune")
            assert all(record["test"] is None for record in trials)
            best = max(range(3), key=lambda k: (trials[k]["validation"], -trials[k]["validation_loss"]))
            assert {record["trial"] for record in comparison.of(arm, "report")} == {best}

    def test_pinned_options_are_pinned_in_every_trial_and_tuned_ones_are_shared(self, comparison):
        pinned, plain = comparison.of("sgd(momentum=0.5)", "tune"), comparison.of("sgd", "tune")
        assert [r["options"] for r in pinned] == [r["options"] for r in plain]
        assert [r["fingerprint"] for r in pinned] != [r["fingerprint"] for r in plain]

    def test_equal_seconds_are_measured_where_the_speeds_differ(self, comparison):
        for arm in comparison.settings.arms[1:]:
            from assay.bench.comparison import seconds_factor

            runs = comparison.of(arm, "seconds")
            assert len(runs) == (0 if seconds_factor(comparison, arm) == 1.0 else 3)

    def test_every_record_says_where_it_was_made(self, comparison):
        for record in comparison.records:
            assert record["protocol"] == PROTOCOL
            assert {"versions", "machine", "seconds", "peak_memory", "optimizer_bytes", "options"} <= record.keys()
            json.dumps(record, allow_nan=False)

    def test_table_is_pandas_ready(self, comparison):
        frame = comparison.to_pandas()
        assert list(frame["method"]) == ["adamw", "sgd", "sgd(momentum=0.5)"]

    def test_csv_and_json_hold_the_table(self, comparison, tmp_path):
        import pandas

        csv = pandas.read_csv(comparison.save(tmp_path / "t.csv"))
        assert list(csv["method"]) == comparison.settings.arms
        said = json.loads(comparison.save(tmp_path / "t.json").read_text())
        assert said["table"] == json.loads(json.dumps(comparison.table))
        with pytest.raises(ValueError, match=r"path = .* is out of range"):
            comparison.save(tmp_path / "t.txt")

    def test_local_processes_give_the_same_as_one_process(self, comparison):
        parallel = assay.compare("digits(model='mlp')", "sgd", trials=2, seeds=2, steps=5, jobs=2)
        alone = assay.compare("digits(model='mlp')", "sgd", trials=2, seeds=2, steps=5, engine="sequential")
        assert deterministic(parallel.table) == deterministic(alone.table)


def test_a_dask_cluster_gives_the_same_as_one_process():
    pytest.importorskip("distributed")
    asked = {"task": "digits(model='mlp')", "methods": "sgd", "trials": 0, "seeds": 2, "steps": 5}
    clustered, alone = (assay.compare(**asked, jobs=2, engine=engine) for engine in ("dask", "sequential"))
    assert deterministic(clustered.table) == deterministic(alone.table)


def test_an_engine_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'assay-ml\[ray\]'"):
        assay.compare(task, "sgd", engine="ray", trials=0, seeds=2, steps=5)


def test_a_method_without_effect_says_so():
    result = assay.compare(task, "adamw(betas=(0.9, 0.999))", **FAST)
    assert result.table[1]["no_effect"]
    assert result.table[1]["verdict"] == result.table[1]["verdict_equal_seconds"] == "cannot tell"
    assert not result.of(result.settings.arms[1], "seconds")


def test_a_method_that_cannot_be_applied_has_failed_and_is_not_worse():
    result = assay.compare(replace(task, classes=None), "ps-kd", trials=0, seeds=2, steps=5, engine="sequential")
    assert result.table[1]["verdict"] == "failed"
    assert "ps-kd needs a classification task" in result.table[1]["failure"]


def test_defaults_only():
    result = assay.compare(task, "sgd", trials=0, seeds=2, steps=5, engine="sequential", equal_seconds=False)
    assert {record["phase"] for record in result.records} == {"report"}


def test_a_method_can_be_the_baseline_and_others_stand_on_it():
    result = assay.compare(task, "adamw", baseline="sgd", trials=0, seeds=2, steps=5, engine="sequential")
    assert result.settings.arms == ["sgd", "adamw"]


def test_a_diverged_run_is_kept_and_shown():
    hot = replace(
        task, loss=lambda output, target: task.loss(output, target) / (output.detach().abs().max() < 3).float()
    )
    result = assay.compare(hot, "sgd(lr=1000.0)", trials=2, seeds=2, steps=20, engine="sequential")
    row = result.table[1]
    assert row["failed_trials"] == 2 and row["test"] is None
    assert "diverged" in row["failure"]


def test_out_of_memory_and_errors_are_kept_and_the_rest_goes_on(monkeypatch):
    def failing(recipe, *args, **kwargs):
        raise (torch.OutOfMemoryError("too big"), KeyError("broken"))[kwargs.get("test", False)]

    monkeypatch.setattr(protocol, "fit", failing)
    monkeypatch.setattr(protocol, "_warm_up", lambda device: None)
    result = assay.compare(task, "sgd", **FAST)
    assert {record["status"] for record in result.records} == {"out of memory"}
    result = assay.compare(task, "sgd", **{**FAST, "trials": 0})
    assert {record["message"] for record in result.records} == {"KeyError: 'broken'"}


class TestResume:
    def test_a_second_run_repeats_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "records.jsonl"
        first = assay.compare(task, "sgd", records=path, **FAST)
        monkeypatch.setattr(protocol, "run_job", lambda job: pytest.fail("a finished run was repeated"))
        again = assay.compare(task, "sgd", records=path, **FAST)
        assert again.table == first.table
        assert again.reused == len(first.records)
        assert load(tmp_path).table == first.table

    def test_more_seeds_reuse_the_old_ones(self, tmp_path):
        path = tmp_path / "records.jsonl"
        assay.compare(task, "sgd", records=path, equal_seconds=False, **FAST)
        more = assay.compare(task, "sgd", records=path, equal_seconds=False, **{**FAST, "seeds": 4})
        assert (more.reused, len(more.records)) == (12, 14)

    def test_other_code_or_options_are_not_taken_for_the_same(self, tmp_path, monkeypatch):
        path = tmp_path / "records.jsonl"
        # Without runs at equal seconds, whose steps depend on the clock and may happen to be the same.
        options = {**FAST, "equal_seconds": False}
        assay.compare(task, "sgd", records=path, **options)
        assert assay.compare(task, "sgd", records=path, **{**options, "steps": 11}).reused == 0
        monkeypatch.setattr(protocol, "code_version", lambda: "other")
        assert assay.compare(task, "sgd", records=path, **options).reused == 0

    def test_a_file_cut_in_half_loses_only_its_last_line(self, tmp_path):
        path = tmp_path / "records.jsonl"
        whole = assay.compare(task, "sgd", records=path, equal_seconds=False, **FAST)
        data = path.read_bytes()
        path.write_bytes(data[: -len(data.splitlines()[-1]) // 2])
        again = assay.compare(task, "sgd", records=path, equal_seconds=False, **FAST)
        assert (again.damaged, again.reused) == (1, len(whole.records) - 1)
        assert deterministic(again.table) == deterministic(whole.table)
        assert Records(path).damaged == 1, "the line after the damaged one is readable"
        assert len(Records(path).lines) == len(whole.records)

    @pytest.mark.parametrize("garbage", [b"not json\n", b"[1, 2]\n", b"{}\n", b"\xff\xfe\x00\n", b"null\n"])
    def test_garbage_lines_are_counted_and_passed_over(self, tmp_path, garbage):
        path = tmp_path / "records.jsonl"
        path.write_bytes(garbage)
        assert (Records(path).damaged, Records(path).lines) == (1, [])

    def test_a_full_disk_is_said_and_loses_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "records.jsonl"
        kept = assay.compare(task, "sgd", records=path, **{**FAST, "trials": 2, "equal_seconds": False})
        before = path.read_bytes()

        class Full:
            """A file on a disk with room for ten more bytes."""

            def __init__(self, file):
                self.file = file

            def write(self, data):
                if len(data) <= 10:
                    raise OSError(28, "No space left on device")
                return self.file.write(data[:10])

            def __getattr__(self, name):
                return getattr(self.file, name)

        append = Records._append
        monkeypatch.setattr(Records, "_append", staticmethod(lambda file, line: append(Full(file), line)))
        with pytest.raises(RecordError, match=rf"No space left on device.*The {len(kept.records)} runs .* are safe"):
            assay.compare(task, "sgd", records=path, equal_seconds=False, **FAST)
        assert path.read_bytes() == before

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_a_really_full_device_is_said(self):
        store = Records(None)
        store.path = Path("/dev/full")
        with pytest.raises(RecordError, match="No space left on device"):
            store.add({"protocol": PROTOCOL})


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_and_start_again(tmp_path):
    """kill -9 in the middle; the second start reuses every finished run and ends in the same report."""

    def command(folder):
        words = ["--task", f"{HERE}/my_task.py:task", "--methods", "sgd,sgd(momentum=0.5)", "--trials", "4"]
        rest = ["--seeds", "3", "--jobs", "2", "--no-equal-seconds", "--out", str(folder)]
        return [sys.executable, "-m", "assay.cli", "compare", *words, *rest]

    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    records = killed / "records.jsonl"
    process = subprocess.Popen(
        command(killed), env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (not records.exists() or records.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survivors = {key(record) for record in Records(records).lines}
    assert survivors, "nothing was recorded before the kill"

    subprocess.run(command(killed), env=environment, check=True, capture_output=True)
    keys = [key(record) for record in Records(records).lines]
    assert len(keys) == len(set(keys)), "a finished run was repeated"
    assert survivors <= set(keys)

    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    assert deterministic(load(killed).table) == deterministic(load(whole).table)
    assert (killed / "report.html").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_ends_cleanly_with_what_is_finished(tmp_path):
    words = [
        "--task",
        f"{HERE}/my_task.py:task",
        "--methods",
        "sgd",
        "--steps",
        "400",
        "--trials",
        "8",
        "--out",
        tmp_path,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "assay.cli", "compare", *words, "--jobs", "2", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell runs in the background ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    records = tmp_path / "records.jsonl"
    deadline = time.monotonic() + 120
    while (not records.exists() or records.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "the same command goes on from here" in err
    assert (tmp_path / "report.html").exists()


SPACE = {"lr": {"default": 1e-3, "log": [1e-4, 1e-1]}, "k": {"default": 2, "integer": [1, 4]}}


class TestSpace:
    def test_trial_0_is_the_defaults_and_trials_are_reproducible(self):
        assert trial_options(SPACE, 0) == {"lr": 1e-3, "k": 2}
        assert trial_options(SPACE, 5) == trial_options(SPACE, 5)

    def test_a_longer_stream_begins_like_a_shorter_one(self):
        from assay.bench.space import _stream

        assert (_stream(256)[:64] == _stream(64)).all()

    def test_equal_first_options_meet_equal_values(self):
        other = {"lr": SPACE["lr"], "x": {"default": 0, "uniform": [0, 1]}}
        assert [trial_options(other, t)["lr"] for t in range(9)] == [trial_options(SPACE, t)["lr"] for t in range(9)]

    def test_few_points_cover_the_range(self):
        import math

        logs = sorted(math.log10(trial_options(SPACE, t)["lr"]) for t in range(1, 9))
        assert logs[0] < -3.4 and logs[-1] > -1.6

    @pytest.mark.parametrize("u", [0.0, 0.5, 0.999999])
    def test_samplers_stay_in_range(self, u):
        assert 1e-4 <= draw({"log": [1e-4, 1e-1]}, u) <= 1e-1
        assert draw({"integer": [1, 4]}, u) in (1, 2, 3, 4)
        assert draw({"choice": ["a", "b"]}, u) in ("a", "b")


class TestNames:
    @pytest.mark.parametrize(
        ("text", "names"),
        [
            ("a", [["a"]]),
            ("a, b+c", [["a"], ["b", "c"]]),
            ("a(x=1, y='p,+q'), b", [["a(x=1, y='p,+q')"], ["b"]]),
            ("a(x=(1, 2))", [["a(x=(1, 2))"]]),
        ],
    )
    def test_words(self, text, names):
        assert [[str(spec) for spec in arm] for arm in parse_specs(text)] == names

    @pytest.mark.parametrize("text", ["", "a,,b", "a+", "a(1)", "a(x=", "a(x=f())", "a(**{})"])
    def test_nonsense_is_refused(self, text):
        with pytest.raises(ValueError, match=r"empty name|cannot read"):
            parse_specs(text)

    def test_two_parts_at_one_seam_are_refused(self):
        with pytest.raises(ValueError, match="both change the update"):
            resolve(parse_specs("sgd+adamw")[0])

    def test_an_option_that_is_not_there_is_refused_with_those_that_are(self):
        with pytest.raises(ValueError, match=r"sgd has no option 'speed'; allowed: lr, momentum"):
            resolve(parse_specs("sgd(speed=1)")[0])

    def test_a_value_out_of_range_is_refused_before_any_training(self):
        with pytest.raises(ValueError, match="Invalid learning rate"):
            resolve(parse_specs("sgd(lr=-1)")[0])


def test_peak_memory_sees_an_allocation_and_forgets_the_last_run():
    with PeakMemory() as big:
        torch.ones(16 << 20).sum()
    with PeakMemory() as small:
        torch.ones(1 << 18).sum()
    if big.bytes is None:
        pytest.skip("this platform cannot tell")
    assert 60 << 20 <= big.bytes < 100 << 20
    assert small.bytes < 16 << 20


def test_default_recipe_is_what_an_arm_starts_from():
    assert resolve(parse_specs("sgd")[0]).recipe({}).data is DEFAULT_RECIPE.data
