"""The scripts against what goes wrong: kills at every write, damaged files, a full disk,
a closed pipe, others at work in the same folder.

FUZZ=20 pytest tests/test_faults.py tries twenty times as many damaged files.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import measure
import plot
import sample
import train

SMALL = ["--n", "4", "--width", "4", "--mults", "1", "--blocks", "1", "--embed", "4",
         "--batch", "2", "--conditional", "--eval-images", "10", "--first-eval", "2",
         "--evals-per-doubling", "1", "--device", "cpu"]
SAMPLE = ["--num", "3", "--sampling-steps", "2", "--device", "cpu"]
FUZZ = int(os.environ.get("FUZZ", "1"))


def write_data(path, seed=0, **change):
    """A small data file with three classes; `change` replaces arrays."""
    g = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", 8), ("test", 12)):
        arrays[f"{split}_images"] = g.integers(0, 256, (n, 4, 4, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 3
    np.savez(path, **arrays | change)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data.npz and two runs of it: r, trained to step 4 and sampled, and seed1."""
    folder = tmp_path_factory.mktemp("faults")
    write_data(folder / "data.npz")
    for name, seed in (("r", 0), ("seed1", 1)):
        do(train, folder / name, 4, "--seed", seed)
        do(sample, folder / name)
        do(sample, folder / name, "--exact")
    return folder


def argv_of(script, run, *more):
    """The command line of a script for a run; of train.py, `more` begins with the steps."""
    start = ([*SMALL, "--data", run.parent / "data.npz", "--out", run, "--steps"]
             if script is train else [run, *(SAMPLE if script is sample else SAMPLE[-2:]),
                                      "--data", run.parent / "data.npz"])
    return [str(a) for a in (*start, *more)]


def do(script, run, *more):
    """Run the script; (exit code, lines on stderr, stdout). An uncaught exception goes through."""
    return do_argv(script, argv_of(script, run, *more))


def do_argv(script, argv):
    """The same for a whole command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)        # numpy leaves a broken zip open
        try:
            script.main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, err.getvalue().splitlines() + [str(w.message) for w in warned], out.getvalue()


def content(value):
    """The value with every tensor as bytes, without what depends on the machine's mood."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: content(v) for k, v in value.items()
                if k not in ("seconds", "images_per_second", "check")}
    return [content(v) for v in value] if isinstance(value, list | tuple) else value


def contents(run):
    """{file: what it holds} of a run folder, locks left out."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".lock"):
        if path.suffix == ".pt":
            value = content(torch.load(path, weights_only=True))
        elif path.name == "log.csv":
            with open(path) as file:
                value = content(list(csv.DictReader(file)))
        elif path.name == "args.json":
            value = {k: v for k, v in json.loads(path.read_text())["options"].items()
                     if k not in ("out", "data")}
        else:
            value = path.read_bytes()
        found[str(path.relative_to(run))] = value
    return found


def same(run, other):
    """Whether two run folders hold the same files with the same content."""
    a, b = contents(run), contents(other)
    assert sorted(a) == sorted(b)
    different = [name for name in a if a[name] != b[name]]
    assert not different, different
    return True


# --- Kills ----------------------------------------------------------------------------------------


def child(script, argv, prepare=lambda: None, output="/dev/null"):
    """The id of a forked process that runs the script, with its output in a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)
        prepare()
        try:
            script.main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        sys.stdout.flush()                      # as the interpreter does at its end
    finally:
        os._exit(code)


