"""plot.py: onsets, fits and claims on made-up runs whose answers are known; every figure is
written.
"""

import csv
import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import plot

STEPS = np.round(64 * 2 ** (np.arange(25) / 2))


def write_csv(path, columns):
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))


def made_up(root, onset, n=16, width=32, batch=16, lr=1e-3, seed=0, best=1.0):
    """A run whose held-out loss is lowest at `onset`, whose copy ratio is 1/2 at 8 onset."""
    run = root / f"N{n}_w{width}_B{batch}_lr{lr}_s{seed}"
    (run / "neighbours").mkdir(parents=True)
    options = {"n": n, "width": width, "batch": batch, "lr": lr, "seed": seed,
               "data": "toy", "steps": 1}
    (run / "args.json").write_text(json.dumps({"options": options, "parameters": width**2}))
    x = np.log(STEPS / onset)
    loss = {"step": STEPS, "train_loss": 0.1 * np.exp(-0.1 * x), "heldout_loss": 0.1 + 0.01 * x**2}
    for k in range(10):
        loss |= {f"train_loss_level{k}": loss["train_loss"],
                 f"heldout_loss_level{k}": loss["heldout_loss"]}
    write_csv(run / "log.csv", loss)
    copies = 1 / (1 + (STEPS / (8 * onset)) ** -2.0)
    distance = best * (1 + (x - 1) ** 2 / (1 + 0.03 * (x - 1) ** 4))      # falls, rises, falls
    columns = {"step": STEPS, "copy_ratio": copies, "null_copy_ratio": 0 * STEPS}
    for name in ("fid", "sw"):
        columns |= {f"{name}_pixels_{s}": distance for s in ("train", "heldout")}
    write_csv(run / "metrics.csv", columns)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    for step, share in zip(STEPS, copies, strict=True):
        ratios = np.where(np.arange(200) < 200 * share, 0.1, 0.9)
        np.savez(run / f"neighbours/{int(step):07d}.npz", samples=images, nearest=images,
                 ratios=ratios)
    return run


@pytest.fixture
def study(tmp_path):
    """Sweeps of all four factors, onset proportional to N, 1/width, 1/B and lr^-0.5; two seeds."""
    for seed in (0, 1):
        for n, best in ((16, 3.0), (32, 2.0), (64, 1.0)):
            made_up(tmp_path, 10 * n, n=n, seed=seed, best=best)
        for width, best in ((8, 5.0), (16, 4.0)):
            made_up(tmp_path, 160 * 32 / width, width=width, seed=seed, best=best)
        for batch, best in ((8, 2.0), (32, 4.0)):
            made_up(tmp_path, 160 * 16 / batch, batch=batch, seed=seed, best=best)
        for lr, best in ((2.5e-4, 4.0), (4e-3, 2.0)):
            made_up(tmp_path, 160 * (lr / 1e-3) ** -0.5, lr=lr, seed=seed, best=best)
    return tmp_path


def test_onsets_rate_and_best_fidelity_of_a_known_run(tmp_path):
    run = plot.Run(made_up(tmp_path, 300.0))
    onset = plot.taus(run)
    assert onset["heldout_min"] == pytest.approx(300, rel=1e-6)     # a parabola in log step
    assert onset["heldout_25"] == pytest.approx(300 * math.exp(math.sqrt(2.5)), rel=0.01)
    assert onset["copy_50"] == pytest.approx(2400, rel=0.01)
    assert onset["copy_10"] == pytest.approx(2400 / 3, rel=0.02)
    # the logistic's slope is at most 1/2 a unit of ln(step): .347 a doubling
    assert 0.2 < plot.memorization_rate(run) < 0.347
    value, step = plot.best_fidelity(run)
    assert step <= onset["copy_01"] < STEPS[-1] and value >= 1


def test_intervals_hold_the_onset_and_narrow_with_its_slope(tmp_path):
    run = plot.Run(made_up(tmp_path, 300.0))
    onset, intervals = plot.taus(run), plot.tau_intervals(run)
    assert set(intervals) == set(plot.TAUS)
    for name, (low, high) in intervals.items():
        assert low < onset[name] < high
    assert 1.1 < intervals["copy_10"][1] / intervals["copy_10"][0] < 3
    assert intervals["heldout_min"] == (STEPS[3], STEPS[5])     # 181 and 362 around 256


