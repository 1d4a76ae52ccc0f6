"""sweep.sh: plan, run, skip, continue, fail, refuse.

What Python decides (the grid, the state of a run) is tested on tiny runs; what the shell does (take
runs, end them, continue) mostly on scripts that do nothing but write files, since they start fast.
BASH32=/path/to/bash runs all of it with another bash; macOS has version 3.2.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

SHELL = os.environ.get("BASH32", "bash")
TINY = {"N": "4 6", "WIDTH": "8", "BATCH": "4", "LR": "1e-3", "IMAGES": "48", "GPUS": "cpu cpu",
        "TRAIN": "--embed 16 --eval-images 10 --first-eval 4", "PYTHON": sys.executable,
        "SAMPLE": "--num 6 --sampling-steps 3"}
ONE, OTHER = "N4_w8_B4_lr1e-3_s0", "N6_w8_B4_lr1e-3_s0"


def sweep(out, *arguments, code=0, script=ROOT / "sweep.sh", cwd=None, **change):
    """Run sweep.sh; returns its output."""
    env = {**os.environ, **TINY, "OUT": str(out), **change}
    done = subprocess.run([SHELL, str(script), *arguments], env=env, text=True, check=False,
                          cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout
    return done.stdout


# --- With scripts that only write files -----------------------------------------------------------

FAKE = {"train.py": """
    import os, sys, time
    from pathlib import Path
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    (out / "snapshots").mkdir(parents=True, exist_ok=True)
    for name in ("snapshots/0000004.pt", "snapshots/0000012.pt", "last.pt", "args.json"):
        (out / name).touch()
    print(*sys.argv, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"))
    time.sleep(float(os.environ.get("SECONDS_EACH", "0")))
    """, "sample.py": """
    import os, sys
    print(*sys.argv)
    if sys.argv[1].endswith(os.environ.get("FAILS", "none")):
        sys.exit("error: a reason")
    """, "measure.py": """
    import itertools, os, sys
    from pathlib import Path
    if sys.argv[1] != "--sweep":
        print(*sys.argv)
        (Path(sys.argv[1]) / "done").touch()
        sys.exit()
    text = sys.stdin.read()
    Path(sys.argv[0]).with_name("asked").write_text(text)
    lists = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    offsets = lists.get("--offset", ["0"])
    for n, seed, offset in itertools.product(lists["--n"], lists["--seed"], offsets):
        name = f"N{n}" + f"_s{seed}" * (seed != "0") + f"_offset{offset}" * (offset != "0")
        run = Path(sys.argv[2], name)
        state = os.environ.get("STATE") if run.name == "N4" else None
        state = state or ("done" if (run / "done").exists() else "not started")
        if lists["ONLY"] in ([], [run.name]):
            print(run.name, state, "-", "-", "?", "?", "?", "--n", n, sep="\\t")
    """, "plot.py": ""}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A sweep.sh whose scripts take no time, to be given as sweep(..., script=fake)."""
    home = tmp_path_factory.mktemp("fake")
    shutil.copy(ROOT / "sweep.sh", home)
    for name, text in FAKE.items():
        (home / name).write_text(textwrap.dedent(text))
    return home / "sweep.sh"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.pt"))


def test_a_failure_is_named_the_others_go_on_and_mended_it_continues(fake, tmp_path):
    text = sweep(tmp_path, "toy", script=fake, code=1, FAILS="N4", N="4 6 8", KEEP="last")
    assert "3 runs in" in text and "done   N6" in text and "done   N8" in text
    assert "FAILED N4, see" in text and "    error: a reason" in text and "1 of 3 runs" in text
    text = sweep(tmp_path, "toy", script=fake, N="4 6 8")
    assert "1 to do" in text and text.count("start") == 1 and "done   N4" in text
    assert not list(tmp_path.glob(".claims*"))


def test_weights_of_anything_but_a_done_run_stay(fake, tmp_path):
    sweep(tmp_path, "toy", script=fake)
    sweep(tmp_path, "toy", script=fake, KEEP="last")
    assert files(tmp_path / "N4") == ["last.pt", "snapshots/0000012.pt"]
    before = files(tmp_path)
    text = sweep(tmp_path, "toy", script=fake, code=2, KEEP="none", STATE="another run: lr")
    assert "N4: holds another run: lr" in text and "another OUT" in text
    assert files(tmp_path) == before
    sweep(tmp_path, "toy", "--only", "N6", script=fake, KEEP="none")
    assert files(tmp_path) == ["N4/last.pt", "N4/snapshots/0000012.pt"]


def test_bad_arguments_are_named(fake, tmp_path):
    def refused(*arguments, word, **change):
        assert word in sweep(tmp_path / "none", *arguments, script=fake, code=2, **change)
    refused("huge", word="unknown grid")
    refused(word="usage")
    refused("toy", "--wet-run", word="--wet-run: unknown option")
    refused("toy", "--only", word="takes the name of one run")
    refused("toy", KEEP="some", word="KEEP=some")
    refused("toy", IMAGES="08", word="IMAGES=08")
    refused("custom", DATA="my data", word="DATA=my data: a path without spaces")
    for grid in (["digits"], ["toy"], ["class", "1"]):
        refused(*grid, DATA="cifar10", word="DATA=cifar10: this grid is of ")
    refused("toy", IMAGES="10 20", word="IMAGES=10 20")
    refused("toy", PYTHON="/no/such", word="PYTHON=/no/such")
    refused("toy", SLURM_ARRAY_TASK_ID="99", word="SLURM_ARRAY_TASK_ID=99: the runs are 0 to 1")
    refused("toy", SLURM_ARRAY_TASK_ID="a[$(touch x)0]", word="SLURM_ARRAY_TASK_ID=a[")
    assert not (tmp_path / "none").exists()


OWN = dict.fromkeys(("N", "WIDTH", "BATCH", "LR", "IMAGES", "TRAIN", "SAMPLE"), "")  # the grid's


@pytest.mark.parametrize(("lesson", "lists", "then"), [
    (1, ["--n 64"], ""), (2, ["--n 64 16"], ""), (3, ["--n 64"], "--exact"),
    (4, ["--n 16", "--lr 1e-3 3e-4 3e-3"], ""), (6, ["--n 64"], "--planted"),
    (7, ["--n 64"], "--denoisers")])
def test_experiments_of_the_class(fake, tmp_path, lesson, lists, then):
    text = sweep(tmp_path, "class", str(lesson), script=fake, **OWN)
    asked = [" ".join(line.split()) for line in fake.with_name("asked").read_text().splitlines()]
    assert {*lists, "--width 32", "--batch 32", "IMAGES 500N"} <= {*asked}
    assert "done   N" in text and then in text
    assert "1 to 7" in sweep(tmp_path, "class", "8", script=fake, code=2)


@pytest.mark.parametrize(("lesson", "then"), [(3, "--exact"), (6, "--planted"), (7, "--denoisers")])
def test_experiments_of_the_class_do_so_with_every_run(fake, tmp_path, lesson, then):
    text = sweep(tmp_path, "class", str(lesson), script=fake, SEEDS="0 1 2", **OWN)
    for name in ("N64", "N64_s1", "N64_s2"):
        assert len(re.findall(rf"(?m)/{name} .*{then}", text)) == 1


def test_twins_of_the_class_are_pairs_of_one_seed(fake, tmp_path):
    def pairs(text):
        return re.findall(r"/(N\S+) --twin \S+/(N\S+)", text)
    text = sweep(tmp_path, "class", "5", script=fake, SEEDS="0 1 12", **OWN)
    assert "6 runs in" in text
    assert pairs(text) == [(f"N512{s}", f"N512{s}_offset512") for s in ("", "_s1", "_s12")]
    text = sweep(tmp_path, "class", "5", "--only", "N512_s1", script=fake, SEEDS="0 1", **OWN)
    assert "--twin" not in text                         # its twin is no row of this one


def test_devices(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"

    def log(**change):
        sweep(tmp_path / "runs", "custom", script=fake, GPUS="", N="4", **change)
        text = (tmp_path / "runs/logs/N4.log").read_text()
        shutil.rmtree(tmp_path / "runs")
        return text
    assert "--device cpu None" in log(PATH=path)
    assert "--device cpu  " in log(CUDA_VISIBLE_DEVICES="")
    assert "--device cuda 3 " in log(CUDA_VISIBLE_DEVICES="3")
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 7\n")
    assert "--device cuda 7 " in log(PATH=path)
    text = sweep(tmp_path / "runs", "custom", script=fake, code=2, N="4", GPUS="0 3 cpu",
                 CUDA_VISIBLE_DEVICES="3,5")
    assert "0 is not among CUDA_VISIBLE_DEVICES=3,5" in text
    text = sweep(tmp_path / "runs", "custom", script=fake, N="4", GPUS="5 3 cpu",
                 CUDA_VISIBLE_DEVICES="3,5")
    assert "done   N4" in text


@pytest.mark.parametrize("given, threads", [("", "4"), ("3", "3")])
def test_cores_are_shared_out_unless_the_user_says_how_many(fake, tmp_path, given, threads):
    sweep(tmp_path, "toy", script=fake, SLURM_CPUS_ON_NODE="8", OMP_NUM_THREADS=given)
    log = (tmp_path / "logs/N4.log").read_text()
    assert re.search(r"train.py .* (\S+)", log).group(1) == threads


def test_out_is_in_the_callers_folder(fake, tmp_path):
    sweep("my runs", "toy", script=fake, cwd=tmp_path)
    assert (tmp_path / "my runs/N6/done").exists()


def test_experiments_that_measure_take_measure_s_options(fake, tmp_path):
    for lesson, asked in (("3", ""), ("6", " --planted")):
        text = sweep(tmp_path / lesson, "class", lesson, script=fake, MEASURE="--num 5")
        lines = re.findall(r"measure.py .*", text)
        assert lines and all(line.endswith(f"{asked} --device cpu --num 5") for line in lines)


def test_no_text_is_evaluated(fake, tmp_path):
    # STATE is what a damaged table says, see FAKE
    for name in ("N", "IMAGES", "SAMPLE", "TRAIN", "VARY", "GPUS", "STATE"):
        text = f"--num slots[$(touch {tmp_path}/x)0] $(touch {tmp_path}/x) `touch {tmp_path}/x`"
        for mode in ((), ("--dry-run",), ("--status",)):
            env = {**os.environ, **TINY, "OUT": str(tmp_path / "runs"), name: text}
            subprocess.run([SHELL, str(fake), "toy", *mode], env=env, check=False,
                           capture_output=True)
    assert not (tmp_path / "x").exists()


def test_a_second_sweep_in_the_same_folder_is_refused(fake, tmp_path):
    (tmp_path / "logs").mkdir()
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another sweep" in sweep(tmp_path, "toy", script=fake, code=2)
    (tmp_path / ".claims/0").mkdir(parents=True)            # of a sweep that was killed
    assert "done   N4" in sweep(tmp_path, "toy", script=fake)


def processes_of(out):
    """The ids of all processes that work for the sweep in `out`, by their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"OUT={out}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:                         # it has ended meanwhile, or is not ours
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_ends_its_children_and_says_how_to_go_on(fake, tmp_path, signum):
    env = {**os.environ, **TINY, "OUT": str(tmp_path), "SECONDS_EACH": "60"}
    with subprocess.Popen([SHELL, str(fake), "toy"], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert "toy" in process.stdout.readline() and "start" in process.stdout.readline()
        process.send_signal(signum)
        text = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and f"continues (OUT={tmp_path})" in text
    time.sleep(0.2)
    assert not processes_of(tmp_path)


def kill_all(out):
    while left := processes_of(out):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_what_a_dead_sweep_leaves_behind_holds_the_folder_until_it_ends(fake, tmp_path):
    env = {**os.environ, **TINY, "OUT": str(tmp_path), "SECONDS_EACH": "60"}
    with subprocess.Popen([SHELL, str(fake), "toy"], env=env, text=True,
                          stdout=subprocess.PIPE) as process:
        assert "toy" in process.stdout.readline() and "start" in process.stdout.readline()
        process.kill()
        process.wait()
        assert "another sweep" in sweep(tmp_path, "toy", script=fake, code=2)
        kill_all(tmp_path)
    assert "2 to do" in sweep(tmp_path, "toy", script=fake)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_dead_sweep_begins_no_other_run(fake, tmp_path):
    env = {**os.environ, **TINY, "OUT": str(tmp_path), "SECONDS_EACH": "1", "GPUS": "cpu"}
    with subprocess.Popen([SHELL, str(fake), "toy"], env=env, text=True,
                          stdout=subprocess.PIPE) as process:
        assert "toy" in process.stdout.readline() and "start" in process.stdout.readline()
        process.kill()
        process.wait()
        while processes_of(tmp_path):
            time.sleep(0.1)
    assert "1 to do" in sweep(tmp_path, "toy", script=fake)


# What macOS lacks, and options that its tools do not know, by tool; long ones none of them knows.
ABSENT = ("flock", "nproc", "tac", "shuf", "realpath", "timeout", "numfmt", "setsid", "stdbuf")
GNU = {"sed": "-i|-r|-z|-s", "xargs": "-d|-a", "grep": "-P|-z", "head": "-n-*|-c-*", "mktemp": "-p",
       "sort": "-V", "date": "-d", "readlink": "-f|-e|-m", "stat": "-c", "cp": "-t", "mv": "-t",
       "ls": "", "cat": "-A", "tail": "", "tr": "", "rm": "", "mkdir": "", "wc": "", "cut": ""}


def test_it_runs_with_the_tools_of_macos(fake, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ABSENT:
        (tools / name).write_text(f"#!/bin/sh\necho {name} called; exit 97\n")
    for name, options in GNU.items():
        (tools / name).write_text(
            f"#!/bin/sh\nfor word; do case $word in --) break ;; --?*{options and '|' + options})\n"
            f"echo {name} $word called >&2; exit 97;; esac; done\n"
            f"exec {shutil.which(name)} \"$@\"\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    newer = {f"BASH_FUNC_{name}%%": f"() {{ echo {name} called; exit 97; }}"
             for name in ("mapfile", "readarray")}
    more = {"PATH": f"{tools}:{os.environ['PATH']}", "script": fake, **newer}
    out = tmp_path / "runs"
    text = sweep(out, "toy", code=1, FAILS="N4", **more) + sweep(out, "toy", KEEP="last", **more)
    for mode in ("--dry-run", "--status", "--list"):
        text += sweep(out, "toy", mode, **more)
    text += sweep(out, "-h", **more)
    assert "called" not in text and "done   N4" in text and "SEEDS" in text


def test_it_is_written_in_bash_3():
    newer = (r"mapfile|readarray|coproc|wait -n|declare -[Agln]|local -[Agln]|\$\{\w+(,|\^)|&>>|\|&"
             r"|;;?&|\$\{[^}]*@[A-Za-z]\}|printf [^|]*%\(|BASHPID|EPOCH(SECONDS|REALTIME)|globstar"
             r"|\[\[ -[vR] |\$\{\w+\[@\]: -|\$\{\w+\[-|exec \{\w+\}|read [^|]*-[Ni] ")
    text = re.sub(r"(?m)^\s*#.*$", "", (ROOT / "sweep.sh").read_text())
    assert re.search(newer, text) is None
    # There, "${a[@]}" of an empty array ends a script under set -u.
    assert '"${more[@]}"' not in text.replace('${more[@]+"${more[@]}"}', "")


# --- What Python decides --------------------------------------------------------------------------


def grid(fake, monkeypatch, capsys, *arguments, **change):
    """{name: words for train.py} of the rows that measure.py answers for a grid's own lists."""
    import measure
    own = dict.fromkeys(("N", "WIDTH", "BATCH", "LR", "IMAGES", "TRAIN", "SAMPLE", "MEASURE"), "")
    sweep("none", *arguments, "--list", script=fake, **{**own, **change})
    monkeypatch.setattr(sys, "stdin", io.StringIO(fake.with_name("asked").read_text()))
    capsys.readouterr()
    measure.sweep(["none"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert all(row[1] == "not started" and len(row) == 8 for row in rows)
    return {row[0]: row[7] for row in rows}


@pytest.fixture
def rows(fake, monkeypatch, capsys):
    """rows(grid, LIST=...): {name: words for train.py}."""
    return lambda *arguments, **change: grid(fake, monkeypatch, capsys, *arguments, **change)


def test_the_grids(rows):
    for name, count in (("digits", 13), ("toy", 10), ("mini", 10), ("cifar10", 14), ("paper", 14),
                        ("full", 320)):
        found = rows(name)
        assert len(found) == count
    assert "N2048_w128_B16_lr1e-4_s0" in found and "N16384_w192_B128_lr4e-4_s0" in found
    assert "_w192_B16_" in next(iter(found))           # the longest first
    assert len(rows("cifar10", SEEDS="0 1 2")) == 42
    assert len(rows("digits", SEEDS="0 1 2")) == 33     # its REPEATS are among them
    assert len(rows("digits", REPEATS="")) == 11
    mini = rows("mini")
    assert mini["N1024_w32_B64_lr1e-3_s0"].endswith("--images 741376")
    assert mini["N256_w32_B64_lr1e-3_s0"].endswith("--images 185344")
    assert mini["N1024_w32_B128_lr1e-3_s0"].endswith("--images 741376")
    lists = {"N": " 8\n16", "WIDTH": "8 16", "BATCH": "4", "LR": "1e-3"}
    assert len(rows("custom", **lists)) == 3 and len(rows("custom", **lists, DESIGN="full")) == 4


def test_any_option_can_vary(rows):
    one = {"N": "8", "WIDTH": "8", "BATCH": "4", "LR": "1e-3"}
    found = rows("custom", VARY="ema .99 .999; process ddpm flow\n--flip off on;", **one)
    base = "N8_w8_B4_lr1e-3_s0"
    assert set(found) == {f"{base}_ema0.99", f"{base}_ema0.999", f"{base}_flow_ema0.99",
                          f"{base}_flip_ema0.99"}
    assert "--flip" in found[f"{base}_flip_ema0.99"] and "--flip" not in found[f"{base}_ema0.99"]
    assert len(rows("custom", VARY="ema .99 .999; process ddpm flow", DESIGN="full", **one)) == 4
    found = rows("paper", VARY="conditional on off", **one)
    assert "--conditional" in found[f"{base}_conditional"] and "--conditional" not in found[base]
    assert "--mults 1 2 4" in rows("custom", VARY="mults 1,2 1,2,4", **one)[base]


def test_a_switch_that_is_on_by_default_can_vary(monkeypatch):
    import measure
    import train

    def more(real=train.make_parser):
        parser = real()
        parser.add_argument("--bias", action=argparse.BooleanOptionalAction, default=True)
        return parser
    monkeypatch.setattr(train, "make_parser", more)
    assert measure.sweep_words("--bias", ["on", "off"]) == [[], ["--no-bias"]]
    assert measure.sweep_words("--flip", ["on", "off"]) == [["--flip"], []]
    lists = {"TRAIN": ["--data", "toy", "--no-bias"], "IMAGES": ["8"], "DESIGN": ["one"],
             "REPEATS": [], "--n": ["8"], "--seed": ["0"], "--bias": ["on", "off"]}
    assert [options.bias for _, options in measure.sweep_rows(lists).values()] == [True, False]
    assert measure.sweep_words("--lr", ["-1e-3", "2"]) == [["--lr=-1e-3"], ["--lr", "2"]]


@pytest.mark.parametrize("change, word", [
    ({"N": "4k"}, "--n"), ({"BATCH": "16 08 32"}, "--batch 08"), ({"BATCH": "0"}, "--batch 0"),
    ({"N": "16 16"}, "--n 16: is listed twice"), ({"LR": "fast"}, "--lr"),
    ({"LR": "1e-3 .001"}, "two values of a list are the same"), ({"SEEDS": "-1"}, "--seed"),
    ({"VARY": "flips off on"}, "--flips: unknown"), ({"VARY": "flip yes"}, "--flip yes"),
    ({"VARY": "n 4 8"}, "--n: has two lists"), ({"VARY": "ema"}, "--ema: has no values"),
    ({"VARY": "device cpu cuda"}, "two values"), ({"SAMPLE": "--num x[$(touch y)0]"}, "--num"),
    ({"SAMPLE": "--exact"}, "SAMPLE: --exact"), ({"SAMPLE": "--switch=4@.5"}, "SAMPLE: --switch"),
    ({"MEASURE": "--plant"}, "MEASURE: --planted"), ({"TRAIN": "--wid 64"}, "--width is set by"),
    ({"MEASURE": "--denoisers"}, "MEASURE: --denoisers"),
    ({"MEASURE": "--features none.pt2"}, "MEASURE: --features none.pt2: no such file")])
def test_bad_lists_are_refused_by_name(rows, capsys, change, word):
    with pytest.raises(SystemExit) as stop:
        rows("toy", **change)
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """A tiny sweep that nobody disturbed, and its output. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("sweep") / "runs"
    return out, sweep(out, "toy", cwd=out.parent)


def tables(out):
    """metrics.csv and, less the timings, log.csv of every run of a sweep."""
    found = {}
    for path in sorted(out.glob("N*/*.csv")):
        with open(path) as file:
            found[path.relative_to(out)] = [
                {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "check")}
                for row in csv.DictReader(file)]
    return found


def test_end_to_end(left_alone):
    out, text = left_alone
    assert "2 runs in" in text and text.count("done   N") == 2
    for name in (ONE, OTHER):
        assert tables(out)[Path(name, "metrics.csv")][-1]["step"] == "12"
        assert (out / "logs" / f"{name}.log").exists()
        assert list((out / "figures").glob(f"run_{name}*.png"))
    assert (out / "figures/claims.md").exists()
    status = sweep(out, "toy", "--status").splitlines()
    assert len(status) == 3 and all("done" in line for line in status[1:])


def test_the_plan_times_what_never_ran(tmp_path):
    text = sweep(tmp_path / "none", "toy", "--dry-run", "--time")
    assert text.count("not started") == 2 and "?" not in text and "hours" in text
    assert "never timed" not in text and "2 to do" in text and not (tmp_path / "none").exists()


def test_a_time_is_that_of_runs_that_cost_the_same(left_alone):
    import measure as measure_py
    import train as train_py
    text = sweep(left_alone[0], "toy", "--dry-run", LR="1e-3 2e-3")
    assert text.count("not started") == 1 and "?" not in text       # as fast as the two that ran
    plain = measure_py.step_of(train_py.parse([]))
    for words, same in ((["--n", "4096", "--lr", "1", "--ema", ".9"], True),
                        (["--blocks", "2"], False), (["--mults", "1", "2"], False),
                        (["--batch", "32"], False), (["--amp", "off"], False)):
        assert (measure_py.step_of(train_py.parse(words)) == plain) is same, words


def state(out, name=ONE, train=(), sample=(), measure=(), images=48):
    """The state of a run of left_alone, for these intentions."""
    import measure as measure_py
    import sample as sample_py
    import train as train_py
    base = ["--data", "toy", "--size", "8", "--mults", "1", "2", "--blocks", "1", "--width", "8",
            "--batch", "4", "--lr", "1e-3", "--n", "4", "--images", str(images),
            *TINY["TRAIN"].split()]
    return measure_py.sweep_state(
        out / name, train_py.parse([*base, *train]),
        sample_py.parse(["", *TINY["SAMPLE"].split(), *sample]),
        measure_py.parse(["", *measure]))[0]


def test_a_run_of_another_code_or_of_other_images_is_not_done(left_alone, tmp_path, monkeypatch):
    import measure as measure_py
    import train as train_py
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(left_alone[0], tmp_path / "runs")
    with monkeypatch.context() as changed:
        changed.chdir(out)                          # as if the cache had not been there before
        changed.setattr(train_py.F, "silu", lambda x, inplace=False: train_py.F.gelu(x))
        assert state(out) == "another run: network, by the code of today"
    with monkeypatch.context() as changed:
        changed.chdir(out / ONE)
        changed.setitem(train_py.WEIGHTINGS, "uniform", lambda process, t: 1 + t)
        assert "another run: loss, optimizer or training step" in state(out)
    with monkeypatch.context() as changed:          # of a run that has ended nothing more will come
        changed.setattr(train_py, "evaluation_steps", lambda steps, *_: [*range(2, steps + 1, 2)])
        assert state(out) == "done" and state(out, images=96) == "training, step 12 of 24"
    # the same name of a file, with other images
    data = tmp_path / "d.npz"
    options = ["--data", str(data), "--size", "8"]
    for seed in (0, 1):
        g = np.random.default_rng(seed)
        np.savez(data, **{f"{split}_{what}": g.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
                          if what == "images" else np.arange(12)
                          for split in ("train", "test") for what in ("images", "labels")})
        measure_py.hashes_today.cache_clear()
        if not seed:
            words = TINY["TRAIN"] + " --mults 1 2 --blocks 1 --width 8 --batch 4 --lr 1e-3 --n 4"
            train_py.main([*words.split(), *options, "--steps", "12", "--out", str(out / "own")])
            assert state(out, "own", train=options).startswith("sampling")
    assert state(out, "own", train=options) == "another run: held-out images, training images"
    # data of the project's own that a user has changed
    monkeypatch.setattr(train_py, "HELD_OUT", 20)
    measure_py.hashes_today.cache_clear()
    assert state(out) == "another run: held-out images"
    measure_py.hashes_today.cache_clear()


def test_what_drew_and_measured_a_run_belongs_to_its_state(left_alone, tmp_path, monkeypatch):
    import measure as measure_py
    import sample as sample_py
    out = shutil.copytree(left_alone[0], tmp_path / "runs")
    assert state(out) == "done"
    with monkeypatch.context() as changed:
        real = sample_py.ddim_step
        changed.setattr(sample_py, "ddim_step", lambda *a, **k: [x * 1.1 for x in real(*a, **k)])
        assert "another run: sampler, which drew samples" in state(out)

    def edge(c):
        """The same columns by another name."""
        return measure_py.sharpness(c)
    others = [m for m in measure_py.METRICS if m is not measure_py.sharpness]
    monkeypatch.setattr(measure_py, "METRICS", (*others, edge))
    assert state(out).startswith("measuring, 0 of")
    measure_py.main([str(out / ONE), "--device", "cpu"])
    assert state(out) == "done"


def test_a_run_whose_weights_are_gone_is_measured_again(left_alone, tmp_path):
    out = shutil.copytree(left_alone[0], tmp_path / "runs")
    shutil.rmtree(out / ONE / "snapshots")
    (out / ONE / "last.pt").unlink()
    (out / ONE / "metrics.csv").unlink()
    assert state(out).startswith("measuring, 0 of")
    assert f"done   {ONE}" in sweep(out, "toy", "--only", ONE, cwd=tmp_path)
    assert state(out) == "done" and not (out / ONE / "snapshots").exists()


def test_done_is_only_what_was_intended(left_alone, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(left_alone[0], out)
    assert state(out) == "done" and state(out, name="N99") == "not started"
    assert state(out, train=["--lr", "2e-3"]) == "another run: lr"
    assert state(out, train=["--ema", ".5"]) == "another run: ema"
    assert state(out, train=["--data", "cifar10"]) == "another run: data"
    assert state(out, images=32) == "another run: last step, 12"
    assert state(out, images=96) == "training, step 12 of 24"
    assert state(out, sample=["--eta", "1"]).startswith("sampling, 0 of")
    assert state(out, sample=["--num", "7"]).startswith("measuring, 0 of")
    assert state(out, sample=["--num", "5"]) == "done"
    assert state(out, measure=["--features", "inception"]).startswith("measuring, 0 of")
    next((out / ONE / "samples").rglob("0000004.npz")).unlink()
    assert state(out).startswith("sampling")
    import train
    rows = train.read_csv(out / OTHER / "metrics.csv")      # older than an option of sample.py
    train.write_csv(out / OTHER / "metrics.csv",
                    [{k: v for k, v in row.items() if k != "setting_switch"} for row in rows])
    assert state(out, OTHER, train=["--n", "6"]) == "done"
    (out / OTHER / "metrics.csv").unlink()
    assert state(out, OTHER, train=["--n", "6"]).startswith("measuring, 0 of")


def test_a_damaged_table_is_named(left_alone, fake, tmp_path, monkeypatch, capsys):
    import measure
    import train
    out = tmp_path / "runs"
    shutil.copytree(left_alone[0], out)
    log = out / ONE / "log.csv"
    log_rows = train.read_csv(log)
    log_rows[-1]["step"] = "slots[$(touch x)0]"
    train.write_csv(log, log_rows)
    sweep(out, "toy", "--list", script=fake)
    monkeypatch.setattr(sys, "stdin", io.StringIO(fake.with_name("asked").read_text()))
    capsys.readouterr()
    measure.sweep([str(out)])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    states = {row[0]: row[1] for row in rows}
    assert states[OTHER] == "done" and states[ONE].startswith("unreadable, ValueError")
    assert "touch x" in states[ONE]


def test_finished_runs_of_other_options_are_refused_and_their_weights_stay(left_alone, tmp_path):
    out = tmp_path / "runs"
    shutil.copytree(left_alone[0], out)
    before = files(out)
    text = sweep(out, "toy", code=2, KEEP="none", TRAIN=TINY["TRAIN"] + " --ema .5")
    assert "holds another run: ema" in text and files(out) == before and before


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_killed_at_random_moments_it_ends_with_the_same_tables(left_alone, tmp_path):
    # KILLS=20 python -m pytest -k random_moments is for those who want to be surer: of two runs
    out, script, chance = tmp_path / "runs", tmp_path / "sweep.sh", random.Random(0)
    shutil.copy(ROOT / "sweep.sh", script)
    for name in ("train.py", "sample.py", "measure.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "plot.py").touch()              # it takes longer than all the rest
    change = {"TRAIN": TINY["TRAIN"] + " --save-minutes 0",
              "N": TINY["N"] if "KILLS" in os.environ else "6"}
    env = {**os.environ, **TINY, **change, "OUT": str(out)}
    for _ in range(int(os.environ.get("KILLS", "2"))):
        whom = chance.choice(["all", "one"])
        with subprocess.Popen([SHELL, str(script), "toy"], env=env, cwd=tmp_path,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(1, 5))
            alive = processes_of(out)
            for pid in alive if whom == "all" else [chance.choice(alive)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
            kill_all(out)                       # what one dead process left behind
            process.wait()
    sweep(out, "toy", script=script, cwd=tmp_path, **change)
    alone = tables(left_alone[0])
    runs = [path.parent.name for path in out.glob("*/args.json")]
    assert tables(out) == {k: v for k, v in alone.items() if k.parts[0] in runs} and OTHER in runs


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A real Slurm of one node, this machine, for one test; its files in a temporary folder."""
    if os.geteuid() or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs root and Debian's packages slurm-wlm and munge (.ci/run installs them)")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    home, host = Path(tempfile.mkdtemp(prefix="slurm")), socket.gethostname().split(".")[0]
    (home / "state").mkdir()
    (home / "spool").mkdir()
    (home / "key").write_bytes(os.urandom(1024))
    (home / "key").chmod(0o600)
    (home / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={home}/munge.socket
SlurmUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()}
PartitionName=main Nodes=ALL Default=YES State=UP
""")
    monkeypatch.setenv("SLURM_CONF", str(home / "slurm.conf"))
    files = {"socket": "munge.socket", "key-file": "key", "log-file": "munged.log",
             "pid-file": "munged.pid", "seed-file": "seed"}
    daemons = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for command in (
        ["munged", "--foreground", "--force", *(f"--{k}={home / v}" for k, v in files.items())],
        ["slurmctld", "-D", "-c", "-L", f"{home}/slurmctld.log"],
        ["slurmd", "-D", "-L", f"{home}/slurmd.log"])]
    yield
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait()
    shutil.rmtree(home)


def test_a_real_slurm_runs_a_row_of_the_grid(slurm, fake, tmp_path):
    subprocess.run(["sbatch", "--array=1", f"--output={tmp_path}/task.txt", "sweep.sh", "toy"],
                   env={**os.environ, **TINY, "OUT": str(tmp_path / "runs")}, cwd=fake.parent,
                   timeout=60, check=True, stdout=subprocess.DEVNULL)
    until, printed = time.monotonic() + 90, ""
    while "done" not in printed and "failed" not in printed and time.monotonic() < until:
        time.sleep(0.2)                         # sbatch --wait looks only every few seconds
        if (tmp_path / "task.txt").exists():
            printed = (tmp_path / "task.txt").read_text()
    assert printed.split() == ["start", "N6", "done", "N6"]
    assert (tmp_path / "runs/N6/done").exists() and not (tmp_path / "runs/N4").exists()


def test_twins_of_the_class_have_the_names_that_it_looks_for(tmp_path):
    names = sweep(tmp_path, "class", "5", "--list", N="64", SEEDS="0 1").split()
    one, other = "N64_w8_B4_lr1e-3_s0", "N64_w8_B4_lr1e-3_s1"
    assert sorted(names) == [one, f"{one}_offset64", other, f"{other}_offset64"]