def ended(pid):
    """The exit code of a child; minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def at_operation(k, folder, act):
    """Call act(file) right before this process's k-th change in `folder` (open for writing, fsync,
    rename, ...), k from 0; file is the number of the one being synced, else None.
    """
    count = itertools.count()

    def look(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in CHANGES or writes) and str(args[0]).startswith(str(folder)) and (
                event != "os.remove" or os.path.exists(args[0])) and next(count) == k:
            act(None)

    def fsync(file, real=os.fsync):
        if next(count) == k:
            act(file)
        real(file)
    sys.addaudithook(look)                      # for good, but this process will not live long
    os.fsync = fsync


def die(file):
    """End this process; half of a file that was not yet synced is lost."""
    if file is not None:
        os.ftruncate(file, os.fstat(file).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_everywhere(script, start, argv, reference):
    """Kill the script before each change that it makes, from a folder as start() makes it; then run
    it again, which must end like `reference`. The number of kills.
    """
    for k in range(1000):
        run = start()
        code = ended(child(script, argv_of(script, run, *argv), functools.partial(
            at_operation, k, run, die)))
        if code == 0:
            return k
        assert code == -signal.SIGKILL, k
        assert do(script, run, *argv)[:2] == (0, []), k
        assert same(run, reference), k
        shutil.rmtree(run)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("first", [0, 2])
def test_training_killed_at_every_write_ends_with_the_same_bits(world, tmp_path, first):
    os.symlink(world / "data.npz", tmp_path / "data.npz")
    do(train, tmp_path / "whole", 3)

    def start():
        if first:
            do(train, tmp_path / "r", first)
        return tmp_path / "r"
    assert kill_everywhere(train, start, [3], tmp_path / "whole") > 10


def test_sampling_killed_at_every_write_ends_with_the_same_images(world, tmp_path):
    def start():
        return shutil.copytree(world / "r", tmp_path / "r",
                               ignore=shutil.ignore_patterns("0*.npz", "0*.png"))
    assert kill_everywhere(sample, start, [], world / "r") > 10


def test_measuring_killed_at_every_write_ends_with_the_same_tables(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                 # the cache goes there
    os.symlink(world / "data.npz", tmp_path / "data.npz")

    def start(name="r"):
        return shutil.copytree(world / "r", tmp_path / name)
    assert do(measure, start("whole"))[:2] == (0, [])
    assert kill_everywhere(measure, start, [], tmp_path / "whole") > 10


# --- Damaged files --------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled: it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch pickle_was_run",)


def of_another_kind():
    """{name: bytes} of files that are none of ours."""
    zipped, saved, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"step": 4, "ema": Evil()}, zipped)
    torch.save([1, 2], saved)
    np.savez(arrays, images=np.array([Evil()], object))
    return {"empty": b"", "noise": random.Random(0).randbytes(3000), "list": b"[1, 2]\n",
            "object": b"{}\n", "pickle": pickle.dumps(Evil()), "torch pickle": zipped.getvalue(),
            "torch list": saved.getvalue(), "npz pickle": arrays.getvalue(),
            "binary text": b"step,images\n\xff\x00,1\n", "cells": b"step,images\n4,8,9\n",
            "other columns": b"a,b\n1,2\n", "no number": b"step\nfour\n"}


def damages(whole, siblings, rng, count):
    """Yield (name, bytes): the file cut short, with one byte changed, of another kind, another."""
    for _ in range(count):
        at = rng.randrange(len(whole))
        yield f"cut to {at}", whole[:at]
        at = rng.randrange(len(whole))
        yield f"byte {at}", whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1:]
        at = rng.randrange(len(whole))
        digit = bytes([rng.choice(b"0123456789,.- \n")])
        yield f"digit {at}", whole[:at] + digit + whole[at + 1:]
    for at in (m.end() for m in re.finditer(rb"'shape': \(", whole)):
        yield f"shape {at}", whole[:at] + bytes([whole[at] - 1]) + whole[at + 1:]
    yield from of_another_kind().items()
    for path in siblings:
        yield f"as {path.parent.name}/{path.name}", path.read_bytes()


# The file, the script that meets it, its options, what is taken away first, and how often to try.
FUZZED = {
    "train args.json": (train, [6], [], 6), "sample args.json": (sample, ["--num", 4], [], 6),
    "train log.csv": (train, [5], ["r/last.pt"], 2),
    "train last.pt": (train, [6], [], 6),
    "sample snapshots/0000004.pt": (sample, [], ["r/samples/steps2/0000004.npz"], 6),
    "sample samples/steps2/0000004.npz": (sample, ["--num", 4], [], 6),
    "sample samples/steps2/exact.npz": (sample, ["--exact", "--num", 4], [], 6),
    "train ../data.npz": (train, [6], [], 6),
    "sample ../data.npz": (sample, ["--exact", "--num", 4], [], 6)}


@pytest.mark.parametrize("case", FUZZED)
def test_a_damaged_file_ends_in_the_right_result_or_in_one_line(world, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: None)         # it would take most of the time
    (script, more, without, times), name = FUZZED[case], case.split()[1]

    def start(folder):
        shutil.copytree(world, folder, ignore=shutil.ignore_patterns("seed1"))
        for file in without:
            (folder / file).unlink()
        return folder / "r"
    reference, victim = start(tmp_path / "reference"), tmp_path / "victim/r"
    whole = (reference / name).read_bytes()
    siblings = [p for p in world.rglob("*.*") if p.name[0] != "." and p.read_bytes() != whole]
    assert do(script, reference, *more)[:2] == (0, [])
    found = []
    for what, damaged in damages(whole, siblings, random.Random(case), times * FUZZ):
        (start(victim.parent) / name).write_bytes(damaged)
        try:
            code, lines, _ = do(script, victim, *more)
            if code == 0 and not lines:
                if script is sample and "samples" not in name:      # what was read is no result
                    shutil.copy(reference / name, victim / name)
                assert same(reference, victim)
            elif code not in (1, 2) or len(lines) != 1:
                found.append(f"{what}: code {code}, {lines}")
        except Exception as error:  # noqa: BLE001
            found.append(f"{what}: {type(error).__name__} {str(error)[:300]}")
        shutil.rmtree(victim.parent)
    if found:
        pytest.fail("\n".join(found), pytrace=False)
    assert not (tmp_path / "pickle_was_run").exists()


def test_damage_that_no_checksum_sees_is_seen(world, tmp_path):
    whole, file = (world / "r/last.pt").read_bytes(), tmp_path / "last.pt"
    file.write_bytes(whole)
    train.check_zip(file)
    at = [m.start() for m in re.finditer(rb"archive/data/10", whole)][-1]   # in the directory
    for place, byte in ((at + 14, b"1"),        # the name of another member
                        (at - 8, b"\x10")):     # marked as a folder: torch would read nothing
        file.write_bytes(whole[:place] + byte + whole[place + 1:])
        with pytest.raises(ValueError, match="checksum"):
            train.check_zip(file)


# Of measured runs: the file, the script that meets it and its options.
FUZZED_TABLES = {
    "measure r/metrics.csv": [], "measure r/controls.csv": [], "measure r/denoisers.csv":
    ["--denoisers"], "measure r/neighbours/steps2/0000004.npz": [], "measure r/args.json": [],
    "measure data/cache": [], "plot r/args.json": [], "plot r/log.csv": [], "plot r/metrics.csv":
    [], "plot r/controls.csv": [], "plot r/spectrum.csv": [], "plot r/denoisers.csv": []}


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    """The world with all tables of both runs, and the cache that they were made with."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("measured") / "w")
    with contextlib.chdir(folder):
        for name in ("r", "seed1"):
            for more in ([], ["--denoisers"]):
                assert do(measure, folder / name, *more)[:2] == (0, [])
    return folder