def test_not_reached_is_a_value(tmp_path):
    row = plot.summarize(plot.Run(made_up(tmp_path, 1e7)))
    last = f">{STEPS[-1]:.0f}"
    assert row["tau_heldout_min"] == row["tau_heldout_25"] == row["tau_copy_10"] == last
    assert row["memorization_rate"] == "nan"


def test_crossing_interpolates_in_log_step():
    steps, values = np.array([100.0, 400.0, 1600.0]), np.array([0.0, 0.2, 0.1])
    assert plot.crossing(steps, values, 0.1) == pytest.approx(200)
    assert plot.crossing(steps, values, 0.3) == math.inf
    assert plot.crossing(steps, values, 0.0) == 100


def test_power_law_and_its_error():
    x = np.array([1.0, 2, 4, 8])
    assert plot.power_law(np.stack([x, 5 * x**1.5], 1)) == \
        pytest.approx((1.5, math.log(5), 0), abs=1e-9)
    slope, _, error = plot.power_law(np.stack([x, x * np.array([1, 1.1, 0.9, 1])], 1))
    assert abs(slope - 1) < 3 * error
    assert plot.power_law(np.array([[2.0, 3], [2, 4]])) is None


@pytest.mark.parametrize(("values", "answer"), [
    ([10, 5, 8, 4], True), ([10, 5, 4, 3], False), ([10, 5, 8, 9], False), ([3, 5, 4], False)])
def test_double_descent(values, answer):
    assert plot.is_double_descent(np.array(values, float)) is answer


def test_claims_of_a_study_with_known_answers(study):
    (runs,) = plot.find_runs(study).values()
    found = plot.sweeps(runs)
    assert {f: sorted(g) for f, g in found.items()} == {
        "n": [16, 32, 64], "width": [8, 16, 32], "batch": [8, 16, 32], "lr": [2.5e-4, 1e-3, 4e-3]}
    assert all(len(runs) == 2 for group in found.values() for runs in group.values())
    rows = {row[0]: row for row in plot.claims(runs, found)}
    verdicts = {number: row[3] for number, row in rows.items()}
    assert "lowest: 1.00 ± 0.0" in rows["3a"][2] and "lowest: -1.00" in rows["5a"][2]
    assert verdicts == {"1": "supported", "2": "supported", "3a": "supported",
                        "3b": "not supported", "3c": "supported", "4a": "supported",
                        "4b": "supported", "5a": "supported", "5b": "supported", "5c": "supported",
                        "6a": "supported", "6b": "supported", "7": verdicts["7"]}
    assert "of 18 runs" in rows["7"][2]


def test_everything_is_drawn(tmp_path):
    for n, width in ((16, 8), (32, 8), (16, 16)):
        made_up(tmp_path, 10 * n, n=n, width=width)
    plot.main([str(tmp_path)])
    figures = tmp_path / "figures"
    names = {p.name for p in figures.iterdir()}
    for factor in ("n", "width"):
        assert {f"sweep_{factor}.png", f"tau_{factor}.png", f"novelty_{factor}.png"} <= names
    for run in tmp_path.glob("N*"):
        assert {f"{kind}_{run.name}.png"
                for kind in ("run", "samples", "levels", "ratios")} <= names
    assert all(p.read_bytes()[1:4] == b"PNG" for p in figures.glob("*.png"))
    with open(figures / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and rows[0]["tau_copy_50"]
    assert "| 1 | " in (figures / "claims.md").read_text()


def test_a_real_run_is_drawn(tiny_run):
    plot.main([str(tiny_run)])
    assert (tiny_run / "figures/claims.md").exists()
    assert len(list((tiny_run / "figures").glob("*.png"))) == 4


def test_other_configurations_are_kept_apart(study):
    run = made_up(study, 100.0, n=128)
    record = json.loads((run / "args.json").read_text())
    record["options"]["data"] = "cifar10"
    (run / "args.json").write_text(json.dumps(record))
    assert sorted(len(runs) for runs in plot.find_runs(study).values()) == [1, 18]


def test_bad_input(tmp_path, refused):
    refused(plot.main, [tmp_path / "none"], "none", "no such folder")
    refused(plot.main, [tmp_path], "no run")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/args.json").write_text("{")
    refused(plot.main, [tmp_path / "r"], "args.json", "damaged")


def test_plot_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import plot"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["train", "sample", "measure", "plot"])
def test_every_script_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
