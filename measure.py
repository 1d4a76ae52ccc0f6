"""Measure every snapshot's samples: how many are copies, and how good they are.

    python measure.py runs/first                    # whatever is not measured yet
    python measure.py runs/first --features FILE    # in another space than pixels or Inception's
    python measure.py runs/first --denoisers        # which known denoiser is the network, and when?

Writes metrics.csv (a row per snapshot), controls.csv (the same of pictures known to be copies, or
known not to be), spectrum.csv, duplicates.csv, and neighbours/STEP.npz (nearest training images).
To add a metric, write a function from a Context to columns and name it in METRICS: runs measured
before get its columns on the next call, and keep theirs. Read down to the line of equal signs:
copies, fidelity, other metrics, controls, one run, then denoisers, planted copies, twins.

Sources: "Heusel" is arXiv 1706.08500 (FID), "Binkowski" 1801.01401 (KID), "Kynkaanniemi" 1904.06991
(precision and recall), "Alaa" 2102.08921 (AuthPct), "Yoon" openreview shciCbSk9h (d1/d2 < 1/3),
"Wang" 2412.09726 and "Kamb" 2412.20292 (denoisers), "Kadkhodaie" 2310.02557 (twins).
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import inspect
import itertools
import logging
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import sample
import train
from train import (
    LEVELS,
    InputError,
    generator,
    reading,
    to_float,
    to_uint8,
    write_atomic,
    write_csv,
)

THRESHOLDS = {"": 1 / 3, "_quarter": 1 / 4, "_half": 1 / 2}     # of d1/d2; the literature's is 1/3
SW_SAMPLES, SW_PROJECTIONS = 2000, 1000
SSCD_THRESHOLD = 0.6        # the study's: a higher cosine similarity to a training image is a copy
# Its authors' "small 288" transform: size, mean, std.
SSCD_PREPARE = (288, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")

# What this script writes, and where a killed call may have left temporary files; see train.locked.
WRITTEN = ("metrics.csv", "controls.csv", "spectrum.csv", "duplicates.csv", "planted.csv",
           "denoisers.csv", "twin_*.csv", "neighbours/*", "neighbours/*/*")

# --- Copies: the two nearest training images ------------------------------------------------------


def squared_distances(queries, references):
    """Squared distances of vectors (Q, D), (N, D), a block of queries at a time: float64 (rows, N).

    By a matrix product, after the mean of the references is taken from all: the rounding is 1e-13
    of the largest squared norm. Memory: 128 MB per block, of which up to three are alive, and 4,096
    references in float64.
    """
    center = references[:4096].double().mean(0)
    for q in queries.split(max(1, 2**24 // len(references))):
        q, blocks = q.double() - center, []
        for r in references.split(4096):
            r = r.double() - center
            blocks.append(torch.addmm(r.square().sum(1), q, r.T, alpha=-2))
        yield torch.cat(blocks, 1).add_(q.square().sum(1, keepdim=True)).clamp_(min=0)


def k_nearest(queries, references, k):
    """Squared distances to the k nearest references, float64 (Q, k), and their indices (Q, k)."""
    parts = [d.topk(k, largest=False) for d in squared_distances(queries, references)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


@contextlib.contextmanager
def exact_float32():
    """Matrix products and convolutions without TF32, whatever was set before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@exact_float32()
def _screen(queries, references, center, k, exclude, groups):
    """The k smallest of |r|^2 - 2 q.r for each query, in float32.

    Values and indices (Q, k), and the largest |r|. queries are less `center` already, and so is r:
    the numbers are small. One block of the product is in memory at a time.
    """
    best = torch.full((len(queries), k), math.inf, device=queries.device)
    index = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
    largest = 0.0
    for start in range(0, len(references), 4096):
        r = (references[start:start + 4096] - center).float()
        r2 = r.square().sum(1)
        largest = max(largest, r2.max().sqrt().item())
        for first in range(0, len(queries), 2048):
            q = slice(first, first + 2048)
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
    values, indices = squared.gather(1, pair), index.gather(1, pair)
    values[:, 1:][~outside.gather(1, second)] = math.inf
    indices[values == math.inf] = -1
    return values, indices


