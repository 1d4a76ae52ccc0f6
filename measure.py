"""Measure every snapshot's samples: how many are copies, \
and how close they are to the train and held-out images.

    # copies only need pixels; so do toys
    python measure.py runs/N16_w32_B16_lr2e-3_s0
    # FID as everyone reports it
    python measure.py runs/N2048_w128_B16_lr1e-4_s0 --features inception
    # where no weights can be had
    python measure.py runs/N2048_w128_B16_lr1e-4_s0 --features pixels

Writes metrics.csv (a row a snapshot), controls.csv (the same numbers on images known not to be, or
to be, copies) and neighbours/STEP.npz (distances and indices of the two nearest training images,
and the nearest ones to look at).
What is done is skipped. Distances are computed without TF32; the two nearest are exact.

Equation numbers: "Heusel" is arXiv 1706.08500 (FID), "Binkowski" is 1801.01401 (KID),
"Kynkaanniemi" is 1904.06991 (precision and recall), "Alaa" is 2102.08921 (AuthPct), "Yoon" is
openreview shciCbSk9h (d1/d2 < 1/3).
"""

import argparse
import hashlib
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sample import exact_predictor, load_subset, read_samples
from train import (
    PROCESSES,
    UNREADABLE,
    InputError,
    command_line,
    evaluate,
    pick_device,
    read_csv,
    read_run,
    to_float,
    write_atomic,
    write_csv,
)

# of d1/d2; the literature's is 1/3
THRESHOLDS = {"quarter": 1 / 4, "third": 1 / 3, "half": 1 / 2}
DUPLICATE_SHARE = 0.5       # see duplicate_groups
CACHE_VERSION = 2           # to be raised with what is computed and kept in data/cache
SW_SAMPLES, SW_PROJECTIONS = 2000, 1000
SSCD_THRESHOLD = 0.6        # the study's: a higher cosine similarity to a training image is a copy
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")


