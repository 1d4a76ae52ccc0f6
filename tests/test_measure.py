"""measure.py: every metric against a case with a known answer, or a public implementation of it."""

import functools
import hashlib
import importlib
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

import measure
import sample
import train

G = torch.Generator().manual_seed(0)


def brute_force(queries, references, groups=None, exclude=None):
    """Two nearest by differences in float64, the second outside the first one's group."""
    d = (queries.double()[:, None] - references.double()).flatten(2).square().sum(2).sqrt()
    groups = torch.arange(len(references)) if groups is None else groups
    if exclude is not None:
        d[groups == exclude[:, None]] = math.inf
    first = d.argmin(1, keepdim=True)
    outside = d.masked_fill(groups == groups[first], math.inf)
    second = outside.argmin(1, keepdim=True)
    return (torch.cat([d.gather(1, first), outside.gather(1, second)], 1),
            torch.cat([first, second], 1))


# --- Nearest neighbours ---------------------------------------------------------------------------


def adversarial(name):
    """Queries and references on which a float32 matrix product alone gets the neighbours wrong."""
    q, r = torch.randn(40, 300, generator=G), torch.randn(200, 300, generator=G)
    if name == "near copies":
        q = r[:40] + 1e-5 * q
    elif name == "near ties at norm 100":
        r = 100 * torch.nn.functional.normalize(r[:1], dim=1) + 1e-4 * r
        q = r[:1] + 1e-4 * q
    elif name == "exact duplicates":
        r[100:] = r[:100]
        q[:20] = r[:20]
    elif name == "more duplicates than candidates":
        r[10:] = r[0]
        q[:20] = r[0] + 1e-6 * q[:20]
    elif name == "far from the origin":
        q, r = q + 1000, r + 1000
    elif name == "two references":
        r = r[:2]
    return q, r


@pytest.mark.parametrize("name", ["plain", "near copies", "near ties at norm 100",
                                  "exact duplicates", "more duplicates than candidates",
                                  "far from the origin", "two references"])
def test_two_nearest_equals_brute_force(name):
    q, r = adversarial(name)
    distances, indices = measure.two_nearest(q, r)
    expected, where = brute_force(q, r)
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=0)
    if "duplicates" in name:            # any of the equal ones
        assert torch.equal(r[indices], r[where]) and (indices[:, 0] != indices[:, 1]).all()
    else:
        assert torch.equal(indices, where)


def test_two_nearest_over_many_blocks():
    q, r = torch.randn(2100, 8, generator=G), torch.randn(9000, 8, generator=G)
    expected, where = brute_force(q[::21], r)
    distances, indices = measure.two_nearest(q, r)
    torch.testing.assert_close(distances[::21], expected, rtol=1e-9, atol=0)
    assert torch.equal(indices[::21], where)


def test_two_nearest_with_groups_and_exclusion():
    r = torch.randn(60, 20, generator=G)
    groups = torch.arange(60) // 3 * 3
    for query, exclude in ((r[:30] + 0.1, None), (r, groups)):
        expected, where = brute_force(query, r, groups, exclude)
        distances, indices = measure.two_nearest(query, r, groups, exclude)
        torch.testing.assert_close(distances, expected, rtol=1e-9, atol=0)
        assert torch.equal(indices, where)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_two_nearest_refuses_what_is_not_finite(bad):
    fine, broken = torch.rand(4, 3), torch.rand(4, 3)
    broken[2, 1] = bad
    for pair in ((fine, broken), (broken, fine)):
        with pytest.raises(train.InputError, match="not finite"):
            measure.two_nearest(*pair)


def test_two_nearest_without_a_second_group_says_so():
    distances, indices = measure.two_nearest(torch.zeros(3, 4), torch.ones(5, 4), torch.zeros(5))
    assert (distances[:, 0] == 2).all() and distances[:, 1].isinf().all()
    assert indices.tolist() == [[0, -1]] * 3


# --- Copies ---------------------------------------------------------------------------------------