def two_nearest(queries, references, groups=None, exclude=None):
    """The nearest reference of each query, and the nearest of another group than that one's.

    queries (Q, ...), references (N, ...), float, the same shape but for the first. groups (N,)
    int64: references that count as one image (default: each its own). exclude (Q,): the group that
    a query may not find, say its own.
    Returns Euclidean distances float64 and indices int64, (Q, 2) each; ties go to the lower index;
    inf and -1 where there is no second group. Exact: a matrix product in float32 picks candidates;
    their distances are computed anew from differences in float64; where the product's rounding
    could have hidden a nearer one, more candidates are taken, in the end all.
    Memory beyond the inputs: the queries once more, and about 300 MB.
    Raises InputError on a number that is not finite.
    """
    q, r = queries.flatten(1), references.flatten(1)
    if not all(torch.stack(torch.aminmax(x)).isfinite().all() for x in (q, r)):
        raise InputError("two_nearest: the images hold numbers that are not finite")
    groups = torch.arange(len(r), device=r.device) if groups is None else groups
    distances = torch.full((len(q), 2), math.inf, dtype=torch.float64, device=q.device)
    indices = torch.full((len(q), 2), -1, dtype=torch.int64, device=q.device)
    center, todo, k = r[:4096].mean(0), torch.arange(len(q), device=q.device), 8
    while len(todo):
        k, unsure = min(k, len(r)), []
        for part in todo.split(max(1, 2**24 // k)):
            centered = (q[part] - center).float()
            score, index, largest = _screen(
                centered, r, center, k, None if exclude is None else exclude[part], groups)
            values, nearest = _best_two(q[part], r, index, groups, score == math.inf)
            # A reference that was not picked scores at least max(score); the product's error is at
            # most 2 (D + 8) u (|q| + |r|)^2 with u = 2^-24, so its distance^2 is at least `beyond`.
            norm = centered.double().square().sum(1)
            error = 2 * (q.shape[1] + 8) * 2**-24 * (norm.sqrt() + largest) ** 2
            beyond = score.double().amax(1) + norm - error
            sure = (values[:, 1] < beyond) | (k == len(r))
            distances[part[sure]], indices[part[sure]] = values[sure].sqrt(), nearest[sure]
            unsure.append(part[~sure])
        todo, k = torch.cat(unsure), 8 * k
    return distances, indices


def copy_ratios(distances):
    """d1/d2 of each query (Yoon; Bonnaire, arXiv 2505.17638): (Q, 2) -> (Q,) in [0, 1]; 1, no copy,
    where both are 0 or there is no second image."""
    d1, d2 = distances.double().unbind(1)
    return torch.where((d2 > 0) & d2.isfinite(), d1 / d2, torch.ones_like(d1))


def duplicate_groups(images):
    """Near-identical images as groups: (N, ...) float -> (N,) int64, the lowest index of each.

    Two images are near-identical if they are nearer to each other than half the distance of either
    to its 10th nearest (of fewer than 2,000 images the N/200-th, at least the 2nd); a group is what
    such pairs link. So among N < 600 images a picture that is there three times is not seen. A
    bound on the distance alone does not do: two blue skies are closer than two copies of one
    detailed picture. Equal images count as one image here.
    """
    x = images.flatten(1)
    _, first, inverse = np.unique(x.cpu().numpy(), axis=0, return_index=True, return_inverse=True)
    groups, kept = torch.from_numpy(first[inverse.reshape(-1)]), torch.from_numpy(np.sort(first))
    x = x[kept.to(x.device)]
    rank = min(10, max(2, len(x) // 200), len(x) - 1)
    if rank >= 2:
        distance, index = (v[:, 1:] for v in k_nearest(x, x, rank + 1))     # the first is itself
        half = 0.5 * distance[:, -1].sqrt()
        linked = distance.sqrt() < torch.minimum(half[:, None], half[index])        # (N, rank)
        rows, columns = linked.nonzero(as_tuple=True)
        for pair in torch.stack([kept[rows.cpu()], kept[index[rows, columns].cpu()]], 1).tolist():
            low, high = sorted(groups[pair].tolist())
            groups[groups == high] = low
    return groups.to(images.device)


# --- Fidelity: distances between two sets of feature vectors --------------------------------------


def fid(x, y):
    """Frechet distance, squared, of the Gaussians fitted to vectors (n, D) and (m, D), in float64.

    |mean1 - mean2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2))  (Heusel, eq. 6). With centred rows
    X / sqrt(n - 1) and Y / sqrt(m - 1), cov1 = X^T X, and the trace of the root is the sum of the
    singular values of X Y^T. nan where a set has fewer than 2 vectors.
    """
    if min(len(x), len(y)) < 2:
        return math.nan
    shift = x.double().mean(0) - y.double().mean(0)
    x, y = ((v.double() - v.double().mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    # X = Q R has the same X^T X as R, which is smaller where there are more vectors than dimensions
    x, y = (torch.linalg.qr(v, mode="r").R if len(v) > v.shape[1] else v for v in (x, y))
    cross = x @ y.T
    root = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).sqrt().sum()
    return float(shift.square().sum() + x.square().sum() + y.square().sum() - 2 * root)


def sliced_wasserstein(x, y, projections=SW_PROJECTIONS):
    """Sliced 2-Wasserstein distance of vectors (n, D), as many in each set, and its standard error.

    (E_theta W_2^2(theta.x, theta.y))^(1/2) over `projections` random unit vectors theta, always the
    same (Bonneel 2015); W_2 in one dimension pairs the sorted values. The error is the jackknife's
    over tenths of the data, not the bootstrap's: an empirical W_2 shrinks with n, and draws with
    replacement have fewer different points. nan for n < 10.
    """
    n, groups = len(x), 10 if len(x) >= 10 else 0
    # A tenth is a run of neighbours: of ten classes in turn, every tenth sample has the same one.
    member = torch.arange(n, device=x.device) * groups // n
    total, without = 0.0, torch.zeros(groups, dtype=torch.float64)
    theta = torch.randn(projections, x.shape[1], dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))
    for part in F.normalize(theta, dim=1).to(x.device).split(256):
        (a, order_a), (b, order_b) = ((part @ v.double().T).sort(1) for v in (x, y))
        total += float((a - b).square().mean(1).sum())                          # (projections, n)
        group_a, group_b = member[order_a], member[order_b]
        for k in range(groups):                 # what is sorted stays so with some left out
            difference = (a[group_a != k] - b[group_b != k]).reshape(len(a), -1)
            without[k] += difference.square().mean(1).sum().cpu()
    without = (without / projections).sqrt()
    variance = (1 - 1 / groups) * (without - without.mean()).square().sum() if groups else math.nan
    return math.sqrt(total / projections), float(variance) ** 0.5


def kid(x, y):
    """The unbiased squared MMD of vectors (n, D) and (m, D), and its standard error.

    With kernel (x.y / D + 1)^3. Binkowski, eq. 4; the error is the delete-one jackknife's. nan
    where a set has fewer than 2 vectors, the error where one has fewer than 3.
    """
    if min(len(x), len(y)) < 2:
        return math.nan, math.nan
    n, m, x, y = len(x), len(y), x.double(), y.double()

    def sums(a, b):                             # of the kernel matrix's rows, by blocks of rows
        return torch.cat([((part @ b.T / x.shape[1] + 1) ** 3).sum(1) for part in a.split(1024)])
    xx, yy = (sums(v, v) - (v.square().sum(1) / v.shape[1] + 1) ** 3 for v in (x, y))
    xy, yx = sums(x, y), sums(y, x)
    value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m)
    variance = 0.0
    for k, own, cross in ((n, xx, xy / m), (m, yy, yx / n)):
        left_out = (cross - own / (k - 2)) * 2 / (k - 1)        # the value without one, + constant
        variance += (k - 1) / k * (left_out - left_out.mean()).square().sum()
    return float(value), float(variance.sqrt()) if min(n, m) > 2 else math.nan


def precision_recall(samples, real, k=3):
    """Share of samples inside the real manifold, and of real vectors inside the samples'.

    Kynkaanniemi, eq. 1 and 2. (n, D), (m, D). A manifold is the union of balls around its points,
    each reaching to the point's k-th nearest other one. nan where a set has k vectors or fewer.
    """
    if min(len(samples), len(real)) <= k:
        return math.nan, math.nan

    def inside(a, b):
        # Where a vector is there more than k times its ball is the point alone: its square is 0 but
        # for rounding, and must hold equal vectors all the same.
        rounding = 1e-12 * float((b.double() - b.double().mean(0)).square().sum(1).max())
        radius = k_nearest(b, b, k + 1)[0][:, k] + rounding
        covered = [(d <= radius).any(1) for d in squared_distances(a, b)]
        return float(torch.cat(covered).double().mean())
    return inside(samples, real), inside(real, samples)


# --- What a metric sees ---------------------------------------------------------------------------


class Space(NamedTuple):
    """A feature space: extract(uint8 images (n, H, W, C)) -> float32 (n, D).

    key: a digest of all that features are made of, beside the images.
    """
    name: str
    extract: Callable
    key: str

    def of_real(self, images):
        """extract, through the cache where a network is asked."""
        if self.key == "pixels":
            return self.extract(images)
        return cached(self.extract, images, made_by=self.key).to(images.device)


def pixel_features(images):
    """uint8 images (n, H, W, C) -> their numbers in [-1, 1] as float32 (n, H W C)."""
    return to_float(images).permute(0, 2, 3, 1).flatten(1)


PIXELS = Space("pixels", pixel_features, "pixels")


class Subset:
    """The training subset that copies are searched in, the held-out images, and their features.

    train, heldout uint8 (n, S, S, C); groups (N,) of near-duplicates. Where training flipped, a
    mirrored copy is a copy, of the same group as its original. space: of fidelity; max_count: of
    held-out images that it takes (all). own: the two nearest of each training image among
    those of other groups; references: features, float32 (n, D), of real images.
    Raises InputError where all are near-duplicates.
    """

    def __init__(self, data, flip, device, space=PIXELS, sscd=None, max_count=10**9):
        self.train = torch.from_numpy(data.train_images).to(device)
        self.heldout = torch.from_numpy(data.heldout_images).to(device)
        self.search = pixel_features(self.train)
        self.groups = self.search_groups = cached(duplicate_groups, self.search).to(device)
        if len(self.groups.unique()) < 2:
            raise InputError("the training images are all near-duplicates of one another: d1/d2 "
                             "has no meaning")
        if flip:
            self.search = torch.cat([self.search, pixel_features(self.train.flip(2))])
            self.search_groups = self.groups.repeat(2)
        self.own = self.nearest(self.train, self.groups)
        self.space, self.sscd, self.max_count = space, sscd, min(max_count, len(self.heldout))
        self.references = {"train": space.of_real(self.train),
                           "heldout": space.of_real(self.heldout[:self.max_count]),
                           "sscd": sscd and sscd.of_real(self.train)}
        self.key = digest_of(self.search, self.heldout, self.max_count, space, sscd)

    def nearest(self, images, exclude=None):
        """two_nearest of uint8 images: distances and indices, each (n, 2)."""
        distances, indices = (x.to(self.train.device) for x in cached(
            two_nearest, pixel_features(images), self.search, self.search_groups, exclude))
        return distances, torch.where(indices < 0, indices, indices % len(self.train))


class Context:
    """Pictures to be measured and what a metric may ask of them; `c` in all that follows.

    images uint8 (n, S, S, C), pixels (n, D); distances (n,) to the nearest training image, nearest
    (n,) its index, ratios (n,) d1/d2; count: fidelity takes so many, the first ones, and compares
    them with `splits`. neighbours: the two nearest, if not those in subset.search.
    """

    def __init__(self, images, subset, splits=("train", "heldout"), neighbours=None):
        self.images = torch.as_tensor(images, device=subset.train.device)
        self.subset, self.splits, self.count = subset, splits, min(len(images), subset.max_count)
        self.pixels = pixel_features(self.images)
        self.neighbours = neighbours or subset.nearest(self.images)     # distances, indices (n, 2)
        self.distances, self.nearest = (x[:, 0] for x in self.neighbours)
        self.ratios = copy_ratios(self.neighbours[0])
        self.key = digest_of(self.images, self.nearest, splits, subset)


# --- Metrics: functions from a Context to columns -------------------------------------------------


def share_columns(name, hits, end=""):
    """The share of True in hits (n,), with its 95 % Wilson interval: columns NAME_ratio, ..."""
    n, z = len(hits), 1.959964
    p, z2n = int(hits.sum()) / n, z * z / n
    middle, half = p + z2n / 2, z * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return {f"{name}_ratio{end}": p, f"{name}_low{end}": max(0.0, (middle - half) / (1 + z2n)),
            f"{name}_high{end}": min(1.0, (middle + half) / (1 + z2n))}


def copying(c):
    """The share of copies at each threshold of d1/d2; how many different training images (groups)
    are copied at 1/3, and how often the most copied one is."""
    row = {}
    for end, threshold in THRESHOLDS.items():
        row |= share_columns("copy", c.ratios < threshold, end)
    copied = c.subset.groups[c.nearest[c.ratios < THRESHOLDS[""]]]
    counts = torch.bincount(copied, minlength=1)
    return row | {"distinct_copied": int((counts > 0).sum()), "most_copied": int(counts.max())}


def authenticity(c):
    """AuthPct, as a share (Alaa, eq. 8): pictures farther from their nearest training image than
    that one is from its own nearest."""
    own, _ = c.subset.own
    return {"auth_share": float((c.distances >= own[c.nearest, 0]).double().mean())}


def distances_of(x, reference, end):
    """FID, KID and sliced Wasserstein distance of features (m, D), as columns that end in `end`.

    At equal counts: the first m reference vectors, repeated in turn where there are fewer, which is
    what a perfect memorizer shows in m draws. KID, which looks at pairs, takes each once. FID is
    biased in m, so it has no interval: compare it at equal m only.
    """
    y = reference[torch.arange(len(x), device=x.device) % len(reference)]
    values = [fid(x, y), *kid(x, reference[:len(x)]),
              *sliced_wasserstein(x[:SW_SAMPLES], y[:SW_SAMPLES])]
    return {f"{name}_{end}": value for name, value in zip(
        ("fid", "kid", "kid_error", "sw", "sw_error"), values, strict=True)}


def fidelity(c):
    """How far the pictures' distribution is from the training and from the held-out images'."""
    row, features = {}, c.subset.space.extract(c.images[:c.count])
    for split in c.splits:
        end, reference = f"{c.subset.space.name}_{split}", c.subset.references[split]
        precision, recall = precision_recall(features, reference[:c.count])
        row |= distances_of(features, reference, end)
        row |= {f"precision_{end}": precision, f"recall_{end}": recall}
    return row


def replaced(c):
    """Distances to held-out images with each picture replaced by its nearest training image: a hump
    that stays comes from which images are copied, not from how the pictures look."""
    if "heldout" not in c.splits:
        return {}
    x, held = c.subset.references["train"][c.nearest[:c.count]], c.subset.references["heldout"]
    row = distances_of(x, held, f"{c.subset.space.name}_replaced")
    return {k: v for k, v in row.items() if not k.startswith(("kid_error", "sw_error"))}


def gradient_energy(images):
    """The mean squared difference of horizontal neighbours plus that of vertical ones, of numbers
    in [0, 1]; uint8 images (n, S, S, C)."""
    x = (to_float(images) + 1) / 2
    return float(sum(x.diff(dim=d).square().mean() for d in (2, 3)))


def sharpness(c):
    """Gradient energy, and contrast: the mean standard deviation of a channel, of numbers in
    [0, 1]."""
    x = (to_float(c.images) + 1) / 2
    return {"sharpness": gradient_energy(c.images),
            "contrast": float(x.flatten(2).std(2, unbiased=False).mean())}


def nearest_rms(c):
    """The median distance to the nearest training image, as the rms over numbers in [-1, 1]."""
    return {"nearest_rms": float(c.distances.quantile(0.5)) / math.sqrt(c.pixels.shape[1])}


def non_negative(x, y, sweeps=300):
    """Weights w (n, k) >= 0 for which w @ y is nearest to x; x (n, D), y (n, k, D), float64.
    Non-negative least squares by coordinate descent, on the Gram matrices (n, k, k); as good as
    exact unless the y are nearly one and the same picture."""
    gram, b = y @ y.mT, (y @ x[:, :, None])[..., 0]
    w, scale = torch.zeros_like(b), gram.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    for j in [*range(w.shape[1])] * sweeps:
        slope = (gram[:, j] * w).sum(1) - b[:, j]
        w[:, j] = (w[:, j] - slope / scale[:, j]).clamp(min=0)
    return w


def mixture(c, k=10):
    """How far the pictures are from mixtures of training images: the median rms, over numbers in
    [-1, 1], of what the best non-negative combination of the k nearest leaves."""
    search, left = c.subset.search, []
    _, index = k_nearest(c.pixels, search, min(k, len(search)))
    for x, i in zip(c.pixels.double().split(512), index.split(512), strict=True):
        y = search[i].double()                                          # (rows, k, D)
        left.append((x - (non_negative(x, y)[:, :, None] * y).sum(1)).square().mean(1).sqrt())
    return {"mixture_residual": float(torch.cat(left).quantile(0.5))}


def blurred(c):
    """What blur alone makes of AuthPct, of the distance to the nearest training image and of the
    mixture residual: theirs of as many held-out images under the Gaussian that leaves them as sharp
    as the pictures; as they are, if the pictures are sharper; of a standard deviation of a quarter
    of their size, if that leaves them sharper still."""
    x, sharp = to_float(c.subset.heldout[:c.count]), gradient_energy(c.images)
    place = torch.arange(x.shape[2], device=x.device)
    low, high = 0.05, x.shape[2] / 4                    # its standard deviation, in pixels
    for _ in range(20):
        sigma = (low + high) / 2
        rows = (-(place[:, None] - place).square() / (2 * sigma**2)).softmax(1)
        images = to_uint8(rows @ x @ rows.T)            # at the edges, of the pixels that there are
        low, high = (sigma, high) if gradient_energy(images) > sharp else (low, sigma)
    c = Context(images, c.subset)
    return {f"blurred_{key}": value for key, value in
            (authenticity(c) | nearest_rms(c) | mixture(c)).items()}


def near_samples(c):
    """The share of pictures that are no copies, yet nearer to another picture than to any training
    image. More of them than among held-out images: spurious attractors (arXiv 2505.21777)."""
    x, own = c.pixels[:c.count], torch.arange(c.count, device=c.images.device)
    near = two_nearest(x, x, exclude=own)[0][:, 0] < c.distances[:c.count]
    return {"near_samples": float((near & (c.ratios[:c.count] >= THRESHOLDS[""])).double().mean())}


def similarity(c):
    """The study's memorization score, if asked for: the share whose highest cosine similarity to a
    training image in SSCD features exceeds .6."""
    if c.subset.sscd is None:
        return {}
    features = c.subset.sscd.extract(c.images), c.subset.references["sscd"]
    x, y = (F.normalize(v, dim=1).double() for v in features)
    highest = torch.cat([(part @ y.T).amax(1) for part in x.split(1024)])
    return share_columns("sscd", highest > SSCD_THRESHOLD)


METRICS = (copying, authenticity, fidelity, replaced, sharpness, nearest_rms, mixture, blurred,
           near_samples, similarity)
# What a row of metrics.csv also has for held-out images, as null_...: columns by how they begin.
NULLS = ("copy_ratio", "copy_low", "copy_high", "auth_share", "sscd")


def columns_of(metric, c):
    """metric(c), checked: {column: number}. Raises InputError."""
    row = metric(c)
    if not isinstance(row, dict) or not all(isinstance(v, (int, float)) and not isinstance(v, bool)
                                            for v in row.values()):
        raise InputError(f"metric {metric.__name__}: returned {row!r:.99}, must be "
                         "{column: number}, say float(...)")
    return row


def power_spectrum(images):
    """The power at 0, 1, ... S/2 cycles per image of uint8 images (n, S, S, C): columns power_k.

    |c|^2 of the Fourier coefficients c of a channel in [0, 1] (they sum to its mean square), the
    mean over the images and over all frequencies whose radius rounds to k.
    """
    power = sum(torch.fft.fft2((to_float(part) + 1) / 2, norm="forward").abs().square().mean(1)
                .sum(0) for part in images.split(1024)) / len(images)
    cycles = torch.fft.fftfreq(len(power), 1 / len(power), device=images.device)
    radius = torch.hypot(cycles[:, None], cycles).round()
    return {f"power_{k}": float(power[radius == k].mean()) for k in range(len(power) // 2 + 1)}


@torch.inference_mode()
def loss_floor(process, images, labels, count):
    """The perfect memorizer's loss on its own images, by level, as train.evaluate gives it: a list.
    No network has less, but for chance. images uint8 (n, S, S, C), labels (n,) or None."""
    net = sample.memorizer(process, to_float(images).contiguous(), labels)
    return train.evaluate(net, process, images, labels, count, amp="off")[1].tolist()


# --- Controls and one run -------------------------------------------------------------------------


def measure_controls(run, subset, exact):
    """controls.csv and neighbours/CONTROL.npz. Returns {control: {metric: columns}}.

    heldout: the held-out images as if they were samples, what a perfect generalizer draws; where
    there are enough, those compared are others than the reference. training: draws of training
    images, a perfect memorizer's. leave_one_out: each training image among the others. exact:
    samples of the exact denoiser, uint8 (n, S, S, C), or None. What the file holds of another
    feature space stays, if of as many pictures.
    """
    n, max_count, heldout, splits = len(subset.train), subset.max_count, subset.heldout, ("train",)
    if 2 * max_count <= len(heldout):           # the first ones are the reference
        heldout, splits = heldout.roll(-max_count, 0), ("train", "heldout")
    draws = torch.randint(n, (max(n, max_count),), generator=generator("cpu", "control"))
    contexts = {"heldout": Context(heldout, subset, splits),
                "training": Context(subset.train[draws.to(heldout.device)], subset),
                "leave_one_out": Context(subset.train, subset, neighbours=subset.own)}
    if exact is not None:
        contexts["exact"] = Context(exact, subset)
    old = {row.get("name"): row for row in train.read_csv(run / "controls.csv")}
    rows, results = [], {}
    for name, c in contexts.items():
        metrics = (copying, nearest_rms) if name == "leave_one_out" else METRICS
        results[name] = {metric: cached(columns_of, metric, c) for metric in metrics}
        row = {"name": name, "images": len(c.images), "compared": c.count,
               "made_of": digest_of(c.images, c.neighbours[1])[:8]}
        code, before = codes_today(), old.get(name, {})
        if all(str(v) == before.get(k) for k, v in row.items()) and is_current(before, code):
            row |= before
        for metric, columns in results[name].items():
            others = [other for other, own in results[name].items()
                      if other is not metric and columns.keys() & own.keys()]
            if others:
                raise InputError(f"METRICS: {metric.__name__} and {others[0].__name__} return "
                                 "columns of the same name")
            row |= columns
        rows.append(row | {"code": " ".join(map(":".join, code.items()))})
        write_neighbours(run / f"neighbours/{name}.npz", c)
    write_csv(run / "controls.csv", rows)
    return results


@torch.inference_mode()
def measure(args, record, device):
    """All tables of a run. What is done is skipped, snapshot by snapshot and metric by metric."""
    run, options, sets = args.run, record["options"], sample.sample_sets(args.run)
    drawn = {(name, step): open_samples(run, record, name, step, args.num)
             for name, steps in sets.items() for step in steps}
    if not drawn:
        raise InputError(f"{run}: no samples to measure; run sample.py {run} first")
    exact = sorted((run / "samples").rglob("exact.npz"))        # of several sets the first will do
    exact = open_samples(run, record, exact[0].parent.relative_to(run / "samples"), "exact"
                         ).images if exact else None
    table = {key: rows[0] for key, rows in rows_by_snapshot(run / "metrics.csv").items()}
    spaces, data = load_spaces(args, device), train.load_subset(run, record, args.data)
    counts = sorted({len(samples.images) for samples in drawn.values()})
    if len(counts) > 1:
        print(f"{run}: samples of {' and '.join(map(str, counts))} images side by side: FID and "
              f"the distances' controls, of {counts[-1]}, depend on the number; --num {counts[0]} "
              "measures all alike", file=sys.stderr, flush=True)
    subset = Subset(data, options["flip"], device, *spaces, max_count=counts[-1])
    write_duplicates_and_spectra(run, subset, drawn)
    controls = measure_controls(run, subset, exact)
    common = {}
    for columns in controls["heldout"].values():
        common |= {f"null_{k}": value for k, value in columns.items() if k.startswith(NULLS)}
    labels = torch.from_numpy(data.train_labels).to(device)
    floor = cached(loss_floor, train.PROCESSES[options["process"]], subset.train,
                   labels if record["classes"] else None, options["eval_images"])
    common |= {f"floor_level{k}": value for k, value in enumerate(floor)}
    measure_samples(args, options, drawn, subset, table, controls["training"], common)
    if args.planted or made_by_others(run / "planted.csv", planted_rows):
        write_csv(run / "planted.csv", planted_rows(subset))
        print(f"{run}/planted.csv: what each measure of copying catches", flush=True)
    warn_of_old_twins(run)


def write_duplicates_and_spectra(run, subset, drawn):
    """duplicates.csv; spectrum.csv, of all samples, {(set, step): Samples}, and of real images."""
    write_csv(run / "duplicates.csv",
              [{"image": i, "duplicate_of": group}
               for i, group in enumerate(subset.groups.tolist()) if group != i],
              columns=("image", "duplicate_of"))
    spectra = [{"name": "", "set": name, "step": step,
                **power_spectrum(torch.from_numpy(samples.images).to(subset.train.device))}
               for (name, step), samples in drawn.items()]
    spectra += [{"name": "heldout", **power_spectrum(subset.heldout)},
                {"name": "training", **power_spectrum(subset.train)}]
    write_csv(run / "spectrum.csv", spectra)


def warn_of_old_twins(run):
    """Say which twin_NAME.csv are of other code than today's, or of another run beside this one."""
    for path in sorted(run.glob("twin_*.csv")):
        other = False
        with contextlib.suppress(InputError):           # the twin is elsewhere, or gone
            now = train.identity(train.read_run(run.parent / path.stem.removeprefix("twin_")))
            other = any(row.get("twin", now) != now for row in train.read_csv(path))
        if other or made_by_others(path, twin_row):
            print(f"{path}: is of {'another run' if other else 'other code'} than today's; "
                  f"measure.py {run} --twin RUN2 makes it anew", file=sys.stderr, flush=True)


def made_by_others(path, function):
    """Whether a table that is there was made by other code than the function is today."""
    return any(row.get("made_of") != code_of(function) for row in train.read_csv(path))


def codes_today():
    """{metric: code_of it}. Raises InputError where two have one name, which is all that says in a
    table by what it was measured."""
    names = [getattr(metric, "__name__", "") for metric in METRICS]
    for name in names:
        if not name.isidentifier() or names.count(name) > 1:
            raise InputError("METRICS: each must be a function with a name of its own, not "
                             f"{name or 'one without'}")
    return dict(zip(names, map(code_of, METRICS), strict=True))


def codes_of(row):
    """{metric: code_of it when the row was measured}, of a row of metrics.csv."""
    return dict(word.split(":") for word in row.get("code", "").split())


def is_current(row, code):
    """Whether a row was measured by today's code, {metric: code_of it}, as far as its metrics are
    still there."""
    then = codes_of(row)
    return bool(then) and all(code.get(metric, was) == was for metric, was in then.items())


def still_true(row, digest, code, spaces):
    """What still holds of a row of metrics.csv: nothing, {}, where the samples (their digest) or
    the code of a metric are others today; nothing in a space whose network's weights are others.
    """
    if row.get("samples_digest") != digest or not is_current(row, code):
        return {}
    for space in spaces:
        if row.get(f"weights_{space.name}") != space.key[:8]:
            own = re.compile(rf"(.*_)?{re.escape(space.name)}(_.*)?")
            row = {column: cell for column, cell in row.items() if not own.fullmatch(column)}
    return row


def plan(drawn, table, columns, spaces, digests, paths):
    """Of each snapshot, {(set, step): ...}, the row of metrics.csv as far as it still holds, {} if
    not at all; and of those that lack something the metrics to be measured.

    As measure_samples has it; digests: of the samples; paths: of their files of neighbours.
    """
    code, todo = codes_today(), {}
    kept = {key: still_true(table.get(key, {}), digests[key], code, spaces) for key in drawn}
    for key, row in kept.items():
        lacking = [metric for metric, names in columns.items()
                   if metric.__name__ not in codes_of(row) or not all(row.get(k) for k in names)]
        if lacking or not has_neighbours(paths[key], digests[key], key[1]):
            todo[key] = lacking
    return kept, todo


def measure_samples(args, options, drawn, subset, table, columns, common):
    """metrics.csv and neighbours/[SET/]STEP.npz of the samples that lack any of the columns.

    drawn: {(set, step): Samples}; table: {(set, step): row of metrics.csv}; columns: {metric: its
    columns}; common: columns that are the same in all rows.
    """
    run, code, process = args.run, codes_today(), train.PROCESSES[options["process"]]
    spaces = [space for space in (subset.space, subset.sscd) if space]
    # What samples of before an option existed were drawn with.
    defaults = {f"setting_{k}": value for k, value in sample.default_settings(process).items()}
    digests = {key: hashlib.sha256(samples.images.tobytes()).hexdigest()[:8]
               for key, samples in drawn.items()}
    paths = {(name, step): run / "neighbours" / name / f"{step:07d}.npz" for name, step in drawn}
    kept, todo = plan(drawn, table, columns, spaces, digests, paths)
    for key, row in kept.items():               # columns stay in their order; new ones follow
        table[key] = row and row | {k: v for k, v in defaults.items() if k not in row} | common
    if gone := [key for key, row in table.items()
                if key not in drawn and codes_of(row) and not is_current(row, code)]:
        print(f"{run}/metrics.csv: {len(gone)} rows whose samples are gone are of other code than "
              "today's metrics", file=sys.stderr, flush=True)
    print(f"{run}: {len(todo)} of {len(drawn)} snapshots to measure, "
          f"{', '.join(s.name for s in spaces)}, on {subset.train.device}", flush=True)

    def write():
        write_csv(run / "metrics.csv", [table[key] for key in sorted(table) if table[key]])
    for (name, step), lacking in todo.items():
        key, samples = (name, step), drawn[name, step]
        c = Context(samples.images, subset)
        row = {"set": name, "step": step, "images": step * options["batch"],
               "samples": len(c.images), "samples_digest": digests[key]}
        row |= defaults | {f"setting_{k}": value for k, value in samples.settings.items()}
        row |= {"out_of_range": samples.out_of_range} | table[key]
        for metric in lacking:
            row |= columns_of(metric, c)
        write_neighbours(paths[key], c, digests[key], step, samples.labels)
        # What a metric that is gone was measured by stays, in case that it comes again, changed.
        by = " ".join(f"{k}:{v}" for k, v in (codes_of(kept[key]) | code).items())
        weights = {f"weights_{space.name}": space.key[:8] for space in spaces}
        table[key] = row | common | {"code": by} | weights
        write()
        shown = "  ".join(f"{k} {float(v):.4g}" for k, v in row.items()
                          if k == "copy_ratio" or re.fullmatch(r"fid_.*_(train|heldout)", k))
        print(f"step {step:7d}  {name}  {shown}", flush=True)
    write()


# --- Which known denoiser does the network follow? ------------------------------------------------

INPUTS = 64             # pictures of each kind at each level


def gaussian(images):
    """f(xt, a, s) -> E[x0 | xt] under the mean and covariance of images (N, C, H, W) (Wang).

    A Wiener filter: m + V diag(a v / (a^2 v + s^2)) V^T (xt - a m), with the covariance's N or
    fewer eigenvectors V and values v that are not 0.
    """
    mean = images.flatten(1).mean(0)
    _, root, basis = torch.linalg.svd(images.flatten(1) - mean, full_matrices=False)
    value = root.square() / len(images)

    def estimate(xt, a, s):
        a, s = a[:, None], s[:, None]
        part = (xt.flatten(1) - a * mean) @ basis.T * (a * value / (a**2 * value + s**2))
        return (mean + part @ basis).reshape(xt.shape)
    return estimate


def local(images, patch=3):
    """f(xt, a, s) -> x0, each pixel the posterior mean over the images' patches at its place.

    A patch is the patch x patch pixels around it, as far as they lie in the picture. Kamb's local
    denoiser, with patches of the same place only. images (N, C, H, W); memory: about 500 MB.
    """
    mean, padded_images = images.mean(0), F.pad(images - images.mean(0), [patch // 2] * 4)

    def patches(padded, i):         # around the pixels of row i: (W, n, C patch^2)
        return F.unfold(padded[:, :, i:i + patch], patch).permute(2, 0, 1)

    def estimate(xt, a, s):
        x0, a, s = torch.empty_like(xt), a[:, None, None, None], s[:, None, None, None]
        x = F.pad(xt - a * mean, [patch // 2] * 4)
        for i in range(xt.shape[2]):
            y, center = patches(padded_images, i), (images - mean)[:, :, i].permute(2, 0, 1)
            y2, rows = y.square().sum(2)[:, None], max(1, 2**25 // (len(y) * len(images)))
            for q in torch.arange(len(xt), device=xt.device).split(rows):
                a_, s_ = a[q, :, 0, 0], s[q, :, 0, 0]
                weight = ((patches(x[q], i) @ y.mT - 0.5 * a_ * y2) * (a_ / s_**2)).softmax(2)
                x0[q, :, i] = (weight @ center).permute(1, 2, 0)                # (q, C, W)
        return x0 + mean
    return estimate


def x0_of(net, process, xt, t, labels):
    """What a net takes for x0, (n, C, H, W); clamped where sampling clamps it."""
    parts = []
    for rows in torch.arange(len(xt), device=xt.device).split(256):
        prediction = net(xt[rows], t[rows], labels[rows])
        parts.append(process.x0_eps(xt[rows], prediction, t[rows])[0])
    return torch.cat(parts).clamp(-1, 1) if process.clip else torch.cat(parts)


def noised(process, x0, labels):
    """(xt, t, labels): images (n, C, S, S) at the middle of each level of t, most noise first."""
    t = sample.sampling_times(process, 2 * LEVELS)[1::2].to(x0.device).repeat_interleave(len(x0))
    x0 = x0.repeat(LEVELS, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=generator("cpu", "denoisers")).to(x0.device)
    return train.q_sample(process, x0, t, eps), t, labels.repeat(LEVELS)


def on_path(net, process, shape, labels):
    """(xt, t, labels) as noised gives them, of points on the net's own way to an image."""
    seen = {}

    def watched(xt, t, labels):
        # The sampler writes into xt. Of several looks at a time (Heun's) the last is from the path.
        seen[float(t[0])] = xt.clone(), t
        return net(xt, t, labels)
    sample.sample(watched, process, shape, [(0, i) for i in range(len(labels))], 2 * LEVELS,
                  clip=process.clip, labels=labels, device=labels.device)
    path = [seen[float(t)] for t in sample.sampling_times(process, 2 * LEVELS)[1::2]]
    return *map(torch.cat, zip(*path, strict=True)), labels.repeat(LEVELS)


def denoiser_study(process, data, patch):
    """A function net -> rows of denoisers.csv: how far its x0 is from that of known denoisers.

    data: (images uint8, labels) of the training subset and of the held-out images, labels all 0
    where the model has no classes; else each reference is that of the class. The population is
    stood in for by the held-out images that are no inputs. rms over numbers in [-1, 1].
    """
    (images, labels), (heldout, heldout_labels) = data
    images, heldout = to_float(images).contiguous(), to_float(heldout).contiguous()
    m = min(INPUTS, len(heldout) // 2)
    trained = process, images, labels
    references = {"memorizer": sample.memorizer(*trained),
                  "gaussian": sample.as_network(gaussian, *trained, least=2),
                  "local": sample.as_network(functools.partial(local, patch=patch), *trained,
                                             least=2),
                  "population": sample.memorizer(process, heldout[m:], heldout_labels[m:])}
    inputs = {"heldout": noised(process, heldout[:m], heldout_labels[:m]),
              "training": noised(process, images[:INPUTS], labels[:INPUTS])}
    expected = {(kind, name): x0_of(reference, process, *points)
                for kind, points in inputs.items() for name, reference in references.items()}
    path_labels = labels.unique().repeat(INPUTS)[:INPUTS]       # the classes in turn

    def rows_of(net):
        rows, path = [], on_path(net, process, images.shape[1:], path_labels)
        for name, reference in references.items():
            expected["path", name] = x0_of(reference, process, *path)
        for kind, points in {"path": path, **inputs}.items():
            own = x0_of(net, process, *points)
            for name in references:
                rms = (own - expected[kind, name]).square().mean((1, 2, 3)).sqrt()
                for level, values in enumerate(rms.reshape(LEVELS, -1).flip(0)):
                    low, median, high = values.quantile(values.new_tensor([.25, .5, .75])).tolist()
                    rows.append({"level": level, "t": (level + 0.5) / LEVELS, "inputs": kind,
                                 "reference": name, "median": median, "low": low, "high": high})
        return rows
    return rows_of


@torch.inference_mode()
def measure_denoisers(args, record, device):
    """denoisers.csv: denoiser_study of the averaged weights of every snapshot that is not done."""
    run, process = args.run, train.PROCESSES[record["options"]["process"]]
    table, steps, todo = rows_by_snapshot(run / "denoisers.csv"), sample.snapshots(run), {}
    if not steps:
        raise InputError(f"{run}: has no snapshots; train it first")
    for step in steps:
        weights = hashlib.sha256((run / f"snapshots/{step:07d}.pt").read_bytes()).hexdigest()
        made_of = digest_of(weights, train.identity(record), args.patch, FILES)[:8]
        rows = table.get(("", step), [])            # per input, reference and level
        if {row.get("made_of") for row in rows} != {made_of}:
            todo[step] = made_of
    print(f"{run}: {len(todo)} of {len(steps)} snapshots to compare with denoisers", flush=True)
    if not todo:
        return
    shown, heldout = train.data_on(device, train.load_subset(run, record, args.data),
                                   classes=True).values()
    data = train.as_shown(*shown, record["options"]["flip"]), heldout
    rows_of = denoiser_study(process, [(x, k if record["classes"] else 0 * k) for x, k in data],
                             args.patch)
    net = sample.load_net(run, record, device)
    for step, made_of in todo.items():
        sample.load_ema(net, run, record, step)
        # A network without classes gets none; the references' are all of class 0.
        table["", step] = [{"set": "", "step": step, **row, "made_of": made_of}
                           for row in rows_of(net if record["classes"] else
                                              lambda xt, t, _: net(xt, t, None))]
        write_csv(run / "denoisers.csv", [row for key in sorted(table) for row in table[key]])
        print(f"{run}/denoisers.csv: step {step}", flush=True)


# --- Beyond the study: planted copies, twins ------------------------------------------------------


def planted_rows(subset):
    """What each measure of copying catches: a row per kind of planted copy, all made of the first
    1,024 training images, and one for held-out images."""
    images = subset.train[:1024]                                # uint8 (n, S, S, C)
    g, x = torch.Generator().manual_seed(0), to_float(images)   # (n, C, S, S)
    noise = torch.randn(x.shape, generator=g).to(x.device)
    gain, shift = (torch.rand(2, len(x), x.shape[1], 1, 1, generator=g) - 0.5).to(x.device)
    planted = {"exact": images}
    planted |= {f"noise rms {rms:.2f}": to_uint8(x + rms * noise) for rms in (0.05, 0.1, 0.15, 0.2)}
    planted |= {"mirrored": images.flip(2), "shifted by 1 pixel": images.roll(1, 2),
                "recoloured": to_uint8(x * (1 + 0.4 * gain) + 0.4 * shift),
                "held-out images": subset.heldout[:1024]}
    rows = []
    for name, pictures in planted.items():
        c = Context(pictures, subset)
        shares = {k: v for k, v in (copying(c) | similarity(c)).items() if "_ratio" in k}
        rows.append({"planted": name, **shares, "not_authentic": 1 - authenticity(c)["auth_share"],
                     "made_of": code_of(planted_rows)})
    return rows


def twin_row(c, twin, shift=1):
    """How the samples of two models trained on disjoint images agree, as columns.

    c, twin: Contexts of as many samples, sample i of each from the same noise. Two samples agree if
    they are nearer to each other than either is to its nearest training image, which copying alone
    cannot bring about (Kadkhodaie, figure 2). null_agreement: of sample i and i + shift, from
    different noise; shift: the number of classes. Distances are rms over numbers in [-1, 1].
    """
    x, y, n = c.pixels.double(), twin.pixels.double(), len(c.images)

    def agree(k):                               # sample i + k and the twin's sample i
        between = (x[k:] - y[:n - k]).norm(dim=1)
        return between < torch.minimum(c.distances[k:], twin.distances[:n - k])
    row = share_columns("agreement", agree(0))
    return {"samples": n, "agreement": row.pop("agreement_ratio"), **row,
            "null_agreement": float(agree(shift).double().mean()) if shift < n else math.nan,
            "twin_rms": float((x - y).norm(dim=1).quantile(0.5) / x.shape[1] ** 0.5),
            "nearest_train_rms": nearest_rms(c)["nearest_rms"],
            "twin_nearest_train_rms": nearest_rms(twin)["nearest_rms"],
            "copy_ratio": copying(c)["copy_ratio"]}


@torch.inference_mode()
def measure_twin(args, record, device):
    """twin_NAME.csv: twin_row at each step that both runs have samples of, in one set of samples.
    Raises InputError where the runs share images, or have no samples with the same settings."""
    runs = [(args.run, record), (args.twin, train.read_run(args.twin))]
    sets, twin_sets = (sample.sample_sets(run) for run, _ in runs)
    shared = sorted(name for name in sets.keys() & twin_sets.keys()
                    if {*sets[name]} & {*twin_sets[name]})
    if not shared:
        raise InputError(f"--twin {args.twin}: no step has samples in both runs")
    name = shared[0]                            # "", of the default settings, if it is there
    steps = sorted({*sets[name]} & {*twin_sets[name]})
    if record["image_shape"] != runs[1][1]["image_shape"]:
        raise InputError(f"--twin {args.twin}: its pictures are of another size")
    data = [train.load_subset(run, r, args.data) for run, r in runs]
    images, twin_images = ({image.tobytes() for image in d.train_images} for d in data)
    if common := len(images & twin_images):
        raise InputError(f"--twin {args.twin}: the two training sets share {common} images; "
                         f"train one with --offset {record['options']['n']}")
    subset, twin_subset = (Subset(d, r["options"]["flip"], device)
                           for d, (_, r) in zip(data, runs, strict=True))
    shift, rows = len(record["labels"]) if record["classes"] else 1, []
    for step in steps:
        samples, twins = (open_samples(run, r, name, step, args.num) for run, r in runs)
        n = min(len(samples.images), len(twins.images))
        if (samples.settings != twins.settings
                or (samples.labels[:n] != twins.labels[:n]).any()):
            raise InputError(f"--twin {args.twin}: its samples of step {step} have other settings "
                             "or classes")
        contexts = Context(samples.images[:n], subset), Context(twins.images[:n], twin_subset)
        rows.append({"set": name, "step": step, **twin_row(*contexts, shift),
                     "made_of": code_of(twin_row),
                     "twin": train.identity(runs[1][1])})
    path = args.run / f"twin_{args.twin.name}.csv"
    write_csv(path, rows)
    print(f"{path}: {len(rows)} steps of samples/{name}; at the last, agreement "
          f"{rows[-1]['agreement']:.3f}, of pairs from different noise "
          f"{rows[-1]['null_agreement']:.3f}", flush=True)


# ==================================================================================================
# Machinery. A reader who came for the metrics can stop here.
# ==================================================================================================

# --- Caches: kept in data/cache under what they are made of ---------------------------------------

# All code that can matter, files of your own beside this one and in folders beside it included.
HERE = Path(__file__).parent
FILES = "".join(path.read_text(errors="replace") for depth in ("[!.]*.py", "[!.]*/[!.]*.py")
                for path in sorted(HERE.glob(depth)) if path.is_file()
                and path.name != "plot.py" and path.parent.name != "tests")
say_once = functools.cache(functools.partial(print, flush=True))
source_of = functools.cache(inspect.getsource)


def digest_of(*things):
    """64 hex digits of tensors by their bytes, processes by what they compute, functions by their
    source, and all else by its `key`, if it has one, or what it prints as."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            digest.update(thing.contiguous().cpu().numpy())
            thing = thing.shape, thing.dtype
        elif isinstance(thing, train.Process):
            thing = train.fingerprint(thing)
        elif inspect.isroutine(thing):
            thing = code_of(thing) if thing in METRICS else source_of(thing)
        digest.update(f"{getattr(thing, 'key', thing)!r}\n".encode())
    return digest.hexdigest()


def is_own(module):
    """Whether a module is a file beside this one, or in a folder beside it, and none of the
    project's."""
    path = Path(getattr(module, "__file__", None) or "/")
    return (HERE in (path.parent, path.parent.parent) and inspect.ismodule(module)
            and module not in (train, sample, sys.modules[__name__]))


@functools.cache
def names_in(source):
    """The names in a function's or class's source."""
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:                         # a part of a line, as of a lambda in a list
        return set(re.findall(r"[^\W\d]\w*", source))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def code_of(function):
    """8 hex digits of the source of a metric and of all that it uses, in this file and in files of
    your own beside it: whatever a name in the source stands for, and so on."""
    followed, said = [function, Context, Subset], []
    for thing in followed:                      # which grows
        said.append(source_of(thing))
        known = vars(sys.modules[thing.__module__])
        for name in sorted(names_in(said[-1]) & known.keys()):
            said += [name, *parts_of(known[name], followed)]
    return digest_of(*said)[:8]


def parts_of(value, followed, within=()):
    """What to digest of a value that a name in a source stands for: constants by value, containers
    part by part, modules of your own by their source. Functions and classes of this file or of your
    own go into the list `followed`. within: the containers that hold the value."""
    if isinstance(value, train.Process):
        return [value]
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        if id(value) in within:
            return ["itself"]
        items = value.items() if isinstance(value, dict) else value
        items = sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
        return [type(value).__name__, len(value), *(part for item in items for part in parts_of(
            item, followed, (*within, id(value))))]
    if inspect.isroutine(value) or inspect.isclass(value):
        own = value.__module__ == __name__ or is_own(sys.modules.get(value.__module__))
        if own and value not in [*followed, cached, digest_of]:
            followed.append(value)
        return [getattr(value, "__qualname__", type(value).__name__)]       # no address
    if is_own(value):
        return [source_of(value)]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return [torch.as_tensor(value)]
    # Not None, which may stand for what is loaded at the first use; and nothing with an address.
    constant = isinstance(value, (int, float, str, np.generic))
    return [value] if constant or within and " at 0x" not in repr(value) else []


def cached(function, *things, made_by=FILES):
    """function(*things), kept in data/cache: tensors, which may come back on the CPU, or numbers.

    The key is a digest of the things and of the code: all of it, unless `made_by` names less. The
    file holds its key, too; one that holds another, or is damaged, is made anew.
    """
    key = digest_of(made_by, getattr(function, "__name__", ""), *things)
    path = Path(f"data/cache/{key[:32]}.pt")
    try:
        return train.load_checkpoint(path, key, 0)["value"]
    except InputError:
        value = function(*things)
    try:
        train.save(path, {"run": key, "step": 0, "value": value})
    except OSError:
        say_once("data/cache: cannot be written, so nothing is kept there")
    return value


# --- Files of a run -------------------------------------------------------------------------------


def open_samples(run, record, name, step, num=None):
    """The Samples of a set at a step, the first num (all), checked. Raises InputError."""
    path, shape = sample.samples_path(run, name, step), tuple(record["image_shape"])
    samples = sample.read_samples(path, train.identity(record))
    count = len(samples.images)
    if sample.what_changed(samples.made, sample.weights_today(run, record, samples.settings, step)):
        raise InputError(f"{path}: was drawn by other weights than the run has now; delete it and "
                         "run sample.py again")
    if not count or samples.images.shape[1:] != shape:
        raise InputError(f"{path}: {samples.images.dtype} {samples.images.shape}, "
                         f"must be uint8 (num, {', '.join(map(str, shape))})")
    if num and num > count:
        raise InputError(f"--num {num}: {path} holds only {count}; run sample.py --num {num}")
    return samples._replace(images=samples.images[:num], labels=samples.labels[:num])


def rows_by_snapshot(path):
    """The rows of a table by (set, step): {key: [row]}. Raises InputError: damaged, another's."""
    rows = {}
    for row in train.read_csv(path):
        with reading(path, "delete it to measure anew"):
            rows.setdefault((row.get("set", ""), int(row["step"])), []).append(row)
    return rows


def write_neighbours(path, c, digest="", step=-1, labels=()):
    """neighbours/[SET/]STEP.npz: the two nearest training images of each; 64 pairs to look at."""
    arrays = {"distances": c.neighbours[0], "indices": c.neighbours[1], "ratios": c.ratios,
              "samples": c.images[:64], "nearest": c.subset.train[c.nearest[:64]]}
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    write_atomic(path, lambda file: np.savez(file, labels=labels, samples_digest=digest, step=step,
                                             threshold=THRESHOLDS[""], **arrays))


def has_neighbours(path, digest, step):
    """Whether the file is whole, and made of these samples."""
    with contextlib.suppress(InputError), reading(path):
        arrays = train.read_npz(path)
        return (str(arrays["samples_digest"]), int(arrays["step"]), float(arrays["threshold"])
                ) == (digest, step, THRESHOLDS[""])
    return False


# --- Networks' files ------------------------------------------------------------------------------


@torch.inference_mode()
def network_features(net, images, flag="", size=None, mean=0.0, std=1.0, batch=128):
    """uint8 images (n, H, W, C) -> net(images (B, 3, H, W) in [0, 1]), float32 (n, D).

    size: resize to size x size first; mean, std: numbers, or three. Raises InputError, naming the
    flag, where the network fails or returns anything but finite (B, D).
    """
    features = []
    mean, std = (torch.tensor(v, device=images.device).reshape(-1, 1, 1) for v in (mean, std))
    for part in tqdm(images.split(batch), desc="features", unit="batch", leave=False, disable=None):
        x = part.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1).contiguous() / 255
        if size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        with reading(f"{flag}, given {tuple(x.shape)}"):
            y = net((x - mean) / std)
            if not isinstance(y, torch.Tensor) or y.dim() != 2 or len(y) != len(x):
                raise TypeError(f"returns {getattr(y, 'shape', type(y).__name__)}, "
                                f"must be a tensor ({len(x)}, D)")
            if not y.isfinite().all():
                raise ValueError("returns numbers that are not finite")
        features.append(y.float())
    return torch.cat(features)


def inception_net(state):
    """The Inception v3 of FID, (B, 3, 299, 299) in [-1, 1] -> (B, 2048), from a state dict.

    As pytorch-fid 0.3.0 computes it: torchvision's network, but average pools do not count the
    padding, the last block has a max pool, and there are 1,008 classes. Raises InputError.
    """
    with train.needs_torchvision("--features inception"):
        from torchvision.models import inception as tv

    def patched(block):
        class FIDBlock(block):
            def pool(self, x):
                return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

            def _forward(self, x):                      # the pool's branch is the last one
                return super()._forward(x)[:-1] + [self.branch_pool(self.pool(x))]
        return FIDBlock
    blocks = [tv.BasicConv2d, patched(tv.InceptionA), tv.InceptionB, patched(tv.InceptionC),
              tv.InceptionD, patched(tv.InceptionE), tv.InceptionAux]
    net = tv.Inception3(num_classes=1008, aux_logits=False, transform_input=False,
                        inception_blocks=blocks, init_weights=False, dropout=0.0)
    net.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, stride=1, padding=1)
    with reading("--weights: not the state dict of the FID Inception graph"):
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("AuxLogits.")})
    net.fc = torch.nn.Identity()
    return net.eval().requires_grad_(False)


def load_inception(weights, device):
    """The space of FID: weights from a file, or (None) pytorch-fid's GitHub release, kept by torch.
    Raises InputError where they cannot be had or are damaged, saying what to fetch and where to."""
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.split("/")[-1])
    if weights is None:
        with reading("--features inception: the weights cannot be had",
                     f"fetch {WEIGHTS_URL} to {path}, or name the file with --weights"):
            torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True, progress=False,
                                               map_location="cpu")
    with reading(f"--weights {path}"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        net = inception_net(torch.load(path, map_location="cpu", weights_only=True)).to(device)
    if digest not in WEIGHTS_URL:
        print(f"--weights {path}: SHA-256 {digest}..., not the official FID weights; FID is not "
              "comparable", flush=True)
    return network_space("inception", net, digest, "--features inception", 299, 0.5, 0.5)


def load_network(flag, path, device, *prepare):
    """The Space of a saved network, images (B, 3, H, W) in [0, 1] -> (B, D).

    A file of torch.export (.pt2) or TorchScript; both run whatever their maker put in. Named by the
    file's stem and digest. prepare: as in network_space. Raises InputError.
    """
    with reading(f"{flag} {path}"):
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        if Path(path).suffix == ".pt2":
            logging.getLogger("torch.export").disabled = True   # it prints tracebacks, beside ours
            net = torch.export.load(path).module().to(device)
        else:
            say_once(f"{flag} {path}: read as TorchScript, which PyTorch is giving up; save it by "
                     "torch.export as a .pt2 file")
            net = torch.jit.load(path, map_location=device).eval()
    return network_space(f"{space_name(path)}-{digest}", net, digest, f"{flag} {path}", *prepare)


def network_space(name, net, digest, flag, *prepare):
    """The Space of a network, whose features stay when other code changes, since they are slow.
    flag: how errors call it; prepare: size, mean and std, as network_features takes them."""
    key = digest_of(name, digest, prepare, network_features, inception_net)
    return Space(name, lambda images: network_features(net, images, flag, *prepare), key)


def space_name(path):
    """The word for a network's file in names of columns, whose other words "_" separates."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", Path(path).stem)


def default_features(record):
    """The --features of a run (a record of args.json) where none are given."""
    size, _, channels = record["image_shape"]
    small = record["options"]["data"] == "toy" or size < 32 or channels < 3
    return "pixels" if small else "inception"


def load_spaces(args, device):
    """The Space of --features (inception, pixels or a file), and that of --sscd, else None."""
    if args.features == "inception":
        space = load_inception(args.weights, device)
    elif args.features == "pixels":
        space = PIXELS
    else:
        space = load_network("--features", args.features, device)
    if not args.sscd:
        return space, None
    return space, load_network("--sscd", args.sscd, device, *SSCD_PREPARE)._replace(name="sscd")


# ==================================================================================================
# What sweep.sh asks: the runs of a grid, and how far each is. Nothing here measures.
# ==================================================================================================


# Options of train.py that sweep.sh sets, and the variable to give it instead.
SWEEPS_OWN = {"n": "N", "width": "WIDTH", "batch": "BATCH", "lr": "LR", "seed": "SEEDS",
              "images": "IMAGES", "steps": "IMAGES", "data": "DATA", "out": "OUT", "device": "GPUS"}


def sweep_words(flag, values):
    """For each value of an option of train.py, its words on the command line: a switch takes on and
    off; commas separate the values of an option with several."""
    options, key = vars(train.make_parser().parse_args([])), flag[2:].replace("-", "_")
    if key not in options or not values:
        raise InputError(f"{flag}: " + ("has no values" if key in options else "unknown option"))
    is_switch = isinstance(options[key], bool)
    for value in values:
        if values.count(value) > 1 or re.match(r"0\d", value):
            raise InputError(f"{flag} {value}: is listed twice, or starts with a 0")
        if is_switch and value not in ("on", "off"):
            raise InputError(f"{flag} {value}: must be on or off")
    if is_switch:                       # one that is on by default is turned off by --no-NAME
        return [[] if (v == "on") == options[key] else [flag if v == "on" else f"--no-{flag[2:]}"]
                for v in values]
    several = isinstance(options[key], (list, tuple))
    # with =, so that argparse does not take -1e-3 for an option
    return [[flag, *v.split(",")] if several else [f"{flag}={v}"] if v.startswith("-") else
            [flag, v] for v in values]


def sweep_options(lists):
    """The options of sample.py and measure.py that SAMPLE and MEASURE name, for all runs. Raises
    InputError on those that no run could ever be done with, and on those of TRAIN that the sweep
    itself sets."""
    nothing = argparse.Namespace(**dict.fromkeys(vars(train.make_parser().parse_args([]))))
    asked = train.make_parser().parse_args(lists["TRAIN"][2:], nothing)     # after --data DATA
    for option, variable in SWEEPS_OWN.items():
        if getattr(asked, option) is not None:
            raise InputError(f"TRAIN: --{option} is set by the sweep; give {variable}= instead")
    drawing, args = sample.parse(["", *lists["SAMPLE"]]), parse(["", *lists["MEASURE"]])
    for name, options, flags in (("SAMPLE", drawing, "exact steps_only switch"),
                                 ("MEASURE", args, "denoisers planted twin")):
        for flag in flags.split():
            if getattr(options, flag):
                raise InputError(f"{name}: --{flag.replace('_', '-')} is for one run, by hand, "
                                 "after the sweep")
    for flag in ("features", "weights", "sscd"):
        path = getattr(args, flag)
        if path not in (None, "inception", "pixels") and not Path(path).is_file():
            raise InputError(f"MEASURE: --{flag} {path}: no such file (looked for from "
                             f"{Path.cwd()})")
    return drawing, args


def sweep_rows(lists):
    """The runs of a grid, {name: (words for train.py, its options)}, the longest first.

    lists: what sweep.sh asks, {"TRAIN": words, "IMAGES": ["724N"], "DESIGN": ["one"], "--n":
    values, ...}; the first value of an option is its default; the listed options name a run.
    """
    axes = {flag: sweep_words(flag, v) for flag, v in lists.items() if flag.startswith("--")}
    default, seed = [words[0] for words in axes.values()], list(axes).index("--seed")

    def changed(choice):                        # how many factors are not at their default
        return sum(a != b for k, (a, b) in enumerate(zip(choice, default, strict=True))
                   if k != seed)
    choices = [choice for choice in itertools.product(*axes.values())
               if lists["DESIGN"] == ["full"] or changed(choice) < 2]
    repeats = sweep_words("--seed", lists["REPEATS"]) if lists["REPEATS"] else []
    choices += [(*default[:seed], words, *default[seed + 1:]) for words in repeats
                if words not in axes["--seed"]]                     # SEEDS has these already
    # A switch that varies has no place among the options that all runs have.
    switches = {word for words in axes.values() if [] in words for word in itertools.chain(*words)}
    common = [word for word in lists["TRAIN"] if word not in switches]
    images, rows = lists["IMAGES"][0], {}
    for choice in choices:
        words = [word for words in choice for word in words]
        named = train.make_parser().parse_args(words)
        name, epochs_of = train.run_name(named), named.n if images.endswith("N") else 1
        if name in rows:
            raise InputError(f"{name}: two values of a list are the same")
        words = [*common, *words, "--images", str(int(images.rstrip("N")) * epochs_of)]
        rows[name] = words, train.parse(words)

    def cost(row):          # a step's is about its images' FLOPs, plus what launching it takes
        options = row[1][1]
        return options.steps * (25600 + options.batch * options.width ** 2)
    return dict(sorted(rows.items(), key=cost, reverse=True))


def drawn_of(run, record, settings, name, shots):
    """Of snapshots: those that have samples in the set `name`, and, in words, what drew them that
    is another today."""
    drawn, changed = set(), []
    sampler = sample.sampler_values(train.PROCESSES[record["options"]["process"]], settings)
    for shot in shots:
        if (path := sample.samples_path(run, name, shot)).exists():
            drawn.add(shot)
            weights = sample.weights_today(run, record, settings, shot)
            if what := sample.what_changed(sample.made_by(path), weights, sampler):
                changed.append(f"{what}, which drew {path.relative_to(run)}")
    return drawn, changed


@functools.cache
def hashes_today(data, n, size, offset, conditional):
    """The hashes of the training and of the held-out images that these options give today."""
    loaded = train.load_data(data, n, size, offset)
    loaded = train.of_known_classes(loaded) if conditional else loaded
    return {"subset_sha256": train.hash_of(*loaded[:2]),
            "heldout_sha256": train.hash_of(*loaded[2:])}


def values_today(options, image_shape, classes):
    """train.step_values and train.network_values as the code of today has them."""
    net = train.build_net(options, image_shape, classes)
    return {"step_values": train.step_values(options),
            "network_values": train.network_values(net, image_shape, classes)}


def record_today(record, options):
    """What the record of a run (args.json) would say today, if it were begun with these options."""
    found = {"options": vars(options)}
    found |= cached(values_today, record["options"], record["image_shape"], record["classes"])
    if options.data in ("toy", "digits") or Path(options.data).is_file():
        found |= hashes_today(options.data, options.n, options.size, options.offset,
                              options.conditional)
    return found


def rows_asked(run, record, name, settings, num, args):
    """{step: row} of metrics.csv, of the set `name`: of at least num samples drawn with these
    settings, measured by today's metrics in the feature spaces that args asks."""
    features = args.features or default_features(record)
    if features not in ("pixels", "inception"):
        features = re.escape(space_name(features)) + "-[0-9a-f]{8}"
    spaces, today = [features] + ["sscd"] * bool(args.sscd), codes_today().items()
    defaults = sample.default_settings(train.PROCESSES[record["options"]["process"]])
    settings = {k: str(v) for k, v in settings.items()}

    def is_asked(row):
        # rows of before a setting existed have its default
        made = {k: row.get(f"setting_{k}") or str(v) for k, v in defaults.items()}
        columns = [column for column, cell in row.items() if cell]
        return (int(row["samples"]) >= num and made == settings and today <= codes_of(row).items()
                and all(any(re.fullmatch(f"weights_{s}", c) for c in columns) for s in spaces))
    table = rows_by_snapshot(run / "metrics.csv")
    return {step: rows[0] for (place, step), rows in table.items()
            if place == name and is_asked(rows[0])}


def sweep_state(run, options, drawing, args):
    """(state, steps to train, snapshots to draw or measure, held-out loss, copy ratio) of a run.

    options, drawing, args: of train, sample and measure.py. "done" is only this very run, trained
    to its last step, with samples of these settings of every snapshot and the rows of metrics.csv.
    """
    planned = train.evaluation_steps(options.steps, options.evals_per_doubling, options.first_eval)
    if not (run / "args.json").exists():
        return "not started", options.steps, len(planned), "-", "-"
    record, log = train.read_run(run), train.read_csv(run / "log.csv")
    step, process = int(log[-1]["step"]) if log else 0, train.PROCESSES[options.process]
    other = train.differences(record, record | record_today(record, options))
    other += ["data"] * (Path(record["options"]["data"]).stem != Path(options.data).stem)
    if step > options.steps:
        other.append(f"last step, {step}")
    settings = sample.settings_of(drawing, process)
    if step >= options.steps:           # no more will come, whatever the schedule is today
        planned = [int(row["step"]) for row in log]
    name, shots = sample.set_name(settings, process), {*planned, *sample.snapshots(run)}
    drawn, changed = drawn_of(run, record, settings, name, shots)
    measured = rows_asked(run, record, name, settings, args.num or drawing.num, args)
    left = len(shots - (drawn & measured.keys()))
    if other + changed:
        state = f"another run: {', '.join(other + changed)}"
    elif step < options.steps:
        state = f"training, step {step} of {options.steps}"
    elif drawn < shots:
        state = f"sampling, {len(drawn)} of {len(shots)}"
    else:
        state = f"measuring, {len(measured)} of {len(shots)}" if left else "done"
    return (state, max(0, options.steps - step), left,
            f"{float(log[-1]['heldout_loss']):.4g}" if log else "-",
            f"{float(measured[max(measured)]['copy_ratio']):.4g}" if measured else "-")


# Options of train.py that a step's time does not depend on. One that is not here, yours included,
# is taken to matter: its values are timed one by one.
SAME_SPEED = {*train.FREE, "n", "offset", "lr", "seed", "ema", "weighting", "flip",
              "evals_per_doubling", "first_eval", "eval_images"}


def step_of(options):
    """What the time of a training step depends on: all options but those of SAME_SPEED."""
    return tuple((k, str(v)) for k, v in vars(options).items() if k not in SAME_SPEED)


def sweep_speed(run):
    """(images per second, parameters) of a run that has got somewhere, else None."""
    with contextlib.suppress(InputError, LookupError, TypeError, ValueError):
        rates = [float(row["images_per_second"]) for row in train.read_csv(run / "log.csv")]
        return (max(0.05, [rate for rate in rates if math.isfinite(rate)][-1]),
                int(train.read_run(run)["parameters"]))


def time_steps(words, device):
    """sweep_speed of a few steps with these words for train.py, which leave nothing behind."""
    few = ["--steps", "16", "--first-eval", "2", "--evals-per-doubling", "1", "--eval-images", "10"]
    torch.compiler.reset()          # of many networks in one process it compiles eight, no more
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        train.main([*words[:words.index("--images")], *few, "--out", out, "--device", device])
        return sweep_speed(Path(out))


@train.command_line
def sweep(argv):
    """Answer sweep.sh: a line per run, between tabs its name, state, held-out loss, copy ratio,
    images/s, hours left, GB of weights, and words for train.py.

    argv: the runs' folder, and a device on which to time the steps that never ran. stdin: lists.
    """
    lists = dict.fromkeys(("TRAIN", "SAMPLE", "MEASURE"), ())
    for key, *values in filter(None, map(str.split, sys.stdin)):
        key = key.replace("_", "-") if key.startswith("--") else key
        if lists.get(key):
            raise InputError(f"{key}: has two lists")
        lists[key] = values
    drawing, args = sweep_options(lists)
    rows, out = sweep_rows(lists), Path(argv[0])
    speeds = {step_of(options): speed for name, (_, options) in rows.items()
              if (speed := sweep_speed(out / name))}
    for name in lists["ONLY"] or rows:
        if name not in rows:
            raise InputError(f"--only {name}: no such run; see --list")
        words, options = rows[name]
        try:
            state, steps, left, *values = sweep_state(out / name, options, drawing, args)
        except (InputError, LookupError, TypeError, ValueError) as error:
            state, steps, left, *values = f"unreadable, {error!r:.99}", options.steps, 0, "-", "-"
        if argv[1:] and state != "done" and step_of(options) not in speeds:
            speeds[step_of(options)] = time_steps(words, argv[1])
        rate, parameters = speeds.get(step_of(options), (math.nan, math.nan))
        # Of a training step, sampling does the forward third. last.pt holds weights, average and
        # Adam's two moments, a snapshot the average: 4 bytes per parameter each.
        images = steps * options.batch + left * drawing.num * drawing.sampling_steps / 3
        kept = {"all": 4 + left, "last": 5, "none": 0}[lists["KEEP"][0]]
        numbers = f"{rate:.0f}\t{images / rate / 3600:.2f}\t{kept * 4 * parameters / 1e9:.2f}"
        print(name, state, *values, numbers.replace("nan", "?"), " ".join(words), sep="\t")


# --- Command line ---------------------------------------------------------------------------------


def parse(argv):
    """The options. Raises InputError on values that make no sense."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("run", type=Path, help="run folder, trained and sampled")
    add("--features", help="space of FID, KID, SW, precision and recall: inception, pixels, or a "
        "network (B, 3, H, W) in [0, 1] -> (B, D) saved by torch.export (.pt2) or as TorchScript; "
        "it runs what its maker put in, so only a trusted one (inception for colour pictures of 32 "
        "pixels or more that are no toys, else pixels)")
    add("--weights", help="file of the FID Inception weights (downloaded)")
    add("--sscd", help="file of an SSCD model, as --features takes: adds the study's own score")
    add("--num", type=int, help="samples per snapshot (all); another number measures anew")
    add("--planted", action="store_true", help="also measure planted copies of the training "
        "images, into planted.csv: what each measure of copying catches")
    add("--denoisers", action="store_true", help="only ask which known denoiser the network "
        "follows, into denoisers.csv, from the snapshots alone")
    add("--patch", type=int, default=3, help="width of the local denoiser's patches, odd")
    add("--twin", type=Path, help="run trained on other images (--offset): only compare the two "
        "models' samples from the same noise, into twin_NAME.csv")
    add("--data", help="where the training images are, if not where train.py found them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = p.parse_args(argv)
    if args.num is not None and args.num < 1:
        raise InputError(f"--num {args.num}: must be at least 1")
    if args.twin and (args.denoisers or args.planted) or args.denoisers and args.planted:
        raise InputError("--twin, --denoisers, --planted: one at a time")
    if (args.twin or args.denoisers) and (args.features or args.sscd or args.weights):
        raise InputError("--features, --sscd, --weights: --twin and --denoisers compare pixels")
    if args.patch < 1 or args.patch % 2 == 0:
        raise InputError(f"--patch {args.patch}: must be odd, so that a pixel is in the middle")
    if args.denoisers and args.num or args.patch != p.get_default("patch") and not args.denoisers:
        raise InputError("--num goes without --denoisers, --patch with it")
    if args.weights and args.features not in (None, "inception"):
        raise InputError(f"--weights: are Inception's, not those of --features {args.features}")
    return args


@train.command_line
def main(argv=None):
    """Measure whatever is not done. Raises SystemExit(2) on bad input."""
    args = parse(argv)
    record, device = train.read_run(args.run), train.pick_device(args.device)
    args.features = args.features or default_features(record)
    with train.locked(args.run, "measure", *WRITTEN), exact_float32():  # some distances are small
        stage = measure_twin if args.twin else measure_denoisers if args.denoisers else measure
        stage(args, record, device)


if __name__ == "__main__":
    sweep(sys.argv[2:]) if sys.argv[1:2] == ["--sweep"] else main()
