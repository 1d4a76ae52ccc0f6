"""measure.py: every metric against a case with a known answer, or a public implementation of it."""

import csv
import math
import shutil

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


def test_two_nearest_without_a_second_group_says_so():
    distances, indices = measure.two_nearest(torch.zeros(3, 4), torch.ones(5, 4), torch.zeros(5))
    assert (distances[:, 0] == 2).all() and distances[:, 1].isinf().all()
    assert indices.tolist() == [[0, -1]] * 3


def test_two_nearest_refuses_nan():
    with pytest.raises(train.InputError, match="not finite"):
        measure.two_nearest(torch.full((2, 3), math.nan), torch.zeros(4, 3))


def test_two_nearest_ignores_and_restores_tf32():
    torch.set_float32_matmul_precision("high")
    measure.two_nearest(torch.zeros(2, 3), torch.eye(3))
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


# --- Copies ---------------------------------------------------------------------------------------


@pytest.fixture
def subset(tmp_path, monkeypatch):
    """The toy subset of 64 images at 16x16, its cache in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return measure.Subset(train.load_data("toy", 64), False, torch.device("cpu"))


def ratio(subset, images):
    """The copy ratio of uint8 images."""
    return measure.copying_row(subset.nearest(images), subset.groups)["copy_ratio"]


def test_planted_copies_are_all_found_and_noise_never(subset):
    noise = torch.randint(0, 256, subset.train.shape, generator=G, dtype=torch.uint8)
    slightly = (subset.train.int() + torch.randint(-5, 6, subset.train.shape, generator=G))
    assert ratio(subset, subset.train) == 1
    assert ratio(subset, slightly.clamp(0, 255).to(torch.uint8)) == 1
    assert ratio(subset, noise) == 0
    assert ratio(subset, torch.cat([subset.train[:16], noise[:48]])) == 0.25


def test_held_out_toy_images_are_no_copies(subset):
    controls = subset.controls()
    for found in controls.values():
        assert measure.copying_row(found, subset.groups)["copy_ratio"] == 0
    assert len(controls["heldout"]["distances"]) == 5120
    # left out, an image does not find itself
    assert (controls["leave_one_out"]["distances"][:, 0] > 0).all()
    assert (controls["leave_one_out"]["indices"][:, 0] != torch.arange(64)).all()


def test_copies_of_duplicated_images_count(subset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train.load_data("toy", 64)
    twice = data._replace(train_images=np.concatenate([data.train_images, data.train_images[:8]]),
                          train_labels=np.concatenate([data.train_labels, data.train_labels[:8]]))
    doubled = measure.Subset(twice, False, torch.device("cpu"))
    assert doubled.groups.tolist() == [*range(64), *range(8)]
    copies = doubled.train[:8]
    assert ratio(doubled, copies) == 1
    distances, _ = measure.two_nearest(measure.pixel_features(copies), doubled.pixels)
    assert (measure.copy_ratios(distances) == 1).all()     # without groups they would pass as novel
    row = measure.copying_row(doubled.nearest(doubled.train[[0, 64, 1, 9]]), doubled.groups)
    assert (row["distinct_copied"], row["most_copied"]) == (3, 2)


def test_mirrored_copies_count_where_training_flipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = train.load_data("toy", 64)
    plain, flipped = (measure.Subset(data, flip, torch.device("cpu")) for flip in (False, True))
    mirrored = plain.train.flip(2)
    assert ratio(flipped, mirrored) == 1 and ratio(flipped, plain.train) == 1
    assert ratio(plain, mirrored) < 0.5
    assert torch.equal(flipped.nearest(mirrored)["indices"][:, 0], torch.arange(64))


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
    assert measure.wilson(k, n) == pytest.approx((low, high), rel=2e-3, abs=1e-9)


def test_auth_share_counts_those_nearer_than_the_images_own_neighbour():
    own = {"distances": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    found = {"distances": torch.tensor([[0.5, 2], [1.5, 2], [2.9, 4], [3.0, 4]]),
             "indices": torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])}
    assert measure.auth_share(found, own) == 0.5


# --- Distances of distributions -------------------------------------------------------------------


def gaussian(n, d, shift=0.0):
    return torch.randn(n, d, generator=G, dtype=torch.float64) + shift


def test_frechet_of_equal_covariances_is_the_mean_distance():
    mean, cov = measure.moments(gaussian(500, 20))
    assert measure.frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(80, rel=1e-9)
    assert measure.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)


def test_frechet_of_commuting_covariances():
    a, b = torch.rand(2, 30, generator=G, dtype=torch.float64) + 0.1
    turn, _ = torch.linalg.qr(gaussian(30, 30))
    zero = torch.zeros(30)
    got = measure.frechet_distance(zero, turn @ a.diag() @ turn.T, zero, turn @ b.diag() @ turn.T)
    assert got == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_frechet_with_fewer_samples_than_dimensions():
    # |sqrt(cov1)|^2 + |sqrt(cov2)|^2 - 2 |X1 X2^T|_* / (n - 1), without forming a covariance
    x, y = gaussian(30, 80), gaussian(30, 80, 0.2) * 1.5
    x_, y_ = x - x.mean(0), y - y.mean(0)
    expected = ((x.mean(0) - y.mean(0)).square().sum() + (x_.square().sum() + y_.square().sum()
                - 2 * torch.linalg.svdvals(x_ @ y_.T).sum()) / 29)
    got = measure.frechet_distance(*measure.moments(x), *measure.moments(y))
    assert got == pytest.approx(float(expected), rel=1e-6)
    assert measure.fid(x, y) == pytest.approx(float(expected), rel=1e-9)
    many = gaussian(200, 80)                    # one singular, one not, either way round
    a, b = measure.moments(x), measure.moments(many)
    assert measure.frechet_distance(*a, *b) == \
        pytest.approx(measure.frechet_distance(*b, *a), rel=1e-6)
    assert measure.fid(x, many) == pytest.approx(measure.frechet_distance(*a, *b), rel=1e-6)


def test_frechet_of_a_covariance_whose_first_dimensions_are_dead():
    x, y = gaussian(30, 40), gaussian(30, 40)
    x[:, 3] = y[:, 5] = 0
    x[:, 8] = x[:, 7]
    got = measure.frechet_distance(*measure.moments(x), *measure.moments(y))
    assert got == pytest.approx(measure.fid(x, y), rel=1e-6)


def test_frechet_equals_pytorch_fid():
    from pytorch_fid.fid_score import calculate_frechet_distance
    a, b = (measure.moments(gaussian(300, 60, s) @ gaussian(60, 60)) for s in (0, 0.1))
    expected = calculate_frechet_distance(*(v.numpy() for v in (*a, *b)))
    assert measure.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [(torch.zeros(3), torch.eye(4)),
                                 (torch.zeros(4) * math.nan, torch.eye(4))])
def test_frechet_refuses_bad_input(bad):
    with pytest.raises(train.InputError, match="frechet_distance"):
        measure.frechet_distance(*bad, torch.zeros(4), torch.eye(4))


def test_sliced_wasserstein_closed_forms():
    x = gaussian(500, 1)
    assert measure.sliced_wasserstein(x, x + 3) == pytest.approx(3)
    assert measure.sliced_wasserstein(x, x.flip(0)) == 0
    # a shift by d in D dimensions: (E (theta.d)^2)^(1/2) = |d| / sqrt(D)
    y = gaussian(100, 10)
    assert measure.sliced_wasserstein(y, y + 2, 20000) == pytest.approx(2, rel=0.02)
    # scaled Gaussians: W2 of N(0, 1) and N(0, 4) is 1
    assert measure.sliced_wasserstein(gaussian(20000, 3), 2 * gaussian(20000, 3), 200) == \
        pytest.approx(1, rel=0.03)
    assert measure.sliced_wasserstein(y, y + 2, 50, 1) == \
        measure.sliced_wasserstein(y, y + 2, 50, 1)
    assert measure.sliced_wasserstein(y, y + 2, 50, 1) != \
        measure.sliced_wasserstein(y, y + 2, 50, 2)


def test_sliced_wasserstein_error_is_the_spread_of_fresh_draws():
    value, error = measure.sliced_wasserstein_error(gaussian(200, 5), gaussian(200, 5, 1.0), 100)
    draws = [measure.sliced_wasserstein(gaussian(200, 5), gaussian(200, 5, 1.0), 100)
             for _ in range(100)]
    assert abs(value - np.mean(draws)) < 4 * np.std(draws)
    assert np.std(draws) / 2 < error < 2 * np.std(draws)


def test_sliced_wasserstein_wants_equal_counts():
    with pytest.raises(train.InputError, match="must be equal"):
        measure.sliced_wasserstein(gaussian(3, 2), gaussian(4, 2))


def test_kid_equals_torch_fidelity_and_its_error_the_spread():
    from torch_fidelity.metric_kid import kid_features_to_metric
    x, y = gaussian(200, 40), gaussian(200, 40, 0.3)
    expected = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, verbose=False)
    value, error = measure.kernel_distance(x, y)
    assert value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    draws = [measure.kernel_distance(gaussian(200, 40), gaussian(200, 40, 0.3))[0]
             for _ in range(200)]
    assert error == pytest.approx(np.std(draws), rel=0.3)


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
    assert math.isnan(measure.kernel_distance(one, one)[0])
    assert math.isnan(measure.precision_recall(one, gaussian(9, 4))[0])
    assert measure.precision_recall(same, same) == (1, 1)
    assert measure.sliced_wasserstein(same, same) == 0
    assert measure.frechet_distance(*measure.moments(same), *measure.moments(same)) == 0


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
    got = measure.inception_features(measure.inception_net(inception_state), images, batch=3)
    assert got.shape == (4, 2048) and got.std() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_weights_that_cannot_be_used_are_named(tiny_run, tmp_path, refused, monkeypatch):
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    before = (run / "metrics.csv").read_bytes()
    more = ["--features", "inception", "--weights"]
    refused(measure.main, [run, *more, "none.pth"], "none.pth", "No such file")
    (tmp_path / "w.pth").write_bytes(b"PK\3\4 damaged")
    refused(measure.main, [run, *more, tmp_path / "w.pth"], "w.pth", "damaged")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    refused(measure.main, [run, *more, tmp_path / "other.pth"], "--weights", "graph")
    def offline(*a, **k):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    refused(measure.main, [run, "--features", "inception"], "6726825d", "--weights", "no network")
    assert (run / "metrics.csv").read_bytes() == before


def test_both_feature_spaces_side_by_side(tiny_run, tmp_path, inception_state, monkeypatch, capsys):
    run = tmp_path / "r"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, run)
    for path in (run / "samples").glob("0000*"):
        if path.stem != "0000016":
            path.unlink()
    torch.save(inception_state, tmp_path / "w.pth")
    measure.main([str(run), "--features", "inception", "--weights", str(tmp_path / "w.pth"),
                  "--num", "6", "--device", "cpu"])
    assert "not the official FID weights" in capsys.readouterr().out
    rows = metrics(run)
    assert float(rows[-1]["fid_inception_train"]) > 0 and rows[-1]["fid_pixels_train"] == ""
    assert rows[0]["fid_inception_train"] == "" and rows[0]["fid_pixels_train"]


# --- The command ----------------------------------------------------------------------------------


def metrics(run, name="metrics.csv"):
    with open(run / name) as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_run(tiny_run):
    rows = metrics(tiny_run)
    assert [int(r["step"]) for r in rows] == [4, 6, 8, 11, 16]
    for row in rows:
        assert row["samples"] == "12" and row["copy_ratio"] == "0.0"
        assert float(row["copy_high"]) == pytest.approx(0.2425, abs=1e-3)
        assert all(float(row[f"{m}_pixels_{s}"]) > 0
                   for m in ("fid", "sw") for s in ("train", "heldout"))
    controls = {row["name"]: row for row in metrics(tiny_run, "controls.csv")}
    assert float(controls["heldout"]["copy_ratio"]) == 0
    assert float(controls["exact"]["copy_ratio"]) == 1
    with np.load(tiny_run / "neighbours/0000016.npz") as found:
        assert found["distances"].shape == found["indices"].shape == (12, 2)
        assert found["nearest"].shape == (12, 8, 8, 3)


def test_measuring_skips_what_is_done_and_measures_new_samples(tiny_run, tmp_path, capsys):
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    measure.main([str(run), "--device", "cpu"])
    assert "0 of 5 snapshots" in capsys.readouterr().out
    images, labels, settings = sample.read_samples(run / "samples/0000016.npz")
    images[:8] = train.load_data("toy", 8, 8).train_images
    sample.write_samples(run, "0000016", images, labels, settings)
    measure.main([str(run), "--device", "cpu"])
    assert "1 of 5 snapshots" in capsys.readouterr().out
    row = metrics(run)[-1]
    assert float(row["copy_ratio"]) == pytest.approx(8 / 12) and row["distinct_copied"] == "8"


def test_measuring_again_gives_the_same_file(tiny_run, tmp_path):
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    (run / "metrics.csv").unlink()
    measure.main([str(run), "--device", "cpu"])
    assert (run / "metrics.csv").read_bytes() == (tiny_run / "metrics.csv").read_bytes()


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


def test_bad_samples_are_named(tiny_run, tmp_path, refused):
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    before = (run / "metrics.csv").read_bytes()
    path = run / "samples/0000016.npz"
    refused(measure.main, [run, "--num", "13"], "--num 13", "only 12")
    refused(measure.main, [run, "--num", "0"], "--num 0")
    refused(measure.main, [run, "--data", "none.npz"], "none.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    refused(measure.main, [run], path, "no readable samples")
    np.savez(path, images=np.zeros((12, 4, 4, 3), np.uint8), labels=np.zeros(12), settings="{}")
    refused(measure.main, [run], path, "(12, 4, 4, 3)")
    shutil.rmtree(run / "samples")
    refused(measure.main, [run], "no samples", "sample.py")
    refused(measure.main, [tmp_path / "none"], "not a run folder")
    assert (run / "metrics.csv").read_bytes() == before


def test_flipped_training_is_measured_with_mirrored_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "r"
    train.main([*TINY, "--flip", "--steps", "4", "--out", str(run)])
    sample.main([str(run), "--num", "8", "--sampling-steps", "2", "--device", "cpu"])
    _, labels, settings = sample.read_samples(run / "samples/0000004.npz")
    mirrored = train.load_data("toy", 8, 8).train_images[:, :, ::-1].copy()
    sample.write_samples(run, "0000004", mirrored, labels, settings)
    measure.main([str(run), "--device", "cpu"])
    assert float(metrics(run)[0]["copy_ratio"]) == 1


# --- SSCD, planted copies, twins, the floor -------------------------------------------------------


def test_similarity_counts_what_is_above_the_threshold():
    train_features = torch.eye(4)[:2]
    angles = torch.tensor([0.0, 0.9, 0.95, 3.0])           # cosines 1, .62, .58, -.99 to the first
    samples = torch.stack([angles.cos(), 0 * angles, angles.sin(), 0 * angles], 1)
    row = measure.similarity_row(samples, train_features, torch.eye(4)[2:])
    assert row["sscd_ratio"] == 0.5 and row["null_sscd_ratio"] == 0
    assert row["sscd_low"] < 0.5 < row["sscd_high"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A TorchScript module in SSCD's place: the picture in 8 x 8, as a vector."""
    class Small(torch.nn.Module):
        def forward(self, x):
            x = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
            return x - x.mean(1, keepdim=True)
    path = tmp_path_factory.mktemp("sscd") / "small.torchscript.pt"
    torch.jit.trace(Small(), torch.zeros(1, 3, 288, 288)).save(str(path))
    return path