@pytest.fixture
def subset(tmp_path, monkeypatch):
    """The toy subset of 64 images at 16x16, its cache in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return measure.Subset(train.load_data("toy", 64), False, torch.device("cpu"))


def ratio(subset, images):
    """The copy ratio of uint8 images."""
    return measure.copying(measure.Context(images, subset))["copy_ratio"]


def test_planted_copies_are_all_found_and_noise_never(subset):
    noise = torch.randint(0, 256, subset.train.shape, generator=G, dtype=torch.uint8)
    slightly = (subset.train.int() + torch.randint(-5, 6, subset.train.shape, generator=G))
    assert ratio(subset, subset.train) == 1
    assert ratio(subset, slightly.clamp(0, 255).to(torch.uint8)) == 1
    assert ratio(subset, noise) == 0
    assert ratio(subset, torch.cat([subset.train[:16], noise[:48]])) == 0.25


def test_held_out_toy_images_are_no_copies(subset):
    assert ratio(subset, subset.heldout) == 0 and len(subset.heldout) == 5120
    # left out, an image does not find itself
    distances, indices = subset.own
    assert (distances[:, 0] > 0).all() and (indices[:, 0] != torch.arange(64)).all()
    assert (measure.copy_ratios(distances) > 1 / 3).all()


def test_copies_of_duplicated_images_count(subset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train.load_data("toy", 64)
    twice = data._replace(train_images=np.concatenate([data.train_images, data.train_images[:8]]),
                          train_labels=np.concatenate([data.train_labels, data.train_labels[:8]]))
    doubled = measure.Subset(twice, False, torch.device("cpu"))
    assert doubled.groups.tolist() == [*range(64), *range(8)]
    copies = doubled.train[:8]
    assert ratio(doubled, copies) == 1
    distances, _ = measure.two_nearest(measure.pixel_features(copies), doubled.search)
    assert (measure.copy_ratios(distances) == 1).all()     # without groups they would pass as novel
    row = measure.copying(measure.Context(doubled.train[[0, 64, 1, 9]], doubled))
    assert (row["distinct_copied"], row["most_copied"]) == (3, 2)


def test_mirrored_copies_count_where_training_flipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train.load_data("toy", 64)
    plain, flipped = (measure.Subset(data, flip, torch.device("cpu")) for flip in (False, True))
    mirrored = plain.train.flip(2)
    assert ratio(flipped, mirrored) == 1 and ratio(flipped, plain.train) == 1
    assert ratio(plain, mirrored) < 0.5
    assert torch.equal(flipped.nearest(mirrored)[1][:, 0], torch.arange(64))


def test_near_duplicates_are_grouped_and_look_alikes_are_not():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(700, 50, generator=g)
    x[600:] *= 0.01                                         # dull: all near one another
    x[7] = x[3] + 0.1 * x[7]                                # a pair
    x[9], x[11] = x[8] + 0.1 * x[9], x[8] - 0.1 * x[11]     # a triple
    x[20:30] = x[19]                                        # ten more of the same
    expected = torch.arange(700)
    expected[7], expected[[9, 11]], expected[20:30] = 3, 8, 19
    assert torch.equal(measure.duplicate_groups(x), expected)
    assert measure.duplicate_groups(x[[3, 3]]).tolist() == [0, 0]
    assert measure.duplicate_groups(x[[3, 4]]).tolist() == [0, 1]


def test_all_duplicates_have_no_ratio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train.load_data("toy", 4)
    same = data._replace(train_images=np.repeat(data.train_images[:1], 4, 0))
    with pytest.raises(train.InputError, match="near-duplicates"):
        measure.Subset(same, False, torch.device("cpu"))


@pytest.mark.parametrize(("k", "n", "low", "high"), [
    (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0),
    (1, 2048, 8.62e-5, 0.00276)])
def test_wilson_interval(k, n, low, high):
    row = measure.share_columns("x", torch.arange(n) < k)
    assert (row["x_ratio"], row["x_low"], row["x_high"]) == pytest.approx(
        (k / n, low, high), rel=2e-3, abs=1e-9)


def test_authenticity_counts_those_nearer_than_the_images_own_neighbour(subset):
    subset.own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None
    c = measure.Context(subset.train[:4], subset, neighbours=(
        torch.tensor([[0.5, 2], [1.5, 2], [2.9, 4], [3.0, 4]]),
        torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])))
    assert measure.authenticity(c)["auth_share"] == 0.5


# --- Distances of distributions -------------------------------------------------------------------


def gaussian(n, d, shift=0.0):
    return torch.randn(n, d, generator=G, dtype=torch.float64) + shift


def with_moments(x, mean, factor):
    """Vectors whose mean and covariance are exactly `mean` and factor factor^T."""
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T,
                                             upper=False)
    return (factor @ whitened).T + mean


def test_fid_of_equal_covariances_is_the_mean_distance():
    x = gaussian(500, 20)
    assert measure.fid(x, x + 2) == pytest.approx(80, rel=1e-9)
    assert measure.fid(x, x) == pytest.approx(0, abs=1e-6)


def test_fid_of_commuting_covariances():
    a, b = torch.rand(2, 30, generator=G, dtype=torch.float64) + 0.1
    turn, _ = torch.linalg.qr(gaussian(30, 30))
    x, y = (with_moments(gaussian(n, 30), 0, turn @ v.sqrt().diag()) for n, v in ((50, a), (70, b)))
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert measure.fid(x, y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (30, 200), (200, 30), (30, 40)])
def test_fid_equals_pytorch_fid(n, m):
    from pytorch_fid.fid_score import calculate_frechet_distance
    x, y = gaussian(n, 60) @ gaussian(60, 60), gaussian(m, 60, 0.1) @ gaussian(60, 60)
    expected = calculate_frechet_distance(*(v.numpy() for z in (x, y)
                                            for v in (z.mean(0), torch.cov(z.T))))
    assert measure.fid(x, y) == pytest.approx(expected, rel=1e-4)


def test_fid_with_fewer_samples_than_dimensions():
    # |sqrt(cov1)|^2 + |sqrt(cov2)|^2 - 2 |X1 X2^T|_* / (n - 1), without forming a covariance
    x, y = gaussian(30, 80), gaussian(30, 80, 0.2) * 1.5
    x_, y_ = x - x.mean(0), y - y.mean(0)
    expected = ((x.mean(0) - y.mean(0)).square().sum() + (x_.square().sum() + y_.square().sum()
                - 2 * torch.linalg.svdvals(x_ @ y_.T).sum()) / 29)
    assert measure.fid(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_fid_where_dimensions_are_dead():
    x, y = gaussian(60, 40), gaussian(60, 40)
    x[:, 3] = y[:, 5] = 0
    x[:, 8] = x[:, 7]
    alive = [k for k in range(40) if k not in (3, 5)]
    rest = float(x[:, 5].var() + x[:, 5].mean() ** 2 + y[:, 3].var() + y[:, 3].mean() ** 2)
    assert measure.fid(x, y) == pytest.approx(measure.fid(x[:, alive], y[:, alive]) + rest,
                                              rel=1e-6)


def sw(*args):
    """The value of sliced_wasserstein, without its error."""
    return measure.sliced_wasserstein(*args)[0]


def test_sliced_wasserstein_closed_forms():
    x = gaussian(500, 1)
    assert sw(x, x + 3) == pytest.approx(3)
    assert sw(x, x.flip(0)) == 0
    # a shift by d in D dimensions: (E (theta.d)^2)^(1/2) = |d| / sqrt(D)
    y = gaussian(100, 10)
    assert sw(y, y + 2, 20000) == pytest.approx(2, rel=0.02)
    # scaled Gaussians: W2 of N(0, 1) and N(0, 4) is 1
    assert sw(gaussian(20000, 3), 2 * gaussian(20000, 3), 200) == \
        pytest.approx(1, rel=0.03)
    assert sw(y, y + 2, 50) == sw(y, y + 2, 50)


def test_sliced_wasserstein_error_is_the_spread_of_fresh_draws():
    value, error = measure.sliced_wasserstein(gaussian(200, 5), gaussian(200, 5, 1.0), 100)
    draws = [sw(gaussian(200, 5), gaussian(200, 5, 1.0), 100)
             for _ in range(100)]
    assert abs(value - np.mean(draws)) < 4 * np.std(draws)
    assert np.std(draws) / 2 < error < 2 * np.std(draws)


def test_sliced_wasserstein_error_does_not_mind_the_classes_in_turn():
    errors = []
    for _ in range(8):
        classes = 3 * gaussian(10, 5)               # sample i is of class i % 10
        x, y = (classes.repeat(20, 1) + gaussian(200, 5) for _ in range(2))
        shuffled, y = x[torch.randperm(200, generator=G)], y[torch.randperm(200, generator=G)]
        errors.append([measure.sliced_wasserstein(v, y, 50)[1] for v in (x, shuffled)])
    in_turn, shuffled = np.mean(errors, 0)
    assert in_turn < 1.5 * shuffled


def test_kid_equals_torch_fidelity_and_its_error_the_spread():
    from torch_fidelity.metric_kid import kid_features_to_metric
    x, y = gaussian(200, 40), gaussian(200, 40, 0.3)
    expected = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, verbose=False)
    value, error = measure.kid(x, y)
    assert value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    draws = [measure.kid(gaussian(200, 40), gaussian(200, 40, 0.3))[0]
             for _ in range(200)]
    assert error == pytest.approx(np.std(draws), rel=0.3)


def test_kid_and_its_error_of_few_vectors():
    x = gaussian(5, 4)
    for a, b in ((x[:1], x), (x, x[:1])):
        assert all(map(math.isnan, measure.kid(a, b)))
    value, error = measure.kid(x[:2], x)
    assert math.isfinite(value) and math.isnan(error)


def test_a_vector_that_is_there_often_covers_itself():
    for n in (10, 25, 50):
        real = torch.rand(n, 64, generator=G)
        drawn = real[torch.randint(n, (12 * n,), generator=G)]
        recall = torch.isin(torch.arange(n), torch.cdist(drawn, real).argmin(1)).float().mean()
        assert measure.precision_recall(drawn, real[torch.arange(12 * n) % n]) == (1, recall)


def test_precision_and_recall_equal_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric
    real, fake = gaussian(300, 5), gaussian(250, 5, 0.7) * 0.7
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100,
                                      save_cpu_ram=False, verbose=False)
    precision, recall = measure.precision_recall(fake, real)
    assert precision == pytest.approx(expected["precision"])
    assert recall == pytest.approx(expected["recall"])
    assert precision > recall       # the fakes are the narrower set


def test_degenerate_sets():
    one, same = gaussian(1, 4), torch.ones(10, 4)
    assert math.isnan(measure.kid(one, one)[0])
    assert math.isnan(measure.precision_recall(one, gaussian(9, 4))[0])
    assert measure.precision_recall(same, same) == (1, 1)
    assert sw(same, same) == 0
    assert measure.fid(same, same) == 0 and math.isnan(measure.fid(one, same))


# --- Inception ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_state():
    """Random weights of pytorch-fid's network, with running statistics that keep signals alive."""
    from torchvision.models.inception import Inception3
    torch.manual_seed(0)
    net = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.state_dict()


