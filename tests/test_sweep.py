"""sweep.sh, end to end on tiny settings: plan, run, skip, continue, fail, refuse."""

import csv
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = {"N": "4 6", "WIDTH": "8", "BATCH": "4", "LR": "1e-3", "IMAGES": "48", "GPUS": "cpu cpu",
        "TRAIN": "--embed 16 --eval-images 10 --first-eval 4",
        "SAMPLE": "--num 6 --sampling-steps 3", "PYTHON": sys.executable}


def sweep(out, *arguments, code=0, **change):
    """Run sweep.sh; returns its output."""
    env = {**os.environ, **TINY, "OUT": str(out), **change}
    done = subprocess.run([str(ROOT / "sweep.sh"), *arguments], env=env, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout
    return done.stdout


def plan(grid, **change):
    """The lines of a dry run with the grid's own lists."""
    clean = dict.fromkeys(("N", "WIDTH", "BATCH", "LR", "IMAGES", "TRAIN", "SAMPLE", "MEASURE"), "")
    return sweep("none", grid, "--dry-run", **{**clean, **change}).splitlines()


def test_the_grids():
    for grid, runs in (("toy", 10), ("cifar10", 14), ("paper", 14), ("full", 320)):
        lines = plan(grid)
        names = {line.split()[0] for line in lines[:-1]}
        assert len(names) == len(lines) - 1 == runs
        assert all(line.endswith("not started") for line in lines[:-1])
    assert "N2048_w128_B16_lr1e-4_s0" in names and "N16384_w192_B128_lr4e-4_s0" in names
    assert len(plan("cifar10", SEEDS="0 1 2")) == 43
    assert len(plan("custom", N="8 16", WIDTH="8 16", BATCH="4", LR="1e-3", DESIGN="full")) == 5


def test_bad_arguments_are_named():
    assert "unknown grid" in sweep("none", "huge", code=2)
    assert "usage" in sweep("none", code=2)
    assert "--wet-run: unknown option" in sweep("none", "toy", "--wet-run", code=2)
    assert "4k" in sweep("none", "toy", N="4k", code=2)
    assert "LR=fast" in sweep("none", "toy", LR="fast", code=2)
    assert not os.path.exists(ROOT / "none")


def test_end_to_end_then_nothing_to_do_then_a_failure_then_mended(tmp_path):
    out = tmp_path / "runs"
    first = sweep(out, "toy")
    assert "2 runs in" in first and first.count("done   N") == 2
    for name in ("N4_w8_B4_lr1e-3_s0", "N6_w8_B4_lr1e-3_s0"):
        with open(out / name / "metrics.csv") as file:
            assert list(csv.DictReader(file))[-1]["step"] == "12"
        assert (out / "logs" / f"{name}.log").exists()
        assert (out / "figures" / f"run_{name}.png").exists()
    assert (out / "figures/claims.md").exists()
    assert "0 to do" in sweep(out, "toy", "--dry-run")

    # One run cannot go on, another is new: the new one is done, the broken one named.
    broken, table = out / "N4_w8_B4_lr1e-3_s0", (out / "N4_w8_B4_lr1e-3_s0/metrics.csv").read_bytes()
    (broken / "metrics.csv").unlink()
    samples = (broken / "samples/0000012.npz").read_bytes()
    (broken / "samples/0000012.npz").write_bytes(samples[:100])
    second = sweep(out, "toy", code=1, N="4 6 8")
    assert "FAILED N4_w8_B4_lr1e-3_s0" in second and "0000012.npz" in second
    assert "done   N8_w8_B4_lr1e-3_s0" in second and "start  N6" not in second
    assert "1 of 3 runs failed" in second
    (broken / "samples/0000012.npz").unlink()
    assert "1 to do" in sweep(out, "toy", N="4 6 8")
    assert (broken / "metrics.csv").read_bytes() == table


def test_a_second_sweep_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another sweep" in sweep(tmp_path, "toy", code=2)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "measure.py", "plot.py"])
def test_every_script_has_help(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], check=True, text=True,
                          capture_output=True)
    assert "usage" in done.stdout
