"""train.py: data, noise processes, U-Net, training, resume, bad input."""

import argparse
import csv
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from torch import nn

import train
from train import PROCESSES, UNet


def columns(run, without=("images_per_second", "seconds", "check")):
    """The rows of log.csv without what depends on the machine's mood."""
    with open(run / "log.csv") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def same_state(a, b):
    """Whether two run folders end with the same bits."""
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    for part in ("net", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(),
                    strict=True):
        assert all(torch.equal(x[k], y[k]) for k in x)
    return a["step"] == b["step"]


# --- Noise processes ------------------------------------------------------------------------------


def test_ddpm_schedule_matches_its_product():
    beta = np.linspace(1e-4, 0.02, 1000)
    k = np.array([1, 2, 500, 1000])
    a, s = PROCESSES["ddpm"].schedule(torch.tensor(k / 1000, dtype=torch.float32))
    expected = np.array([np.prod(1 - beta[:i]) for i in k])
    np.testing.assert_allclose(a.numpy() ** 2, expected, rtol=2e-6)
    np.testing.assert_allclose(s.numpy() ** 2, 1 - expected, rtol=2e-6)


def test_every_ddpm_time_finds_its_step_in_float32():
    t = torch.arange(1001, dtype=torch.float32) / 1000
    a, _ = PROCESSES["ddpm"].schedule(t)
    assert (a[1:] < a[:-1]).all() and a[0] == 1


def test_flow_is_a_straight_line():
    a, s = PROCESSES["flow"].schedule(torch.tensor([0.0, 0.25, 1.0]))
    assert a.tolist() == [1, 0.75, 0] and s.tolist() == [0, 0.25, 1]


SCHEDULES = {"linear_beta": (train.linear_beta, 1000), "straight_line": (train.straight_line, 0)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predicts", train.PREDICTIONS)
def test_a_prediction_gives_back_x0_and_eps(schedule, predicts):
    function, T = SCHEDULES[schedule]
    process = train.Process(function, train.PREDICTIONS[predicts], T)
    x0, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0),
                          dtype=torch.float64)
    t = process.time(torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64))
    xt, prediction = train.q_sample(process, x0, t, eps), process.target(x0, eps, t)
    a, s = (train.expand(v, xt) for v in process.schedule(t))
    torch.testing.assert_close(xt, a * x0 + s * eps)
    got = process.x0_eps(xt, prediction, t)
    torch.testing.assert_close(got[0], x0)
    torch.testing.assert_close(got[1], eps)
    torch.testing.assert_close(process.predict_given_x0(xt, x0, t), prediction)


def test_fingerprints_go_by_what_a_process_computes():
    flow = PROCESSES["flow"]
    again = train.Process(lambda t: (1 - t, t), lambda a, s: (-1.0, 1.0))
    assert train.fingerprint(flow) == train.fingerprint(again)
    others = [PROCESSES["ddpm"], flow._replace(predicts=train.PREDICTIONS["v"]),
              flow._replace(schedule=lambda t: (1 - t**2, t)), PROCESSES["ddpm"]._replace(T=500)]
    assert len({train.fingerprint(p) for p in (flow, *others)}) == 5


def test_sigmoid_weighting_is_sid2s():
    # Hoogeboom, eq. 4, with bias 2, for the error of rectified flow's velocity
    t = torch.linspace(0.01, 0.99, 50)
    e2 = math.exp(2)
    closed = 2 * e2 * t * (1 - t) / ((1 - t) ** 2 + e2 * t**2)
    torch.testing.assert_close(train.sigmoid_weight(PROCESSES["flow"], t), closed, rtol=1e-3,
                               atol=1e-4)
    # It is a weight of the error of eps, whatever is predicted: x0's is a^2 / s^2 as large.
    ddpm = PROCESSES["ddpm"]
    x0 = ddpm._replace(predicts=train.PREDICTIONS["x0"])
    t = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(train.sigmoid_weight(x0, t),
                               train.sigmoid_weight(ddpm, t) * ddpm.log_snr(t).exp(), rtol=1e-4,
                               atol=0)
    # DDPM's times are discrete: -dlambda/dt is a difference of neighbours, at the last of two
    every = torch.arange(1, 1001) / 1000
    log_snr = ddpm.log_snr(every.double())
    slope = torch.gradient(log_snr, spacing=1e-3)[0]
    torch.testing.assert_close(train.sigmoid_weight(ddpm, every),
                               (-slope * torch.sigmoid(2 - log_snr)).float(), rtol=1e-3, atol=0)
    assert train.sigmoid_weight(PROCESSES["flow"], torch.tensor([0.0, 1.0])).isfinite().all()