def test_inception_features_equal_pytorch_fids(inception_state, monkeypatch):
    from pytorch_fid import inception
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: inception_state)
    images = torch.randint(0, 256, (4, 32, 32, 3), generator=G, dtype=torch.uint8)
    with torch.no_grad():
        expected = inception.InceptionV3([3]).eval()(images.permute(0, 3, 1, 2) / 255)[0].flatten(1)
    got = measure.network_features(measure.inception_net(inception_state), images, size=299,
                                   mean=0.5, std=0.5, batch=3)
    assert got.shape == (4, 2048) and got.std() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_weights_that_cannot_be_used_are_named(run, tmp_path, refused, monkeypatch):
    before = (run / "metrics.csv").read_bytes()
    more = ["--features", "inception", "--weights"]
    refused(measure.main, [run, *more, "none.pth"], "none.pth", "no such file")
    (tmp_path / "w.pth").write_bytes(b"PK\3\4 damaged")
    refused(measure.main, [run, *more, tmp_path / "w.pth"], "w.pth", "damaged")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    refused(measure.main, [run, *more, tmp_path / "other.pth"], "--weights", "graph")

    def offline(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    refused(measure.main, [run, "--features", "inception"], "6726825d", "--weights", "no network")
    assert (run / "metrics.csv").read_bytes() == before


def test_both_feature_spaces_side_by_side(run, tmp_path, inception_state, capsys):
    for path in (run / "samples" / SET).glob("*"):
        if path.stem != "0000016":
            path.unlink()
    torch.save(inception_state, tmp_path / "w.pth")
    measure.main([str(run), "--features", "inception", "--weights", str(tmp_path / "w.pth"),
                  "--num", "6", "--device", "cpu"])
    assert "not the official FID weights" in capsys.readouterr().out
    rows = metrics(run)
    assert float(rows[-1]["fid_inception_train"]) > 0 and rows[-1]["fid_pixels_train"] == ""
    assert rows[0]["fid_inception_train"] == "" and rows[0]["fid_pixels_train"]


# --- Features of any network ----------------------------------------------------------------------


class Small(torch.nn.Module):
    """A network to be saved: the picture in 8 x 8, without its mean."""

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
        return x - x.mean(1, keepdim=True)


class Tuple(Small):
    def forward(self, x):
        return super().forward(x), x


class Flat(Small):
    def forward(self, x):
        return super().forward(x).flatten()


def export(module, path):
    """A .pt2 file of a module that takes any number of pictures of any size."""
    B, H = torch.export.Dim("B"), torch.export.Dim("H", min=8, max=1024)
    torch.export.save(torch.export.export(module, (torch.rand(2, 3, 16, 16),),
                                          dynamic_shapes=({0: B, 2: H, 3: H},)), path)
    return path


def test_features_of_an_exported_network(run, tmp_path, refused, capsys):
    refused(measure.main, [run, "--features", "nonsense"], "--features nonsense")
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    refused(measure.main, [run, "--features", tmp_path / "bad.pt2"], "bad.pt2", "damaged")
    refused(measure.main, [run, "--features", export(Tuple(), tmp_path / "two.pt2")], "two.pt2",
            "returns tuple")
    refused(measure.main, [run, "--features", export(Flat(), tmp_path / "flat.pt2")], "flat.pt2",
            "must be a tensor (8, D)")
    capsys.readouterr()
    path = export(Small(), tmp_path / "my net.pt2")
    measure.main([str(run), "--features", str(path), "--device", "cpu"])
    assert "TorchScript" not in capsys.readouterr().out
    row, digest = metrics(run)[-1], hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert row[f"weights_my-net-{digest}"] and float(row["fid_pixels_train"]) > 0
    space = measure.load_network("--features", path, torch.device("cpu"))
    data, (images, *_) = train.load_data("toy", 8, 8), sample.read_samples(file_of(run, 16))
    x, y = (space.extract(torch.from_numpy(v)) for v in (images, data.heldout_images[:12]))
    torch.testing.assert_close(x, Small()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255))
    assert float(row[f"fid_my-net-{digest}_heldout"]) == pytest.approx(measure.fid(x, y))
    # a file of another name has columns of its own, whatever the cache holds
    measure.main([str(run), "--features", str(path.rename(tmp_path / "it.pt2")), "--device", "cpu"])
    row = metrics(run)[-1]
    assert row[f"fid_it-{digest}_heldout"] == row[f"fid_my-net-{digest}_heldout"]


def test_grey_pictures_are_given_three_channels():
    grey = torch.randint(0, 256, (5, 8, 8, 1), generator=G, dtype=torch.uint8)
    x = measure.network_features(lambda x: x.flatten(1), grey, batch=2)
    assert torch.equal(x.reshape(5, 3, 64), (grey.reshape(5, 1, 64) / 255).expand(5, 3, 64))


def test_small_pictures_ask_for_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = ["--data", "digits", "--size", "8"]
    train.main([*TINY, *digits, "--steps", "4", "--out", "r"])
    sample.main(["r", "--num", "4", "--sampling-steps", "2", "--device", "cpu"])
    measure.main(["r", "--device", "cpu"])
    assert "pixels" in capsys.readouterr().out


# --- The command ----------------------------------------------------------------------------------


SET = "steps5"                              # of tiny_run's samples: made in 5 steps