@contextmanager
def exact_float32():
    """Matrix products and convolutions in float32 proper, whatever was set before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --------------------------------------------------------------------------------------------------
# Copies: the two nearest training images
# --------------------------------------------------------------------------------------------------


def _screen(queries, references, center, k, exclude, groups):
    """The k smallest of |r|^2 - 2 q.r for each query, in float32.

    Values and indices (Q, k), and the largest |r|. All is measured from `center`, so that the
    numbers are small. One block of the product is in memory at a time.
    """
    best = torch.full((len(queries), k), math.inf, device=queries.device)
    index = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    largest = 0.0
    for start in range(0, len(references), 4096):
        r = (references[start:start + 4096] - center).float()
        r2 = r.square().sum(1)
        largest = max(largest, r2.max().sqrt().item())
        for rows in torch.arange(len(queries), device=queries.device).split(2048):
            q = slice(int(rows[0]), int(rows[-1]) + 1)
            score = torch.addmm(r2, queries[q], r.T, alpha=-2)              # (rows, block)
            if exclude is not None:
                score.masked_fill_(groups[start:start + len(r)] == exclude[q, None], math.inf)
            value, where = score.topk(min(k, len(r)), dim=1, largest=False)
            value, order = torch.cat([best[q], value], 1).topk(k, dim=1, largest=False)
            best[q], index[q] = value, torch.cat([index[q], where + start], 1).gather(1, order)
    return best, index, largest


def _best_two(q, r, index, groups, barred):
    """The nearest of a few candidates, and the nearest outside its group: squares, indices (Q, 2).

    index (Q, k): the candidates of each query, of which `barred` (Q, k) do not count. Distances
    come from differences in float64. inf and -1 where there is none; ties go to the lower index.
    """
    index, order = index.sort(dim=1)
    rows = max(1, 2**19 // (index.shape[1] * q.shape[1]))           # so few that they stay in cache
    squared = torch.cat([(a[:, None].double() - r[i].double()).square().sum(2)
                         for a, i in zip(q.split(rows), index.split(rows), strict=True)])
    squared[barred.gather(1, order)] = math.inf
    first = squared.argmin(1, keepdim=True)
    outside = groups[index] != groups[index.gather(1, first)]
    second = squared.masked_fill(~outside, math.inf).argmin(1, keepdim=True)
    pair = torch.cat([first, second], 1)
    values, found = squared.gather(1, pair), index.gather(1, pair)
    values[:, 1:][~outside.gather(1, second)] = math.inf
    found[values == math.inf] = -1
    return values, found


def two_nearest(queries, references, groups=None, exclude=None, candidates=8):
    """The nearest reference of each query, and the nearest outside the group of that one.

    queries (Q, ...), references (N, ...), float, the same shape but for the first. groups (N,)
    int64: references that count as one image (default: each its own). exclude (Q,): the group that
    a query may not find (its own, say).
    Returns Euclidean distances float64 (Q, 2) and indices int64 (Q, 2); ties go to the lower index;
    inf and -1 where there is no second group. Exact: a matrix product in float32 picks the
    candidates, their distances are computed anew from differences in float64, and where the
    product's rounding could have hidden a nearer one, more candidates are taken, in the end all.
    Memory beyond the inputs: the queries once more, and about 300 MB.
    Raises InputError on a number that is not finite.
    """
    q, r = queries.flatten(1), references.flatten(1)
    if not all(torch.stack(torch.aminmax(x)).isfinite().all() for x in (q, r)):
        raise InputError("two_nearest: the images hold numbers that are not finite")
    groups = torch.arange(len(r), device=r.device) if groups is None else groups
    distances = torch.full((len(q), 2), math.inf, dtype=torch.float64, device=q.device)
    indices = torch.full((len(q), 2), -1, dtype=torch.int64, device=q.device)
    center, todo, k = r[:4096].mean(0), torch.arange(len(q), device=q.device), candidates
    while len(todo):
        k, unsure = min(k, len(r)), []
        for part in todo.split(max(1, 2**24 // k)):
            centered = (q[part] - center).float()
            with exact_float32():
                score, index, largest = _screen(
                    centered, r, center, k, None if exclude is None else exclude[part], groups)
            values, found = _best_two(q[part], r, index, groups, score == math.inf)
            # A reference that was not picked scores at least max(score); the product's error is at
            # most 2 (D + 8) u (|q| + |r|)^2 with u = 2^-24, so its distance^2 is at least `beyond`.
            norm = centered.double().square().sum(1)
            error = 2 * (q.shape[1] + 8) * 2**-24 * (norm.sqrt() + largest) ** 2
            beyond = score.double().amax(1) + norm - error
            sure = (values[:, 1] < beyond) | (k == len(r))
            distances[part[sure]], indices[part[sure]] = values[sure].sqrt(), found[sure]
            unsure.append(part[~sure])
        todo, k = torch.cat(unsure), 8 * k
    return distances, indices


def copy_ratios(distances):
    """d1/d2 of each query (Yoon; Bonnaire, arXiv 2505.17638): (Q, 2) -> (Q,) in [0, 1].

    1, no copy, where both are 0 or there is no second image to compare with.
    """
    d1, d2 = distances.double().unbind(1)
    return torch.where((d2 > 0) & d2.isfinite(), d1 / d2, torch.ones_like(d1))


def wilson(k, n, z=1.959964):
    """The 95 % Wilson interval (low, high) of a share k/n."""
    p, z2n = k / n, z * z / n
    middle, half = p + z2n / 2, z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max(0.0, (middle - half) / (1 + z2n)), min(1.0, (middle + half) / (1 + z2n))


def duplicate_groups(images):
    """Near-identical images as groups: (N, ...) float -> (N,) int64, the lowest index of each.

    Two images are near-identical if they are nearer to each other than half the distance of either
    to its 10th nearest (of fewer than 2,000 images the N/200-th, at least the 2nd), and so is what
    they link to. A bound on the distance alone does not do: two blue skies are closer than two
    copies of one detailed picture. Equal images are one in all this.
    """
    x = images.flatten(1)
    _, first, inverse = np.unique(x.cpu().numpy(), axis=0, return_index=True, return_inverse=True)
    groups = torch.from_numpy(first[inverse.reshape(-1)])
    kept = torch.from_numpy(np.sort(first))
    x = x[kept.to(x.device)]
    rank = min(10, max(2, len(x) // 200), len(x) - 1)
    if rank < 2:
        return groups.to(images.device)
    center, own = x[:4096].mean(0), torch.arange(len(x), device=x.device)
    with exact_float32():
        score, index, _ = _screen(x - center, x, center, rank, own, own)
    distance = (score + (x - center).square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    half = DUPLICATE_SHARE * distance[:, -1]
    linked = distance < torch.minimum(half[:, None], half[index])           # (N, rank)
    rows, columns = linked.nonzero(as_tuple=True)
    for i, j in zip(kept[rows.cpu()].tolist(), kept[index[rows, columns].cpu()].tolist(),
                    strict=True):
        low, high = sorted((int(groups[i]), int(groups[j])))
        groups[groups == high] = low
    return groups.to(images.device)


# --------------------------------------------------------------------------------------------------
# Fidelity: distances between two sets of feature vectors
# --------------------------------------------------------------------------------------------------


def _factor(cov):
    """F with F F^T = cov, for a positive semi-definite matrix (D, D).

    Cholesky's; for a covariance of fewer samples than dimensions, of rank k, the k columns that it
    has by then, if they do give the rest of the matrix; else from the eigenvectors.
    """
    factor, info = torch.linalg.cholesky_ex(cov)
    if info == 0:
        return factor
    k = int(info) - 1
    if k > 0:
        top = torch.linalg.cholesky(cov[:k, :k])
        below = torch.linalg.solve_triangular(top, cov[:k, k:], upper=False).T
        rest = cov[k:, k:].diagonal() - below.square().sum(1)
        if (rest.abs() < 1e-9 * cov.diagonal().max()).all():
            return torch.cat([top, below])
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance(mean1, cov1, mean2, cov2):
    """Frechet distance of two Gaussians, squared, as FID is: a number.

    Means (D,), covariances (D, D), computed in float64.
    |mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))  (Heusel, eq. 6). Raises InputError:
    not finite, shapes.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(v, dtype=torch.float64)
                                for v in (mean1, cov1, mean2, cov2))
    if (mean1.shape != mean2.shape or cov1.shape != cov2.shape
            or cov1.shape != (*mean1.shape, *mean1.shape)):
        raise InputError(f"frechet_distance: shapes {tuple(mean1.shape)}, {tuple(cov1.shape)}, "
                         f"{tuple(mean2.shape)}, {tuple(cov2.shape)} do not fit")
    if not all(v.isfinite().all() for v in (mean1, cov1, mean2, cov2)):
        raise InputError("frechet_distance: a mean or covariance is not finite")
    # cov1 = F F^T; cov1 cov2 has the eigenvalues of F^T cov2 F, which is symmetric and needs no
    # complex numbers.
    factor = _factor(cov1)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ cov2 @ factor)
    root = eigenvalues.clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root)


