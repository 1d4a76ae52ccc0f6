"""plot.py: every figure is written, for made-up runs and a real one."""

import csv
import importlib
import json

import numpy as np
import pytest

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
    assert (tiny_run / "figures/summary.csv").exists()
    assert len(list((tiny_run / "figures").glob("*.png"))) == 4


@pytest.mark.parametrize("name", ["train", "sample", "measure", "plot"])
def test_every_script_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