@pytest.fixture
def run(tiny_run, tmp_path, monkeypatch):
    """A copy of tiny_run, to be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, tmp_path / "r")
    return tmp_path / "r"


def metrics(run, name="metrics.csv"):
    return train.read_csv(run / name)


def file_of(run, step):
    """The samples file of a step."""
    return sample.samples_path(run, next(iter(sample.sample_sets(run))), step)


def change(run, step, edit):
    """Write the samples of a step anew after edit(images)."""
    path = file_of(run, step)
    found = sample.read_samples(path)
    edit(found.images)
    sample.write_samples(path, *found[:4], train.identity(train.read_run(run)))


def copy_first(images, count=8):
    images[:count] = train.load_data("toy", 8, 8).train_images[:count]


def test_metrics_of_a_run(tiny_run):
    rows = metrics(tiny_run)
    assert [int(r["step"]) for r in rows] == [4, 6, 8, 11, 16]
    for row in rows:
        assert row["set"] == SET and row["setting_sampling_steps"] == "5"
        assert 0 <= float(row["out_of_range"]) <= 1
        assert row["samples"] == "12" and row["copy_ratio"] == "0.0"
        assert float(row["copy_high"]) == pytest.approx(0.2425, abs=1e-3)
        assert all(float(row[f"{m}_pixels_{s}"]) > 0
                   for m in ("fid", "sw") for s in ("train", "heldout"))
        assert all(value for name, value in row.items() if name != "setting_switch")
    with np.load(tiny_run / f"neighbours/{SET}/0000016.npz") as found:
        assert found["distances"].shape == found["indices"].shape == (12, 2)
        assert found["nearest"].shape == found["samples"].shape == (12, 8, 8, 3)
        assert str(found["samples_digest"]) == rows[-1]["samples_digest"] and found["step"] == 16


def test_controls_of_a_run(tiny_run):
    rows = metrics(tiny_run)
    controls = {row["name"]: row for row in metrics(tiny_run, "controls.csv")}
    assert list(controls) == ["heldout", "training", "leave_one_out", "exact"]
    heldout, training, exact = (controls[k] for k in ("heldout", "training", "exact"))
    assert float(heldout["copy_ratio"]) == 0 and float(exact["copy_ratio"]) > 0.7
    assert heldout["images"] == "5120" and training["images"] == "12"
    for column in ("copy_ratio", "copy_high", "auth_share"):
        assert rows[-1][f"null_{column}"] == heldout[column]
    assert 0.3 < float(heldout["auth_share"]) < 0.7 and float(training["auth_share"]) == 0
    assert float(training["copy_ratio"]) == 1 and float(training["nearest_rms"]) == 0
    assert float(training["mixture_residual"]) < 1e-6 < float(heldout["mixture_residual"])
    # honest images are nearer to held-out ones, a memorizer's to the training images
    assert float(heldout["sw_pixels_heldout"]) < float(heldout["sw_pixels_train"])
    assert float(training["sw_pixels_train"]) < float(training["sw_pixels_heldout"])
    # a memorizer's samples are their nearest images
    assert training["kid_pixels_replaced"] == training["kid_pixels_heldout"]
    columns = {c for c, value in training.items() if value} - {"name", "images", "compared",
                                                                   "made_of"}
    assert columns <= set(rows[-1])


def test_controls_of_another_feature_space_stay(run, monkeypatch):
    before = metrics(run, "controls.csv")
    path = export(Small(), run / "net.pt2")
    measure.main([str(run), "--features", str(path), "--device", "cpu"])
    for old, new in zip(before, metrics(run, "controls.csv"), strict=True):
        assert old.items() <= new.items() and len(new) > len(old)

    def dark(c):
        """One metric more changes nothing in the others."""
        return {"dark_share": float((c.images < 64).float().mean())}
    monkeypatch.setattr(measure, "METRICS", (*measure.METRICS, dark))
    measure.main([str(run), "--device", "cpu"])
    for row in metrics(run, "controls.csv"):
        assert row["name"] == "leave_one_out" or row["dark_share"] and any(
            value for name, value in row.items() if name.startswith("sw_net-"))
    measure.main([str(run), "--num", "6", "--device", "cpu"])
    assert all(not value for row in metrics(run, "controls.csv") for name, value in row.items()
               if "_net-" in name)                          # of another count


def test_a_network_named_like_a_space_keeps_its_columns(run):
    (run / "metrics.csv").unlink()
    path = export(Small(), run / "pixels_x.pt2")
    for more in (["--features", str(path)], []):
        measure.main([str(run), *more, "--device", "cpu"])
    columns = [name for name, value in metrics(run)[0].items() if value]
    assert sum("_pixels-x-" in name for name in columns) > 10 and "fid_pixels_train" in columns


def test_spectrum_of_a_run(tiny_run):
    rows = metrics(tiny_run, "spectrum.csv")
    assert [r["name"] or int(r["step"]) for r in rows] == [4, 6, 8, 11, 16, "heldout", "training"]
    assert list(rows[0]) == ["name", "set", "step", *(f"power_{k}" for k in range(5))]
    assert all(float(row["power_1"]) > 0 for row in rows)


def test_measuring_skips_what_is_done_and_measures_new_samples(run, capsys):
    measure.main([str(run), "--device", "cpu"])
    assert "0 of 5 snapshots" in capsys.readouterr().out
    change(run, 16, copy_first)
    measure.main([str(run), "--device", "cpu"])
    assert "1 of 5 snapshots" in capsys.readouterr().out
    row = metrics(run)[-1]
    assert float(row["copy_ratio"]) == pytest.approx(8 / 12) and row["distinct_copied"] == "8"


def test_measuring_again_gives_the_same_files(tiny_run, run):
    shutil.rmtree(run / "neighbours")
    for name in ("metrics.csv", "controls.csv", "spectrum.csv"):
        (run / name).unlink()
    measure.main([str(run), "--device", "cpu"])
    for name in ("metrics.csv", "controls.csv", "spectrum.csv"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes()


def test_a_new_metric_is_added_to_what_was_measured(run, monkeypatch, capsys):
    old = metrics(run)

    def brightness(c):
        """The mean value of the pictures."""
        return {"brightness": float(c.images.double().mean())}
    monkeypatch.setattr(measure, "METRICS", (*measure.METRICS, brightness))
    measure.main([str(run), "--device", "cpu"])
    assert "5 of 5 snapshots" in capsys.readouterr().out
    for before, after in zip(old, metrics(run), strict=True):
        assert before.items() <= after.items() | {("code", before["code"])}
        assert float(after["brightness"]) == pytest.approx(
            sample.read_samples(file_of(run, int(after["step"]))).images.mean())
    assert all(float(r["brightness"]) > 0 for r in metrics(run, "controls.csv") if r["brightness"])
    measure.main([str(run), "--device", "cpu"])
    assert "0 of 5 snapshots" in capsys.readouterr().out


def test_a_metric_that_went_and_came_again_changed_is_measured_anew(run, monkeypatch, capsys):
    def share(limit):
        def dark(c):
            """The share of dark pixels."""
            return {"dark_share": float((c.images < limit).double().mean())}
        monkeypatch.setattr(measure, "METRICS", (*real, dark))
        monkeypatch.setattr(measure, "source_of", lambda f: f"{limit}" if f is dark else source(f))
        measure.main([str(run), "--device", "cpu"])
        return [float(row["dark_share"]) for row in metrics(run)]
    real, source = measure.METRICS, measure.source_of
    first = share(64)
    monkeypatch.setattr(measure, "METRICS", real)
    measure.main([str(run), "--device", "cpu"])
    assert all(a < b for a, b in zip(first, share(200), strict=True))


def sharp(c):
    """A column that another metric has."""
    return {"sharpness": 0.0}


@pytest.mark.parametrize(("metrics", "words"), [
    ([lambda c: {"a": 1.0}], ["METRICS", "<lambda>"]),
    ([measure.copying], ["METRICS", "copying"]),
    ([sharp], ["METRICS", "sharpness and sharp", "columns of the same name"]),
    ([functools.partial(measure.mixture, k=3)], ["METRICS", "one without"])])
def test_metrics_need_names_of_their_own(run, monkeypatch, refused, metrics, words):
    monkeypatch.setattr(measure, "METRICS", (*measure.METRICS, *metrics))
    refused(measure.main, [run, "--device", "cpu"], *words)


@pytest.mark.parametrize("returned", [{"dark": torch.tensor(0.5)}, 0.5, {"dark": "half"},
                                      {"dark": True}])
def test_a_metric_that_gives_no_numbers_is_named(run, monkeypatch, refused, returned):
    def dark(c):
        """No float."""
        return returned
    monkeypatch.setattr(measure, "METRICS", (*measure.METRICS, dark))
    refused(measure.main, [run, "--device", "cpu"], "metric dark", "must be {column: number}")


def test_a_metric_in_a_file_of_your_own_is_measured_anew_when_that_changes(
        run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("""