def moments(x):
    """Mean (D,) and unbiased covariance (D, D) in float64 of feature vectors (n, D)."""
    x = x.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def fid(x, y):
    """frechet_distance of the Gaussians fitted to two sets of feature vectors (n, D), (m, D).

    Where there are fewer vectors than dimensions it takes the short way round: with centred rows
    X, Y the square roots of the eigenvalues of cov1 cov2 are the singular values of X Y^T, over
    sqrt((n - 1) (m - 1)), a smaller matrix.
    """
    if len(x) > x.shape[1]:
        return frechet_distance(*moments(x), *moments(y))
    x, y = x.double(), y.double()
    shift = x.mean(0) - y.mean(0)
    x, y = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
    cross = x @ y.T
    root = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).sqrt().sum()
    return float(shift.square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def _project(x, y, projections, seed):
    """x and y (n, D) on random unit vectors: float64 (projections, n) each, a block at a time."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(projections, x.shape[1], generator=g, dtype=torch.float64)
    for part in F.normalize(theta, dim=1).to(x.device).split(256):
        yield part @ x.double().T, part @ y.double().T


def sliced_wasserstein(x, y, projections=SW_PROJECTIONS, seed=0):
    """Sliced 2-Wasserstein distance of two sets of as many vectors (n, D): in the features' units.

    (E_theta W_2^2(theta.x, theta.y))^(1/2) over `projections` random unit vectors theta, a function
    of the seed (Bonneel 2015). W_2 in one dimension pairs the sorted values. Raises InputError
    where the counts differ.
    """
    return sliced_wasserstein_error(x, y, projections, seed, groups=0)[0]


def sliced_wasserstein_error(x, y, projections=SW_PROJECTIONS, seed=0, groups=10):
    """sliced_wasserstein and its standard error, by the jackknife over `groups` tenths of the data.

    The jackknife, not the bootstrap: an empirical W_2 shrinks with n, and drawing with replacement
    has fewer different points, while leaving a tenth out hardly changes n. nan for n < groups.
    """
    if x.shape != y.shape or len(x) == 0:
        raise InputError(f"sliced_wasserstein: shapes {tuple(x.shape)} and {tuple(y.shape)} "
                         "must be equal")
    n, groups = len(x), groups if len(x) >= groups else 0
    member = torch.arange(n, device=x.device) % max(groups, 1)
    total, without = 0.0, torch.zeros(groups, dtype=torch.float64)
    for projected in _project(x, y, projections, seed):
        (a, order_a), (b, order_b) = (p.sort(1) for p in projected)         # (projections, n)
        total += float((a - b).square().mean(1).sum())
        group_a, group_b = member[order_a], member[order_b]
        for k in range(groups):                 # what is sorted stays so with some left out
            difference = (a[group_a != k] - b[group_b != k]).reshape(len(a), -1)
            without[k] += difference.square().mean(1).sum().cpu()
    without = (without / projections).sqrt()
    error = math.nan
    if groups > 1:
        error = float(((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt())
    return math.sqrt(total / projections), error


def kernel_distance(x, y):
    """KID, the unbiased squared MMD of two sets (n, D), (m, D), and its standard error.

    With kernel (x.y / D + 1)^3. Binkowski, eq. 4; the error is the delete-one jackknife's.
    (nan, nan) where a set has fewer than 2 vectors, and no error (nan) where it has fewer than 3.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return math.nan, math.nan
    x, y = x.double(), y.double()

    def sums(a, b):
        """Row sums and column sums of the kernel matrix, a block of rows at a time."""
        rows, columns = [], 0
        for part in a.split(1024):
            k = (part @ b.T / x.shape[1] + 1) ** 3
            rows.append(k.sum(1))
            columns = columns + k.sum(0)
        return torch.cat(rows), columns

    def own(a):
        return (a.square().sum(1) / x.shape[1] + 1) ** 3
    row_x, row_y, (xy, yx) = sums(x, x)[0] - own(x), sums(y, y)[0] - own(y), sums(x, y)
    sx, sy, sxy = row_x.sum(), row_y.sum(), xy.sum()
    value = sx / (n * (n - 1)) + sy / (m * (m - 1)) - 2 * sxy / (n * m)
    if min(n, m) < 3:
        return float(value), math.nan
    without_x = ((sx - 2 * row_x) / ((n - 1) * (n - 2)) + sy / (m * (m - 1))
                 - 2 * (sxy - xy) / ((n - 1) * m))
    without_y = (sx / (n * (n - 1)) + (sy - 2 * row_y) / ((m - 1) * (m - 2))
                 - 2 * (sxy - yx) / (n * (m - 1)))
    variance = sum((len(w) - 1) / len(w) * (w - w.mean()).square().sum()
                   for w in (without_x, without_y))
    return float(value), float(variance.sqrt())


def precision_recall(samples, real, k=3):
    """Share of samples inside the real manifold, and of real vectors inside the samples'.

    Kynkaanniemi, eq. 1-3. (n, D), (m, D). A manifold is the union of balls around its points, each
    reaching to the point's k-th nearest other one. Both nan where a set has k vectors or fewer.
    """
    if min(len(samples), len(real)) <= k:
        return math.nan, math.nan
    # From the mean, in float64: rounding would let a point miss its own neighbour's ball.
    center = real.double().mean(0)
    samples, real = samples.double() - center, real.double() - center

    def squared(a, b):
        """Squared distances of rows, a block of rows of `a` at a time."""
        for part in a.split(1024):
            yield (part.square().sum(1)[:, None] + b.square().sum(1) - 2 * part @ b.T).clamp(min=0)

    def radii(a):
        return torch.cat([d.kthvalue(k + 1, dim=1).values for d in squared(a, a)])

    def inside(a, b):
        radius = radii(b)
        return torch.cat([(d <= radius).any(1) for d in squared(a, b)]).double().mean()
    return float(inside(samples, real)), float(inside(real, samples))


# --------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------


def inception_net(state):
    """The Inception v3 of FID, from a state dict.

    uint8-like images (B, 3, H, W) in [0, 1] -> features (B, 2048). torchvision's network, changed
    to what the 2015 TensorFlow graph computes: average pools that do not count the padding, a max
    pool in the last block, 1,008 classes. Raises InputError where the weights are of another graph.
    """
    from torchvision.models import inception as tv

    def patched(block, pool=lambda x: F.avg_pool2d(x, 3, stride=1, padding=1,
                                                   count_include_pad=False)):
        class FIDBlock(block):
            def _forward(self, x):                      # the pool's branch is the last one
                return super()._forward(x)[:-1] + [self.branch_pool(self.pool(x))]
        FIDBlock.pool = staticmethod(pool)
        return FIDBlock
    blocks = [tv.BasicConv2d, patched(tv.InceptionA), tv.InceptionB, patched(tv.InceptionC),
              tv.InceptionD, patched(tv.InceptionE), tv.InceptionAux]
    net = tv.Inception3(num_classes=1008, aux_logits=False, transform_input=False,
                        inception_blocks=blocks, init_weights=False, dropout=0.0)
    net.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, stride=1, padding=1)
    try:
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("AuxLogits.")})
    except (RuntimeError, AttributeError):
        raise InputError("--weights: not the state dict of the FID Inception graph") from None
    net.fc = torch.nn.Identity()
    return net.eval().requires_grad_(False)


