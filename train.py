"""Train one diffusion model on the first n images of a data set; \
loss, weights and log go to a run folder.

    # a CPU, 3 min
    python train.py --data toy --n 16 --size 8 --width 32 --mults 1 2 --blocks 1 --steps 2000
    # any GPU
    python train.py --data data/cifar10.npz --n 2048 --width 32 --batch 64 --steps 20000
    # the study
    python train.py --data cifar10 --n 2048 --process flow --conditional --batch 16

This file owns the data, the noise process, the U-Net and the checkpoints; sample.py and measure.py
import from it.
A run killed at any moment and started again with the same command ends with the same bits.

The study: Marion & Wu, "Understanding diffusion models requires rethinking (again) generalization",
arXiv 2605.06077. Equation numbers below: "Ho" is arXiv 2006.11239 (DDPM), "Liu" is arXiv
2209.03003 (rectified flow).
"""

import argparse
import contextlib
import copy
import csv
import datetime
import fcntl
import functools
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

HELD_OUT = 5120                 # the study's held-out set: the first 5,120 test images
LEVELS = 10                     # the loss is also kept in ten equal slices of t
# What numpy and torch raise on a file that is missing, cut short, damaged or of another format.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
              RuntimeError, NotImplementedError, pickle.UnpicklingError, zipfile.BadZipFile,
              zlib.error)