def test_a_conditional_model_is_held_to_the_classes_that_it_has_seen(tmp_path, capsys):
    few = ["--data", "digits", "--n", "16", "--width", "8", "--mults", "1", "--blocks", "1",
           "--embed", "16", "--batch", "4", "--eval-images", "20", "--steps", "2"]
    train.main([*few, "--out", str(tmp_path / "all")])
    train.main([*few, "--conditional", "--out", str(tmp_path / "known")])
    everything, known = (train.load_subset(run, train.read_run(run)) for run in (
        tmp_path / "all", tmp_path / "known"))
    seen = set(known.train_labels.tolist())
    assert seen == {1, 2, 5, 6, 7, 8, 9} and len(everything.heldout_images) == 517
    assert set(known.heldout_labels.tolist()) == seen
    keep = np.isin(everything.heldout_labels, list(seen))
    assert np.array_equal(known.heldout_images, everything.heldout_images[keep])
    # none of the held-out images has a class that the model was trained on
    arrays = {f"{split}_{what}": value for split, label in (("train", 0), ("test", 1)) for
              what, value in (("images", np.random.default_rng(label).integers(
                  0, 255, (4, 8, 8, 1), np.uint8)), ("labels", np.full(4, label)))}
    np.savez(tmp_path / "apart.npz", **arrays)
    few[1], few[3] = str(tmp_path / "apart.npz"), "4"
    train.main([*few, "--out", str(tmp_path / "fine")])
    with pytest.raises(SystemExit):
        train.main([*few, "--conditional", "--out", str(tmp_path / "none")])
    assert "--conditional: no two held-out images" in capsys.readouterr().err


def test_weighting_is_only_the_trained_loss(tmp_path):
    for weighting in ("uniform", "sigmoid"):
        train.main([*TINY, "--process", "flow", "--weighting", weighting, "--steps", "4",
                    "--out", str(tmp_path / weighting)])
    one, two = (columns(tmp_path / weighting)[0] for weighting in ("uniform", "sigmoid"))
    assert one != two and float(one["train_loss"]) == pytest.approx(float(two["train_loss"]),
                                                                    rel=0.02)


def test_loss_of_a_known_prediction():
    class Zero(nn.Module):
        def forward(self, xt, t, labels):
            return torch.zeros_like(xt)
    x0, eps = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 2.0)
    t = torch.tensor([0.5, 1.0])
    assert train.diffusion_loss(Zero(), PROCESSES["ddpm"], x0, t, eps).tolist() == [4.0, 4.0]
    assert train.diffusion_loss(Zero(), PROCESSES["flow"], x0, t, eps).tolist() == [2.25, 2.25]


def test_ddpm_draws_every_time_equally():
    t = PROCESSES["ddpm"].time((torch.arange(5000) + 0.5) / 5000)
    counts = torch.bincount(torch.round(t * 1000).long(), minlength=1001)
    assert counts[0] == 0 and (counts[1:] == 5).all()


# --- U-Net ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "parameters"), [
    (16, 2_926_690), (32, 7_929_010), (64, 25_751_890), (128, 92_670_610), (192, 201_286_610)])
def test_parameter_counts_are_the_studys(width, parameters):
    with torch.device("meta"):
        conditional, plain = UNet(width, classes=10), UNet(width)
    assert sum(p.numel() for p in conditional.parameters()) == parameters
    assert sum(p.numel() for p in plain.parameters()) == parameters - 5120


def test_study_net_has_15_attentions_and_two_downsamplings():
    with torch.device("meta"):
        net = UNet(64)
        assert sum(isinstance(m, train.Attention) for m in net.modules()) == 15
        shapes = []
        for m in net.modules():
            if isinstance(m, train.Attention):
                m.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1]))
        assert net(torch.zeros(1, 3, 32, 32), torch.zeros(1)).shape == (1, 3, 32, 32)
    assert sorted(shapes) == [8] * 8 + [16] * 7