def test_sscd_and_planted_copies_on_a_run(tiny_run, tmp_path, stand_in, refused, monkeypatch):
    run = tmp_path / "r"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, run)
    refused(measure.main, [run, "--sscd", "none.pt"], "--sscd none.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    refused(measure.main, [run, "--sscd", tmp_path / "bad.pt"], "bad.pt", "TorchScript")
    images, labels, settings = sample.read_samples(run / "samples/0000016.npz")
    images[:] = train.load_data("toy", 8, 8).train_images[0]
    sample.write_samples(run, "0000016", images, labels, settings)
    measure.main([str(run), "--sscd", str(stand_in), "--planted", "--device", "cpu"])
    row = metrics(run)[-1]
    assert float(row["sscd_ratio"]) == 1 and float(row["null_sscd_ratio"]) < 1
    assert row["most_copied"] == "12" and row["distinct_copied"] == "1"
    planted = {r["planted"]: r for r in metrics(run, "planted.csv")}
    for kind in ("exact", "noise rms 0.05"):
        assert float(planted[kind]["copy_ratio"]) == float(planted[kind]["sscd_ratio"]) == 1
        assert float(planted[kind]["not_authentic"]) == 1
    assert float(planted["held-out images"]["copy_ratio"]) == 0
    assert float(planted["noise rms 0.20"]["copy_ratio"]) < 1


def test_twins_that_agree_and_twins_that_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subsets = [measure.Subset(train.load_data("toy", 32, 8, offset), False, torch.device("cpu"))
               for offset in (0, 32)]
    fresh = torch.from_numpy(train.load_data("toy", 2, 8).test_images[:32])
    agree = measure.twin_row(fresh, fresh.clone(), *subsets)
    assert agree["agreement"] == 1 and agree["twin_rms"] == 0 and agree["nearest_train_rms"] > 0.05
    copy = measure.twin_row(subsets[0].train, subsets[1].train, *subsets)
    assert copy["agreement"] == 0 and copy["nearest_train_rms"] == 0 and copy["twin_rms"] > 0.1


def test_twin_command(tiny_run, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = tmp_path / "twin"
    train.main([*TINY, "--offset", "8", "--steps", "16", "--out", str(twin)])
    refused(measure.main, [tiny_run, "--twin", twin], "no step has samples")
    sample.main([str(twin), "--num", "12", "--sampling-steps", "5", "--device", "cpu"])
    run = tmp_path / "r"
    shutil.copytree(tiny_run, run)
    measure.main([str(run), "--twin", str(twin), "--device", "cpu"])
    rows = metrics(run, "twin_twin.csv")
    assert [r["step"] for r in rows] == ["4", "6", "8", "11", "16"]
    assert all(0 <= float(r["agreement"]) <= 1 and float(r["twin_rms"]) >= 0 for r in rows)
    refused(measure.main, [run, "--twin", tiny_run], "share 8 images", "--offset 8")


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
    u = (np.arange(5000) + 0.5) / 5000
    a, s = (x.double().numpy() for x in process.a_s(process.snap(torch.from_numpy(u))))
    norm = float(v.square().sum())
    z = g.standard_normal((400, 5000))
    argument = a * (a * norm + s * math.sqrt(norm) * z) / s**2
    loss = (process.c - process.d * a / s) ** 2 * norm / 48 * (1 - np.tanh(argument) ** 2)
    expected = loss.mean(0).reshape(10, 500).mean(1)
    np.testing.assert_allclose(got, expected, rtol=0.1, atol=5e-4)
