"""sample.py: the update rule, the exact denoiser, noise that is a function of the index, bad
input.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY

import sample
import train
from train import PROCESSES


def pictures(n, seed=0, size=8):
    """Random images in [-1, 1], (n, 3, size, size)."""
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_exact_denoiser_of_one_image_leads_to_it(name, eta):
    process, image = PROCESSES[name], pictures(1)
    predict = sample.exact_predictor(process, image)
    found = sample.sample(predict, process, image.shape[1:], [(0, i) for i in range(3)], 20, eta)
    torch.testing.assert_close(found, image.expand(3, -1, -1, -1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_denoiser_of_many_images_copies_all_of_them(name):
    process, images = PROCESSES[name], pictures(4)
    predict = sample.exact_predictor(process, images)
    found = sample.sample(predict, process, images.shape[1:], [(0, i) for i in range(40)], 100)
    distance = (found[:, None] - images).flatten(2).norm(dim=2)
    assert distance.amin(1).max() < 0.05
    assert set(distance.argmin(1).tolist()) == {0, 1, 2, 3}


def test_exact_denoiser_is_the_posterior_mean():
    images, xt = pictures(5, 1).double(), pictures(6, 2).double()
    for a, s in ((0.9, 0.4), (0.2, 3.0), (0.0, 1.0), (1.0, 1.5)):
        weights = torch.stack([torch.exp(-((xt - a * y) ** 2).sum((1, 2, 3)) / (2 * s**2))
                               for y in images], dim=1)
        mean = torch.einsum("bn,nchw->bchw", weights / weights.sum(1, keepdim=True), images)
        torch.testing.assert_close(sample.exact_denoiser(xt, a, s, images), mean)


def test_exact_denoiser_at_no_noise_is_the_nearest_image_and_finite():
    images = pictures(5, 1)
    found = sample.exact_denoiser(images + 0.01, 1.0, 0.0, images)
    torch.testing.assert_close(found, images)


def test_exact_predictor_keeps_to_the_class():
    images, labels = pictures(4), torch.tensor([0, 1, 0, 1])
    want = torch.tensor([1, 1, 0])
    predict = sample.exact_predictor(PROCESSES["flow"], images, (labels, want))
    found = sample.sample(predict, PROCESSES["flow"], images.shape[1:],
                          [(0, i) for i in range(3)], 50)
    nearest = (found[:, None] - images).flatten(2).norm(dim=2).argmin(1)
    assert torch.equal(labels[nearest], want)


@pytest.mark.parametrize("step", [1000, 500, 2])
def test_eta_1_is_the_ddpm_posterior(step):
    # Ho, eq. 6 and 7, with k = step: mean and variance of q(x_{k-1} | x_k, x0)
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    b, now, before = beta[step - 1], bar[step - 1], bar[step - 2]
    x0, eps, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    xt = np.sqrt(now) * x0 + np.sqrt(1 - now) * eps
    mean = (np.sqrt(before) * b / (1 - now)) * x0 + (np.sqrt(1 - b) * (1 - before) / (1 - now)) * xt
    variance = (1 - before) / (1 - now) * b
    t, t_next = (torch.tensor(k / 1000, dtype=torch.float64) for k in (step, step - 1))
    got = sample.ddim_step(PROCESSES["ddpm"], xt, eps, t, t_next, 1.0, z)
    torch.testing.assert_close(got, mean + np.sqrt(variance) * z, rtol=1e-9, atol=1e-9)


def test_flow_at_eta_0_is_the_euler_step():
    x, v = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for t, t_next in ((1.0, 0.75), (0.5, 0.25), (0.25, 0.0)):
        t, t_next = (torch.tensor(value, dtype=torch.float64) for value in (t, t_next))
        got = sample.ddim_step(PROCESSES["flow"], x, v, t, t_next, 0.0, None)
        torch.testing.assert_close(got, x + (t_next - t) * v)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_fall_from_one_to_zero(name):
    for steps in (1, 7, 250):
        times = PROCESSES[name].times(steps)
        assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
        assert (times[1:] < times[:-1]).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_i_does_not_depend_on_the_batch(eta):
    torch.manual_seed(0)
    net = train.UNet(8, (1, 2), 1, None, 16).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    def run(indices):
        return sample.sample(net, PROCESSES["ddpm"], (3, 8, 8), [(0, i) for i in indices], 5, eta)
    torch.randn(3)
    together = run(range(6))
    torch.testing.assert_close(torch.cat([run([i]) for i in range(6)]), together,
                               rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_samples_file_and_grid(tiny_run):
    for step in (4, 16):
        images, labels, settings = sample.read_samples(tiny_run / f"samples/{step:07d}.npz")
        assert images.shape == (12, 8, 8, 3) and images.dtype == np.uint8
        assert (labels == -1).all() and settings["sampling_steps"] == 5
        assert (tiny_run / f"samples/{step:07d}.png").read_bytes()[1:4] == b"PNG"


def test_sampling_is_repeatable_skips_what_is_done_and_extends(tiny_run, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    more = ["--sampling-steps", "5", "--device", "cpu"]
    sample.main([str(run), "--num", "12", *more])
    assert "0 of 5" in capsys.readouterr().out
    before, _, _ = sample.read_samples(run / "samples/0000016.npz")
    sample.main([str(run), "--num", "20", "--steps-only", "16", "--batch-size", "3", *more])
    after, _, _ = sample.read_samples(run / "samples/0000016.npz")
    assert len(after) == 20
    assert np.abs(after[:12].astype(int) - before).max() <= 1       # rounding, at other batch sizes


def test_conditional_samples_have_every_label_in_turn(tmp_path):
    run = tmp_path / "r"
    train.main([*TINY, "--conditional", "--process", "flow", "--steps", "4", "--out", str(run)])
    sample.main([str(run), "--num", "7", "--sampling-steps", "3", "--device", "cpu"])
    sample.main([str(run), "--num", "7", "--sampling-steps", "20", "--exact", "--device", "cpu"])
    _, labels, _ = sample.read_samples(run / "samples/0000004.npz")
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    images, labels, _ = sample.read_samples(run / "samples/exact.npz")
    data = train.load_data("toy", 8, 8)
    nearest = np.abs(images[:, None].astype(int) - data.train_images).sum((2, 3, 4)).argmin(1)
    assert np.array_equal(data.train_labels[nearest], labels)


@pytest.mark.parametrize(("more", "words"), [
    (["--steps-only", "5"], ["--steps-only 5"]),
    (["--num", "0"], ["--num"]),
    (["--eta", "2"], ["--eta 2"]),
    (["--sampling-steps", "1001"], ["--sampling-steps 1001", "1000"]),
    (["--sampling-steps", "0"], ["--sampling-steps 0"]),
    (["--sampling-steps", "9", "--num", "2"], ["sampling_steps 5", "delete"]),
    (["--exact", "--data", "none.npz", "--sampling-steps", "50", "--num", "99"], ["none.npz"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
])
def test_bad_options_are_named(tiny_run, refused, more, words):
    files = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}
    refused(sample.main, [tiny_run, *more], *words)
    assert files == {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}


def test_bad_run_folders_and_snapshots_are_named(tiny_run, tmp_path, refused):
    refused(sample.main, [tmp_path / "none"], "none", "not a run folder")
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    shutil.rmtree(run / "samples")
    snapshot = run / "snapshots/0000004.pt"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:2000])
    refused(sample.main, [run, "--steps-only", "4"], snapshot, "damaged")
    state = torch.load(tiny_run / "snapshots/0000004.pt", weights_only=True)
    del state["ema"]["conv_in.bias"]
    torch.save(state, snapshot)
    refused(sample.main, [run, "--steps-only", "4"], snapshot, "args.json")
    shutil.rmtree(run / "snapshots")
    refused(sample.main, [run], "no snapshots")
    record = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(record | {"subset_sha256": "0"}))
    refused(sample.main, [run, "--exact"], "not the images")
    assert not (run / "samples").exists()