def load_weights(path=None):
    """The FID network's state dict and the first 8 hex digits of its file's SHA-256.

    From `path`, or from pytorch-fid's GitHub release through torch.hub, which checks the hash and
    keeps the file. Raises InputError where the file is missing, damaged, or cannot be fetched,
    saying what to fetch and where to.
    """
    place = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.split("/")[-1]
    if path is None:
        try:
            torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True, progress=False,
                                               map_location="cpu")
        except UNREADABLE as error:         # no network, a full disk, a wrong hash, a damaged file
            raise InputError(f"--features inception: the weights cannot be had ({error}); fetch "
                             f"{WEIGHTS_URL} to {place}, or name the file with --weights") from None
    path = Path(path or place)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"--weights {path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise InputError(f"--weights {path}: damaged or no state dict "
                         f"({type(error).__name__})") from None
    if digest not in WEIGHTS_URL:
        print(f"--weights {path}: SHA-256 {digest}..., not the official FID weights; FID is not "
              "comparable", flush=True)
    return state, digest


def pixel_features(images):
    """uint8 images (n, H, W, C) -> their numbers in [-1, 1] as float32 (n, H W C)."""
    return to_float(images).permute(0, 2, 3, 1).flatten(1)


@torch.inference_mode()
def inception_features(net, images, batch=128):
    """uint8 images (n, H, W, C) -> pool features float32 (n, 2048).

    As pytorch-fid 0.3.0 computes them.
    """
    features = []
    for part in tqdm(images.split(batch), desc="Inception", unit="batch", leave=False,
                     disable=None):
        x = part.permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=(299, 299), mode="bilinear",
                          align_corners=False)
        with exact_float32():
            features.append(net(2 * x - 1).float())
    return torch.cat(features)