# --------------------------------------------------------------------------------------------------
# Errors and files
# --------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one line that names the flag or file and what is wrong.
    """


def command_line(main):
    """Decorate a script's main(argv).

    A failure that a user can mend ends it with one line on stderr. Exit code 2 for bad input, 1 for
    a loss that is not finite or a file that cannot be written.
    """
    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except InputError as error:
            code, message = 2, f"error: {error}"
        except MemoryError as error:
            code, message = 2, f"error: does not fit in memory, take fewer images ({error})"
        except (FloatingPointError, OSError) as error:
            code, message = 1, f"error: {error}"
        except KeyboardInterrupt:
            print("interrupted: the same command continues from the last checkpoint",
                  file=sys.stderr)
            raise SystemExit(130) from None
        print(message, file=sys.stderr)
        raise SystemExit(code)
    return wrapper


def write_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, move it into place.

    A reader, a kill or a power cut sees the old file or the new one, never a part of it. Raises
    OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows, columns=None):
    """Write a list of dicts with the same keys as a CSV file, atomically.

    columns: the header, needed where the list may be empty.
    """
    lines = [",".join(columns or rows[0])]
    lines += [",".join(str(value) for value in row.values()) for row in rows]
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def read_csv(path):
    """The rows of a CSV file as dicts of strings; [] where the file does not exist."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def save(path, value):
    """torch.save, atomically. Raises OSError, also where torch has another name for a full disk."""
    try:
        write_atomic(path, lambda file: torch.save(value, file))
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from None


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A training subset and a held-out set, numpy arrays.

    Images uint8 (n, S, S, C), labels int64 (n,).
    """
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@functools.lru_cache(maxsize=8)
def toy_images(count, size, split):
    """Toy pictures: one disc, square or triangle over a two-colour gradient, 15 random factors.

    Returns images uint8 (count, size, size, 3) and labels int64 (count,): 0 disc, 1 square, 2
    triangle. Image i is the same whatever `count`; split 0 is training, 1 held-out. Every pixel is
    the mean of 4x4 points.
    """
    factors = np.random.default_rng([2605, 6077, split]).random((count, 15), np.float32)
    labels = (factors[:, 0] * 3).astype(np.int64)
    points = (np.arange(4 * size, dtype=np.float32) + 0.5) / (2 * size) - 1     # [-1, 1]
    grid_y, grid_x = np.meshgrid(points, points, indexing="ij")
    images = np.empty((count, size, size, 3), np.uint8)
    for part in range(0, count, 128):
        f = factors[part:part + 128].T[:, :, None, None]                # (15, B, 1, 1)
        x, y = grid_x - (f[1] - 0.5), grid_y - (f[2] - 0.5)             # centre in the middle half
        radius, (turn, ramp) = 0.3 + 0.3 * f[3], 2 * np.pi * f[4:6]
        x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        inside = np.select([f[0] < 1 / 3, f[0] < 2 / 3], [              # of about the same area
            x**2 + y**2 < radius**2, np.maximum(abs(x), abs(y)) < 0.886 * radius],
            np.maximum(-y, abs(x) * 0.866 + y * 0.5) < 0.778 * radius)
        ramp = (np.cos(ramp) * grid_x + np.sin(ramp) * grid_y) / 2.83 + 0.5     # 0 to 1
        for c in range(3):                                              # red, green, blue
            picture = np.where(inside, f[6 + c], f[9 + c] + (f[12 + c] - f[9 + c]) * ramp)
            picture = picture.reshape(-1, size, 4, size, 4).mean((2, 4)) * 255 + 0.5
            images[part:part + 128, :, :, c] = picture.clip(0, 255)
    return images, labels


def _read_npz(path):
    """The four arrays of an .npz file, checked; raises InputError naming the file and the key."""
    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in Data._fields if key in archive.files}
    except FileNotFoundError:
        raise InputError(f"--data {path}: no such file (looked for from {Path.cwd()})") from None
    except UNREADABLE as error:
        raise InputError(f"--data {path}: not a readable .npz "
                         f"({type(error).__name__}: {error})") from None
    for key in Data._fields:
        if key not in arrays:
            raise InputError(f"--data {path}: key {key!r} is missing "
                             f"(needs {', '.join(Data._fields)})")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8:
            raise InputError(f"--data {path}: {split}_images is {images.dtype}, must be uint8")
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
            raise InputError(f"--data {path}: {split}_images has shape {images.shape}, "
                             "must be (N, S, S, 1 or 3)")
        if (not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]
                or (labels < 0).any()):
            raise InputError(f"--data {path}: {split}_labels must be {len(images)} whole numbers, "
                             "0 or more")
        if len(images) < 2:
            raise InputError(f"--data {path}: {split}_images holds {len(images)} images, "
                             "needs at least 2")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise InputError(f"--data {path}: train_images and test_images differ in shape")
    return Data(**arrays)


def _download_cifar10():
    """CIFAR-10 through torchvision, checksummed, kept in ./data."""
    from torchvision.datasets import CIFAR10
    try:
        train, test = (CIFAR10("data", train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data cifar10: download failed ({error}); fetch it elsewhere and pass "
                         f"--data FILE.npz with keys {', '.join(Data._fields)}") from None
    return Data(train.data, np.array(train.targets), test.data, np.array(test.targets))


def resize(images, size):
    """Area-average uint8 images (n, H, H, C) down to (n, size, size, C), rounded."""
    parts = [F.adaptive_avg_pool2d(torch.from_numpy(part).permute(0, 3, 1, 2).float(), size)
             for part in np.array_split(images, max(1, len(images) // 4096))]
    return torch.cat(parts).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def load_data(name, n, size=None, offset=0):
    """The training images offset .. offset+n of `name` and the first 5,120 test images.

    All test images, if fewer.
    name: "toy", "cifar10" or the path of an .npz file with keys train_images, train_labels,
    test_images, test_labels (uint8 NHWC, square, 1 or 3 channels). size: area-average down to
    size x size (toy: drawn at that size, 16 by default). Subsets are nested: the first k images do
    not depend on n.
    Returns Data. Raises InputError on a missing or malformed file, or when there are not enough
    images.
    """
    if n < 2:
        raise InputError(f"--n {n}: needs at least 2 training images")
    if offset < 0:
        raise InputError(f"--offset {offset}: must be 0 or more")
    if size is not None and size < 4:
        raise InputError(f"--size {size}: must be at least 4")
    if name == "toy":
        images, labels = toy_images(offset + n, size or 16, split=0)
        return Data(images[offset:], labels[offset:], *toy_images(HELD_OUT, size or 16, split=1))
    if name == "cifar10":
        data = _download_cifar10()
    elif str(name).endswith(".npz"):
        data = _read_npz(name)
    else:
        raise InputError(f"--data {name}: unknown; use toy, cifar10 or the path of an .npz file")
    if offset + n > len(data.train_images):
        raise InputError(f"--n {n}: with --offset {offset}, {name} has only "
                         f"{len(data.train_images)} training images")
    if size and size > data.train_images.shape[1]:
        raise InputError(f"--size {size}: larger than the {data.train_images.shape[1]} pixels "
                         f"of {name}")
    images, labels = (data.train_images[offset:offset + n],
                      data.train_labels[offset:offset + n].astype(np.int64))
    held, held_labels = data.test_images[:HELD_OUT], data.test_labels[:HELD_OUT].astype(np.int64)
    if size and size < images.shape[1]:
        images, held = resize(images, size), resize(held, size)
    return Data(images.copy(), labels.copy(), held.copy(), held_labels.copy())


def subset_hash(data):
    """SHA-256 of the training images and labels.

    What a run was trained on, wherever it came from.
    """
    digest = hashlib.sha256(str(data.train_images.shape).encode())
    digest.update(np.ascontiguousarray(data.train_images))
    digest.update(np.ascontiguousarray(data.train_labels))
    return digest.hexdigest()


def to_float(images):
    """uint8 images (B, S, S, C) to float32 (B, C, S, S) in [-1, 1].

    The memory stays NHWC (channels_last).
    """
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# --------------------------------------------------------------------------------------------------
# Noise processes: xt = a(t) x0 + s(t) eps, t in [0, 1]
# --------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """A noise process and what the network predicts in it.

    a_s(t): t (B,) -> a, s, each (B,): the signal's and the noise's share in xt = a x0 + s eps.
    c, d: the network predicts c x0 + d eps.
    T: the number of discrete times k/T, k = 1 .. T; 0 where time is continuous.
    """
    a_s: Callable
    c: float
    d: float
    T: int

    def snap(self, u):
        """u uniform in [0, 1) to a training time t: k/T with k uniform in 1 .. T, or u itself."""
        return (torch.floor(u * self.T) + 1) / self.T if self.T else u

    def times(self, steps):
        """The sampler's times, steps + 1 of them from 1 down to 0, float64.

        Raises InputError if steps > T.
        """
        if steps < 1 or (self.T and steps > self.T):
            raise InputError(f"--sampling-steps {steps}: must be 1 to {self.T or 'any number'}")
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return torch.round(t * self.T) / self.T if self.T else t

    def split(self, xt, prediction, a, s):
        """x0 and eps from xt = a x0 + s eps and prediction = c x0 + d eps.

        Two equations, two unknowns.
        """
        det = a * self.d - s * self.c
        return (self.d * xt - s * prediction) / det, (a * prediction - self.c * xt) / det


@functools.lru_cache
def _alpha_bar(device):
    """alpha_bar_k = prod (1 - beta_i), i = 1 .. k, for k = 0 .. 1000.

    Ho, section 4: beta linear, 1e-4 to .02.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)]).to(device)


