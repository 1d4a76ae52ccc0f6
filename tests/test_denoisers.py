"""The denoiser study of measure.py: each reference against a known answer, and a network that is
one of them against all.
"""

import csv
import functools
import shutil

import pytest
import torch

import measure
import sample
import train

CPU = torch.device("cpu")


def pictures(n, size=4, channels=3, seed=0):
    """Smooth random pictures, float (n, C, S, S) in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, 2, 2, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=True)


def levels(n):
    """a, s (n,) of rectified flow at n times."""
    t = torch.linspace(0.05, 0.95, n)
    return 1 - t, t


@pytest.mark.parametrize("n", [6, 200])                 # fewer and more than dimensions
def test_gaussian_equals_the_matrix_formula(n):
    images, (a, s) = pictures(n), levels(9)
    xt = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    got = measure.gaussian(images)(xt, a, s)
    x = images.flatten(1).double()
    mean, cov = x.mean(0), torch.cov(x.T, correction=0)
    for k in range(9):
        gain = a[k] * cov @ torch.linalg.inv(a[k].double()**2 * cov + s[k]**2 * torch.eye(48))
        expected = mean + gain @ (xt[k].flatten().double() - a[k] * mean)
        torch.testing.assert_close(got[k].flatten().double(), expected, rtol=1e-3, atol=1e-4)


def test_gaussian_is_the_best_linear_denoiser_of_its_images():
    # Its error is uncorrelated with what it is given, over the images and fresh noise.
    images, g = pictures(50, 2, 1), torch.Generator().manual_seed(2)
    x0 = images.repeat(4000, 1, 1, 1)
    a, s = (torch.full((len(x0),), v) for v in (0.6, 0.4))
    xt = 0.6 * x0 + 0.4 * torch.randn(x0.shape, generator=g)
    error = (measure.gaussian(images)(xt, a, s) - x0).flatten(1).double()
    given = torch.cat([torch.ones(len(x0), 1), xt.flatten(1)], 1).double()
    product = given[:, :, None] * error[:, None]
    assert (product.mean(0).abs() < 5 * product.std(0) / len(x0) ** 0.5).all()
    # and it is E[x0 | xt] where the images are many draws of a Gaussian
    many = torch.randn(100_000, 1, 1, 2, generator=g) * torch.tensor([0.5, 2.0])
    (a, s), point = (torch.full((2,), v) for v in (0.6, 0.4)), torch.tensor([[1.0, 1], [-1, 0.5]])
    got = measure.gaussian(many)(point.reshape(2, 1, 1, 2), a, s).reshape(2, 2)
    weight = torch.exp(-(point[:, None] - 0.6 * many.reshape(1, -1, 2)).square() / 2 / 0.16)
    monte_carlo = (weight * many.reshape(1, -1, 2)).sum(1) / weight.sum(1)
    torch.testing.assert_close(got, monte_carlo, rtol=0.03, atol=0.03)


def test_local_that_sees_the_whole_picture_is_the_memorizer():
    images, (a, s) = pictures(30), levels(20)
    noise = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    xt = a[:, None, None, None] * images[:20] + s[:, None, None, None] * noise
    got = measure.local(images, patch=7)(xt, a, s)      # 7 wide: from any pixel to any other
    torch.testing.assert_close(got, sample.exact_denoiser(xt, a, s, images), rtol=1e-3, atol=1e-4)


def test_local_of_one_pixel_is_a_posterior_per_pixel():
    images, (a, s) = pictures(30), levels(5)
    xt = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    got = measure.local(images, patch=1)(xt, a, s)
    for y in range(4):
        for x in range(4):
            pixel = images[:, :, y, x]                                          # (N, 3)
            far = (xt[:, None, :, y, x] - a[:, None, None] * pixel).square().sum(2)
            weight = (-far / (2 * s[:, None] ** 2)).softmax(1)
            torch.testing.assert_close(got[:, :, y, x], weight @ pixel, rtol=1e-3, atol=1e-4)


def test_local_of_three_pixels_looks_no_further():
    images, (a, s) = pictures(30, size=6), levels(4)
    xt = torch.randn(4, 3, 6, 6)
    moved = xt.clone()
    moved[:, :, 0, 0] += 3
    change = (measure.local(images, 3)(moved, a, s) - measure.local(images, 3)(xt, a, s)).abs()
    assert change.amax((0, 1))[:2, :2].min() > 0
    assert change[:, :, 2:].max() == change[:, :, :, 2:].max() == 0


def nets(process, images, labels, other, other_labels):
    """The four references, as reference nets."""
    known = process, images, labels
    return {"memorizer": sample.memorizer(*known),
            "gaussian": sample.as_network(measure.gaussian, *known, least=2),
            "local": sample.as_network(functools.partial(measure.local, patch=3), *known, least=2),
            "population": sample.memorizer(process, other, other_labels)}


@pytest.fixture(scope="module")
def data():
    """Toy pictures of three classes: [(images uint8, labels)] of training and held-out ones."""
    toys = train.load_data("toy", 48, 8)
    return [tuple(map(torch.from_numpy, pair))
            for pair in (toys[:2], (toys.heldout_images[:160], toys.heldout_labels[:160]))]


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", train.PROCESSES)
def test_a_network_that_is_a_reference_is_found_to_be_it(data, name, conditional):
    process = train.PROCESSES[name]
    data = [(x, k if conditional else 0 * k) for x, k in data]
    rows_of = measure.denoiser_study(process, data, 3)
    images, labels = train.to_float(data[0][0]), data[0][1]
    other, other_labels = (x[measure.INPUTS:] for x in data[1])
    for reference, net in nets(process, images, labels, train.to_float(other),
                               other_labels).items():
        rows = rows_of(net)
        assert len(rows) == 120
        own = [r for r in rows if r["reference"] == reference]
        assert {(r["inputs"], r["level"]) for r in own} == {
            (kind, k) for kind in ("path", "heldout", "training") for k in range(10)}
        assert all(r["low"] <= r["median"] <= r["high"] < 1e-3 for r in own)
        for r in own:                   # at middle noise, the others are told apart
            if 2 <= r["level"] <= 5 and r["inputs"] == "heldout":
                rest = [q["median"] for q in rows if q["reference"] != reference
                        and (q["inputs"], q["level"]) == ("heldout", r["level"])]
                assert min(rest) > 0.01


def test_the_population_is_a_memorizer_of_held_out_images(data):
    process, (images, labels) = train.PROCESSES["flow"], data[0]
    # The held-out images that are no inputs are the training images here.
    other = torch.cat([data[1][0][:measure.INPUTS], images, images[:16]])
    zeros = torch.zeros(len(other), dtype=torch.int64)
    rows = measure.denoiser_study(process, [(images, 0 * labels), (other, zeros)], 3)(
        sample.memorizer(process, train.to_float(torch.cat([images, images[:16]]))))
    assert all(r["high"] < 1e-4 for r in rows if r["reference"] == "population")


def test_distances_are_what_they_say(data):
    process, images = train.PROCESSES["flow"], data[0][0]
    exact = sample.memorizer(process, train.to_float(images))

    def off(xt, t, wanted):             # its x0 is .3 too bright at t > .5
        x0 = process.x0_eps(xt, exact(xt, t), t)[0] + 0.3 * (t > 0.5)[:, None, None, None]
        return process.predict_given_x0(xt, x0, t)
    rows = measure.denoiser_study(process, [(x, 0 * k) for x, k in data], 3)(off)
    for r in rows:
        if r["reference"] == "memorizer":
            assert r["median"] == pytest.approx(0.3 if r["level"] >= 5 else 0, abs=1e-3)
            assert r["t"] == pytest.approx((r["level"] + 0.5) / 10)


def test_classes_are_kept_apart_and_tiny_ones_fall_back():
    process, images = train.PROCESSES["flow"], pictures(9)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2])
    net = sample.as_network(measure.gaussian, process, images, labels, least=2)
    xt, t = torch.randn(3, 3, 4, 4), torch.full((3,), 0.5)
    got = process.x0_eps(xt, net(xt, t, torch.tensor([0, 1, 2])), t)[0]
    for k, own in enumerate((images[:5], images[5:8], images)):
        expected = measure.gaussian(own)(xt[k:k + 1], 1 - t[:1], t[:1])
        torch.testing.assert_close(got[k:k + 1], expected, rtol=1e-4, atol=1e-5)


def test_path_is_what_the_sampler_visits():
    process = train.PROCESSES["ddpm"]
    exact = sample.memorizer(process, pictures(5))
    labels = torch.zeros(4, dtype=torch.int64)
    xt, t, wanted = measure.on_path(exact, process, (3, 4, 4), labels)
    assert len(xt) == len(t) == len(wanted) == 40
    torch.testing.assert_close(t.reshape(10, 4)[:, 0], 0.95 - 0.1 * torch.arange(10))
    start, _ = sample.sample(exact, process, (3, 4, 4), [(0, i) for i in range(4)], 20, clip=True)
    last = process.x0_eps(xt[-4:], exact(xt[-4:], t[-4:]), t[-4:])[0]
    torch.testing.assert_close(start, last.clamp(-1, 1), rtol=0, atol=0.05)
    # The same points by the update rule alone, one time after the other.
    times, x = sample.sampling_times(process, 20), torch.stack([torch.randn(
        3, 4, 4, generator=train.generator("cpu", "sample", 0, i)) for i in range(4)])
    for k in range(20):
        if k % 2:
            torch.testing.assert_close(xt[k // 2 * 4:][:4], x, rtol=0, atol=1e-4)
        prediction = exact(x, times[k].expand(4), labels)
        x, _ = sample.ddim_step(process, x, prediction, times[k], times[k + 1], clip=True)


def test_path_of_a_sampler_that_looks_twice(monkeypatch):
    process = train.PROCESSES["flow"]
    exact, labels = sample.memorizer(process, pictures(5)), torch.zeros(4, dtype=torch.int64)
    plain = measure.on_path(exact, process, (3, 4, 4), labels)

    def heun(net, process, shape, seeds, steps, real=sample.sample, **more):
        times = [float(t) for t in sample.sampling_times(process, steps)]

        def twice(xt, t, labels):               # and what it tries at the next time
            prediction = net(xt, t, labels)
            net(xt + 9, t * 0 + times[times.index(float(t[0])) + 1], labels)
            return prediction
        return real(twice, process, shape, seeds, steps, **more)
    monkeypatch.setattr(sample, "sample", heun)
    for one, two in zip(plain, measure.on_path(exact, process, (3, 4, 4), labels), strict=True):
        assert torch.equal(one, two)


# --- The command ----------------------------------------------------------------------------------


def table(run):
    with open(run / "denoisers.csv") as file:
        return list(csv.DictReader(file))


def test_denoisers_of_a_run(sampled_run, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "r"
    shutil.copytree(sampled_run, run)
    shutil.rmtree(run / "samples")                      # it needs none
    measure.main([str(run), "--denoisers", "--device", "cpu"])
    rows = table(run)
    assert [int(r["step"]) for r in rows] == [s for s in (4, 6, 8, 11, 16) for _ in range(120)]
    assert all(float(r["low"]) <= float(r["median"]) <= float(r["high"]) for r in rows)
    before = (run / "denoisers.csv").read_bytes()
    capsys.readouterr()
    measure.main([str(run), "--denoisers", "--device", "cpu"])
    assert "step" not in capsys.readouterr().out and (run / "denoisers.csv").read_bytes() == before
    shutil.copy(run / "snapshots/0000016.pt", run / "snapshots/0000004.pt")
    refused(measure.main, [run, "--denoisers"], "0000004.pt", "another run or step")
    shutil.copy(sampled_run / "snapshots/0000004.pt", run / "snapshots/0000004.pt")
    measure.main([str(run), "--denoisers", "--patch", "1", "--device", "cpu"])
    other = table(run)
    assert capsys.readouterr().out.count("step") == 5 and len(other) == 600
    for a, b in zip(rows, other, strict=True):
        assert (a["median"] != b["median"]) == (a["reference"] == "local")
    shutil.rmtree(run / "snapshots")
    refused(measure.main, [run, "--denoisers"], "no snapshots")