def load_space(space, weights, device):
    """A feature space: (uint8 images (n, H, W, C) -> features (n, D), digest of its weights)."""
    if space == "pixels":
        return pixel_features, "none"
    state, digest = load_weights(weights)
    net = inception_net(state).to(device)
    return lambda images: inception_features(net, images), digest


def load_sscd(path, device):
    """An SSCD model from its TorchScript file, as load_space gives a space; features of length 1.

    Preprocessed as its authors' "small 288" transform does. Raises InputError: missing, damaged.
    """
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        net = torch.jit.load(path, map_location=device).eval()
    except OSError as error:
        raise InputError(f"--sscd {path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise InputError(f"--sscd {path}: no TorchScript file ({type(error).__name__})") from None
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1)
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.inference_mode()
    def features(images, batch=128):
        found = []
        for part in tqdm(images.split(batch), desc="SSCD", unit="batch", leave=False, disable=None):
            x = part.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 255
            x = F.interpolate(x, size=(288, 288), mode="bilinear", align_corners=False)
            with exact_float32():
                found.append(F.normalize(net((x - mean) / std).float(), dim=1))
        return torch.cat(found)
    return features, digest


def features_of(space, spaces, images):
    """Features of real images, cached by content: they do not change from snapshot to snapshot."""
    extract, digest = spaces[space]
    return cached(f"{space} {digest}", lambda: {"features": extract(images)}, images)["features"]


def cached(name, compute, *images):
    """compute() -> dict of arrays, kept in data/cache.

    Kept under `name` and the content of the (uint8, tensor) images.
    """
    digest = hashlib.sha256(f"{CACHE_VERSION} {name}".encode())
    for part in images:
        digest.update(str(tuple(part.shape)).encode() + part.cpu().numpy().tobytes())
    path = Path("data/cache") / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(path) as archive:
            arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    except UNREADABLE:                              # not there, or damaged: made anew
        arrays = compute()
        write_atomic(path, lambda f: np.savez(f, **{k: v.cpu().numpy() for k, v in arrays.items()}))
    return {key: value.to(images[0].device) for key, value in arrays.items()}


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


class Subset:
    """The training subset that copies are searched in.

    Images in [-1, 1], groups of duplicates, and controls.
    """

    def __init__(self, data, flip, device):
        self.train = torch.from_numpy(data.train_images).to(device)
        self.heldout = torch.from_numpy(data.test_images).to(device)
        self.groups = cached(f"groups {DUPLICATE_SHARE}",
                             lambda: {"groups": duplicate_groups(pixel_features(self.train))},
                             self.train)["groups"]
        if len(self.groups.unique()) < 2:
            raise InputError("the training images are all near-duplicates of one another: d1/d2 "
                             "has no meaning")
        self.pixels = pixel_features(self.train)
        self.search, self.search_groups = self.pixels, self.groups
        if flip:        # a mirrored copy is a copy, of the same group as its original
            self.search = torch.cat([self.pixels, pixel_features(self.train.flip(2))])
            self.search_groups = self.groups.repeat(2)

    def nearest(self, images, exclude=None):
        """two_nearest of uint8 images among the subset.

        An index beyond n, of a mirrored image, is taken back.
        """
        distances, indices = two_nearest(pixel_features(images), self.search, self.search_groups,
                                         exclude)
        return {"distances": distances,
                "indices": torch.where(indices < 0, indices, indices % len(self.train))}

    def controls(self):
        """Neighbours of images that are no copies, cached: held-out, and training left out.

        The latter searches each training image among those of other groups.
        """
        flip = len(self.search) > len(self.pixels)
        return {"heldout": cached(f"null {flip}", lambda: self.nearest(self.heldout),
                                  self.heldout, self.train, self.groups),
                "leave_one_out": cached(f"self {flip}",
                                        lambda: self.nearest(self.train, self.groups),
                                        self.train, self.groups)}


def copying_row(found, groups):
    """What neighbours (distances, indices) say of copying, as CSV columns.

    The share of copies at each threshold with its interval; how many different training images
    (groups) are copied at 1/3, and how often the most copied one is.
    """
    ratios, row = copy_ratios(found["distances"]), {}
    n = len(ratios)
    for name, threshold in THRESHOLDS.items():
        k, suffix = int((ratios < threshold).sum()), "" if name == "third" else f"_{name}"
        low, high = wilson(k, n)
        row |= {f"copy_ratio{suffix}": k / n, f"copy_low{suffix}": low, f"copy_high{suffix}": high}
    copied = groups[found["indices"][ratios < THRESHOLDS["third"], 0]]
    counts = torch.bincount(copied) if len(copied) else torch.zeros(1)
    return row | {"distinct_copied": int((counts > 0).sum()), "most_copied": int(counts.max())}