def _ddpm(t):
    # Ho, eq. 4: q(xt | x0) = N(sqrt(alpha_bar) x0, (1 - alpha_bar) I)
    alpha_bar = _alpha_bar(t.device)[torch.round(t * 1000).long()]
    return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)


def _flow(t):
    # Liu, eq. 1: the straight line from the image (t = 0) to the noise (t = 1); the velocity is
    # eps - x0
    return 1 - t, t


PROCESSES = {"ddpm": Process(_ddpm, c=0, d=1, T=1000),      # predicts eps (Ho, eq. 14)
             "flow": Process(_flow, c=-1, d=1, T=0)}        # predicts eps - x0


def expand(value, x):
    """(B,) to (B, 1, 1, 1), to be multiplied with images x (B, C, H, W)."""
    return value.reshape(-1, *[1] * (x.dim() - 1))


def q_sample(process, x0, t, eps):
    """xt = a(t) x0 + s(t) eps (Ho, eq. 4; Liu, eq. 1). x0, eps (B, C, H, W), t (B,) in [0, 1]."""
    a, s = process.a_s(t)
    return expand(a, x0) * x0 + expand(s, x0) * eps


def diffusion_loss(net, process, x0, t, eps, labels=None):
    """Mean squared error of the prediction, one number an image: (B,). Ho, eq. 14; Liu, eq. 1."""
    target = process.c * x0 + process.d * eps
    return (net(q_sample(process, x0, t, eps), t, labels) - target).square().mean((1, 2, 3))


# --------------------------------------------------------------------------------------------------
# U-Net
# --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide each pixel by the root mean square of its channels; learned scale, no bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):                                           # (B, C, H, W), channels_last
        x = x.permute(0, 2, 3, 1)                                   # (B, H, W, C), a view
        weight = self.weight.to(x.dtype)        # under autocast: the fused kernel wants one type
        return F.rms_norm(x, weight.shape, weight, 1e-6).permute(0, 3, 1, 2)


