"""Shared by the tests: tiny settings, and one tiny run that is trained, sampled and measured
once.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background ignores it
os.environ["OMP_NUM_THREADS"] = "1"             # the scripts that tests start, too

TINY = ["--data", "toy", "--size", "8", "--width", "8", "--mults", "1", "2", "--blocks", "1",
        "--embed", "16", "--batch", "4", "--n", "8", "--eval-images", "20", "--first-eval", "4",
        "--device", "cpu"]


@pytest.fixture(scope="session")
def sampled_run(tmp_path_factory):
    """A run folder of 16 steps, sampled. Tests copy it before they change anything."""
    import sample
    import train
    os.chdir(tmp_path_factory.mktemp("cwd"))    # data/cache goes here, not into the repository
    run = tmp_path_factory.mktemp("runs") / "sampled"
    train.main([*TINY, "--steps", "16", "--out", str(run)])
    more = ["--num", "12", "--device", "cpu", "--sampling-steps"]
    sample.main([str(run), *more, "5"])
    sample.main([str(run), *more, "5", "--exact"])
    return run


@pytest.fixture(scope="session")
def tiny_run(sampled_run):
    """A run folder of 16 steps, sampled and measured. Tests copy it before they change anything."""
    import measure
    run = sampled_run.with_name("tiny")
    shutil.copytree(sampled_run, run)
    measure.main([str(run), "--device", "cpu"])
    return run


@pytest.fixture
def refused(capsys):
    """refused(main, argv, word, ...): main ends with exit code 2 and one line that has all
    words.
    """
    def check(main, argv, *words, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == code
        assert len(lines) == 1, lines
        for word in words:
            assert str(word) in lines[0]
    return check


def pytest_configure(config):
    """Name the project's own marker: `python -m pytest -m cuda` runs what needs a GPU."""
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