def auth_share(found, own):
    """AuthPct, as a share (Alaa, eq. 8): samples farther from their nearest training image than
    that one is from its own nearest. found: the samples' neighbours, own: the training images'."""
    nearest = own["distances"][found["indices"][:, 0], 0]
    return float((found["distances"][:, 0] >= nearest).double().mean())


def fidelity_row(name, features, references):
    """Distances in one feature space, as CSV columns.

    features (n, D); references {"train": (N, D), "heldout": (M, D)}. Equal counts throughout:
    against each split, the first m = min(n, M) of the held-out images, and as many of the training
    images, repeated in turn where there are fewer: m draws from what a perfect memorizer shows.
    KID, precision and recall, which look at pairs, take each image once.
    FID is biased in m, so it has no interval: compare it at equal m only.
    """
    row, m = {}, min(len(features), len(references["heldout"]))
    for split, reference in references.items():
        x, y = features[:m], reference[torch.arange(m, device=features.device) % len(reference)]
        end = f"{name}_{split}"
        row[f"fid_{end}"] = fid(x, y) if m > 1 else math.nan
        once = y[:len(reference)]
        row[f"kid_{end}"], row[f"kid_error_{end}"] = kernel_distance(x, once)
        row[f"sw_{end}"], row[f"sw_error_{end}"] = sliced_wasserstein_error(
            x[:SW_SAMPLES], y[:SW_SAMPLES])
        row[f"precision_{end}"], row[f"recall_{end}"] = precision_recall(x, once)
    return row


def similarity_row(features, train, heldout):
    """The study's memorization score and its null, from unit SSCD features (n, D), as CSV columns.

    The share whose highest cosine similarity to a training image exceeds .6.
    """
    row = {}
    for name, x in (("sscd", features), ("null_sscd", heldout)):
        with exact_float32():
            highest = torch.cat([(part @ train.T).amax(1) for part in x.split(1024)])
        k = int((highest > SSCD_THRESHOLD).sum())
        row |= dict(zip((f"{name}_ratio", f"{name}_low", f"{name}_high"),
                        (k / len(x), *wilson(k, len(x))), strict=True))
    return row


@torch.inference_mode()
def loss_floor(process, images, labels, count):
    """The loss of the exact denoiser on its own images, in slices of t: as train.evaluate gives it.

    images uint8 (n, S, S, C), labels (n,) or None. The perfect memorizer's: no network has less.
    """
    known = to_float(images).contiguous()

    def net(xt, t, wanted):
        return exact_predictor(process, known, None if labels is None else (labels, wanted))(xt, t)
    with exact_float32():
        return evaluate(net, process, images, labels, count, amp="off")[1]


# --------------------------------------------------------------------------------------------------
# Planted copies, twins
# --------------------------------------------------------------------------------------------------