def zero_init(layer):
    """The layer with its weight and bias set to 0.

    A residual branch that starts as the identity.
    """
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Block(nn.Module):
    """Residual block: two convolutions, the second modulated by the embedding.

    May halve or double the picture.
    """

    def __init__(self, i, o, embed, resample=None):
        super().__init__()
        self.resample = resample
        self.norm1 = RMSNorm(i)
        self.conv1 = nn.Conv2d(i, o, 3, padding=1)
        self.norm2 = RMSNorm(o)
        self.modulation = nn.Linear(embed, 2 * o)
        self.conv2 = zero_init(nn.Conv2d(o, o, 3, padding=1))
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, embedding):
        h = F.silu(self.norm1(x))                                   # (B, i, H, W)
        if self.resample == "down":                                 # (B, i, H/2, W/2)
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":                                 # (B, i, 2H, 2W)
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        h = self.conv1(h)                                           # (B, o, H, W)
        # (B, o, 1, 1) each
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention over the pixels; q and k normalised, with one learned scale.

    Heads of 64 channels or fewer.
    """

    def __init__(self, d):
        super().__init__()
        self.heads = d // min(64, d)
        self.norm = RMSNorm(d)
        self.qkv = nn.Conv2d(d, 3 * d, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = zero_init(nn.Conv2d(d, d, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)            # (B, H, W, 3C)
        qkv = qkv.reshape(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, heads, HW, C/heads) each
        # With unit q and k, the logits lie in [-scale sqrt(C/heads), +scale sqrt(C/heads)].
        q = F.normalize(q, dim=-1) * (self.scale * (C // self.heads) ** 0.5)
        h = F.scaled_dot_product_attention(q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v,
                                           scale=1.0)
        # (B, C, H, W), channels_last
        h = h.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.out(h)


class Layer(nn.Module):
    """A residual block, followed by self-attention where the level has it."""

    def __init__(self, i, o, embed, attention=False, resample=None):
        super().__init__()
        self.block = Block(i, o, embed, resample)
        self.attention = Attention(o) if attention else nn.Identity()

    def forward(self, x, embedding):
        return self.attention(self.block(x, embedding))


class UNet(nn.Module):
    """The study's U-Net.

    2,926,690 / 7,929,010 / 25,751,890 / 92,670,610 / 201,286,610 parameters at width
    16 / 32 / 64 / 128 / 192 with 10 classes.

    width: channels of the first level; mults: the levels' multiples of it; blocks: residual blocks
    a level; attention: the levels with self-attention (0 is full size; default: all but level 0;
    the middle always has it); embed: size of the noise and class embedding; classes: 0 for an
    unconditional model; channels: of the images.
    Raises InputError where the heads do not divide a level's channels or a level does not exist.
    """

    def __init__(self, width=128, mults=(1, 2, 4), blocks=3, attention=None, embed=512, classes=0,
                 channels=3):
        super().__init__()
        attention = check_unet(width, mults, blocks, attention, embed)
        self.embed, self.classes, self.levels = embed, classes, len(mults)
        self.time = nn.Sequential(nn.Linear(embed, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label = nn.Embedding(classes, embed) if classes else None
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        d, stack = width, [width]                       # channels now; channels of the kept tensors
        self.down = nn.ModuleList()
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(Layer(d, mult * width, embed, level in attention))
                d = mult * width
                stack.append(d)
            if level < len(mults) - 1:
                self.down.append(Layer(d, d, embed, resample="down"))
                stack.append(d)
        self.middle = nn.ModuleList([Layer(d, d, embed, attention=True), Layer(d, d, embed)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(Layer(d + stack.pop(), mult * width, embed, level in attention))
                d = mult * width
            if level > 0:
                self.up.append(Layer(d, d, embed, resample="up"))
        assert not stack
        self.norm = RMSNorm(d)
        self.conv_out = zero_init(nn.Conv2d(d, channels, 3, padding=1))

    def forward(self, xt, t, labels=None):
        """The prediction (B, C, S, S).

        xt (B, C, S, S), t (B,) in [0, 1], labels int64 (B,) if conditional.
        """
        half = self.embed // 2
        frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
        angle = 1000 * t[:, None] * frequency                       # (B, embed/2)
        embedding = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))     # (B, embed)
        if self.label is not None:
            embedding = embedding + self.label(labels)
        embedding = F.silu(embedding)
        h = self.conv_in(xt)
        stack = [h]
        for layer in self.down:
            h = layer(h, embedding)
            stack.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if layer.block.resample is None:
                h = torch.cat([h, stack.pop()], dim=1)
            h = layer(h, embedding)
        assert not stack
        return self.conv_out(F.silu(self.norm(h)))


def check_unet(width, mults, blocks, attention, embed):
    """The set of levels with attention. Raises InputError, naming the flag, on impossible sizes."""
    if width < 1 or blocks < 1 or not mults or min(mults) < 1:
        raise InputError("--width, --blocks and each of --mults must be at least 1")
    if embed < 2 or embed % 2:
        raise InputError(f"--embed {embed}: must be an even number")
    attention = set(range(1, len(mults)) if attention is None else attention)
    if not attention <= set(range(len(mults))):
        raise InputError(f"--attention: the levels are 0 to {len(mults) - 1}")
    for level in sorted(attention | {len(mults) - 1}):
        d = width * mults[level]
        if d > 64 and d % 64:
            raise InputError(f"--width {width}: heads of 64 channels do not divide the {d} "
                             f"channels of level {level}")
    return attention


def check_size(size, mults):
    """Raise InputError unless pictures of size x size can be halved between the levels."""
    if size % 2 ** (len(mults) - 1):
        raise InputError(f"--size {size}: {len(mults)} levels halve the picture {len(mults) - 1} "
                         f"times; needs a multiple of {2 ** (len(mults) - 1)}")


# --------------------------------------------------------------------------------------------------
# Randomness: everything a step draws is a function of (seed, step), so there is no random state to
# save
# --------------------------------------------------------------------------------------------------


def generator(device, *key):
    """A torch.Generator on `device` seeded by a tuple of whole numbers, through SHA-256."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1
    return torch.Generator(device).manual_seed(seed)


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch, device):
    return torch.randperm(n, generator=generator(device, "epoch", seed, epoch), device=device)


