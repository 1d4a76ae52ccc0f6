"""sample.py: the update rule, the exact denoiser, noise that is a function of the index, bad
input.
"""

import json
import math
import shutil
from pathlib import Path

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
    net = sample.memorizer(process, image)
    found, _ = sample.sample(net, process, image.shape[1:], [(0, i) for i in range(3)], 20, eta)
    torch.testing.assert_close(found, image.expand(3, -1, -1, -1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_exact_denoiser_of_many_images_copies_all_of_them(name):
    process, images = PROCESSES[name], pictures(4)
    net = sample.memorizer(process, images)
    found, _ = sample.sample(net, process, images.shape[1:], [(0, i) for i in range(40)], 100)
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


def test_exact_denoiser_tells_images_apart_that_differ_in_one_number():
    images = pictures(1, 1).repeat(2, 1, 1, 1)
    images[1, 0, 0, 0] += 2 / 255
    for t in (0.003, 0.001):
        xt = (1 - t) * images + t * pictures(2, 3)
        a, b = xt[:, 0, 0, 0].double(), (1 - t) * images[:, 0, 0, 0].double()
        odds = ((a - b[0])**2 - (a - b[1])**2) / (2 * t * t)
        want = images[0, 0, 0, 0] + 2 / 255 * torch.sigmoid(odds)
        found = sample.exact_denoiser(xt, 1 - t, t, images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[:, 0, 0, 0], want.float(), rtol=0, atol=1e-6)


def test_memorizer_keeps_to_the_class():
    images, labels = pictures(4), torch.tensor([0, 1, 0, 1])
    want = torch.tensor([1, 1, 0])
    net = sample.memorizer(PROCESSES["flow"], images, labels)
    found, _ = sample.sample(net, PROCESSES["flow"], images.shape[1:], [(0, i) for i in range(3)],
                             50, labels=want)
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
    got = sample.ddim_step(PROCESSES["ddpm"], xt, eps, t, t_next, 1.0, z)[0]
    torch.testing.assert_close(got, mean + np.sqrt(variance) * z, rtol=1e-9, atol=1e-9)


def test_flow_at_eta_0_is_the_euler_step():
    x, v = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for t, t_next in ((1.0, 0.75), (0.5, 0.25), (0.25, 0.0)):
        t, t_next = (torch.tensor(value, dtype=torch.float64) for value in (t, t_next))
        got = sample.ddim_step(PROCESSES["flow"], x, v, t, t_next)[0]
        torch.testing.assert_close(got, x + (t_next - t) * v)


@pytest.mark.parametrize("name", PROCESSES)
def test_times_fall_from_one_to_zero(name):
    for steps in (1, 7, 250):
        times = sample.sampling_times(PROCESSES[name], steps)
        assert len(times) == steps + 1 and times[0] == 1 and times[-1] == 0
        assert (times[1:] < times[:-1]).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_i_does_not_depend_on_the_batch(eta):
    torch.manual_seed(0)
    net = train.UNet(8, (1, 2), 1, None, 16).eval()
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    def run(indices):
        return sample.sample(net, PROCESSES["ddpm"], (3, 8, 8), [(0, i) for i in indices], 5,
                             eta)[0]
    torch.randn(3)
    together = run(range(6))
    torch.testing.assert_close(torch.cat([run([i]) for i in range(6)]), together,
                               rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0], together[1])


def saturated(images):
    """The share of values at an end of the range."""
    return float(((images < -0.999) | (images > 0.999)).float().mean())


def noisy(net, error, seed=0):
    """The net with an error of so many per cent (rms) in its prediction."""
    g = torch.Generator().manual_seed(seed)

    def with_error(xt, t, labels=None):
        prediction = net(xt, t, labels)
        return prediction + error * torch.randn(prediction.shape, generator=g)
    return with_error


def test_what_clipping_is_for():
    # Where the images are N(0, .09) in each value, x0 = a .09 / (.09 a^2 + s^2) xt. A net whose eps
    # is a fifth too small, as a little-trained one's is, errs by .2 / sqrt(alpha_bar) = 31 in x0 at
    # t = 1; without clipping the error stays, and the samples are saturated.
    process = PROCESSES["ddpm"]

    def net(xt, t, labels):
        a, s = (train.expand(v, xt) for v in process.schedule(t))
        return 0.8 * process.predict_given_x0(xt, a * 0.09 / (0.09 * a**2 + s**2) * xt, t)
    (plain, left), (clipped, left_clipped) = (
        sample.sample(net, process, (3, 8, 8), [(0, i) for i in range(16)], 50, clip=clip)
        for clip in (False, True))
    assert saturated(plain) > 0.3 and plain.std() > 1 and left.mean() > 0.3
    assert saturated(clipped) < 0.1 and clipped.std() < 0.6 and left_clipped.mean() < 0.06


def test_clipped_and_exact_the_sampler_ends_the_same():
    process, images = PROCESSES["ddpm"], pictures(4)
    seeds = [(0, i) for i in range(8)]
    (one, _), (two, _) = (sample.sample(sample.memorizer(process, images), process, (3, 8, 8),
                                        seeds, 50, clip=clip) for clip in (False, True))
    torch.testing.assert_close(one, two, rtol=0, atol=0.05)


@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_a_new_process_is_a_few_lines(monkeypatch, tmp_path, predicts):
    def cosine(t):
        return torch.cos(t * torch.pi / 2), torch.sin(t * torch.pi / 2)
    monkeypatch.setitem(PROCESSES, "cosine",
                        train.Process(cosine, train.PREDICTIONS[predicts], clip=True))
    process, images = PROCESSES["cosine"], pictures(4) * 0.8
    for net, close in ((sample.memorizer(process, images), 0.03),
                       (noisy(sample.memorizer(process, images), 0.03), 0.1)):
        found, _ = sample.sample(net, process, (3, 8, 8), [(0, i) for i in range(16)], 50,
                                 clip=process.clip)
        distance = (found[:, None] - images).square().mean((2, 3, 4)).sqrt()
        assert distance.amin(1).max() < close and saturated(found) < 0.02
        assert len(set(distance.argmin(1).tolist())) == 4
    run = tmp_path / "r"
    train.main([*TINY, "--process", "cosine", "--weighting", "sigmoid", "--steps", "4",
                "--out", str(run)])
    sample.main([str(run), "--num", "4", "--sampling-steps", "5", "--device", "cpu"])
    made = sample.read_samples(run / "samples/steps5/0000004.npz")
    assert made.settings["clip"] is True and 0 <= made.out_of_range <= 1


def test_samples_file_and_grid(sampled_run):
    assert sample.sample_sets(sampled_run) == {"steps5": [4, 6, 8, 11, 16]}
    for step in (4, 16):
        found = sample.read_samples(sample.samples_path(sampled_run, "steps5", step))
        assert found.images.shape == (12, 8, 8, 3) and found.images.dtype == np.uint8
        assert (found.labels == -1).all()
        assert found.settings == {"sampling_steps": 5, "eta": 0.0, "clip": True, "seed": 0,
                                  "switch": ""}
        assert (sampled_run / f"samples/steps5/{step:07d}.png").read_bytes()[1:4] == b"PNG"


def test_sampling_is_repeatable_skips_what_is_done_and_extends(sampled_run, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    more, path = ["--sampling-steps", "5", "--device", "cpu"], run / "samples/steps5/0000016.npz"
    sample.main([str(run), "--num", "12", *more])
    assert "0 of 5" in capsys.readouterr().out
    before = sample.read_samples(path).images
    sample.main([str(run), "--num", "20", "--steps-only", "16", "--batch-size", "3", *more])
    after = sample.read_samples(path).images
    assert len(after) == 20
    assert np.abs(after[:12].astype(int) - before).max() <= 1       # rounding, at other batch sizes


def test_samples_of_other_settings_stand_side_by_side(sampled_run, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    before = (run / "samples/steps5/0000016.npz").read_bytes()
    sample.main([str(run), "--num", "3", "--sampling-steps", "5", "--eta", "1", "--no-clip",
                 "--seed", "7", "--steps-only", "16", "--device", "cpu"])
    assert sample.sample_sets(run) == {"steps5": [4, 6, 8, 11, 16],
                                       "steps5_eta1_no-clip_seed7": [16]}
    assert (run / "samples/steps5/0000016.npz").read_bytes() == before


def test_samples_of_another_step_or_run_are_refused(sampled_run, tmp_path, refused):
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    files = [run / f"samples/steps5/{step:07d}.npz" for step in (4, 16)]
    shutil.copy(files[0], files[1])
    more = ["--sampling-steps", "5", "--num", "12"]
    refused(sample.main, [run, *more], files[1], "0000004")
    shutil.copy(sampled_run / "snapshots/0000004.pt", run / "snapshots/0000016.pt")
    files[1].unlink()
    refused(sample.main, [run, *more], "0000016.pt", "step 4")
    train.main([*TINY, "--seed", "1", "--steps", "4", "--out", str(tmp_path / "other")])
    shutil.copy(tmp_path / "other/snapshots/0000004.pt", run / "snapshots/0000004.pt")
    files[0].unlink()
    refused(sample.main, [run, "--steps-only", "4", *more], "0000004.pt", "another run")


def test_conditional_samples_have_the_subsets_labels_in_turn(tmp_path):
    run = tmp_path / "r"                        # the first 16 digits lack some classes
    train.main([*TINY, "--data", "digits", "--n", "16", "--conditional", "--process", "flow",
                "--steps", "4", "--out", str(run)])
    more = ["--num", "9", "--device", "cpu", "--sampling-steps"]
    sample.main([str(run), *more, "3"])
    sample.main([str(run), *more, "20", "--exact"])
    labels = sample.read_samples(run / "samples/steps3/0000004.npz").labels
    data = train.load_data("digits", 16)
    classes = sorted(set(data.train_labels.tolist()))
    assert classes != list(range(10)) and labels.tolist() == (2 * classes)[:9]
    found = sample.read_samples(run / "samples/steps20/exact.npz")
    nearest = np.abs(found.images[:, None].astype(int) - data.train_images).sum((2, 3, 4)).argmin(1)
    assert np.array_equal(data.train_labels[nearest], found.labels)


def test_another_snapshot_takes_over_at_a_time(sampled_run, tmp_path):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    record, process = train.read_run(run), PROCESSES["ddpm"]
    nets = {step: sample.load_net(run, record, "cpu") for step in (4, 16)}
    for step, net in nets.items():
        sample.load_ema(net, run, record, step)
        torch.nn.init.normal_(net.conv_out.weight, std=step / 16)   # so that it matters which
        train.save(run / f"snapshots/{step:07d}.pt",
                   {"run": train.identity(record), "step": step, "ema": net.state_dict()})
    argv = [str(run), "--num", "6", "--sampling-steps", "4", "--steps-only", "4", "--device", "cpu"]
    for at in (0.1, 0.5, 0.9):                  # of the times 1, .75, .5, .25
        sample.main([*argv, "--switch", f"16@{at}"])
        x, _ = sample.sample(lambda xt, t, labels, at=at: nets[16 if t[0] <= at else 4](
            xt, t, labels), process, (3, 8, 8), [(0, i) for i in range(6)], 4, clip=True)
        found = sample.read_samples(run / f"samples/steps4_switch16@{at}/0000004.npz")
        wanted = ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().numpy()
        assert np.abs(found.images - wanted).max() <= 1


def test_samples_made_before_an_option_existed_had_its_default(sampled_run, tmp_path, monkeypatch,
                                                               capsys):
    run = shutil.copytree(sampled_run, tmp_path / "r")

    def more(real=sample.make_parser):
        parser = real()
        parser.add_argument("--guidance", type=float, default=0.0)
        return parser
    monkeypatch.setattr(sample, "make_parser", more)
    argv = [str(run), "--num", "12", "--device", "cpu", "--sampling-steps", "5"]
    sample.main(argv)
    sample.main([*argv, "--guidance", "2"])
    assert "0 of 5" in (out := capsys.readouterr().out) and "5 of 5" in out
    assert sorted(sample.sample_sets(run)) == ["steps5", "steps5_guidance2"]


def test_samples_of_other_weights_or_of_another_sampler_are_refused(sampled_run, tmp_path, refused,
                                                                    monkeypatch, capsys):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    argv = [str(run), "--num", "12", "--device", "cpu", "--sampling-steps", "5"]
    path, real = run / "samples/steps5/0000004.npz", sample.ddim_step
    for name in ("last.pt", "log.csv"):         # trained anew, to the same bits: nothing to do
        (run / name).unlink()
    train.main([*TINY, "--steps", "16", "--out", str(run)])
    capsys.readouterr()
    sample.main(argv)
    assert "0 of 5" in capsys.readouterr().out
    with monkeypatch.context() as changed:
        changed.setattr(sample, "ddim_step", lambda *a, **k: [1.01 * x for x in real(*a, **k)])
        refused(sample.main, argv, path, "another sampler")
        refused(sample.main, [*argv, "--exact"], "exact.npz", "another sampler")
    with monkeypatch.context() as changed:      # which the networks' samples do not depend on
        changed.setattr(sample, "exact_denoiser",
                        lambda *a, real=sample.exact_denoiser, **k: 0.9 * real(*a, **k))
        refused(sample.main, [*argv, "--exact"], "exact.npz", "another sampler")
        sample.main(argv)
    with monkeypatch.context() as changed:
        changed.setattr(sample, "ddim_step", lambda *a, **k: [1.01 * x for x in real(*a, **k)])
        sample.main([*argv, "--eta", "1"])      # another set: nothing is mixed
    with monkeypatch.context() as changed:      # only what had left [-1, 1]
        changed.setattr(torch.Tensor, "clamp", lambda x, *ends, real=torch.Tensor.clamp, **more:
                        real(x, *(1.5 * end for end in ends), **more))
        refused(sample.main, argv, path, "another sampler")
    state = torch.load(run / "snapshots/0000004.pt", weights_only=True)
    state["ema"]["conv_in.bias"] += 1
    train.save(run / "snapshots/0000004.pt", state)
    refused(sample.main, argv, path, "other weights")


def test_a_setting_of_several_numbers_names_its_samples(sampled_run, tmp_path, monkeypatch,
                                                        capsys):
    def more(real=sample.make_parser):
        parser = real()
        parser.add_argument("--interval", type=float, nargs=2, default=(0.2, 0.8))
        return parser
    monkeypatch.setattr(sample, "make_parser", more)
    run = shutil.copytree(sampled_run, tmp_path / "r")
    argv = [str(run), "--num", "12", "--device", "cpu", "--sampling-steps", "5"]
    sample.main(argv)                           # as drawn before there was the option
    sample.main([*argv, "--interval", "0.1", "0.8"])
    sample.main([*argv, "--interval", "0.1", "0.8"])
    out = capsys.readouterr().out
    assert out.count("0 of 5") == 2 and (run / "samples/steps5_interval0.1-0.8").is_dir()


def test_an_option_of_a_type_that_json_lacks_is_refused_before_any_work(sampled_run, tmp_path,
                                                                        refused, monkeypatch):
    def more(real=sample.make_parser):
        parser = real()
        parser.add_argument("--guide", type=Path)
        return parser
    monkeypatch.setattr(sample, "make_parser", more)
    run = shutil.copytree(sampled_run, tmp_path / "r")
    refused(sample.main, [str(run), "--num", "4", "--guide", "a/b"], "cannot hold these options")
    assert not list((run / "samples").rglob("*guide*"))


def test_a_path_in_an_option_makes_one_folder():
    settings = sample.default_settings(PROCESSES["flow"]) | {"guide": "runs/other"}
    assert sample.set_name(settings, PROCESSES["flow"]) == "guideruns-other"


def test_a_process_that_does_not_end_in_unit_noise_is_not_trained(monkeypatch, tmp_path, refused):
    exploding = train.Process(lambda t: (1 + 0 * t, 10 * t), train.PREDICTIONS["eps"])
    monkeypatch.setitem(PROCESSES, "exploding", exploding)
    refused(train.main, [*TINY, "--process", "exploding", "--out", tmp_path / "r"], "variance 1")


def test_a_samples_file_of_your_own_making_is_taken(sampled_run, tmp_path):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    path = run / "samples/mine/0000016.npz"
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64)
    sample.write_samples(path, images, labels, {}, 0.0, train.identity(train.read_run(run)))
    found = sample.read_samples(path)
    weights = sample.weights_today(run, train.read_run(run), found.settings, 16)
    assert weights and not sample.what_changed(found.made, weights, [1.0])


def test_an_option_of_your_own_belongs_to_the_sampler(sampled_run, tmp_path, refused, monkeypatch,
                                                      capsys):
    run, power = shutil.copytree(sampled_run, tmp_path / "r"), [1]

    def more(real=sample.make_parser):
        parser = real()
        parser.add_argument("--guidance", type=float, default=0.0)
        return parser

    def guided(settings, early, late, real=sample.to_draw_with):
        net = real(settings, early, late)
        return lambda xt, t, labels: (1 + settings["guidance"] ** power[0]) * net(xt, t, labels)
    monkeypatch.setattr(sample, "make_parser", more)
    monkeypatch.setattr(sample, "to_draw_with", guided)
    argv = [str(run), "--num", "4", "--device", "cpu", "--sampling-steps", "5"]
    sample.main([*argv, "--guidance", "0.5"])
    power[0] = 2
    refused(sample.main, [*argv, "--guidance", "0.5"], "steps5_guidance0.5", "another sampler")
    sample.main([*argv, "--guidance", "0"])         # which the power does not change
    assert "0 of 5" in capsys.readouterr().out


def test_another_network_is_not_sampled(sampled_run, tmp_path, refused, monkeypatch):
    run = shutil.copytree(sampled_run, tmp_path / "r")
    monkeypatch.setattr(train.F, "silu", lambda x, inplace=False: train.F.gelu(x))
    refused(sample.main, [run, "--num", "4", "--device", "cpu", "--sampling-steps", "5", "--eta",
                          "1"], run, "network", "code of today")
    assert not (run / "samples/steps5_eta1").exists()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_not_drawn(process, bad, sampled_run, tmp_path, refused,
                                                      monkeypatch):
    def net(xt, t, labels):
        return torch.full_like(xt, bad if 0.4 < t[0] < 0.6 else 0.1)
    x, _ = sample.sample(net, PROCESSES[process], (1, 4, 4), [(0, 0)], 2, clip=True)
    assert not x.isfinite().any()
    run = shutil.copytree(sampled_run, tmp_path / "r")
    monkeypatch.setattr(sample, "network", lambda *_: (net, lambda step: None))
    refused(sample.main, [run, "--num", "2", "--sampling-steps", "2", "--device", "cpu"],
            "not finite")


def test_the_perfect_memorizer_of_a_run_that_flips_knows_the_mirror_images(tmp_path):
    run = tmp_path / "r"
    train.main([*TINY, "--flip", "--n", "2", "--steps", "4", "--out", str(run)])
    sample.main([str(run), "--exact", "--num", "32", "--sampling-steps", "50", "--device", "cpu"])
    images = torch.from_numpy(train.load_data("toy", 2, 8).train_images)
    known = torch.cat([images, images.flip(2)]).float()
    found = torch.from_numpy(sample.read_samples(run / "samples/steps50/exact.npz").images).float()
    distance = (found[:, None] - known).square().mean((2, 3, 4)).sqrt()
    assert distance.amin(1).max() < 8 and set(distance.argmin(1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("more", "words"), [
    (["--exact", "--steps-only", "4"], ["--steps-only"]),
    (["--switch", "5@0.5"], ["--switch 5", "no snapshot"]), (["--switch", "4"], ["--switch 4"]),
    (["--switch", "4@1"], ["--switch 4@1"]), (["--exact", "--switch", "4@0.5"], ["--exact"]),
    (["--steps-only", "5"], ["--steps-only 5"]),
    (["--num", "0"], ["--num"]),
    (["--eta", "2"], ["--eta 2"]),
    (["--sampling-steps", "1001"], ["--sampling-steps 1001", "1000"]),
    (["--sampling-steps", "0"], ["--sampling-steps 0"]),
    (["--exact", "--data", "none.npz", "--sampling-steps", "50", "--num", "99"], ["none.npz"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
])
def test_bad_options_are_named(sampled_run, refused, more, words):
    files = {p: p.stat().st_mtime_ns for p in sampled_run.rglob("*")}
    refused(sample.main, [sampled_run, *more], *words)
    assert files == {p: p.stat().st_mtime_ns for p in sampled_run.rglob("*")}


def test_bad_run_folders_and_snapshots_are_named(sampled_run, tmp_path, refused):
    refused(sample.main, [tmp_path / "none"], "none", "not a run folder")
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    shutil.rmtree(run / "samples")
    snapshot = run / "snapshots/0000004.pt"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:2000])
    refused(sample.main, [run, "--steps-only", "4"], snapshot, "damaged")
    state = torch.load(sampled_run / "snapshots/0000004.pt", weights_only=True)
    del state["ema"]["conv_in.bias"]
    torch.save(state, snapshot)
    refused(sample.main, [run, "--steps-only", "4"], snapshot, "args.json")
    (run / "snapshots/0000004 (1).pt").write_bytes(whole)           # a stray copy is no snapshot
    assert sample.snapshots(run) == [4, 6, 8, 11, 16]
    shutil.rmtree(run / "snapshots")
    refused(sample.main, [run], "no snapshots")
    record = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(record | {"subset_sha256": "0"}))
    refused(sample.main, [run, "--exact"], "args.json", "changed since")
    del record["checksum"]
    (run / "args.json").write_text(json.dumps(record | {"subset_sha256": "0"}))
    refused(sample.main, [run, "--exact"], "not the images")
    assert not (run / "samples").exists()