LIMIT = 64

def below(x):
    return x < LIMIT

def dark(c):
    return {"dark_share": float(below(c.images).float().mean())}
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(measure, "HERE", tmp_path)                              # beside it
    mine = importlib.import_module("mine")
    monkeypatch.setattr(measure, "METRICS", (mine.dark, *measure.METRICS))
    monkeypatch.setattr(measure, "NULLS", ("dark_share", *measure.NULLS))
    shares = []
    for limit in (64, 200):
        monkeypatch.setattr(mine, "LIMIT", limit)
        measure.main([str(run), "--device", "cpu"])
        assert "5 of 5 snapshots" in capsys.readouterr().out
        row = metrics(run)[-1]
        shares.append((float(row["dark_share"]), float(row["null_dark_share"])))
    assert shares[0][0] < shares[1][0] and shares[0][1] < shares[1][1]


def test_what_a_metric_uses_belongs_to_its_code(monkeypatch):
    before = measure.code_of(measure.fidelity), measure.code_of(measure.similarity)
    monkeypatch.setattr(measure, "SW_PROJECTIONS", 50)          # the default of an argument
    assert measure.code_of(measure.fidelity) != before[0]
    assert measure.code_of(measure.similarity) == before[1]


@pytest.mark.parametrize("kind", [int, str, lambda x: [x], lambda x: {"a": x}, np.float32,
                                  lambda x: np.array([x]), lambda x: torch.tensor(x),
                                  lambda x: {x}, lambda x: ([torch.tensor(x)],)])
def test_a_constant_of_any_kind_belongs_to_the_code(monkeypatch, kind):
    codes = []
    for value in (1, 2, 2):
        monkeypatch.setattr(measure, "SW_PROJECTIONS", kind(value))
        codes.append(measure.code_of(measure.fidelity))
    assert codes[0] != codes[1] == codes[2]


@pytest.mark.parametrize("kind", [lambda f: {"a": f}, lambda f: (f, f), lambda f: {"a": (f, 2)}])
def test_functions_in_a_container_belong_to_the_code(monkeypatch, kind):
    codes = []
    for function in (measure.kid, measure.kid, measure.sharpness, torch.sin, torch.cos):
        monkeypatch.setattr(measure, "SW_PROJECTIONS", kind(function))
        codes.append(measure.code_of(measure.fidelity))
    assert codes[0] == codes[1] and len({*codes}) == 4
    assert measure.code_of(measure.fidelity) == codes[-1]       # no address is in it


def test_a_network_that_is_loaded_at_its_first_use_is_no_change(monkeypatch):
    codes = []
    for value in (None, torch.nn.Linear(1, 1), None):
        monkeypatch.setattr(measure, "SW_PROJECTIONS", value)
        codes.append(measure.code_of(measure.fidelity))
    assert len({*codes}) == 1


def test_containers_of_anything_have_a_code(monkeypatch):
    loop = [1]
    loop.append(loop)
    sizes = (lambda x: x,
             lambda x: x / 2)
    codes = []
    for value in (loop, sizes, (measure.say_once,), ((1,), 2), ((1, 2),), (torch.float64, 1),
                  (torch.float32, 1), (range(3),), (range(4),), (train.PROCESSES["flow"],),
                  (train.PROCESSES["ddpm"],)):
        monkeypatch.setattr(measure, "SW_PROJECTIONS", value)
        codes.append(measure.code_of(measure.fidelity))
        assert measure.code_of(measure.fidelity) == codes[-1]
    assert len({*codes}) == len(codes)


def test_rows_whose_samples_are_gone_are_said_to_be_old(run, monkeypatch, capsys):
    file_of(run, 16).unlink()
    for threshold, told in ((1 / 3, False), (1 / 4, True)):
        monkeypatch.setitem(measure.THRESHOLDS, "", threshold)
        measure.main([str(run), "--device", "cpu"])
        assert ("1 rows whose samples are gone" in capsys.readouterr().err) is told