def batch_indices(n, batch, seed, step, device="cpu"):
    """The indices of the images of step 1, 2, ...: (batch,) int64.

    Each epoch visits every image once.
    """
    first = (step - 1) * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([_permutation(n, seed, epoch, device) for epoch in epochs])
    return order[first - epochs[0] * n:][:batch]


def step_noise(process, shape, seed, step, device="cpu"):
    """The times (B,), the noise of shape (B, C, S, S) and the flips (B,) bool of a step."""
    g = generator(device, "step", seed, step)
    t = process.snap(torch.rand(shape[0], generator=g, device=device))
    eps = torch.randn(shape, generator=g, device=device)
    return t, eps, torch.rand(shape[0], generator=g, device=device) < 0.5


def evaluation_steps(steps, per_doubling=2, first=64):
    """Log-spaced steps, the same for all runs: first * 2^(k / per_doubling), and the last step."""
    count = math.floor(per_doubling * math.log2(steps / first) + 1e-9) if steps >= first else -1
    return sorted({round(first * 2 ** (k / per_doubling)) for k in range(count + 1)} | {steps})


# --------------------------------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------------------------------

# Options that say where, how fast or how long: they may change when a run is continued, although
# another device draws other numbers.
NOT_IDENTITY = ("out", "steps", "images", "device", "compile", "save_minutes")


def make_parser():
    """The command line of train.py."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = p.add_argument_group("data").add_argument
    data("--data", default="cifar10", help="toy, cifar10 (downloaded) or an .npz file")
    data("--n", type=int, default=2048, help="training images: the first n, so subsets are nested")
    data("--offset", type=int, default=0, help="skip so many images first, for disjoint subsets")
    data("--size", type=int, help="area-average the images down to SIZE x SIZE pixels; toy images "
         "are drawn at that size (16)")
    data("--flip", action="store_true", help="mirror half of the images at random")
    model = p.add_argument_group("model").add_argument
    model("--process", choices=PROCESSES, default="ddpm", help="noise process")
    model("--conditional", action="store_true", help="give the class to the model")
    model("--width", type=int, default=128, help="channels of the first level")
    model("--mults", type=int, nargs="+", default=[1, 2, 4], help="channels of each level / width")
    model("--blocks", type=int, default=3, help="residual blocks a level")
    model("--attention", type=int, nargs="*", help="levels with self-attention (all but level 0)")
    model("--embed", type=int, default=512, help="size of the noise and class embedding")
    training = p.add_argument_group("training").add_argument
    training("--batch", type=int, default=16, help="images a step")
    training("--lr", type=float, default=1e-4, help="Adam's learning rate")
    training("--steps", type=int, help="train to this step (100000); a larger one continues a run")
    training("--images", type=int, help="train until so many images are seen, instead of --steps")
    training("--seed", type=int, default=0, help="of initial weights, batches, times and noise")
    training("--ema", type=float, default=0.9999, help="decay of the weights' moving average; the "
             "first steps use min(EMA, (1 + step) / (10 + step))")
    evaluation = p.add_argument_group("evaluation and files").add_argument
    evaluation("--evals-per-doubling", type=int, default=2, help="evaluations a doubling of step")
    evaluation("--first-eval", type=int, default=64, help="step of the first evaluation")
    evaluation("--eval-images", type=int, default=HELD_OUT, help="images in each of the two losses "
               "(repeated in turn where there are fewer)")
    evaluation("--save-minutes", type=float, default=5, help="minutes between checkpoints")
    evaluation("--out", help="the run folder (runs/ and a name made of the options)")
    machine = p.add_argument_group("machine").add_argument
    machine("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    machine("--compile", action=argparse.BooleanOptionalAction, default=True,
            help="torch.compile, on CUDA only")
    machine("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="autocast; auto "
            "is bf16 on CUDA (fp16 where the card has no bf16), off on a CPU")
    return p


def parse(argv):
    """The options of a run, checked, with --images turned into --steps. Raises InputError."""
    args = make_parser().parse_args(argv)
    if args.steps is not None and args.images is not None:
        raise InputError("--steps and --images: give one of them")
    for name in ("batch", "steps", "images", "evals_per_doubling", "first_eval", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 <= args.ema < 1:
        raise InputError(f"--ema {args.ema}: must be at least 0 and below 1")
    if args.eval_images < LEVELS:
        raise InputError(f"--eval-images {args.eval_images}: needs {LEVELS} or more, one a level")
    args.steps = args.steps or (math.ceil(args.images / args.batch) if args.images else 100_000)
    check_unet(args.width, args.mults, args.blocks, args.attention, args.embed)
    return args


def run_name(args):
    """N2048_w128_B16_lr1e-4_s0, then every other option that differs from its default."""
    lr = np.format_float_scientific(args.lr, trim="-", exp_digits=1)
    name = f"N{args.n}_w{args.width}_B{args.batch}_lr{lr}_s{args.seed}"
    for key, default in vars(make_parser().parse_args([])).items():
        value = getattr(args, key)
        if key in (*NOT_IDENTITY, "n", "width", "batch", "lr", "seed") or value == default:
            continue
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        text = Path(text).stem if key == "data" else text
        name += {"data": f"_{text}", "process": f"_{text}"}.get(
            key, f"_{key}" if value is True else f"_{key}{text}")
    return name


# --------------------------------------------------------------------------------------------------
# The run folder
# --------------------------------------------------------------------------------------------------


def describe(args, data, net):
    """What args.json holds: the options, and all that the next stages and a reader must know."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
            capture_output=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    except OSError:                                 # no git on this machine
        commit = ""
    return {"options": vars(args), "parameters": sum(p.numel() for p in net.parameters()),
            "image_shape": list(data.train_images.shape[1:]), "classes": net.classes,
            "held_out": len(data.test_images), "subset_sha256": subset_hash(data),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__, "cuda": torch.version.cuda},
            "git_commit": commit or "unknown"}