def plant(images):
    """What a copy may look like: {name: uint8 images}, made of the training images (n, S, S, C)."""
    g = torch.Generator().manual_seed(0)
    x = to_float(images)

    def back(y):
        return ((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    noise = torch.randn(x.shape, generator=g).to(x.device)
    gain, shift = (torch.rand(2, len(x), x.shape[1], 1, 1, generator=g) - 0.5).to(x.device)
    planted = {"exact": images}
    planted |= {f"noise rms {rms:.2f}": back(x + rms * noise) for rms in (0.05, 0.1, 0.15, 0.2)}
    return planted | {"mirrored": images.flip(2), "shifted by 1 pixel": images.roll(1, 2),
                      "recoloured": back(x * (1 + 0.4 * gain) + 0.4 * shift)}


def planted_rows(subset, controls, score):
    """A row for each kind of planted copy, and held-out images: what each measure catches."""
    kinds = plant(subset.train[:1024]) | {"held-out images": subset.heldout[:1024]}
    rows = []
    for name, images in kinds.items():
        found = subset.nearest(images)
        row = copying_row(found, subset.groups)
        rows.append({"planted": name, **{k: row[k] for k in row if k.startswith("copy_ratio")},
                     "not_authentic": 1 - auth_share(found, controls["leave_one_out"])})
        if score:
            rows[-1]["sscd_ratio"] = score(images)["sscd_ratio"]
    return rows


def twin_row(images, twins, subset, twin_subset):
    """How two models trained on disjoint images agree on the same noise (Kadkhodaie, figure 2).

    images, twins uint8 (n, S, S, C), sample i of each from the same noise. Distances are root mean
    squares over pixels in [-1, 1]. agreement: the share of pairs closer to each other than either
    is to its own nearest training image: what copying alone cannot bring about.
    """
    x, y = pixel_features(images), pixel_features(twins)
    scale = x.shape[1] ** -0.5
    between = (x.double() - y.double()).norm(dim=1) * scale
    own = subset.nearest(images)["distances"][:, 0] * scale
    other = twin_subset.nearest(twins)["distances"][:, 0] * scale
    k = int((between < torch.minimum(own, other)).sum())
    low, high = wilson(k, len(x))
    return {"samples": len(x), "agreement": k / len(x), "agreement_low": low,
            "agreement_high": high, "twin_rms": float(between.median()),
            "nearest_train_rms": float(own.median()),
            "twin_nearest_train_rms": float(other.median())}


def measure_twin(run, twin, record, data, args, device):
    """twin_NAME.csv in `run`: twin_row at each step that both runs have samples of."""
    other = read_run(twin)
    other_data = load_subset(twin, other, args.data)
    shared = set.intersection(*({x.tobytes() for x in d.train_images} for d in (data, other_data)))
    if shared:
        raise InputError(f"--twin {twin}: the two training sets share {len(shared)} images; train "
                         f"one with --offset {record['options']['n']}")
    steps = sorted({*sampled(run)} & {*sampled(twin)})
    if not steps:
        raise InputError(f"--twin {twin}: no step has samples in both runs")
    subsets = [Subset(d, r["options"]["flip"], device)
               for d, r in ((data, record), (other_data, other))]
    rows = []
    for name in steps:
        settings = [read_samples(r / f"samples/{name}.npz")[2] for r in (run, twin)]
        if settings[0] != settings[1]:
            raise InputError(f"--twin {twin}: samples/{name}.npz was made with other settings")
        pair = [samples_of(r, name, args.num, record["image_shape"], device)[0]
                for r in (run, twin)]
        count = min(map(len, pair))
        rows.append({"step": int(name), **twin_row(pair[0][:count], pair[1][:count], *subsets)})
    write_csv(run / f"twin_{twin.name}.csv", rows)
    print(f"{run}/twin_{twin.name}.csv: {len(rows)} steps; at the last, agreement "
          f"{rows[-1]['agreement']:.3f}", flush=True)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse(argv):
    """The options. Raises InputError on values that make no sense."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", type=Path, help="run folder, trained and sampled")
    p.add_argument("--features", choices=("inception", "pixels"), help="space of FID, KID, sliced "
                   "Wasserstein, precision and recall (inception; toy data: pixels)")
    p.add_argument("--weights", help="file of the FID Inception weights (downloaded)")
    p.add_argument("--sscd", help="TorchScript file of an SSCD model: adds the study's own score")
    p.add_argument("--twin", type=Path, help="run trained on other images (--offset): compare the "
                   "two models' samples from the same noise, into twin_NAME.csv")
    p.add_argument("--planted", action="store_true", help="measure planted copies of the training "
                   "images, into planted.csv: what each measure of copying catches")
    p.add_argument("--num", type=int, help="samples a snapshot (all there are); another number "
                   "than before measures anew")
    p.add_argument("--data", help="where the training images are, if not where train.py found them")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = p.parse_args(argv)
    if args.num is not None and args.num < 1:
        raise InputError(f"--num {args.num}: must be at least 1")
    return args


def sampled(run):
    """The names of a run's samples files, by step."""
    return sorted(p.stem for p in (run / "samples").glob("[0-9]*.npz"))


def samples_of(run, name, num, shape, device):
    """The first `num` samples of a snapshot, uint8 (num, H, W, C), and labels.

    Checked; and a digest of them.
    """
    path = run / f"samples/{name}.npz"
    images, labels, _ = read_samples(path)
    if images.dtype != np.uint8 or images.shape[1:] != tuple(shape) or not len(images):
        raise InputError(f"{path}: {images.dtype} {images.shape}, "
                         f"must be uint8 (num, {', '.join(map(str, shape))})")
    if num and num > len(images):
        raise InputError(f"--num {num}: {path} holds only {len(images)}; run sample.py --num {num}")
    images, labels = images[:num], labels[:num]
    digest = hashlib.sha256(images.tobytes()).hexdigest()[:8]
    return torch.from_numpy(images).to(device), labels, digest


def merge_rows(path, rows):
    """Write rows {step: dict} as CSV, sorted by step, with every column that any of them has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    write_csv(path, [{c: rows[step].get(c, "") for c in columns} for step in sorted(rows)])


@torch.inference_mode()
def measure_snapshot(run, name, images, labels, subset, controls):
    """The copying columns of one snapshot; keeps its neighbours, 64 to look at, in neighbours/."""
    found = subset.nearest(images)
    write_neighbours(run, name, found, labels=labels, samples=images[:64].cpu().numpy(),
                     nearest=subset.train[found["indices"][:64, 0]].cpu().numpy())
    null = copying_row(controls["heldout"], subset.groups)
    return copying_row(found, subset.groups) | {
        f"null_{key}": value for key, value in null.items() if "copied" not in key} | {
        "auth_share": auth_share(found, controls["leave_one_out"])}


def write_neighbours(run, name, found, **more):
    """neighbours/NAME.npz: distances, indices and d1/d2 of every image, and `more` arrays."""
    arrays = {key: value.cpu().numpy() for key, value in found.items()}
    ratios = copy_ratios(found["distances"]).cpu().numpy()
    write_atomic(run / f"neighbours/{name}.npz",
                 lambda f: np.savez(f, ratios=ratios, **arrays, **more))


def write_controls(run, subset, controls):
    """controls.csv, the neighbours of each control, and duplicates.csv: who is near-identical."""
    groups = subset.groups.tolist()
    write_csv(run / "duplicates.csv", [{"image": i, "duplicate_of": g} for i, g in enumerate(groups)
                                       if g != i], columns=("image", "duplicate_of"))
    rows = []
    for name, found in controls.items():
        write_neighbours(run, name, found)
        rows.append({"name": name, "images": len(found["distances"]),
                     **copying_row(found, subset.groups)})
    write_csv(run / "controls.csv", rows)


@command_line
def main(argv=None):
    """Measure every snapshot that is not done. Raises SystemExit(2) on bad input."""
    args = parse(argv)
    run, device, record = args.run, pick_device(args.device), read_run(args.run)
    options, shape = record["options"], record["image_shape"]
    space = args.features or ("pixels" if options["data"] == "toy" else "inception")
    have = sampled(run)
    if not have:
        raise InputError(f"{run}: no samples to measure; run sample.py {run} first")
    drawn = {name: samples_of(run, name, args.num, shape, device) for name in have}
    spaces = {space: load_space(space, args.weights, device)}
    if args.sscd:
        spaces["sscd"] = load_sscd(args.sscd, device)
    data = load_subset(run, record, args.data)
    if args.twin:
        return measure_twin(run, args.twin, record, data, args, device)
    try:
        rows = {int(row["step"]): row for row in read_csv(run / "metrics.csv")}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{run}/metrics.csv: damaged; delete it to measure anew") from None

    def is_done(name):
        row = rows.get(int(name), {})
        return (row.get("samples_digest") == drawn[name][2]
                and all(row.get(f"weights_{s}") == digest for s, (_, digest) in spaces.items())
                and (run / f"neighbours/{name}.npz").exists())
    todo = [name for name in have if not is_done(name)]
    print(f"{run}: {len(todo)} of {len(have)} snapshots to measure, {', '.join(spaces)}, on "
          f"{device}", flush=True)
    if any(rows.get(int(n), {}).get("samples_digest") not in (None, drawn[n][2]) for n in todo):
        print(f"{run}: measured before with other samples; those rows are replaced", flush=True)

    subset = Subset(data, options["flip"], device)
    controls = subset.controls()
    if (run / "samples/exact.npz").exists():
        controls["exact"] = subset.nearest(samples_of(run, "exact", None, shape, device)[0])
    write_controls(run, subset, controls)
    most = max(len(images) for images, _, _ in drawn.values())
    held = subset.heldout[:most]
    # Copies are searched in all training images, distributions compared at equal counts.
    references = {s: {"train": features_of(s, spaces, subset.train[:None if s == "sscd" else most]),
                      "heldout": features_of(s, spaces, held)} for s in spaces}

    def score(images):
        return similarity_row(spaces["sscd"][0](images), *references["sscd"].values())
    if args.planted:
        write_csv(run / "planted.csv", planted_rows(subset, controls, args.sscd and score))
        print(f"{run}/planted.csv: what each measure of copying catches", flush=True)
    known_labels = torch.from_numpy(data.train_labels).to(device) if record["classes"] else None
    process, count = options["process"], options["eval_images"]
    floor = cached(f"floor {process} {count}", lambda: {"floor": torch.from_numpy(
        loss_floor(PROCESSES[process], subset.train, known_labels, count))},
        subset.train, *([known_labels] if record["classes"] else []))["floor"]
    for name in todo:
        images, labels, digest = drawn[name]
        row = rows.get(int(name), {})
        row = row if row.get("samples_digest") == digest else {}
        row = {"step": int(name), "images": int(name) * options["batch"], "samples": len(images),
               "samples_digest": digest} | row
        row |= measure_snapshot(run, name, images, labels, subset, controls)
        row |= fidelity_row(space, spaces[space][0](images), references[space])
        row |= score(images) if args.sscd else {}
        row |= {f"floor_level{k}": f"{value:.8g}" for k, value in enumerate(floor.tolist())}
        rows[int(name)] = row | {f"weights_{s}": digest for s, (_, digest) in spaces.items()}
        merge_rows(run / "metrics.csv", rows)
        print(f"step {int(name):7d}  copies {row['copy_ratio']:.4f}  "
              f"FID train {row[f'fid_{space}_train']:.2f}  "
              f"held-out {row[f'fid_{space}_heldout']:.2f}", flush=True)


if __name__ == "__main__":
    main()