def test_code_in_folders_beside_is_followed(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/edges.py").write_text("""
def dark(c):
    return {"dark_share": 0.5}
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(measure, "HERE", tmp_path)
    assert measure.is_own(importlib.import_module("more.edges")) and not measure.is_own(np)


def test_samples_of_other_weights_are_not_measured(run, refused):
    state = torch.load(run / "snapshots/0000016.pt", weights_only=True)
    state["ema"]["conv_in.bias"] += 1
    train.save(run / "snapshots/0000016.pt", state)
    refused(measure.main, [run, "--device", "cpu"], file_of(run, 16), "other weights")


def test_samples_of_unequal_numbers_are_named(run, capsys):
    path = file_of(run, 16)
    found = sample.read_samples(path)
    sample.write_samples(path, found.images[:6], found.labels[:6], *found[2:4],
                         train.identity(train.read_run(run)))
    measure.main([str(run), "--device", "cpu"])
    assert "6 and 12 images side by side" in capsys.readouterr().err
    measure.main([str(run), "--device", "cpu", "--num", "6"])
    assert "side by side" not in capsys.readouterr().err


def test_a_changed_metric_is_measured_anew(run, monkeypatch, capsys):
    def sharpness(c):
        """Another sharpness, in the same columns."""
        return {"sharpness": 7.0, "contrast": float(len(c.images))}
    others = [m for m in measure.METRICS if m is not measure.sharpness]
    monkeypatch.setattr(measure, "METRICS", (*others, sharpness))
    measure.main([str(run), "--device", "cpu"])
    assert "5 of 5 snapshots" in capsys.readouterr().out
    assert {row["sharpness"] for row in metrics(run)} == {"7.0"}


def test_the_code_of_a_metric_is_all_that_it_uses(monkeypatch):
    before = {metric: measure.code_of(metric) for metric in measure.METRICS}

    def kid(x, y):
        """Another KID."""
        return 0.0, 0.0
    kid.__module__ = "measure"
    monkeypatch.setattr(measure, "kid", kid)
    changed = {m.__name__ for m in measure.METRICS if measure.code_of(m) != before[m]}
    assert changed == {"fidelity", "replaced"}
    monkeypatch.setattr(measure, "THRESHOLDS", {"": 0.5})
    changed |= {m.__name__ for m in measure.METRICS if measure.code_of(m) != before[m]}
    assert changed == {"fidelity", "replaced", "copying", "near_samples"}


def test_sets_of_samples_side_by_side(run, capsys):
    sample.main([str(run), "--num", "6", "--sampling-steps", "5", "--eta", "1", "--device", "cpu"])
    measure.main([str(run), "--device", "cpu"])
    assert "5 of 10 snapshots" in capsys.readouterr().out
    rows = metrics(run)
    assert [(r["set"], int(r["step"]), r["setting_eta"]) for r in rows] == [
        (name, step, eta) for name, eta in ((SET, "0.0"), ("steps5_eta1", "1.0"))
        for step in (4, 6, 8, 11, 16)]
    assert (run / "neighbours/steps5_eta1/0000016.npz").exists()


def test_two_training_images_and_one_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "r"
    train.main([*TINY, "--n", "2", "--steps", "4", "--out", str(run)])
    sample.main([str(run), "--num", "1", "--sampling-steps", "2", "--device", "cpu"])
    measure.main([str(run), "--device", "cpu"])
    row = metrics(run)[0]
    assert row["samples"] == "1" and row["copy_ratio"] == "0.0" and row["fid_pixels_train"] == "nan"
    assert float(row["sw_pixels_train"]) > 0
    controls = {r["name"]: r for r in metrics(run, "controls.csv")}
    assert float(controls["leave_one_out"]["copy_ratio"]) == 0


def test_bad_samples_are_named(run, refused):
    before = (run / "metrics.csv").read_bytes()
    path = file_of(run, 16)
    refused(measure.main, [run, "--num", "13"], "--num 13", "only 12")
    refused(measure.main, [run, "--num", "0"], "--num 0")
    refused(measure.main, [run, "--data", "none.npz"], "none.npz")
    found, whole = sample.read_samples(path), path.read_bytes()
    path.write_bytes(whole[:300])
    refused(measure.main, [run], path, "damaged")
    sample.write_samples(path, np.zeros((12, 4, 4, 3), np.uint8), found.labels, found.settings, 0.0,
                         train.identity(train.read_run(run)))
    refused(measure.main, [run], path, "(12, 4, 4, 3)")
    shutil.rmtree(run / "samples")
    refused(measure.main, [run], "no samples", "sample.py")
    refused(measure.main, ["none"], "not a run folder")
    assert (run / "metrics.csv").read_bytes() == before


def test_what_is_wrong_is_said_before_weights_are_loaded(run, refused, monkeypatch):
    def loaded(*args):
        raise AssertionError("the weights were asked for")
    monkeypatch.setattr(measure, "load_spaces", loaded)
    refused(measure.main, [run, "--twin", "none"], "none")
    refused(measure.main, [run, "--features", "inception", "--twin", "none"], "--twin")
    refused(measure.main, [run, "--denoisers", "--planted"], "--planted")
    refused(measure.main, [run, "--patch", "5"], "--patch")
    refused(measure.main, [run, "--features", "pixels", "--weights", "w.pth"], "--weights")
    refused(measure.main, [run, "--twin", run], "share 8 images")
    refused(measure.main, [run, "--patch", "2"], "--patch 2")
    (run / "metrics.csv").write_bytes(b"step\n\xff\xfe")
    refused(measure.main, [run, "--features", "inception"], "metrics.csv")


def test_flipped_training_is_measured_with_mirrored_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "r"
    train.main([*TINY, "--flip", "--steps", "4", "--out", str(run)])
    sample.main([str(run), "--num", "8", "--sampling-steps", "2", "--device", "cpu"])

    def mirror(images):
        images[:] = train.load_data("toy", 8, 8).train_images[:, :, ::-1]
    change(run, 4, mirror)
    measure.main([str(run), "--device", "cpu"])
    assert float(metrics(run)[0]["copy_ratio"]) == 1


# --- What measure.py reads may be damaged, swapped, or not to be written --------------------------


@pytest.mark.parametrize("text", [
    b"set,step\n,4,5\n", b"set,step\n\n,\n", b"set,step,a\n,4\n", b"a,b\n1,2\n", b"\0\xff\x80" * 99,
    b'set,step\n"\n', b"set,step\n,four\n"])
def test_a_damaged_table_is_one_line(run, refused, text):
    for name, more in (("metrics.csv", []), ("denoisers.csv", ["--denoisers"])):
        (run / name).write_bytes(text)
        refused(measure.main, [run, *more], name)
        assert (run / name).read_bytes() == text


def test_damaged_and_swapped_neighbours_are_made_anew(tiny_run, run):
    folder = run / "neighbours" / SET
    (folder / "0000004.npz").rename(folder / "0000005.npz")
    (folder / "0000016.npz").rename(folder / "0000004.npz")
    (folder / "0000005.npz").rename(folder / "0000016.npz")
    content = bytearray((folder / "0000006.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "0000006.npz").write_bytes(content)
    (folder / "0000008.npz").write_bytes(content[:100])
    measure.main([str(run), "--device", "cpu"])
    for path in folder.glob("*"):
        with np.load(path) as new, np.load(tiny_run / "neighbours" / SET / path.name) as old:
            assert all(np.array_equal(new[key], old[key]) for key in old.files)


def test_caches_that_are_swapped_or_damaged_are_made_anew(tiny_run, run):
    def fresh():
        shutil.rmtree(run / "neighbours")
        (run / "metrics.csv").unlink()
        measure.main([str(run), "--device", "cpu"])
    fresh()
    files = sorted(Path("data/cache").glob("*"))
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)                       # each is another's
    fresh()
    assert [path.read_bytes() for path in files] != contents[1:] + contents[:1]
    for k, path in enumerate(files):
        path.write_bytes(contents[k][:k * 7] + b"?" + contents[k][k * 7 + 1:])
    fresh()
    for name in ("metrics.csv", "controls.csv"):
        assert (run / name).read_bytes() == (tiny_run / name).read_bytes()


def test_a_cache_that_cannot_be_written_is_no_error(tiny_run, run, capsys):
    Path("data").write_text("no folder")
    (run / "metrics.csv").unlink()
    measure.say_once.cache_clear()
    measure.main([str(run), "--device", "cpu"])
    assert capsys.readouterr().out.count("data/cache") == 1
    assert (run / "metrics.csv").read_bytes() == (tiny_run / "metrics.csv").read_bytes()


def test_caches_follow_what_they_are_made_of(run, monkeypatch):
    calls = []

    def count(*things):
        calls.append(things)
        return torch.zeros(1)
    x, flow = torch.zeros(3), train.PROCESSES["flow"]
    same_by_name = flow._replace(schedule=lambda t: (1 - t**2, t**2))
    for things in ((x, "a"), (x, "b"), (x + 1, "a"), (x.int(), "a"), (x, flow), (x, same_by_name)):
        for _ in range(2):
            measure.cached(count, *things)
    assert len(calls) == 6
    monkeypatch.setattr(measure, "FILES", measure.FILES + "# another line")
    measure.cached(count, x, "a", made_by=measure.FILES)
    assert len(calls) == 7
    # what is slow, features of a network, stays when other code changes
    def net(x):
        calls.append(x)
        return x.flatten(1)
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    a, b = (measure.network_space("net", net, digest, "") for digest in ("1", "2"))
    smaller = measure.network_space("net", net, "2", "", 2)     # other pictures, other features
    for space in (a, a, b, smaller, smaller):
        space.of_real(images)
    assert len(calls) == 10


def test_temporary_files_of_a_kill_go_and_those_of_other_stages_stay(run):
    own, others = run / ".metrics.csv.77.tmp", run / ".log.csv.77.tmp"
    for path in (own, others):
        path.write_text("half")
    measure.main([str(run), "--device", "cpu"])
    assert not own.exists() and others.exists()


def test_two_at_once_are_refused(run, refused):
    with train.locked(run, "measure"):
        refused(measure.main, [run], "another process")


# --- Sharpness, mixtures, attractors, spectra -----------------------------------------------------


def picture(values):
    """uint8 (n, S, S, 1) of numbers in [0, 1]."""
    return (values * 255).round().to(torch.uint8)[..., None]


def test_sharpness_and_contrast_of_known_pictures(subset):
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    stripes = torch.arange(8)[:, None].expand(8, 8) % 2
    nowhere = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64)       # none is looked for
    for x, sharp, contrast in ((board, 2, 0.5), (stripes, 1, 0.5), (torch.ones(8, 8), 0, 0)):
        c = measure.Context(picture(x[None].float()), subset, neighbours=nowhere)
        row = measure.sharpness(c)
        assert row["sharpness"] == pytest.approx(sharp, abs=1e-6)
        assert row["contrast"] == pytest.approx(contrast, abs=1e-6)


def test_spectrum_of_waves():
    turn = 2 * math.pi * torch.arange(32) / 32
    for k in (1, 5, 16):
        x = (0.5 + 0.4 * (k * turn).cos()).expand(2, 32, 32)
        power = measure.power_spectrum(picture(x))
        assert power["power_0"] == pytest.approx(0.25, abs=0.002)
        ring = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(32, 1 / 32)] * 2, indexing="ij"))
        count = int((ring.round() == k).sum())
        total = 0.4**2 / (1 if k == 16 else 2)          # of a cosine; at 16 every value is +-.4
        assert power[f"power_{k}"] * count == pytest.approx(total, rel=0.02)
        assert sum(v for name, v in power.items() if name not in ("power_0", f"power_{k}")) < 1e-5