def read_run(run):
    """args.json of a run folder, a dict. Raises InputError where there is none or it is damaged."""
    try:
        record = json.loads((Path(run) / "args.json").read_text())
        if not record["options"] or not {"image_shape", "classes", "subset_sha256"} <= set(record):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run}: not a run folder (it has no args.json)") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run}/args.json: damaged, or not written by train.py") from None
    return record


@contextlib.contextmanager
def claimed(out, record):
    """Make the run folder, hold its lock, write args.json.

    Raises InputError where the folder holds another configuration, is in use, or cannot be written.
    The lock is the kernel's: it falls with the process, however that ends.
    """
    if out.is_dir() and not (out / "args.json").exists() and any(out.glob("[!.]*")):
        raise InputError(f"--out {out}: holds files but no args.json; use another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = read_run(out) if (out / "args.json").exists() else None
        different = old and [key for key, value in record["options"].items()
                             if key not in NOT_IDENTITY and old["options"].get(key) != value]
        if old and old["subset_sha256"] != record["subset_sha256"]:
            different.append("training images")
        if different:
            raise InputError(f"--out {out}: holds a run with another {', '.join(different)}; "
                             "use another folder")
        if not old or old["options"] != record["options"]:
            write_json(out / "args.json", record)
        for left in (*out.glob(".*.tmp"), *out.glob("snapshots/.*.tmp")):
            left.unlink()                           # of a run that was killed while it wrote
        yield
    except BlockingIOError:
        raise InputError(f"--out {out}: another process is training in it") from None
    finally:
        os.close(lock)


def load_checkpoint(path, device="cpu"):
    """A file of torch.save, its tensors on `device`. Raises InputError: missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged, or no checkpoint ({type(error).__name__}); "
                         "to train this run again, delete its last.pt and log.csv") from None


def build_net(options, channels, classes):
    """A UNet as the options (a dict) say, on the CPU; its weights are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        return UNet(options["width"], options["mults"], options["blocks"], options["attention"],
                    options["embed"], classes, channels)


# --------------------------------------------------------------------------------------------------
# The machine
# --------------------------------------------------------------------------------------------------


def pick_device(name):
    """torch.device of auto, cpu, cuda or cuda:K. Raises InputError where there is no such one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:K")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         "devices that torch can use")
    return torch.device(name)


def join_processes(device):
    """(device, rank, world size) under torchrun, joined by torch.distributed; else (device, 0, 1).

    On CUDA each process of a machine takes the device of its LOCAL_RANK. Raises InputError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, 0, 1
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=datetime.timedelta(hours=1))
    return device, torch.distributed.get_rank(), torch.distributed.get_world_size()