def shaken(net):
    """The net with noise on every weight, so that nothing is at its zero initialisation."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


@pytest.mark.parametrize(("channels", "classes", "attention"), [
    (3, 3, None), (1, 0, [0]), (3, 0, [])])
def test_every_parameter_gets_a_finite_gradient(channels, classes, attention):
    torch.manual_seed(0)
    net = shaken(UNet(8, (1, 2), 1, attention, 16, classes, channels))
    x = torch.randn(4, channels, 8, 8)
    labels = torch.tensor([0, 1, 2, 0]) if classes else None
    net(x, torch.rand(4), labels).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_output_depends_on_time_and_label_and_not_on_neighbours_in_the_batch():
    torch.manual_seed(0)
    net = shaken(UNet(8, (1, 2), 1, None, 16, 3)).eval()
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        whole = net(x, t, y)
        one_by_one = torch.cat([net(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
        torch.testing.assert_close(whole, one_by_one, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(whole, net(x, t.flip(0), y), atol=1e-4)
        assert not torch.allclose(whole, net(x, t, (y + 1) % 3), atol=1e-4)


def test_compiles_without_a_graph_break():
    torch.manual_seed(0)
    net = shaken(UNet(8, (1, 2), 1, None, 16, 3))
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 2])
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), net(x, t, y), rtol=1e-4, atol=1e-5)


def test_runs_in_bfloat16_within_its_precision():
    torch.manual_seed(0)
    net = shaken(UNet(8, (1, 2), 1, None, 16))
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with train.autocast(torch.device("cpu"), "bf16"):
        half = net(x, t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), net(x, t), rtol=0.05, atol=0.05)


# --- Data -----------------------------------------------------------------------------------------


def test_toy_subsets_are_nested_and_held_out_images_are_others():
    small, large = train.load_data("toy", 8), train.load_data("toy", 32)
    assert small.train_images.shape == (8, 16, 16, 3) and small.train_images.dtype == np.uint8
    assert np.array_equal(small.train_images, large.train_images[:8])
    assert np.array_equal(small.train_labels, large.train_labels[:8])
    assert np.array_equal(small.heldout_images, large.heldout_images)
    assert len(small.heldout_images) == 5120
    assert not np.array_equal(small.train_images, small.heldout_images[:8])
    assert np.array_equal(train.load_data("toy", 8, offset=8).train_images,
                          large.train_images[8:16])
    assert set(np.unique(train.load_data("toy", 200).train_labels)) == {0, 1, 2}


def write_npz(path, n=10, size=8, channels=3, **change):
    """A well-formed data file, with arrays replaced (or, if None, left out)."""
    g = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = g.integers(0, 256, (n, size, size, channels), np.uint8)
        arrays[f"{split}_labels"] = g.integers(0, 4, n)
    arrays = {k: v for k, v in {**arrays, **change}.items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_npz_subsets_and_area_average(tmp_path):
    path = write_npz(tmp_path / "d.npz", channels=1)
    data, half = train.load_data(str(path), 4), train.load_data(str(path), 4, size=4)
    with np.load(path) as archive:
        assert np.array_equal(data.train_images, archive["train_images"][:4])
        assert np.array_equal(data.heldout_labels, archive["test_labels"])
        mean = archive["train_images"][:4].reshape(4, 4, 2, 4, 2, 1).mean((2, 4))
    assert half.train_images.shape == (4, 4, 4, 1)
    assert np.abs(half.train_images - mean).max() <= 0.5


def test_hash_names_the_subset(tmp_path):
    path = write_npz(tmp_path / "d.npz")
    one, other = (train.load_data(str(path), n) for n in (4, 5))
    assert train.hash_of(*one[:2]) == train.hash_of(*train.load_data(str(path), 4)[:2])
    assert train.hash_of(*one[:2]) != train.hash_of(*other[:2])


# --- Randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (3, 16), (16, 16)])
def test_every_epoch_visits_every_image_once(n, batch):
    steps = n * batch // math.gcd(n, batch) // batch
    seen = torch.cat([train.batch_indices(n, batch, 0, step) for step in range(1, steps + 1)])
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in seen.split(n))
    if steps > 1:
        assert not torch.equal(train.batch_indices(n, batch, 0, 1),
                               train.batch_indices(n, batch, 1, 1))


def test_step_draws_is_a_function_of_seed_and_step():
    def draw(seed, step):
        return train.step_draws(PROCESSES["ddpm"], (4, 3, 8, 8), seed, step)
    torch.manual_seed(5)
    first = draw(0, 3)
    torch.randn(7)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(0, 3), strict=True))
    assert not torch.equal(first[1], draw(0, 4)[1]) and not torch.equal(first[1], draw(1, 3)[1])


def test_evaluation_steps_are_shared_by_runs_of_any_length():
    short, long = train.evaluation_steps(700), train.evaluation_steps(5000)
    assert short == [64, 91, 128, 181, 256, 362, 512, 700]
    assert set(short) - {700} <= set(long) and long[-1] == 5000
    assert train.evaluation_steps(10) == [10]


# --- Training -------------------------------------------------------------------------------------


def test_run_folder_holds_what_it_should(sampled_run):
    assert [int(r["step"]) for r in columns(sampled_run)] == [4, 6, 8, 11, 16]
    row = columns(sampled_run)[-1]
    levels = [float(row[f"train_loss_level{k}"]) for k in range(10)]
    assert np.isclose(np.mean(levels), float(row["train_loss"]), rtol=1e-6)
    assert int(row["images"]) == 64
    record = json.loads((sampled_run / "args.json").read_text())
    net = UNet(8, (1, 2), 1, None, 16)
    assert record["parameters"] == sum(p.numel() for p in net.parameters())
    assert record["subset_sha256"] == train.hash_of(*train.load_data("toy", 8, 8)[:2])
    assert {p.stem for p in (sampled_run / "snapshots").glob("*.pt")} == {
        "0000004", "0000006", "0000008", "0000011", "0000016"}


def test_first_step_is_adam_and_a_warmed_up_average(tmp_path):
    train.main([*TINY, "--steps", "1", "--lr", "0.01", "--out", str(tmp_path / "r")])
    record, last = train.read_run(tmp_path / "r"), train.load_checkpoint(tmp_path / "r/last.pt")
    start = train.build_net(record["options"], (8, 8, 3), 0).state_dict()
    # Adam's first step is lr * g / (|g| + 1e-8), so lr where there is a gradient; the output layer
    # has one.
    moved = (last["net"]["conv_out.bias"] - start["conv_out.bias"]).abs()
    torch.testing.assert_close(moved, torch.full((3,), 0.01), rtol=1e-3, atol=0)
    for k, w0 in start.items():
        torch.testing.assert_close(last["ema"][k], w0 + (1 - 2 / 11) * (last["net"][k] - w0))


def test_evaluation_gives_equal_images_equal_losses():
    net = shaken(UNet(8, (1, 2), 1, None, 16))
    images = torch.from_numpy(train.load_data("toy", 5, 8).train_images)
    once = train.evaluate(net, PROCESSES["ddpm"], images, None, 20)
    again = train.evaluate(net, PROCESSES["ddpm"], images.repeat(2, 1, 1, 1), None, 20)
    assert once[0] == again[0] and np.array_equal(once[1], again[1])


def test_overfits_four_images(tmp_path):
    train.main([*TINY, "--n", "4", "--width", "16", "--embed", "32", "--lr", "3e-3",
                "--steps", "300", "--first-eval", "75", "--eval-images", "200",
                "--out", str(tmp_path / "r")])
    rows = columns(tmp_path / "r")
    train_loss, heldout_loss = (float(rows[-1][f"{s}_loss"]) for s in ("train", "heldout"))
    assert train_loss < 0.08 and heldout_loss > 1.5 * train_loss
    assert train_loss < 0.6 * float(rows[0]["train_loss"])


@pytest.mark.parametrize("more", [[], ["--process", "flow", "--conditional", "--flip"]])
def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, more):
    train.main([*TINY, *more, "--steps", "12", "--out", str(tmp_path / "a")])
    train.main([*TINY, *more, "--steps", "6", "--out", str(tmp_path / "b")])
    train.main([*TINY, *more, "--steps", "12", "--out", str(tmp_path / "b")])
    assert same_state(tmp_path / "a", tmp_path / "b")
    assert columns(tmp_path / "a") == columns(tmp_path / "b")


def test_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    options = [*TINY, "--steps", "80", "--save-minutes", "0", "--out"]
    command = [sys.executable, str(ROOT / "train.py"), *options]
    train.main([*options, str(tmp_path / "a")])
    kills = 0
    for wait in (0.0, 0.23):
        with subprocess.Popen([*command, str(tmp_path / "b")], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            before = (tmp_path / "b/last.pt").stat().st_mtime_ns if kills else 0
            while process.poll() is None:           # until it has saved anew, then a moment more
                if (tmp_path / "b/last.pt").exists() and (
                        tmp_path / "b/last.pt").stat().st_mtime_ns > before:
                    time.sleep(wait)
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert torch.load(tmp_path / "b/last.pt", weights_only=True)["step"] < 80
    train.main([*options, str(tmp_path / "b")])
    assert same_state(tmp_path / "a", tmp_path / "b")
    assert columns(tmp_path / "a") == columns(tmp_path / "b")
    for a in (tmp_path / "a/snapshots").iterdir():
        a, b = (torch.load(f, weights_only=True)["ema"]
                for f in (a, tmp_path / "b/snapshots" / a.name))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_follow_one_and_resume(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone",
           "--nproc_per_node=2", "--", str(ROOT / "train.py"), *TINY, "--flip", "--conditional",
           "--out", str(tmp_path / "b")]
    for name, steps in (("b", "5"), ("a", "9")):
        train.main([*TINY, "--flip", "--conditional", "--steps", steps,
                    "--out", str(tmp_path / name)])
    subprocess.run([*run, "--steps", "9"], check=True, capture_output=True)
    one, two = ({r["step"]: r for r in columns(tmp_path / name)} for name in "ab")
    assert set(one) < set(two)                      # two has the end of its first part, step 5
    for step, row in one.items():
        for key, value in row.items():
            if key != "machine":
                assert float(value) == pytest.approx(float(two[step][key]), rel=2e-4), (step, key)


def test_the_average_keeps_no_history(tmp_path, monkeypatch):
    seen = []
    def look(net, *rest):
        seen.append([p.grad_fn or p.requires_grad for p in net.parameters()])
        return 1.0, np.ones(10)
    monkeypatch.setattr(train, "evaluate", look)
    train.main([*TINY, "--steps", "4", "--out", str(tmp_path / "r")])
    assert seen and not any(any(one) for one in seen)


def test_a_lost_log_is_written_again_and_a_lost_checkpoint_made_anew(tmp_path):
    run = tmp_path / "r"
    train.main([*TINY, "--steps", "8", "--out", str(run)])
    log = train.read_csv(run / "log.csv")
    (run / "log.csv").write_text("step,im")
    (run / ".last.pt.1.tmp").write_text("left behind by a kill")
    train.main([*TINY, "--steps", "11", "--out", str(run)])
    assert train.read_csv(run / "log.csv")[:3] == log and not (run / ".last.pt.1.tmp").exists()
    (run / "last.pt").unlink()
    train.main([*TINY, "--steps", "11", "--out", str(run)])         # finished all the same
    train.main([*TINY, "--steps", "12", "--out", str(run)])         # starts over
    train.main([*TINY, "--steps", "12", "--out", str(tmp_path / "a")])
    assert same_state(run, tmp_path / "a")


def test_a_finished_run_says_so_and_does_nothing(sampled_run, capsys):
    def files():
        return {p: p.stat().st_mtime_ns for p in sampled_run.rglob("*.*") if p.suffix != ".lock"}
    before = files()
    train.main([*TINY, "--steps", "16", "--out", str(sampled_run)])
    assert "finished" in capsys.readouterr().out and files() == before


def test_a_checkpoint_between_evaluations_is_evaluated_when_training_ends_there(tmp_path,
                                                                                monkeypatch):
    run, real = tmp_path / "r", train.update

    def stops(state, loss, step, ema):
        if step == 8:
            raise KeyboardInterrupt
        real(state, loss, step, ema)
    monkeypatch.setattr(train, "update", stops)
    with pytest.raises(SystemExit):
        train.main([*TINY, "--steps", "16", "--save-minutes", "0", "--out", str(run)])
    monkeypatch.undo()
    assert sorted(p.stem for p in run.glob("snapshots/*.pt")) == ["0000004", "0000006"]
    for _ in range(2):                          # the second time there is nothing to do
        train.main([*TINY, "--steps", "7", "--out", str(run)])
        steps = [row["step"] for row in train.read_csv(run / "log.csv")]
        assert steps == ["4", "6", "7"] and (run / "snapshots/0000007.pt").exists()


def test_another_loss_or_optimizer_does_not_go_on_with_a_run(tmp_path, sampled_run, refused,
                                                             monkeypatch):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    before, real = (run / "last.pt").read_bytes(), torch.optim.Adam
    for steps in ("16", "20"):
        argv = [*TINY, "--steps", steps, "--out", run]
        with monkeypatch.context() as changed:
            for weight in (lambda process, t: 1 + t, lambda process, t: 1 + 1e-3 * t):
                changed.setitem(train.WEIGHTINGS, "uniform", weight)
                refused(train.main, argv, run, "loss")
        with monkeypatch.context() as changed:
            changed.setattr(torch.optim, "Adam", lambda *a, **k: real(*a, betas=(0.9, 0.99), **k))
            refused(train.main, argv, run, "optimizer")
        with monkeypatch.context() as changed:      # which three steps do not show
            changed.setattr(torch.optim, "Adam", lambda *a, **k: real(*a, eps=1e-9, **k))
            refused(train.main, argv, "last.pt", "eps")
    assert (run / "last.pt").read_bytes() == before


def clipped(state, loss, step, ema, real=train.update):
    """train.update of a tenth of the loss from step 2 on, which Adam cannot undo."""
    real(state, loss * (1 if step == 1 else 0.1), step, ema)


def clipped_gradients(state, loss, step, ema):
    """train.update with the norm of the gradients cut at 1, which is seen where they are larger."""
    state.scaler.scale(loss).backward()
    torch.nn.utils.clip_grad_norm_(state.net.parameters(), 1.0)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(state.averages, state.weights, 1 - min(ema, (1 + step) / (10 + step)))


def averaged(state, loss, step, ema, real=train.update):
    """train.update with an average that warms up sooner."""
    real(state, loss, step + 5, ema)


@pytest.mark.parametrize(("place", "name", "value"), [
    (train.F, "silu", lambda x, inplace=False: train.F.gelu(x)),
    (train, "update", clipped), (train, "update", clipped_gradients), (train, "update", averaged),
    (train, "to_float", lambda x: x.permute(0, 3, 1, 2).float() / 255)])
def test_another_network_or_training_step_does_not_go_on_with_a_run(
        tmp_path, sampled_run, refused, monkeypatch, place, name, value):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    before = (run / "last.pt").read_bytes()
    monkeypatch.setattr(place, name, value)
    what = "network, by the code of today" if name == "silu" else "training step, by the code"
    refused(train.main, [*TINY, "--steps", "20", "--out", run], run, what)
    assert (run / "last.pt").read_bytes() == before


def test_a_learning_rate_schedule_goes_on(tmp_path, monkeypatch, refused):
    def warmed(state, loss, step, ema, real=train.update):
        for group in state.optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 6)
        real(state, loss, step, ema)
    monkeypatch.setattr(train, "update", warmed)
    for out, ends in (("a", ("4", "8")), ("b", ("8",))):
        for steps in ends:
            train.main([*TINY, "--lr", "1e-3", "--steps", steps, "--out", str(tmp_path / out)])
    a, b = (train.load_checkpoint(tmp_path / out / "last.pt")["net"] for out in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_what_the_code_computes_is_the_same_on_every_call():
    options = vars(train.parse([*TINY, "--flip", "--weighting", "sigmoid", "--process", "flow"]))
    state = torch.get_rng_state()
    one, two = train.step_values(options), train.step_values(options)
    assert one == two and len(one) == 25 and torch.equal(torch.get_rng_state(), state)
    nets = [train.build_net(options | {"seed": seed}, (8, 8, 3), 3) for seed in (0, 1)]
    one, two = (train.network_values(net, (8, 8, 3), 3) for net in nets)
    assert one == two and np.std(one) > 0.1         # of the code alone, not of the seed
    assert one[:16] == one[16:] and torch.equal(torch.get_rng_state(), state)
    nets[0].middle[0].block.conv1 = nn.Sequential(nets[0].middle[0].block.conv1, nn.Dropout(0.5))
    dropped = train.network_values(nets[0], (8, 8, 3), 3)
    assert train.alike(one[:16], dropped) and not train.alike(one, dropped)
    # of an older run there are fewer numbers; more than today's are another's
    assert train.alike(one[:16], two) and not train.alike(one, two[:16])
    assert not train.alike([*one[:15], one[15] + 0.1], two)


def test_a_loss_that_changes_labels_is_another(monkeypatch):
    options = vars(train.parse([*TINY, "--conditional"]))
    before = train.step_values(options)

    def dropped(net, data, args, step, real=train.training_loss):
        def without(xt, t, labels):
            return net(xt, t, torch.where(torch.arange(len(t)) % 2 > 0, 10, labels))
        return real(without, data, args, step)
    monkeypatch.setattr(train, "training_loss", dropped)
    assert not train.alike(before, train.step_values(options), 2e-5)


@pytest.mark.parametrize(("name", "value"), [
    ("LEVELS", 12), ("LEVELS", 5),
    ("evaluate", lambda *given, real=train.evaluate: [1.01 * loss for loss in real(*given)])])
def test_an_evaluation_that_changes_is_another(monkeypatch, name, value):
    options = vars(train.parse([*TINY]))
    before = train.step_values(options)
    monkeypatch.setattr(train, name, value)
    assert not train.alike(before, train.step_values(options), 2e-5)


def test_a_network_may_have_parameters_of_any_shape(tmp_path, monkeypatch):
    class Gain(train.UNet):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, xt, t, labels=None):
            return self.gain * super().forward(xt, t, labels)
    monkeypatch.setattr(train, "UNet", Gain)
    train.main([*TINY, "--steps", "2", "--out", str(tmp_path / "r")])
    train.main([*TINY, "--steps", "3", "--out", str(tmp_path / "r")])


def test_an_option_that_is_a_tuple_goes_on(tmp_path, monkeypatch):
    def more(real=train.make_parser):
        parser = real()
        parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
        return parser
    monkeypatch.setattr(train, "make_parser", more)
    for steps in ("4", "6"):
        train.main([*TINY, "--steps", steps, "--out", str(tmp_path / "r")])
    assert train.read_run(tmp_path / "r")["options"]["betas"] == [0.9, 0.999]


def test_what_a_run_began_with_stays_in_its_record(tmp_path, sampled_run, monkeypatch):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    monkeypatch.setattr(torch, "__version__", "9.9")
    train.main([*TINY, "--steps", "17", "--save-minutes", "1", "--out", str(run)])
    record, rows = train.read_run(run), train.read_csv(run / "log.csv")
    assert record["options"]["save_minutes"] == 1 and record["versions"]["torch"] != "9.9"
    assert [row["machine"].endswith("9.9") for row in rows] == [False] * 5 + [True]


@pytest.mark.parametrize(("option", "given"), [
    ({"type": lambda text: float(text), "default": 0.5}, ["--mine", "2"]),
    ({"action": "count", "default": 0}, ["--mine"]),
    ({"action": argparse.BooleanOptionalAction}, ["--no-mine"])])
def test_an_option_of_any_type_makes_a_run_that_can_be_read(tmp_path, monkeypatch, option, given):
    def more(real=train.make_parser):
        parser = real()
        parser.add_argument("--mine", **option)
        return parser
    monkeypatch.setattr(train, "make_parser", more)
    for steps in ("4", "5"):
        train.main([*TINY, *given, "--steps", steps, "--out", str(tmp_path / "r")])
    assert train.read_run(tmp_path / "r")["options"]["mine"] in (2, 1, False)


def test_an_option_that_cannot_be_kept_is_refused_before_training(tmp_path, monkeypatch, refused):
    def more(real=train.make_parser):
        parser = real()
        parser.add_argument("--mine", type=Path, default=Path("x"))
        return parser
    monkeypatch.setattr(train, "make_parser", more)
    refused(train.main, [*TINY, "--out", tmp_path / "r"], "args.json")
    assert not (tmp_path / "r").exists()


def test_another_number_of_ddpm_steps_ends_in_noise_as_well(monkeypatch):
    monkeypatch.setattr(train, "DDPM_T", 4000)
    train._alpha_bar.cache_clear()
    try:
        process = train.PROCESSES["ddpm"]._replace(T=4000)
        a, s = process.schedule(torch.arange(1, 4001, dtype=torch.float64) / 4000)
        assert (a.diff() < 0).all() and 0 < s[0] < 0.01 and a[-1] < 0.01
    finally:
        train._alpha_bar.cache_clear()


def test_divergence_names_the_step_and_keeps_the_last_good_state(tmp_path, refused):
    run = tmp_path / "r"
    train.main([*TINY, "--steps", "1", "--lr", "1e18", "--out", str(run)])
    good = (run / "last.pt").read_bytes()
    refused(train.main, [*TINY, "--steps", "9", "--lr", "1e18", "--out", run],
            "step 2", "last good state, of step 1", code=1)
    assert (run / "last.pt").read_bytes() == good


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path):
    run = tmp_path / "r"
    train.main([*TINY, "--steps", "4", "--out", str(run)])
    before = (run / "last.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *TINY, "--steps", "9", "--out", str(run)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True, check=False, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "error" in done.stderr
    assert (run / "last.pt").read_bytes() == before
    train.main([*TINY, "--steps", "9", "--out", str(run)])
    train.main([*TINY, "--steps", "9", "--out", str(tmp_path / "a")])
    assert same_state(run, tmp_path / "a")


# --- Names and bad input --------------------------------------------------------------------------


def test_run_names_tell_configurations_apart():
    names = {train.run_name(train.parse(more)) for more in (
        [], ["--n", "4096"], ["--lr", "5e-5"], ["--process", "flow"], ["--conditional"], ["--flip"],
        ["--mults", "1", "2"], ["--offset", "2048"], ["--data", "toy"], ["--seed", "1"],
        ["--ema", "0.99"], ["--ema", "0.999"])}
    assert "N2048_w128_B16_lr1e-4_s0" in names and len(names) == 12
    assert "N2048_w128_B16_lr1e-4_s0_flow" in names


@pytest.mark.parametrize(("more", "words"), [
    (["--n", "1"], ["--n 1"]),
    (["--n", "-5"], ["--n -5", "above 0"]),
    (["--data", "cifar11"], ["--data cifar11", "unknown"]),
    (["--data", "none.npz"], ["none.npz", "no such file"]),
    (["--size", "9"], ["--size 9", "multiple of 2"]),
    (["--size", "2"], ["--size 2"]),
    (["--data", "digits", "--size", "6"], ["--size 6", "divide the 8"]),
    (["--device", "cpu:"], ["--device cpu:"]),
    (["--eval-images", "20000000"], ["--eval-images"]),
    (["--width", "48"], ["--width 48", "96"]),
    (["--attention", "2"], ["--attention"]),
    (["--embed", "15"], ["--embed 15"]),
    (["--batch", "0"], ["--batch 0"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--steps", "4", "--images", "16"], ["--steps", "--images"]),
    (["--eval-images", "5"], ["--eval-images 5"]),
    (["--offset", "-1"], ["--offset -1"]),
    (["--ema", "1"], ["--ema"]),
    (["--device", "tpu"], ["--device tpu"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
])
def test_bad_options_are_named_and_nothing_is_written(tmp_path, refused, more, words):
    refused(train.main, [*TINY, *more, "--out", tmp_path / "r"], *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"test_labels": None}, ["test_labels", "missing"]),
    ({"train_images": np.zeros((10, 8, 8, 3), np.float32)}, ["train_images", "float32"]),
    ({"train_images": np.zeros((10, 8, 6, 3), np.uint8)}, ["train_images", "(10, 8, 6, 3)"]),
    ({"train_images": np.zeros((10, 8, 8, 2), np.uint8)}, ["train_images", "(10, 8, 8, 2)"]),
    ({"train_labels": np.zeros(9, np.int64)}, ["train_labels"]),
    ({"train_labels": np.zeros(10)}, ["train_labels"]),
    ({"test_images": np.zeros((10, 4, 4, 3), np.uint8)}, ["differ"]),
])
def test_bad_data_files_are_named(tmp_path, refused, change, words):
    path = write_npz(tmp_path / "d.npz", **change)
    refused(train.main, [*TINY, "--data", path, "--out", tmp_path / "r"], path, *words)
    assert not (tmp_path / "r").exists()


def test_more_images_than_there_are_and_a_file_cut_short(tmp_path, refused):
    path = write_npz(tmp_path / "d.npz")
    refused(train.main, [*TINY, "--data", path, "--n", "11", "--out", tmp_path / "r"],
            "--n 11", "10")
    path.write_bytes(path.read_bytes()[:-500])
    refused(train.main, [*TINY, "--data", path, "--out", tmp_path / "r"], path, "damaged")


def test_folders_that_are_refused(tmp_path, sampled_run, refused):
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    before = (run / "last.pt").read_bytes()
    refused(train.main, [*TINY, "--steps", "20", "--lr", "1e-3", "--out", run], run, "another lr")
    (tmp_path / "file").write_text("x")
    refused(train.main, [*TINY, "--out", tmp_path / "file/r"], "file/r", code=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("x")
    refused(train.main, [*TINY, "--out", tmp_path / "notes"], "no args.json")
    with train.claimed(run, train.read_run(run)):
        refused(train.main, [*TINY, "--steps", "20", "--out", run], "another process")
    assert (run / "last.pt").read_bytes() == before
    (run / "last.pt").write_bytes(before[:1000])
    refused(train.main, [*TINY, "--steps", "20", "--out", run], "last.pt", "damaged")
    (run / "args.json").write_text("{")
    refused(train.main, [*TINY, "--steps", "20", "--out", run], "args.json", "damaged")
