"""train.py and sample.py against what goes wrong: kills at every write, damaged files, a full disk,
a closed pipe, others at work in the same folder.

FUZZ=20 pytest tests/test_faults.py tries twenty times as many damaged files.
"""

import contextlib
import csv
import fcntl
import hashlib
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

import sample
import train

SMALL = ["--n", "4", "--width", "4", "--mults", "1", "--blocks", "1", "--embed", "4", "--batch", "2",
         "--conditional", "--eval-images", "10", "--first-eval", "2", "--evals-per-doubling", "1",
         "--device", "cpu"]
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


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the run r, for a test to spoil."""
    return shutil.copytree(world / "r", tmp_path / "r")


def argv_of(script, run, *more):
    """The command line of train.py (`more` begins with the steps) or of sample.py for a run."""
    start = ([*SMALL, "--data", run.parent / "data.npz", "--out", run, "--steps"]
             if script is train else [run, *SAMPLE, "--data", run.parent / "data.npz"])
    return [str(a) for a in (*start, *more)]


def do(script, run, *more):
    """Run the script; (exit code, lines on stderr, stdout). An uncaught exception goes through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)        # numpy leaves a broken zip open
        try:
            script.main(argv_of(script, run, *more))
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, err.getvalue().splitlines() + [str(w.message) for w in warned], out.getvalue()


def content(value):
    """The value with every tensor as bytes, without what depends on the machine's mood."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: content(v) for k, v in value.items() if k not in ("seconds", "images_per_second")}
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
    """Call act() right before this process's k-th change in `folder` (open for writing, fsync,
    rename, ...), k from 0; a file being synced is cut in half first, as a power cut might.
    """
    count = itertools.count()

    def look(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in CHANGES or writes) and str(args[0]).startswith(str(folder)) and (
                event != "os.remove" or os.path.exists(args[0])) and next(count) == k:
            act()

    def fsync(file, real=os.fsync):
        if next(count) == k:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            act()
        real(file)
    sys.addaudithook(look)                      # for good, but this process will not live long
    os.fsync = fsync


def kill_everywhere(script, start, argv, reference):
    """Kill the script before each change that it makes, from a folder as start() makes it; then run
    it again, which must end like `reference`. The number of kills.
    """
    for k in range(1000):
        run = start()
        code = ended(child(script, argv_of(script, run, *argv), lambda: at_operation(
            k, run, lambda: os.kill(os.getpid(), signal.SIGKILL))))
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
        run = shutil.copytree(world / "r", tmp_path / "r")
        shutil.rmtree(run / "samples")
        return run
    assert kill_everywhere(sample, start, [], world / "r") > 10


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
        yield f"digit {at}", whole[:at] + rng.choice(b"0123456789,.- \n").to_bytes() + whole[at + 1:]
    for at in (m.end() for m in re.finditer(rb"'shape': \(", whole)):
        yield f"shape {at}", whole[:at] + bytes([whole[at] - 1]) + whole[at + 1:]
    yield from of_another_kind().items()
    for path in siblings:
        yield f"as {path.parent.name}/{path.name}", path.read_bytes()


# The file, the script that meets it, its options, what is taken away first, and how often to try.
FUZZED = {
    "train args.json": (train, [6], [], 6), "sample args.json": (sample, ["--num", 4], [], 6),
    "train log.csv": (train, [5], ["r/last.pt"], 4),
    "train last.pt": (train, [6], [], 6),
    "sample snapshots/0000004.pt": (sample, [], ["r/samples/steps2/0000004.npz"], 6),
    "sample samples/steps2/0000004.npz": (sample, ["--num", 4], [], 6),
    "sample samples/steps2/exact.npz": (sample, ["--exact", "--num", 4], [], 6),
    "train ../data.npz": (train, [6], [], 6),
    "sample ../data.npz": (sample, ["--exact", "--num", 4], [], 6)}


@pytest.mark.parametrize("case", FUZZED)
def test_a_damaged_file_ends_in_the_right_result_or_in_one_line(world, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


EDITS = [None, True, "x", "", -1, 0, 3, 10**30, 0.5, float("nan"), float("inf"), [], ["x"], [1, -1], {}]


def test_an_edited_args_json_ends_in_one_line_or_works(world, tmp_path):
    whole = json.loads((world / "r/args.json").read_text())
    places = [(part, key) for part in (whole, whole["options"]) for key in part]
    cases = [(part is whole, key, edit, seal) for part, key in places for edit in EDITS
             for seal in (False, False, True)]
    random.Random(0).shuffle(cases)
    found, text = [], (world / "r/args.json").read_text()
    shutil.copytree(world, tmp_path / "victim")
    run = tmp_path / "victim/r"
    for outer, key, edit, seal in cases[:150 * FUZZ]:
        record = json.loads(text)
        (record if outer else record["options"])[key] = edit
        if not seal:
            record.pop("checksum", None)
        for script, more in ((sample, []), (train, [4])):
            (run / "args.json").write_text(json.dumps(record))
            try:
                code, lines, _ = do(script, run, *more)
                assert (code, len(lines)) in ((0, 0), (1, 1), (2, 1)), f"code {code}, {lines}"
                assert code or not seal or key == "checksum"
            except Exception as error:  # noqa: BLE001
                found.append(f"{key} = {edit!r} ({script.__name__}): {type(error).__name__} "
                             f"{str(error)[:300]}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)