@pytest.mark.parametrize("case", FUZZED_TABLES)
def test_a_damaged_table_ends_in_the_right_result_or_in_one_line(measured, tmp_path, case,
                                                                 monkeypatch):
    monkeypatch.setattr(plot, "draw_all", lambda *args: None)
    script, name = case.split()
    more, victim, found = FUZZED_TABLES[case], tmp_path / "w", []
    if name == "data/cache":
        name = str(max((measured / name).iterdir(), key=lambda p: p.stat().st_size).relative_to(
            measured))
    whole, kind = (measured / name).read_bytes(), Path(name).suffix
    siblings = [p for p in measured.rglob(f"*{kind}") if p.read_bytes() != whole][:12]
    kept = {p.relative_to(measured): p.read_bytes() for p in measured.glob("r/*.csv")} | {
        name: whole}
    monkeypatch.setattr(os, "fsync", lambda file: None)         # it would take most of the time

    def run_it():
        if script == "plot":
            return do_argv(plot, [str(victim / "r")])
        return do(measure, victim / "r", *more)

    def restore():
        for file in (victim / "r").rglob("*.csv"):
            file.unlink()
        for file, text in kept.items():
            (victim / file).write_bytes(text)

    def tables():
        made = victim / "r/figures" if script == "plot" else victim / "r"
        return {p.name: p.read_bytes() for p in made.glob("*.csv")}
    shutil.copytree(measured, victim)
    monkeypatch.chdir(victim)
    assert run_it()[:2] == (0, [])
    expected = tables()
    for what, damaged in damages(whole, siblings, random.Random(case), 8 * FUZZ):
        restore()
        (victim / name).write_bytes(damaged)
        try:
            code, lines, _ = run_it()
            if code == 0 and not lines:
                assert tables() == expected, "a wrong table"
            elif code not in (1, 2) or len(lines) != 1:
                found.append(f"{what}: code {code}, {lines}")
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001
            found.append(f"{what}: {type(error).__name__} {str(error)[:300]}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


EDITS = [None, True, "x", "", -1, 0, 3, 10**30, 0.5, float("nan"), float("inf"), [], ["x"], [1, -1],
         {}]


def test_an_edited_args_json_ends_in_one_line_or_works(world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = json.loads((world / "r/args.json").read_text())
    places = [(part, key) for part in (whole, whole["options"]) for key in part]
    cases = [(part is whole, key, edit, seal) for part, key in places for edit in EDITS
             for seal in (False, False, True)]
    random.Random(0).shuffle(cases)
    found, text = [], (world / "r/args.json").read_text()
    shutil.copytree(world, tmp_path / "victim")
    run = tmp_path / "victim/r"
    for outer, key, edit, seal in cases[:100 * FUZZ]:
        record = json.loads(text)
        before = (record if outer else record["options"])[key]
        (record if outer else record["options"])[key] = edit
        if not seal:
            record.pop("checksum", None)
        for script, more in ((sample, []), (train, [4])):
            (run / "args.json").write_text(json.dumps(record))
            try:
                code, lines, _ = do(script, run, *more)
                assert (code, len(lines)) in ((0, 0), (1, 1), (2, 1)), f"code {code}, {lines}"
                assert code or not seal or key == "checksum" or edit is before
            except Exception as error:  # noqa: BLE001
                found.append(f"{key} = {edit!r} ({script.__name__}): {type(error).__name__} "
                             f"{str(error)[:300]}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# --- Impossible options ---------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "more", "word"), [
    (train, ["--seed", 2**70], "--seed"), (train, ["--embed", 4_000_000], "--embed"),
    (train, ["--width", 10**20], "--width"), (train, ["--mults", 10**20], "--mults"),
    (train, ["--blocks", 10**9], "--blocks"), (train, ["--n", 10**25], "--n"),
    (train, ["--n", 10**25, "--data", "toy"], "--n"), (train, ["--offset", 10**25], "--offset"),
    (train, ["--size", 10**9, "--data", "toy"], "--size"), (train, ["--batch", 10**10], "--batch"),
    (train, ["--steps", 10**25], "--steps"), (train, ["--images", 10**25], "--images"),
    (train, ["--eval-images", 10**25], "--eval-images"), (train, ["--lr", "inf"], "--lr"),
    (train, ["--evals-per-doubling", 10**12], "--evals"), (train, ["--ema", "nan"], "--ema"),
    (train, ["--save-minutes", "nan"], "--save-minutes"),
    (sample, ["--num", 10**13], "--num"), (sample, ["--eta", "nan"], "--eta"),
    (sample, ["--sampling-steps", 10**25], "--sampling-steps")])
def test_impossible_options_are_one_line(world, script, more, word):
    argv = argv_of(script, world / ("new" if script is train else "r"))
    code, lines, _ = do_argv(script, [*argv[:-1 if script is train else None], *map(str, more)])
    assert code == 2 and len(lines) == 1 and word in lines[0], lines
    assert not (world / "new").exists()


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"},
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
    {"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}])
def test_half_a_torchrun_is_one_line(world, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, lines, _ = do(train, world / "new", 4)
    assert code == 2 and len(lines) == 1 and "WORLD_SIZE" in lines[0], lines


@pytest.mark.parametrize(("change", "word"), [
    ({"train_labels": np.full(8, 10**10)}, "train_labels"),
    ({"test_labels": np.full(12, -1)}, "test_labels"),
    ({"train_images": np.zeros((8, 0, 0, 3), np.uint8)}, "train_images"),
    ({"test_images": np.zeros((12, 0, 0, 3), np.uint8)}, "test_images"),
    ({"train_images": np.zeros((8, 4, 4, 3), np.uint8)}, "all equal")])
def test_impossible_data_is_refused_before_training(tmp_path, change, word):
    write_data(tmp_path / "data.npz", **change)
    code, lines, _ = do(train, tmp_path / "r", 4)
    assert code == 2 and len(lines) == 1 and word in lines[0], lines
    assert not (tmp_path / "r").exists()


# --- The machine gets in the way ------------------------------------------------------------------


def lines_of(path):
    """The lines of a file."""
    return path.read_text().splitlines()


@pytest.mark.parametrize("script", [train, sample])
def test_a_closed_stdout_ends_quietly_and_the_same_command_continues(world, tmp_path, script):
    shutil.copy(world / "data.npz", tmp_path)
    if script is sample:
        shutil.copytree(world / "r", tmp_path / "r", ignore=shutil.ignore_patterns("samples"))

    def close():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    more = [4] * (script is train)
    assert ended(child(script, argv_of(script, tmp_path / "r", *more), close,
                       tmp_path / "err")) == 1
    assert (tmp_path / "err").read_text() == ""
    code, lines, out = do(script, tmp_path / "r", *more)
    assert (code, lines) == (0, []) and len(set(out.splitlines())) == len(out.splitlines())
    if script is sample:
        do(sample, tmp_path / "r", "--exact")
        assert same(tmp_path / "r", world / "r")
    else:
        assert (content(torch.load(tmp_path / "r/last.pt"))
                == content(torch.load(world / "r/last.pt")))


@pytest.mark.parametrize(("script", "limit"), [(train, 2000), (train, 20_000), (sample, 700)])
def test_a_full_disk_is_one_line_that_names_the_file(world, tmp_path, script, limit):
    shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("samples"))
    run = tmp_path / "w/r"
    before = contents(run)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    more = [6] * (script is train)
    assert ended(child(script, argv_of(script, run, *more), fill, tmp_path / "out")) == 1
    [line] = [line for line in lines_of(tmp_path / "out") if line.startswith("error")]
    assert lines_of(tmp_path / "out")[-1] == line
    assert str(run) in line and "File too large" in line
    after = contents(run)
    assert all(name in before for name in after if "/" not in name)
    assert do(script, run, *more)[:2] == (0, [])


@pytest.mark.parametrize("script", [train, sample])
def test_ctrl_c_is_one_line_and_leaves_nothing_half_done(world, tmp_path, script):
    shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("samples"))
    run, more = tmp_path / "w/r", [6] * (script is train)
    for k in (2, 4):                                # before the first file is whole, and after
        assert ended(child(script, argv_of(script, run, *more), lambda k=k: at_operation(
            k, run, lambda file: signal.raise_signal(signal.SIGINT)), tmp_path / f"out{k}")) == 130
        assert "interrupted" in lines_of(tmp_path / f"out{k}")[-1]
        assert not list(run.rglob(".*.tmp"))
    assert do(script, run, *more)[:2] == (0, [])


@pytest.mark.parametrize(("script", "more", "name"), [
    (train, [4], "new"), (train, [6], "r/snapshots"), (sample, [], "r/samples")])
def test_a_file_where_a_folder_should_be_is_one_line_and_code_1(world, tmp_path, script, more,
                                                                name):
    shutil.copytree(world, tmp_path / "w")
    if name != "new":
        shutil.rmtree(tmp_path / "w" / name)
    (tmp_path / "w" / name).write_text("")
    code, lines, _ = do(script, tmp_path / "w" / ("new" if name == "new" else "r"), *more)
    assert code == 1 and len(lines) == 1 and name in lines[0], lines


def test_one_process_at_a_time_in_a_stage_and_stages_side_by_side(world, tmp_path):
    shutil.copytree(world, tmp_path / "w", ignore=shutil.ignore_patterns("samples"))
    run = tmp_path / "w/r"
    for script, more, other, theirs in ((train, [6], sample, []),
                                        (sample, ["--num", 5], train, [8])):
        pid = child(script, argv_of(script, run, *more), lambda: at_operation(
            4, run, lambda file: signal.raise_signal(signal.SIGSTOP)), tmp_path / "out")
        os.waitpid(pid, os.WUNTRACED)
        code, lines, _ = do(script, run, *more)
        assert code == 2 and len(lines) == 1 and "another process" in lines[0]
        assert do(other, run, *theirs)[:2] == (0, [])
        os.kill(pid, signal.SIGCONT)
        assert ended(pid) == 0
    do(train, tmp_path / "w/whole", 8)
    assert (content(torch.load(run / "last.pt"))["net"]
            == content(torch.load(tmp_path / "w/whole/last.pt"))["net"])
    assert not list(run.rglob(".*.tmp"))


# --- Runs of another day --------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path):
    """The run r beside its data, for a test to spoil."""
    return shutil.copytree(world, tmp_path / "w") / "r"


def edit(run, **change):
    """Replace fields of args.json as its owner may, and drop those that are None."""
    record = {k: v for k, v in (json.loads((run / "args.json").read_text()) | change).items()
              if v is not None and k != "checksum"}
    (run / "args.json").write_text(json.dumps(record))


def test_a_finished_run_given_fewer_steps_is_left_alone(run):
    before = (run / "args.json").read_bytes()
    code, lines, _ = do(train, run, 3)
    assert code == 2 and len(lines) == 1 and "--steps 3" in lines[0]
    assert (run / "args.json").read_bytes() == before


def test_a_run_made_before_an_option_existed_goes_on(run, tmp_path):
    shutil.copytree(run, run.with_name("whole"))
    do(train, run.with_name("whole"), 6)
    options = json.loads((run / "args.json").read_text())["options"]
    del options["weighting"], options["amp"]
    edit(run, options=options, free=None)
    assert do(sample, run, "--num", 5)[:2] == (0, [])
    assert do(train, run, 6)[:2] == (0, [])
    assert (content(torch.load(run / "last.pt"))
            == content(torch.load(run.with_name("whole") / "last.pt")))


def test_a_run_stays_itself_when_a_default_changes(run, monkeypatch):
    def changed(real=train.make_parser):
        parser = real()
        parser.set_defaults(width=16, lr=1e-3)
        parser.add_argument("--dropout", type=float, default=0.0)
        return parser
    monkeypatch.setattr(train, "make_parser", changed)
    assert do(sample, run, "--num", 5)[:2] == (0, [])
    assert do(train, run, 6, "--lr", "1e-4")[:2] == (0, [])
    assert do(sample, run, "--num", 5)[:2] == (0, [])


def test_a_renamed_or_changed_process_is_one_line(run, monkeypatch):
    ddpm = train.PROCESSES["ddpm"]
    for change in ({"DDPM": ddpm}, {"ddpm": ddpm._replace(predicts=train.PREDICTIONS["v"])}):
        monkeypatch.setattr(train, "PROCESSES", {"flow": train.PROCESSES["flow"]} | change)
        for script, more in ((train, [6, "--process", "flow"]), (sample, ["--num", 5])):
            code, lines, _ = do(script, run, *more)
            assert code == 2 and len(lines) == 1 and "--process ddpm" in lines[0], lines


def test_data_may_move_but_not_change(run, tmp_path):
    data = run.parent / "data.npz"
    with np.load(data) as archive:
        arrays = dict(archive)
    for split, word in (("train", "training images"), ("test", "held-out images")):
        labels = arrays[f"{split}_labels"][::-1]
        write_data(data, **arrays | {f"{split}_labels": labels})
        for script, more in ((train, [6]), (sample, ["--exact", "--num", 4])):
            code, lines, _ = do(script, run, *more)
            assert code == 2 and len(lines) == 1, lines
            assert (word if script is train else "not the images") in lines[0]
    (tmp_path / "moved").mkdir()
    shutil.move(run, tmp_path / "moved/r")
    write_data(tmp_path / "moved/data.npz", **arrays)
    data.unlink()
    assert do(train, tmp_path / "moved/r", 6)[:2] == (0, [])
    assert do(sample, tmp_path / "moved/r", "--exact", "--num", 4)[:2] == (0, [])


def test_stray_copies_are_no_snapshots(run):
    for name in ("snapshots/0000004 (1).pt", "snapshots/copy.pt", "snapshots/4.pt.part"):
        shutil.copy(run / "snapshots/0000004.pt", run / name)
    shutil.copy(run / "samples/steps2/0000004.npz", run / "samples/steps2/0000004 (1).npz")
    code, lines, out = do(sample, run)
    assert (code, lines) == (0, []) and "0 of 2" in out
    assert sample.sample_sets(run) == {"steps2": [2, 4]}


# --- A changed network ----------------------------------------------------------------------------


class Dropped(train.UNet):
    """The U-Net with dropout of half of the channels before its last layer, and with a buffer that
    counts images, as batch normalisation's buffers do.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.drop = nn.Dropout2d(0.5)
        self.last = nn.BatchNorm2d(self.conv_out.in_channels)
        nn.init.normal_(self.conv_out.weight)

    def forward(self, xt, t, labels=None):
        hook = self.norm.register_forward_hook(lambda m, i, o: self.last(self.drop(o)))
        try:
            return super().forward(xt, t, labels)
        finally:
            hook.remove()


def test_dropout_and_buffers_resume_exactly_and_are_off_in_what_is_logged(world, tmp_path,
                                                                         monkeypatch):
    monkeypatch.setattr(train, "UNet", Dropped)
    shutil.copy(world / "data.npz", tmp_path)
    seen = []

    def watch(net, *rest, real=train.evaluate):
        seen.append(any(module.training for module in net.modules()))
        one, two = real(net, *rest), real(net, *rest)
        assert one[0] == two[0]
        return one
    monkeypatch.setattr(train, "evaluate", watch)
    for name, parts in (("a", [6]), ("b", [6]), ("c", [3, 6])):
        for steps in parts:
            torch.manual_seed(ord(name) + steps)    # the run depends on no state from outside
            assert do(train, tmp_path / name, steps)[:2] == (0, [])
    a, b, c = (content(torch.load(tmp_path / f"{name}/last.pt")) for name in "abc")
    assert a == b and {k: v for k, v in a.items() if k != "rows"} == {
        k: v for k, v in c.items() if k != "rows"}
    assert [row for row in c["rows"] if row["step"] != 3] == a["rows"]
    assert seen and not any(seen)
    for key in ("last.running_mean", "last.running_var", "last.num_batches_tracked"):
        assert a["ema"][key] == a["net"][key] and a["ema"][key] != content(
            Dropped(4, [1], 1, None, 4, 3, 3, 4).state_dict()[key])
    for name in "ab":
        assert do(sample, tmp_path / name)[:2] == (0, [])
    one, two = (sample.read_samples(tmp_path / f"{name}/samples/steps2/0000006.npz")
                for name in "ab")
    assert np.array_equal(one.images, two.images)


# --- The numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "train_losses", "heldout_losses"), [
    ((), (0.9842956, 0.9386953, 0.8653479), (0.9831785, 0.9418041, 0.8705409)),
    (("--process", "flow", "--weighting", "sigmoid", "--flip"),
     (1.3346487, 1.3107649, 1.2960135), (1.3070832, 1.2892339, 1.2778442))])
def test_a_run_has_the_losses_that_it_had(tmp_path, more, train_losses, heldout_losses):
    # So what is random, the network, the loss, the optimizer and the evaluation are those of every
    # other machine and version. CPUs of all kinds agree to 1e-7.
    write_data(tmp_path / "data.npz")
    assert do(train, tmp_path / "r", 8, "--lr", "1e-2", *more)[0] == 0
    for split, values in (("train", train_losses), ("heldout", heldout_losses)):
        logged = [float(row[f"{split}_loss"]) for row in train.read_csv(tmp_path / "r/log.csv")]
        assert logged == pytest.approx(values, rel=1e-5)