def has_bf16():
    """Whether the card computes in bfloat16 itself; an emulation is slower than float16."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def amp_dtype(device, amp="auto"):
    """torch.bfloat16, torch.float16 or None (no autocast), as --amp and the device say."""
    if amp == "auto":
        amp = ("off" if device.type == "cpu"
               else "bf16" if has_bf16() else "fp16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device, amp="auto"):
    """Mixed precision on `device`, a context manager; see --amp."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def setup_cuda():
    """The same bits every time on one machine, and TF32 for what autocast leaves in float32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not warn_only: attention's backward pass is the deterministic one only if this is strict.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(net, process, images, labels, count, amp="auto"):
    """The loss over `count` images: mean, and by level of t.

    The images are repeated in turn where there are fewer.
    images uint8 (n, S, S, C), labels (n,) or None, on the net's device. Returns a number and
    (LEVELS,), the means in equal slices of t. Image i of every split, at every evaluation of every
    run, meets the same t and noise: differences come from the images and the weights alone.
    """
    device, n, losses = images.device, len(images), []
    order = torch.randperm(count, generator=generator("cpu", "evaluation", count))
    u = ((order + 0.5) / count).to(device)              # one t in each of `count` slices of [0, 1]
    for block, index in enumerate(torch.arange(count, device=device).split(256)):
        x0 = to_float(images[index % n])
        g = generator(device, "evaluation", block)
        eps = torch.randn(x0.shape, generator=g, device=device)
        with autocast(device, amp):
            losses.append(diffusion_loss(net, process, x0, process.snap(u[index]), eps,
                                         None if labels is None else labels[index % n]))
    losses = torch.cat(losses).double().cpu().numpy()
    level = np.minimum((u.cpu().numpy() * LEVELS).astype(int), LEVELS - 1)
    sums = np.bincount(level, losses, LEVELS)
    return losses.mean(), sums / np.bincount(level, minlength=LEVELS)


def log_row(step, batch, rate, seconds, train, heldout):
    """One row of log.csv; train and heldout are what evaluate() returns."""
    row = {"step": step, "images": step * batch,
           "train_loss": f"{train[0]:.8g}", "heldout_loss": f"{heldout[0]:.8g}"}
    for name, (_, levels) in (("train", train), ("heldout", heldout)):
        row |= {f"{name}_loss_level{k}": f"{value:.8g}" for k, value in enumerate(levels)}
    return row | {"images_per_second": f"{rate:.1f}", "seconds": f"{seconds:.1f}"}


def check_finite(status, net, step, good):
    """Raise FloatingPointError if a loss so far or a weight is not finite. Waits for the device."""
    bad_step = int(status[1])
    norms = torch.stack(torch._foreach_norm(list(net.parameters())))
    if bad_step or not norms.isfinite().all():
        kept = f"the last good state, of step {good}, is kept" if good else "nothing was saved"
        raise FloatingPointError(f"step {bad_step or step}: the loss or a weight is not finite; "
                                 f"{kept}. A lower --lr usually helps")


@command_line
def main(argv=None):
    """Train as the options say; see the top of the file.

    Raises SystemExit: 2 on bad input, 1 when the loss is not finite or a file cannot be written.
    """
    args = parse(argv)
    device, rank, world = join_processes(pick_device(args.device))
    if args.batch % world:
        raise InputError(f"--batch {args.batch}: {world} processes cannot share it evenly")
    wait = torch.distributed.barrier if world > 1 else lambda: None
    if rank:
        wait()                                      # the first process downloads, for all
    data = load_data(args.data, args.n, args.size, args.offset)
    if not rank:
        wait()
    check_size(data.train_images.shape[1], args.mults)
    labels_of = (data.train_labels, data.test_labels)
    classes = int(max(labels.max() for labels in labels_of)) + 1 if args.conditional else 0
    net = build_net(vars(args), data.train_images.shape[3], classes)
    out = Path(args.out or f"runs/{run_name(args)}")
    with contextlib.nullcontext() if rank else claimed(out, describe(args, data, net)):
        wait()                                      # until the first process has the folder
        train(args, out, data, net, device, rank, world)
        wait()
    if world > 1:
        torch.distributed.destroy_process_group()


def resume(out, parts, steps, device):
    """Load last.pt into `parts` ({name: net, average, ...}); returns (step, seconds, log rows).

    (0, 0, []) where the run has not started. Raises InputError where it has, and last.pt is gone.
    """
    if (out / "last.pt").exists():
        last = load_checkpoint(out / "last.pt", device)
        for name, part in parts.items():
            part.load_state_dict(last[name])
        return last["step"], last["seconds"], last["rows"]
    logged = read_csv(out / "log.csv")
    step = int(logged[-1]["step"]) if logged else 0
    if 0 < step < steps:
        raise InputError(f"{out}/last.pt: missing, so the run cannot go on from step {step}; "
                         "delete log.csv to start it over")
    return step, 0.0, logged


def train(args, out, data, net, device, rank=0, world=1):
    """Train `net` on `data` from the last checkpoint in `out`, or from the start, to args.steps.

    Of `world` processes each takes its share of every batch; the first one evaluates and writes.
    """
    if device.type == "cuda":
        setup_cuda()
    net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False)
    params, ema_params = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(params, lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device, args.amp) == torch.float16)
    parts = {"net": net, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    start, seconds, rows = resume(out, parts, args.steps, device)
    if start >= args.steps:
        if not rank:
            print(f"{out}: finished at step {start}; nothing to do")
        return

    if rows and not rank:
        write_csv(out / "log.csv", rows)        # as the checkpoint knows it, whatever became of it
    process = PROCESSES[args.process]
    model = net
    if args.compile and device.type == "cuda":
        model = torch.compile(net, fullgraph=True)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    images, held, labels, held_labels = (torch.from_numpy(data_part).to(device) for data_part in (
        data.train_images, data.test_images, data.train_labels, data.test_labels))
    if not net.classes:
        labels = held_labels = None
    shape = (args.batch, images.shape[3], *images.shape[1:3])
    mine = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    evaluations = evaluation_steps(args.steps, args.evals_per_doubling, args.first_eval)
    status = torch.zeros(2, device=device)                      # loss; first step with a bad one
    seen = torch.zeros(2, pin_memory=device.type == "cuda")     # a copy that nobody waits for
    if not rank:
        print(f"{out}: {sum(p.numel() for p in params):,} parameters, {args.n} images, on "
              f"{world} x {device.type}, steps {start} to {args.steps}", flush=True)
    bar = tqdm(total=args.steps * args.batch, initial=start * args.batch, unit="img",
               unit_scale=True, disable=True if rank else None)
    good = lap_step = start
    began = lap = time.monotonic()
    for step in range(start + 1, args.steps + 1):
        # Every process draws the whole batch and takes its share: the same for any number of them.
        index = batch_indices(args.n, args.batch, args.seed, step, device)[mine]
        t, eps, flips = (v[mine] for v in step_noise(process, shape, args.seed, step, device))
        x0 = to_float(images[index])
        if args.flip:
            x0 = torch.where(expand(flips, x0), x0.flip(3), x0)
        with autocast(device, args.amp):
            loss = diffusion_loss(model, process, x0, t, eps,
                                  None if labels is None else labels[index]).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1 - min(args.ema, (1 + step) / (10 + step)))

        loss = loss.detach()
        if world > 1:
            torch.distributed.all_reduce(loss)
            loss /= world
        bad = torch.where((status[1] == 0) & ~loss.isfinite(), step, status[1])
        status = torch.stack([loss, bad])
        seen.copy_(status, non_blocking=True)
        bar.set_postfix(step=step, loss=f"{seen[0]:.4f}", refresh=False)
        bar.update(args.batch)
        saving = time.monotonic() - lap > 60 * args.save_minutes
        if not (step in evaluations or saving or seen[1]):
            continue

        check_finite(status, net, step, good)
        if rank:
            good, lap = step, time.monotonic()
            continue                                # and wait for the first in the next step
        now = time.monotonic()
        rate = (step - lap_step) * args.batch / (now - lap)
        if step in evaluations:
            save(out / f"snapshots/{step:07d}.pt", {"step": step, "ema": ema.state_dict()})
            train_loss = evaluate(ema, process, images, labels, args.eval_images, args.amp)
            heldout_loss = evaluate(ema, process, held, held_labels, args.eval_images, args.amp)
            rows.append(log_row(step, args.batch, rate, seconds + now - began, train_loss,
                                heldout_loss))
            write_csv(out / "log.csv", rows)
            bar.write(f"step {step:7d}  train {train_loss[0]:.5f}  "
                      f"held-out {heldout_loss[0]:.5f}  {rate:.0f} images/s")
        save(out / "last.pt", {"step": step, "seconds": seconds + time.monotonic() - began,
                               "rows": rows, **{k: part.state_dict() for k, part in parts.items()}})
        good, lap, lap_step = step, time.monotonic(), step
    bar.close()
    if not rank:
        print(f"next: python sample.py {out}", flush=True)


if __name__ == "__main__":
    main()