def test_mixture_weights_equal_scipys():
    from scipy.optimize import nnls
    x = torch.randn(40, 60, generator=G, dtype=torch.float64)
    common = torch.randn(40, 1, 60, generator=G, dtype=torch.float64)
    y = torch.randn(40, 10, 60, generator=G, dtype=torch.float64) + 2 * common
    y[5, 1] = y[5, 0]                                       # equal columns
    w = measure.non_negative(x, y)
    rest = (x - (w[:, :, None] * y).sum(1)).norm(dim=1)
    expected = [nnls(b.T.numpy(), a.numpy())[1] for a, b in zip(x, y, strict=True)]
    assert (w >= 0).all()
    np.testing.assert_allclose(rest, expected, rtol=1e-4)


def test_mixtures_are_found(subset):
    a, b = subset.train[:8].float(), subset.train[8:16].float()
    mixed = ((a + b) / 2).round().to(torch.uint8)
    pairs = measure.Subset.__new__(measure.Subset)
    pairs.search = measure.pixel_features(subset.train[:16])
    c = measure.Context(mixed, subset)
    assert measure.mixture(c)["mixture_residual"] < 0.4 * float(
        measure.mixture(measure.Context(subset.heldout[:8], subset))["mixture_residual"])
    c.subset = pairs
    assert measure.mixture(c, k=16)["mixture_residual"] < 0.01


def test_blur_alone_is_told_from_mixing(subset):
    from torchvision.transforms.functional import gaussian_blur
    pictures = measure.to_float(subset.heldout[:256])
    for sigma in (0.6, 1.2):
        c = measure.Context(measure.to_uint8(gaussian_blur(pictures, 9, sigma)), subset)
        row = measure.authenticity(c) | measure.nearest_rms(c) | measure.mixture(c)
        for column, value in measure.blurred(c).items():
            assert value == pytest.approx(row[column.removeprefix("blurred_")], rel=0.02)
    unblurred = measure.Context(subset.heldout[:256], subset)
    noise = torch.randint(0, 256, unblurred.images.shape, generator=G, dtype=torch.uint8)
    assert measure.blurred(measure.Context(noise, subset)) == measure.blurred(unblurred)
    assert measure.blurred(unblurred)["blurred_nearest_rms"] == pytest.approx(
        measure.nearest_rms(unblurred)["nearest_rms"], rel=1e-3)


def test_nearest_distance_in_rms(subset):
    shifted = (subset.train[:9].int() + 10).clamp(0, 255).to(torch.uint8)
    row = measure.nearest_rms(measure.Context(shifted, subset))
    assert row["nearest_rms"] == pytest.approx(10 / 127.5, rel=0.02)


def test_samples_near_one_another_and_no_training_image(subset):
    g = torch.Generator().manual_seed(0)
    attractor = torch.randint(0, 256, (1, 16, 16, 3), generator=g, dtype=torch.uint8)
    near = (attractor.int() + torch.randint(-4, 5, (6, 16, 16, 3), generator=g)).clamp(0, 255)
    images = torch.cat([near.to(torch.uint8), subset.train[:2], subset.train[:2]])
    assert measure.near_samples(measure.Context(images, subset))["near_samples"] == 0.6


def test_replaced_by_the_nearest_training_image(subset):
    c = measure.Context(subset.heldout[:40], subset)
    row = measure.replaced(c)
    nearest = measure.pixel_features(subset.train[c.nearest])
    held = measure.pixel_features(subset.heldout[:40])
    assert row == {"fid_pixels_replaced": measure.fid(nearest, held),
                   "kid_pixels_replaced": measure.kid(nearest, held)[0],
                   "sw_pixels_replaced": sw(nearest, held)}


# --- SSCD, planted copies, twins, the floor -------------------------------------------------------


