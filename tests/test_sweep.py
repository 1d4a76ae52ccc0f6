"""sweep.sh, end to end on tiny settings: plan, run, skip, continue, fail, refuse."""

import contextlib
import csv
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT

TINY = {"N": "4 6", "WIDTH": "8", "BATCH": "4", "LR": "1e-3", "IMAGES": "48", "GPUS": "cpu cpu",
        "TRAIN": "--embed 16 --eval-images 10 --first-eval 4",
        "SAMPLE": "--num 6 --sampling-steps 3", "PYTHON": sys.executable}


def sweep(out, *arguments, code=0, **change):
    """Run sweep.sh; returns its output."""
    env = {**os.environ, **TINY, "OUT": str(out), **change}
    done = subprocess.run([str(ROOT / "sweep.sh"), *arguments], env=env, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout
    return done.stdout


def names(grid, **change):
    """The runs of a grid with its own lists."""
    own = dict.fromkeys(("N", "WIDTH", "BATCH", "LR", "IMAGES", "TRAIN", "SAMPLE", "MEASURE"), "")
    return sweep("none", grid, "--list", **{**own, **change}).split()


def test_the_grids():
    for grid, runs in (("toy", 10), ("cifar10", 14), ("paper", 14), ("full", 320)):
        found = names(grid)
        assert len(set(found)) == len(found) == runs
    assert "N2048_w128_B16_lr1e-4_s0" in found and "N16384_w192_B128_lr4e-4_s0" in found
    assert found[0].startswith("N") and "_w192_B16_" in found[0]        # the longest first
    assert len(names("cifar10", SEEDS="0 1 2")) == 42
    assert len(names("custom", N="8 16", WIDTH="8 16", BATCH="4", LR="1e-3")) == 3
    assert len(names("custom", N="8 16", WIDTH="8 16", BATCH="4", LR="1e-3", DESIGN="full")) == 4


def test_the_plan_times_what_never_ran(tmp_path):
    text = sweep(tmp_path / "none", "toy", "--dry-run")
    assert text.count("not started") == 2 and "--time" in text
    text = sweep(tmp_path / "none", "toy", "--dry-run", "--time")
    assert "timing N4" in text and "?" not in text.split("timing", 1)[1] and "sampling left" in text
    assert not (tmp_path / "none").exists()


def test_bad_arguments_are_named():
    assert "unknown grid" in sweep("none", "huge", code=2)
    assert "usage" in sweep("none", code=2)
    assert "--wet-run: unknown option" in sweep("none", "toy", "--wet-run", code=2)
    assert "4k" in sweep("none", "toy", N="4k", code=2)
    assert "LR=fast" in sweep("none", "toy", LR="fast", code=2)
    assert "KEEP=some" in sweep("none", "toy", KEEP="some", code=2)
    assert "no such run" in sweep("none", "toy", "--only", "N5", code=2)
    assert not os.path.exists(ROOT / "none")


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """A tiny sweep that nobody disturbed, and its output. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("sweep") / "runs"
    return out, sweep(out, "toy")


def tables(out):
    """metrics.csv and, less the timings, log.csv of every run of a sweep."""
    found = {}
    for path in sorted(out.glob("N*/*.csv")):
        with open(path) as file:
            found[path.relative_to(out)] = [
                {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in csv.DictReader(file)]
    return found


def test_end_to_end(left_alone):
    out, text = left_alone
    assert "2 runs in" in text and text.count("done   N") == 2
    for name in ("N4_w8_B4_lr1e-3_s0", "N6_w8_B4_lr1e-3_s0"):
        assert tables(out)[Path(name, "metrics.csv")][-1]["step"] == "12"
        assert (out / "logs" / f"{name}.log").exists()
        assert (out / "figures" / f"run_{name}.png").exists()
    assert (out / "figures/claims.md").exists()
    assert "0 to do" in sweep(out, "toy", "--dry-run")
    status = sweep(out, "toy", "--status").splitlines()
    assert len(status) == 3 and all("done" in line for line in status[1:])
    assert sweep(out, "toy", "--list").split() == ["N4_w8_B4_lr1e-3_s0", "N6_w8_B4_lr1e-3_s0"]


def test_a_failure_is_named_the_others_go_on_and_mended_it_continues(left_alone, tmp_path):
    out, one, other = tmp_path / "runs", "N4_w8_B4_lr1e-3_s0", "N6_w8_B4_lr1e-3_s0"
    shutil.copytree(left_alone[0], out)
    for name in (one, other):
        (out / name / "metrics.csv").unlink()
    samples = out / one / "samples/0000012.npz"
    samples.write_bytes(samples.read_bytes()[:100])
    text = sweep(out, "toy", code=1, KEEP="last")
    assert f"FAILED {one}" in text and "0000012.npz" in text and "1 of 2 runs failed" in text
    assert f"done   {other}" in text
    assert [p.name for p in (out / other / "snapshots").iterdir()] == ["0000012.pt"]
    assert (out / other / "last.pt").exists() and len(list((out / one / "snapshots").iterdir())) > 1
    samples.unlink()
    plan = sweep(out, "toy", "--dry-run")
    assert "1 to do" in plan and "?" not in plan
    sweep(out, "toy", "--only", one)
    assert tables(out) == tables(left_alone[0])


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


def test_killed_at_random_moments_it_ends_with_the_same_tables(left_alone, tmp_path):
    # KILLS=20 python -m pytest -k random_moments is for those who want to be surer
    out, chance = tmp_path / "runs", random.Random(0)
    rounds = [chance.choice(["all", "one"]) for _ in range(int(os.environ.get("KILLS", "2")))]
    env = {**os.environ, **TINY, "OUT": str(out), "TRAIN": TINY["TRAIN"] + " --save-minutes 0"}
    for whom in rounds:
        with subprocess.Popen([str(ROOT / "sweep.sh"), "toy"], env=env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            time.sleep(chance.uniform(1, 5))
            alive = processes_of(out)
            for pid in alive if whom == "all" else [chance.choice(alive)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.5)
            while left := processes_of(out):    # what one dead process left behind
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()
    sweep(out, "toy", TRAIN=env["TRAIN"])
    assert tables(out) == tables(left_alone[0])


def test_terminated_it_stops_its_children_and_says_how_to_go_on(tmp_path):
    env = {**os.environ, **TINY, "OUT": str(tmp_path)}
    with subprocess.Popen([str(ROOT / "sweep.sh"), "toy"], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert "toy" in process.stdout.readline() and "start" in process.stdout.readline()
        process.terminate()
        text = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and f"continues (OUT={tmp_path})" in text
    assert not processes_of(tmp_path)


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


def test_a_real_slurm_runs_a_row_of_the_grid(slurm, left_alone, tmp_path):
    name = "N6_w8_B4_lr1e-3_s0"
    subprocess.run(["sbatch", "--array=1", f"--output={tmp_path}/task.txt", "sweep.sh", "toy"],
                   env={**os.environ, **TINY, "OUT": str(tmp_path / "runs")}, cwd=ROOT, timeout=60,
                   check=True, stdout=subprocess.DEVNULL)
    until, printed = time.monotonic() + 90, ""
    while "done" not in printed and "failed" not in printed and time.monotonic() < until:
        time.sleep(0.2)                         # sbatch --wait looks only every few seconds
        if (tmp_path / "task.txt").exists():
            printed = (tmp_path / "task.txt").read_text()
    assert printed.split() == ["start", name, "done", name]
    alone = tables(left_alone[0])
    assert tables(tmp_path / "runs") == {k: v for k, v in alone.items() if k.parts[0] == name}


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another sweep" in sweep(tmp_path, "toy", code=2)