def test_similarity_counts_what_is_above_the_threshold(subset):
    angles = torch.tensor([0.0, 0.9, 0.95, 3.0])           # cosines 1, .62, .58, -.99 to the first
    samples = torch.stack([angles.cos(), 0 * angles, angles.sin(), 0 * angles], 1)
    c = measure.Context(subset.train[:4], subset)
    assert measure.similarity(c) == {}
    subset.references["sscd"] = torch.eye(4)[:2]
    subset.sscd = measure.Space("sscd", lambda images: samples, "")
    row = measure.similarity(c)
    assert row["sscd_ratio"] == 0.5 and row["sscd_low"] < 0.5 < row["sscd_high"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A TorchScript module in SSCD's place."""
    path = tmp_path_factory.mktemp("sscd") / "small.torchscript.pt"
    torch.jit.trace(Small(), torch.zeros(1, 3, 32, 32)).save(str(path))
    return path


def test_sscd_and_planted_copies_on_a_run(run, tmp_path, stand_in, refused, monkeypatch, capsys):
    refused(measure.main, [run, "--sscd", "none.pt"], "--sscd none.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    refused(measure.main, [run, "--sscd", tmp_path / "bad.pt"], "bad.pt", "damaged")
    refused(measure.main, [run, "--sscd", export(Tuple(), tmp_path / "two.pt2")], "two.pt2",
            "returns tuple")

    def copy_one(images):
        images[:] = train.load_data("toy", 8, 8).train_images[0]
    change(run, 16, copy_one)
    capsys.readouterr()
    monkeypatch.setattr(measure, "SSCD_PREPARE", (32, *measure.SSCD_PREPARE[1:]))
    measure.main([str(run), "--sscd", str(stand_in), "--planted", "--device", "cpu"])
    assert capsys.readouterr().out.count("TorchScript") == 1
    row = metrics(run)[-1]
    assert float(row["sscd_ratio"]) == 1 and float(row["null_sscd_ratio"]) < 1
    assert row["most_copied"] == "12" and row["distinct_copied"] == "1"
    planted = {r["planted"]: r for r in metrics(run, "planted.csv")}
    for kind in ("exact", "noise rms 0.05"):
        assert float(planted[kind]["copy_ratio"]) == float(planted[kind]["sscd_ratio"]) == 1
        assert float(planted[kind]["not_authentic"]) == 1
    assert float(planted["held-out images"]["copy_ratio"]) == 0
    assert float(planted["noise rms 0.20"]["copy_ratio"]) < 1

    # Another threshold: what was asked for before is made anew, without asking again.
    monkeypatch.setitem(measure.THRESHOLDS, "", 1e-9)
    measure.main([str(run), "--sscd", str(stand_in), "--device", "cpu"])
    planted = {r["planted"]: r for r in metrics(run, "planted.csv")}
    assert float(planted["noise rms 0.05"]["copy_ratio"]) == 0
    with np.load(run / f"neighbours/{SET}/0000016.npz") as found:
        assert float(found["threshold"]) == 1e-9


def test_twins_that_agree_and_twins_that_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subsets = [measure.Subset(train.load_data("toy", 32, 8, offset), False, torch.device("cpu"))
               for offset in (0, 32)]
    fresh = torch.from_numpy(train.load_data("toy", 2, 8).heldout_images[:32])

    def row(*images):
        return measure.twin_row(*map(measure.Context, images, subsets))
    agree = row(fresh, fresh.clone())
    assert agree["agreement"] == 1 and agree["twin_rms"] == 0 and agree["nearest_train_rms"] > 0.05
    assert agree["null_agreement"] < 0.7 and agree["copy_ratio"] == 0
    copy = row(subsets[0].train, subsets[1].train)
    assert copy["agreement"] == 0 and copy["nearest_train_rms"] == 0 and copy["twin_rms"] > 0.1
    grey = torch.full((32, 8, 8, 3), 127, dtype=torch.uint8)        # both nets draw the same mush
    mush = row(grey, grey)
    assert mush["agreement"] == mush["null_agreement"] == 1


def test_twin_command(run, tmp_path, refused, monkeypatch, capsys):
    twin = tmp_path / "twin"
    train.main([*TINY, "--offset", "8", "--steps", "16", "--out", str(twin)])
    refused(measure.main, [run, "--twin", twin], "no step has samples")
    sample.main([str(twin), "--num", "12", "--sampling-steps", "5", "--device", "cpu"])
    measure.main([str(run), "--twin", str(twin), "--device", "cpu"])
    rows = metrics(run, "twin_twin.csv")
    assert [r["step"] for r in rows] == ["4", "6", "8", "11", "16"]
    assert all(0 <= float(r["agreement"]) <= 1 and float(r["twin_rms"]) >= 0 for r in rows)
    for threshold, told in ((1 / 3, 0), (1 / 4, 1)):
        monkeypatch.setitem(measure.THRESHOLDS, "", threshold)
        measure.main([str(run), "--device", "cpu"])
        assert capsys.readouterr().err.count("twin_twin.csv: is of other code") == told
    refused(measure.main, [run, "--twin", run], "share 8 images", "--offset 8")
    small = tmp_path / "small"
    train.main([*TINY, "--size", "4", "--steps", "16", "--out", str(small)])
    sample.main([str(small), "--num", "12", "--sampling-steps", "5", "--device", "cpu"])
    refused(measure.main, [run, "--twin", small], "another size")
    table = metrics(run, "twin_twin.csv")
    for other, told in ((table, 0), ([row | {"twin": "0" * 16} for row in table], 1)):
        train.write_csv(run / "twin_twin.csv", other)
        measure.main([str(run), "--device", "cpu"])
        assert capsys.readouterr().err.count("twin_twin.csv: is of another run") == told
    path = file_of(twin, 16)
    found = sample.read_samples(path)
    sample.write_samples(path, found.images, found.labels + 1, found.settings, 0,
                         train.identity(train.read_run(twin)))
    refused(measure.main, [run, "--twin", twin], "other settings or classes")


def test_floor_is_below_every_network_and_zero_at_low_noise(tiny_run):
    floor = metrics(tiny_run)[-1]
    for row in metrics(tiny_run, "log.csv"):
        assert all(float(floor[f"floor_level{k}"]) < float(row[f"train_loss_level{k}"])
                   for k in range(10))
    assert float(floor["floor_level0"]) < 1e-6


@pytest.mark.parametrize("name", train.PROCESSES)
def test_floor_of_two_images_by_integration(name):
    # For x0 = ±v the posterior mean is v tanh(a xt.v / s^2), and the loss of c x0 + d eps, with
    # eps = (xt - a x0) / s, is (c - d a / s)^2 |v|^2 E[1 - tanh^2] / D.
    process, v = train.PROCESSES[name], 40
    images = torch.tensor([127.5 + v, 127.5 - v]).reshape(2, 1, 1, 1).expand(2, 4, 4, 3)
    images = images.round().to(torch.uint8)
    got = measure.loss_floor(process, images, None, 50_000)
    v = train.to_float(images)[0].double()
    g = np.random.default_rng(0)
    t = process.time(torch.from_numpy((np.arange(5000) + 0.5) / 5000))
    a, s, c, d = (torch.as_tensor(x).double().expand_as(t).numpy()
                  for x in process.coefficients(t, t))
    norm = float(v.square().sum())
    z = g.standard_normal((400, 5000))
    argument = a * (a * norm + s * math.sqrt(norm) * z) / s**2
    loss = (c - d * a / s) ** 2 * norm / 48 * (1 - np.tanh(argument) ** 2)
    expected = loss.mean(0).reshape(10, 500).mean(1)
    np.testing.assert_allclose(got, expected, rtol=0.1, atol=5e-4)
