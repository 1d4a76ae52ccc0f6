"""Train one diffusion model on the first n images of a data set, until it copies them.

    python train.py --data digits --n 64 --process flow --conditional --width 32 --mults 1 2 \
                    --blocks 1 --embed 128 --lr 1e-3 --steps 1500 --out runs/first  # a CPU, 1 min
    python train.py --data cifar10 --n 2048 --width 32 --batch 64 --steps 20000     # any GPU
    python train.py --data cifar10 --n 2048 --process flow --conditional --weighting sigmoid

The last one is the study's. A run killed at any moment and started again with the same command ends
with the same bits. Read down to the line of equal signs: loss, U-Net, what is random, the loop.

The study: Marion & Wu, arXiv 2605.06077. Equations: "Ho" is arXiv 2006.11239 (DDPM), "Liu" arXiv
2209.03003 (rectified flow), "Salimans" 2202.00512 (v), "Hoogeboom" 2410.19324 (SiD2).
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# --- The loss: noise an image, let the network predict, compare -----------------------------------


def expand(value, x):
    """(B,) to (B, 1, 1, 1), to be multiplied with images x (B, C, H, W)."""
    return value.reshape(-1, *[1] * (x.dim() - 1))


def q_sample(process, x0, t, eps):
    """xt = a(t) x0 + s(t) eps, t (B,) in [0, 1] (Ho, eq. 4; Liu, eq. 1, with time reversed)."""
    a, s, _, _ = process.coefficients(t, x0)
    return a * x0 + s * eps


def diffusion_loss(net, process, x0, t, eps, labels=None):
    """Mean squared error of the prediction, one number per image: (B,). Ho, eq. 14; Liu, eq. 1."""
    xt = q_sample(process, x0, t, eps)
    return (net(xt, t, labels) - process.target(x0, eps, t)).square().mean((1, 2, 3))


# --- Noise processes: t from 0, the image, to 1, nothing but noise --------------------------------

DDPM_T = 1000      # DDPM's number of steps, above 20; betas are scaled by 1000 / DDPM_T

class Process(NamedTuple):
    """A noise process, and what the network predicts in it.

    schedule(t) -> a, s: the shares of image and noise in xt = a x0 + s eps, for t (B,) in [0, 1];
        s(1) is 1 or nearly: sampling starts from standard normal noise. t may be 0-d, too.
    predicts(a, s) -> c, d: the network predicts c x0 + d eps.
    T: the number of discrete times k/T, k = 1 .. T; 0 where time is continuous.
    clip: whether sample.py clamps x0 to [-1, 1]: needed where eps is predicted, a(1) near 0.
    """
    schedule: Callable
    predicts: Callable
    T: int = 0
    clip: bool = False

    def time(self, u):
        """u in [0, 1) to a time t: k/T with k in 1 .. T, or u itself. Evaluations use it, too: to
        train on some times more than on others, change step_draws."""
        return (torch.floor(u * self.T) + 1) / self.T if self.T else u

    def coefficients(self, t, x):
        """a, s, c, d at times t (B,), each (B, 1, 1, 1) to go with images x; 0-d where t is 0-d."""
        a, s = self.schedule(t)
        return [expand(v, x) if np.ndim(v) else v for v in (a, s, *self.predicts(a, s))]

    def target(self, x0, eps, t):
        """What the network should predict: c x0 + d eps, (B, C, H, W)."""
        _, _, c, d = self.coefficients(t, x0)
        return c * x0 + d * eps

    def x0_eps(self, xt, prediction, t):
        """x0 and eps by solving xt = a x0 + s eps and prediction = c x0 + d eps."""
        a, s, c, d = self.coefficients(t, xt)
        det = a * d - s * c
        return (d * xt - s * prediction) / det, (a * prediction - c * xt) / det

    def predict_given_x0(self, xt, x0, t):
        """What a network that knows x0 predicts at xt: eps follows from xt = a x0 + s eps."""
        a, s, c, d = self.coefficients(t, xt)
        return c * x0 + d * (xt - a * x0) / s

    def log_snr(self, t):
        """The logarithm of the signal-to-noise ratio, log(a^2 / s^2), (B,)."""
        a, s = self.schedule(t)
        return 2 * (a.log() - s.log())


@functools.lru_cache
def _alpha_bar(device):
    """alpha_bar_k = prod (1 - beta_i), i = 1 .. k, for k = 0 .. DDPM_T, float64 on `device`."""
    beta = torch.linspace(0.1 / DDPM_T, 20 / DDPM_T, DDPM_T, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)]).to(device)


def linear_beta(t):
    """DDPM's a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar); beta is linear (Ho, section 4)."""
    alpha_bar = _alpha_bar(t.device)[torch.round(t * DDPM_T).long()]
    return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)


def straight_line(t):
    """Rectified flow's a = 1 - t, s = t: the line from the image to the noise (Liu, eq. 1)."""
    return 1 - t, t


# What a network may predict, c x0 + d eps, as functions (a, s) -> c, d.
PREDICTIONS = {"eps": lambda a, s: (0, 1), "x0": lambda a, s: (1, 0),
               "v": lambda a, s: (-s, a),               # Salimans, appendix D
               "velocity": lambda a, s: (-1, 1)}        # of the straight line: d xt / dt
PROCESSES = {"ddpm": Process(linear_beta, PREDICTIONS["eps"], T=DDPM_T, clip=True),
             "flow": Process(straight_line, PREDICTIONS["velocity"])}


# --- U-Net ----------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide each pixel by the root mean square of its channels; learned scale, no bias."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):                                           # (B, C, H, W), channels_last
        h = x.permute(0, 2, 3, 1).float()                           # (B, H, W, C), a view
        h = F.rms_norm(h, self.weight.shape, self.weight, 1e-6)     # float32 under autocast, too
        return h.to(x.dtype).permute(0, 3, 1, 2)


def zero_init(layer):
    """The layer with weight and bias set to 0, so that a residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def double(x):
    """Each pixel four times, (B, C, H, W) -> (B, C, 2H, 2W), by views whose backward is a sum."""
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(B, H, 2, W, 2, C)
    return x.reshape(B, 2 * H, 2 * W, C).permute(0, 3, 1, 2)        # channels_last stays


class Block(nn.Module):
    """Residual block: two convolutions, between them the embedding; may halve or double x."""

    def __init__(self, c_in, c_out, embed, resample=None):
        super().__init__()
        self.resample = resample
        self.norm1 = RMSNorm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = RMSNorm(c_out)
        self.modulation = nn.Linear(embed, 2 * c_out)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, embedding):
        h = F.silu(self.norm1(x))                                   # (B, c_in, H, W)
        if self.resample == "down":                                 # (B, c_in, H/2, W/2)
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":                                 # (B, c_in, 2H, 2W)
            h, x = double(h), double(x)
        h = self.conv1(h)                                           # (B, c_out, H, W)
        modulation = self.modulation(embedding)[:, :, None, None]   # (B, 2 c_out, 1, 1)
        scale, shift = modulation.chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention over the pixels, heads of 64 channels or fewer; q, k normalised, one scale."""

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
        h = h.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)       # channels_last
        return x + self.out(h)


class Layer(nn.Module):
    """A residual block, followed by self-attention where the level has it."""

    def __init__(self, c_in, c_out, embed, attention=False, resample=None):
        super().__init__()
        self.block = Block(c_in, c_out, embed, resample)
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, embedding):
        return self.attention(self.block(x, embedding))


def time_features(t, size):
    """Sines, cosines of 1000 t at size/2 frequencies, 1 down towards 1/10000: (B,) -> (B, size)."""
    half = size // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
    angle = 1000 * t[:, None] * frequency                           # (B, size/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class UNet(nn.Module):
    """The study's U-Net: 2,926,690 / 7,929,010 / 25,751,890 / 92,670,610 / 201,286,610 parameters
    at width 16 / 32 / 64 / 128 / 192 with 10 classes.

    width: channels of the first level; mults: the levels' multiples of it; blocks: residual blocks
    per level; attention: the levels with self-attention (default: all but 0, the full size; the
    middle always has it); embed: size of the noise and class embedding; classes: 0 for an
    unconditional model; channels, size: of the images. Raises InputError on impossible sizes.
    """

    def __init__(self, width=128, mults=(1, 2, 4), blocks=3, attention=None, embed=512, classes=0,
                 channels=3, size=32):
        super().__init__()
        attention = check_unet(width, mults, blocks, attention, embed, size)
        self.embed, self.classes = embed, classes
        self.time = nn.Sequential(nn.Linear(embed, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label = nn.Embedding(classes, embed) if classes else None
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        d, skips = width, [width]                       # channels now; channels of the kept tensors
        self.down = nn.ModuleList()
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(Layer(d, mult * width, embed, level in attention))
                d = mult * width
                skips.append(d)
            if level < len(mults) - 1:
                self.down.append(Layer(d, d, embed, resample="down"))
                skips.append(d)
        self.middle = nn.ModuleList([Layer(d, d, embed, attention=True), Layer(d, d, embed)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(Layer(d + skips.pop(), mult * width, embed, level in attention))
                d = mult * width
            if level > 0:
                self.up.append(Layer(d, d, embed, resample="up"))
        assert not skips
        self.norm = RMSNorm(d)
        self.conv_out = zero_init(nn.Conv2d(d, channels, 3, padding=1))

    def forward(self, xt, t, labels=None):
        """The prediction (B, C, S, S) at xt (B, C, S, S), t (B,) in [0, 1], labels int64 (B,)."""
        embedding = self.time(time_features(t, self.embed))         # (B, embed)
        if self.label is not None:
            # The label's row of the table as a product with a one-hot vector: the backward of
            # nn.Embedding is not deterministic on CUDA. A label outside the classes is no class.
            one_hot = labels[:, None] == torch.arange(self.classes, device=t.device)
            embedding = embedding + one_hot.to(embedding.dtype) @ self.label.weight
        embedding = F.silu(embedding)
        h = self.conv_in(xt)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if layer.block.resample is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, embedding)
        assert not skips
        return self.conv_out(F.silu(self.norm(h)))


# --- What is random: a function of (seed, step) on one kind of device: no random state to save ----


def seed_of(*key):
    """A seed below 2^63 from a tuple of words and whole numbers, through SHA-256."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(device, *key):
    """A torch.Generator on `device`, seeded by a tuple of words and whole numbers."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch, device):
    return torch.randperm(n, generator=generator(device, "epoch", seed, epoch), device=device)


def batch_indices(n, batch, seed, step, device="cpu"):
    """The images of a step, 1, 2, ..., as indices int64 (batch,); an epoch visits each once."""
    first = (step - 1) * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    order = torch.cat([_permutation(n, seed, epoch, device) for epoch in epochs])
    return order[first - epochs[0] * n:][:batch]


def step_draws(process, shape, seed, step, device="cpu"):
    """The times (B,), the noise of shape (B, C, S, S) and the flips (B,) bool of a step."""
    g = generator(device, "step", seed, step)
    t = process.time(torch.rand(shape[0], generator=g, device=device))
    eps = torch.randn(shape, generator=g, device=device)
    return t, eps, torch.rand(shape[0], generator=g, device=device) < 0.5


# --- The training loop ----------------------------------------------------------------------------


def train(args, record, out, data, net, device, rank=0, world=1):
    """Train `net` on `data` from the last checkpoint in `out`, or from the start, to args.steps.

    Of `world` processes each takes its share of every batch; the first one evaluates and writes.
    """
    # The network, its moving average, Adam and their step: new, or from last.pt.
    state = set_up(args, record, out, net, device, rank)
    if state.step == args.steps and state.evaluated():
        return say(rank, f"{out}: finished at step {state.step}; nothing to do")
    splits = data_on(device, data, record["classes"])       # {"train", "heldout": (images, labels)}
    model = wrap(state.net, args, device, world)            # compiled, in step with other processes
    evaluations = evaluation_steps(args.steps, args.evals_per_doubling, args.first_eval)
    meter, bar = Meter(device), tqdm(total=args.steps * args.batch, unit="img", unit_scale=True,
                                     initial=state.step * args.batch, disable=rank > 0 or None)
    say(rank, f"{out}: {sum(p.numel() for p in net.parameters()):,} parameters, {args.n} images, "
              f"on {world} x {device.type}, steps {state.step} to {args.steps}")
    if rank == 0 and state.step == args.steps:      # killed before its evaluation, or now the end
        bar.write(save_and_evaluate(state, splits, args, out, math.nan))
    last_saved = time.monotonic()
    for step in range(state.step + 1, args.steps + 1):
        # One step. Nothing in it waits for the device.
        loss = training_loss(model, splits["train"], args, step, rank, world)
        update(state, loss, step, args.ema)
        meter.record(step, loss, world)
        bar.set_postfix(step=step, loss=f"{meter.loss:.4f}", refresh=False)
        bar.update(args.batch)

        # Now and then: is all well? Then write down where we are.
        due = step in evaluations
        if due or meter.bad_step or time.monotonic() - last_saved > 60 * args.save_minutes:
            check_finite(meter, net, step, state.step)
            lap = time.monotonic() - last_saved
            rate = (step - state.step) * args.batch / lap
            state.step, state.seconds = step, state.seconds + lap
            if rank == 0 and due:                   # the others wait for it in the next step
                bar.write(save_and_evaluate(state, splits, args, out, rate))
            elif rank == 0:
                state.save(out)
            last_saved = time.monotonic()
    bar.close()
    say(rank, f"next: python sample.py {out}")


def training_loss(model, split, args, step, rank=0, world=1):
    """The mean loss of this process's share of the batch of `step`, on the device."""
    images, labels = split
    process, device = PROCESSES[args.process], images.device
    # Every rank draws the whole batch and takes its share: the same for any number of them.
    share = slice(rank * args.batch // world, (rank + 1) * args.batch // world)
    shape = (args.batch, images.shape[3], *images.shape[1:3])
    index = batch_indices(len(images), args.batch, args.seed, step, device)[share]
    t, eps, flips = (v[share] for v in step_draws(process, shape, args.seed, step, device))
    seed_network(device, args.seed, step, rank)                     # for dropout and the like
    # The images, and how far the network's prediction is from what it should be.
    x0 = to_float(images[index])                                    # (B, C, S, S) in [-1, 1]
    if args.flip:
        x0 = torch.where(expand(flips, x0), x0.flip(3), x0)
    with autocast(device, args.amp):
        loss = diffusion_loss(model, process, x0, t, eps, None if labels is None else labels[index])
    return (WEIGHTINGS[args.weighting](process, t) * loss).mean()


def update(state, loss, step, ema):
    """One step of Adam, then one of the weights' moving average."""
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        decay = min(ema, (1 + step) / (10 + step))  # warmed up, else it remembers the first weights
        torch._foreach_lerp_(state.averages, state.weights, 1 - decay)
        for average, trained in state.buffers:
            average.copy_(trained)


def save_and_evaluate(state, splits, args, out, rate):
    """Evaluate; write the snapshot, last.pt and log.csv; return the line to print."""
    losses = {name: evaluate(state.average, PROCESSES[args.process], *split, args.eval_images,
                             args.amp) for name, split in splits.items()}
    state.rows.append(log_row(state, args, rate, splits["train"][0].device, **losses))
    state.save_snapshot(out)
    state.save(out)                                 # before the log, which must not be ahead of it
    write_csv(out / "log.csv", state.rows)
    return (f"step {state.step:7d}  train {losses['train'][0]:.5f}  "
            f"held-out {losses['heldout'][0]:.5f}  {rate:.0f} images/s")


# ==================================================================================================
# Machinery. A reader who came for the idea can stop here.
# ==================================================================================================


# --- Evaluation, weightings of the loss -----------------------------------------------------------

LEVELS = 10                     # the loss is also kept in ten equal slices of t


@torch.inference_mode()
def evaluate(net, process, images, labels, count, amp="auto"):
    """The unweighted loss over `count` images (repeated in turn where there are fewer), by level.

    images uint8 (n, S, S, C), labels (n,) or None, on the net's device. Returns the mean, a number,
    and (LEVELS,), the means in equal slices of t. Image i of every split, at every evaluation of
    every run with as many, on every device, meets the same t and noise: differences come from the
    images and the weights alone.
    """
    device, n, losses = images.device, len(images), []
    order = torch.randperm(count, generator=generator("cpu", "evaluation", count))
    u = (order + 0.5) / count                           # one t in each of `count` slices of [0, 1]
    for block, index in enumerate(torch.arange(count).split(256)):
        chosen = send(index % n, device)
        x0, t = to_float(images[chosen]), send(process.time(u[index]), device)
        eps = send(torch.randn(x0.shape, generator=generator("cpu", "evaluation", block)), device)
        with autocast(device, amp):
            losses.append(diffusion_loss(net, process, x0, t, eps,
                                         None if labels is None else labels[chosen]))
    losses = torch.cat(losses).double().cpu().numpy()
    level = np.minimum((u.numpy() * LEVELS).astype(int), LEVELS - 1)
    return losses.mean(), (np.bincount(level, losses, LEVELS)
                           / np.bincount(level, minlength=LEVELS))


def sigmoid_weight(process, t, bias=2.0):
    """SiD2's weight of the squared error at times t (B,); much noise counts more (Hoogeboom, 4).

    -dlambda/dt sigmoid(bias - lambda), lambda the log-SNR, weighs the error of eps; it is turned
    into a weight of the error of what the network predicts.
    """
    if process.T:                               # a central difference of its discrete times
        t, h, first = t.double(), 1 / process.T, 1 / process.T
    else:
        t = t.double().clamp(1e-4, 1 - 1e-4)
        h, first = 1e-3 * t * (1 - t), 0
    before, after = (t - h).clamp(min=first), (t + h).clamp(max=1)
    slope = (process.log_snr(after) - process.log_snr(before)) / (after - before)
    a, s, c, d = process.coefficients(t, t)     # t in the images' place: all stay (B,)
    return (-slope * torch.sigmoid(bias - process.log_snr(t)) * (a / (a * d - s * c)) ** 2).float()


WEIGHTINGS = {"uniform": lambda process, t: 1.0, "sigmoid": sigmoid_weight}


def evaluation_steps(steps, per_doubling=2, first=64):
    """Log-spaced steps, the same for all runs: first * 2^(k / per_doubling), and the last step."""
    grid = (round(first * 2 ** (k / per_doubling)) for k in itertools.count())
    return sorted({*itertools.takewhile(lambda step: step <= steps, grid), steps})


# --- Data -----------------------------------------------------------------------------------------

HELD_OUT = 5120                 # the study's held-out set: the first 5,120 test images
KEYS = ("train_images", "train_labels", "test_images", "test_labels")       # of an .npz file


class Data(NamedTuple):
    """A training subset and a held-out set: images uint8 (n, S, S, C), labels int64 (n,)."""
    train_images: np.ndarray
    train_labels: np.ndarray
    heldout_images: np.ndarray
    heldout_labels: np.ndarray


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


def _digits():
    """The 1,797 handwritten digits that scikit-learn ships (UCI, CC BY 4.0), 8x8, grey: 1,280 for
    training, 517 held out.

    In a fixed order at random: theirs goes by writer.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--data digits: needs scikit-learn, which ships them "
                         "(pip install -r requirements.txt)") from None
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = (digits.images[order, :, :, None] * (255 / 16)).round().astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    return Data(images[:1280], labels[:1280], images[1280:], labels[1280:])


def _npz_data(path):
    """The four arrays of an .npz file, checked; raises InputError naming the file and the key."""
    with reading(f"--data {path}"):
        arrays = read_npz(path, KEYS)
    for key in KEYS:
        if key not in arrays:
            raise InputError(f"--data {path}: key {key!r} is missing (needs {', '.join(KEYS)})")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8:
            raise InputError(f"--data {path}: {split}_images is {images.dtype}, must be uint8")
        if (images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[1] < 4
                or images.shape[3] not in (1, 3)):
            raise InputError(f"--data {path}: {split}_images has shape {images.shape}, "
                             "must be (N, S, S, 1 or 3), S at least 4")
        if (not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]
                or (labels < 0).any() or (labels > 9999).any()):
            raise InputError(f"--data {path}: {split}_labels must be {len(images)} whole numbers, "
                             "0 to 9999")
        if len(images) < 2:
            raise InputError(f"--data {path}: {split}_images holds {len(images)} images, "
                             "needs at least 2")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise InputError(f"--data {path}: train_images and test_images differ in shape")
    return Data(*(arrays[key] for key in KEYS))


def _download_cifar10():
    """CIFAR-10 through torchvision, checksummed, kept in ./data."""
    with needs_torchvision("--data cifar10"):
        from torchvision.datasets import CIFAR10
    try:
        with one_at_a_time("data"):                 # runs that start together would mix their files
            train, test = (CIFAR10("data", train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise InputError(f"--data cifar10: download failed ({error}); fetch it elsewhere and pass "
                         f"--data FILE.npz with keys {', '.join(KEYS)}") from None
    return Data(train.data, np.array(train.targets), test.data, np.array(test.targets))


def resize(images, size):
    """Area-average uint8 images (n, H, H, C) down to (n, size, size, C), rounded."""
    parts = [F.adaptive_avg_pool2d(torch.from_numpy(part).permute(0, 3, 1, 2).float(), size)
             for part in np.array_split(images, max(1, len(images) // 4096))]
    return torch.cat(parts).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def read_data(name):
    """All images of digits, cifar10 or an .npz file, as Data; toy's are drawn, see toy_images."""
    if name == "digits":
        return _digits()
    if name == "cifar10":
        return _download_cifar10()
    if str(name).endswith(".npz"):
        return _npz_data(name)
    raise InputError(f"--data {name}: unknown; use toy, digits, cifar10 or an .npz file")


def load_data(name, n, size=None, offset=0, divides=False):
    """The training images offset .. offset+n of `name` and the first 5,120 held-out images, or all
    where there are fewer.

    name: "toy", "digits", "cifar10" or the path of an .npz file with keys train_images,
    train_labels, test_images, test_labels (uint8 NHWC, square, 1 or 3 channels); the test images
    are held out. size: area-average down to size x size (toy: drawn at that size, 16 by default);
    divides: refuse one that does not divide the pictures', where the areas would overlap.
    Subsets are nested: the first k images do not depend on n.
    Returns Data. Raises InputError on a missing or malformed file, or when there are not enough
    images.
    """
    if n < 2:
        raise InputError(f"--n {n}: needs at least 2 training images")
    if offset < 0:
        raise InputError(f"--offset {offset}: must be 0 or more")
    largest = 128 if name == "toy" else 1024
    if size is not None and not 4 <= size <= largest:
        raise InputError(f"--size {size}: must be 4 to {largest}")
    if name == "toy":
        if offset + n > 10**6:
            raise InputError(f"--n {n}: with --offset {offset}, toy has only 1,000,000 images")
        images, labels = toy_images(offset + n, size or 16, split=0)
        return Data(images[offset:], labels[offset:], *toy_images(HELD_OUT, size or 16, split=1))
    data = read_data(name)
    if offset + n > len(data.train_images):
        raise InputError(f"--n {n}: with --offset {offset}, {name} has only "
                         f"{len(data.train_images)} training images")
    if size and size > data.train_images.shape[1]:
        raise InputError(f"--size {size}: larger than the {data.train_images.shape[1]} pixels "
                         f"of {name}")
    if divides and size and data.train_images.shape[1] % size:
        raise InputError(f"--size {size}: must divide the {data.train_images.shape[1]} pixels "
                         f"of {name}")
    images, labels = (array[offset:offset + n] for array in data[:2])
    heldout, heldout_labels = (array[:HELD_OUT] for array in data[2:])
    if size and size < images.shape[1]:
        images, heldout = resize(images, size), resize(heldout, size)
    if (images == images[:1]).all():
        raise InputError(f"--n {n}: these training images of {name} are all equal")
    return Data(np.array(images), labels.astype(np.int64),      # copies, so that the rest may go
                np.array(heldout), heldout_labels.astype(np.int64))


def of_known_classes(data):
    """The Data less the held-out images of classes that no training image has: a class-conditional
    model has never been told of them. Raises InputError where fewer than two are left.
    """
    known = np.isin(data.heldout_labels, data.train_labels)
    if known.sum() < 2:
        raise InputError("--conditional: no two held-out images of the classes trained on")
    return data._replace(heldout_images=data.heldout_images[known],
                         heldout_labels=data.heldout_labels[known])


def load_subset(run, record, data=None):
    """The Data that a run was trained on, checked by its hash; `data`: another place of it.

    Raises InputError where the images, or the held-out ones, are others.
    """
    options = record["options"]
    loaded = load_data(data or options["data"], options["n"], options["size"], options["offset"])
    if options["conditional"]:
        loaded = of_known_classes(loaded)
    for images, key, words in ((loaded[:2], "subset_sha256", "was trained on"),
                               (loaded[2:], "heldout_sha256", "held out")):
        if record[key] != hash_of(*images):
            raise InputError(f"--data {data or options['data']}: not the images that {run} {words}")
    return loaded


def hash_of(images, labels):
    """SHA-256 of images and labels: what a run was trained on, wherever it came from."""
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels))
    return digest.hexdigest()


def to_float(images):
    """uint8 images (B, S, S, C) to float32 (B, C, S, S) in [-1, 1], in memory still NHWC
    (channels_last).
    """
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """float (B, C, S, S), clamped to [-1, 1], to the nearest uint8 images (B, S, S, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_shown(images, labels, flip):
    """Images (N, S, S, C) and labels (N,) as training shows them: where it flips, their mirror
    images, too.
    """
    return ((torch.cat([images, images.flip(2)]), labels.repeat(2)) if flip else (images, labels))


def data_on(device, data, classes):
    """{"train", "heldout": (images, labels)} on the device, labels None where classes is 0."""
    images, labels, heldout, heldout_labels = (torch.from_numpy(x).to(device) for x in data)
    if not classes:
        labels = heldout_labels = None
    return {"train": (images, labels), "heldout": (heldout, heldout_labels)}


# --- Options --------------------------------------------------------------------------------------

# Options that say where, how fast or how long: they may change when a run is continued. All others,
# a new one of yours included, make another run. (--data may name another place of the same images.)
FREE = ("out", "steps", "images", "device", "compile", "save_minutes")


def make_parser():
    """The command line of train.py."""
    p = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = p.add_argument_group("data").add_argument
    data("--data", default="cifar10", help="toy, digits, cifar10 (downloaded) or an .npz file")
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
    model("--blocks", type=int, default=3, help="residual blocks per level")
    model("--attention", type=int, nargs="*", help="levels with self-attention (all but level 0)")
    model("--embed", type=int, default=512, help="size of the noise and class embedding")
    training = p.add_argument_group("training").add_argument
    training("--batch", type=int, default=16, help="images per step")
    training("--lr", type=float, default=1e-4, help="Adam's learning rate")
    training("--steps", type=int, help="train to this step (100000); a larger one continues a run")
    training("--images", type=int, help="train until so many images are seen, instead of --steps")
    training("--weighting", choices=WEIGHTINGS, default="uniform", help="weight of the loss by "
             "noise level; sigmoid is SiD2's, with bias 2; evaluations are not weighted")
    training("--seed", type=int, default=0, help="of initial weights, batches, times and noise")
    training("--ema", type=float, default=0.9999, help="decay of the weights' moving average; "
             "while it is lower, up to step 89,990 for .9999, (1 + step) / (10 + step)")
    evaluation = p.add_argument_group("evaluation and files").add_argument
    evaluation("--evals-per-doubling", type=int, default=2, help="evaluations per doubling of step")
    evaluation("--first-eval", type=int, default=64, help="step of the first evaluation")
    evaluation("--eval-images", type=int, default=HELD_OUT, help="images in each of the two losses "
               "(repeated in turn where there are fewer)")
    evaluation("--save-minutes", type=float, default=5, help="minutes between checkpoints")
    evaluation("--out", help="the run folder (runs/ and a name made of the options)")
    machine = p.add_argument_group("machine").add_argument
    machine("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    machine("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: "
            "on CUDA; on: on a CPU, too, where there is a C++ compiler")
    machine("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="autocast; auto "
            "is bf16 on CUDA (fp16 where the card has no bf16), off on a CPU")
    return p


def parse(argv):
    """The options of a run, checked, with --images turned into --steps. Raises InputError."""
    args = make_parser().parse_args(argv)
    if args.steps is not None and args.images is not None:
        raise InputError("--steps and --images: give one of them")
    for name, limit in {"n": 1e15, "batch": 1e15, "steps": 1e15, "images": 1e15, "first_eval": 1e15,
                        "evals_per_doubling": 1e3, "eval_images": 2**23, "lr": math.inf}.items():
        value = getattr(args, name)
        if value is not None and not 0 < value < limit:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0 and below "
                             f"{limit:g}")
    if not args.save_minutes >= 0:
        raise InputError(f"--save-minutes {args.save_minutes}: must be 0 or more")
    if not 0 <= args.ema < 1:
        raise InputError(f"--ema {args.ema}: must be at least 0 and below 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be at least 0 and below 2^63")
    if args.eval_images < LEVELS:
        raise InputError(f"--eval-images {args.eval_images}: needs {LEVELS} or more, one per level")
    if args.batch > 1000 * args.n:
        raise InputError(f"--batch {args.batch}: more than a thousand times --n {args.n}")
    if abs(float(PROCESSES[args.process].schedule(torch.ones(1))[1]) - 1) > 0.01:
        raise InputError(f"--process {args.process}: its s(1) must be 1, as sampling starts from "
                         "noise of variance 1")
    args.steps = args.steps or (math.ceil(args.images / args.batch) if args.images else 100_000)
    return args


def run_name(args):
    """N2048_w128_B16_lr1e-4_s0, then every other option that differs from its default."""
    lr = np.format_float_scientific(args.lr, trim="-", exp_digits=1)
    name = f"N{args.n}_w{args.width}_B{args.batch}_lr{lr}_s{args.seed}"
    for key, default in vars(make_parser().parse_args([])).items():
        value = getattr(args, key)
        if key in (*FREE, "n", "width", "batch", "lr", "seed") or value == default:
            continue
        text = ("-".join(map(str, value)) if isinstance(value, list) else
                Path(value).stem if key == "data" else "" if value is True else str(value))
        text = text.replace("/", "-")               # the name is a folder's
        name += f"_{text}" if key in ("data", "process") else f"_{key}{text}"
    return name


def build_net(options, image_shape, classes):
    """The network that a run's options (a dict) describe, on the CPU, its weights a function of the
    seed; the one place that names a network.

    A network is an nn.Module net(xt, t, labels) -> prediction: xt float32 (B, C, S, S), t float32
    (B,) in [0, 1], labels int64 (B,) or None where classes is 0; the prediction like xt. It raises
    InputError where it cannot be built for image_shape (S, S, C). It is built once on the "meta"
    device, for that alone.
    """
    size, _, channels = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        return UNet(options["width"], options["mults"], options["blocks"], options["attention"],
                    options["embed"], classes, channels, size)


def check_unet(width, mults, blocks, attention, embed, size):
    """The set of levels with attention. Raises InputError where the sizes do not fit."""
    if width < 1 or blocks < 1 or not mults or min(mults) < 1:
        raise InputError("--width, --blocks and each of --mults must be at least 1")
    if max(width * max(mults), embed) > 2**16 or blocks > 2**8:
        raise InputError("--width, --mults, --embed, --blocks: more than 65,536 channels, or more "
                         "than 256 blocks")
    if embed < 2 or embed % 2:
        raise InputError(f"--embed {embed}: must be an even number")
    attention = set(range(1, len(mults)) if attention is None else attention)
    if not attention <= set(range(len(mults))):
        raise InputError(f"--attention: the levels are 0 to {len(mults) - 1}")
    for level in sorted(attention | {len(mults) - 1}):
        if (d := width * mults[level]) > 64 and d % 64:
            raise InputError(f"--width {width}: heads of 64 channels do not divide the {d} "
                             f"channels of level {level}")
    if size % 2 ** (len(mults) - 1):
        raise InputError(f"--size {size}, given or the pictures' own: the {len(mults)} levels of "
                         f"--mults need a multiple of {2 ** (len(mults) - 1)}")
    return attention


# --- The run folder -------------------------------------------------------------------------------


def set_up(args, record, out, net, device, rank=0):
    """The State to start from: network, its moving average, optimizer, and how far they are."""
    if device.type == "cuda":
        setup_cuda()
    state = fresh_state(args, net, device, identity(record))
    state.load(out, args.steps, rank)
    if rank == 0:
        state.write_record(out, record)
    return state


def fresh_state(args, net, device, run=""):
    """The State of step 0: the network on the device, its average, the optimizer."""
    net.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(device, args.amp) == torch.float16)
    return State(net, average, optimizer, scaler, run)


class State:
    """All that a run needs to go on: network, average, optimizer, and how far they are.

    step, seconds: of training, at the last save; rows: of log.csv; run: the identity that every
    checkpoint carries.
    """

    def __init__(self, net, average, optimizer, scaler, run):
        self.net, self.average, self.optimizer, self.scaler = net, average, optimizer, scaler
        self.run, self.step, self.seconds, self.rows = run, 0, 0.0, []
        self.weights, self.averages = list(net.parameters()), list(average.parameters())
        self.buffers = list(zip(average.buffers(), net.buffers(), strict=True))
        # As they are before any step: a schedule may change them.
        self.settings = optimizer_settings(optimizer)

    def load(self, out, steps, rank=0):
        """Take last.pt, if there is one; a run that has ended may have lost it since.

        Raises InputError where last.pt is damaged, of another run, or beyond `steps`.
        """
        path = out / "last.pt"
        if path.exists():
            last = load_checkpoint(path, self.run)
            with reading(path, DELETE_ADVICE):
                self.net.load_state_dict(last["net"])
                self.average.load_state_dict(last["ema"])
                then = last["optimizer_settings"]
                other = sorted({key for new, old in zip(self.settings, then, strict=True)
                                for key in new.keys() & old.keys() if new[key] != old[key]})
                self.optimizer.load_state_dict(last["optimizer"])
                if last["scaler"]:              # empty where the run began without float16
                    self.scaler.load_state_dict(last["scaler"])
                self.step, self.seconds, self.rows = last["step"], last["seconds"], last["rows"]
            if other:
                raise InputError(f"{path}: the optimizer had another {', '.join(other)} than the "
                                 "code gives it today; use another folder")
        elif logged := read_csv(out / "log.csv"):
            with reading(out / "log.csv", "delete it to train anew"):
                self.step, self.rows = int(logged[-1]["step"]), logged
            if self.step < steps:
                say(rank, f"{out}: last.pt is gone, so this run starts over")
                self.step, self.rows = 0, []
        if self.step > steps:
            raise InputError(f"--steps {steps}: {out} has been trained to step {self.step} already")

    def evaluated(self):
        """Whether the weights are those of the last row of log.csv."""
        return bool(self.rows) and int(self.rows[-1]["step"]) == self.step

    def write_record(self, out, record):
        """Write args.json where it says something else, and log.csv as last.pt knows it."""
        old = run_in(out)
        if old is None or old["options"] != record["options"]:
            if old:                                 # what it began with stays
                record = record | {k: old[k] for k in ("versions", "git_commit")}
            text = json.dumps(record | {"checksum": checksum(record)}, indent=1) + "\n"
            write_atomic(out / "args.json", lambda file: file.write(text.encode()))
        if self.rows:
            write_csv(out / "log.csv", self.rows)

    def save(self, out):
        """Write last.pt."""
        save(out / "last.pt", {
            "run": self.run, "step": self.step, "seconds": self.seconds, "rows": self.rows,
            "net": self.net.state_dict(), "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(), "optimizer_settings": self.settings,
            "scaler": self.scaler.state_dict()})

    def save_snapshot(self, out):
        """Write snapshots/STEP.pt, the averaged weights."""
        save(out / f"snapshots/{self.step:07d}.pt",
             {"run": self.run, "step": self.step, "ema": self.average.state_dict()})


def optimizer_settings(optimizer):
    """An optimizer's class and settings (lr, betas, ...), a dict per group of weights."""
    return [group | {"class": type(optimizer).__name__, "params": None}
            for group in optimizer.param_groups]


def describe(args, data, net, classes):
    """What args.json holds: the options, which of them may change, and all that the next stages and
    a reader must know.
    """
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True,
            capture_output=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    except OSError:                                 # no git on this machine
        commit = ""
    def as_read(options):                           # a tuple comes back as a list
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(options).items()}
    return {"options": as_read(args), "free": FREE,
            "defaults": as_read(make_parser().parse_args([])),
            "parameters": sum(p.numel() for p in net.parameters()),
            "image_shape": list(data.train_images.shape[1:]), "classes": classes,
            "labels": np.unique(data.train_labels).tolist(),
            "subset_sha256": hash_of(*data[:2]), "heldout_sha256": hash_of(*data[2:]),
            "process_fingerprint": fingerprint(PROCESSES[args.process]),
            "step_values": step_values(vars(args)),
            "network_values": network_values(copy.deepcopy(net), data.train_images.shape[1:],
                                             classes),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__, "cuda": torch.version.cuda},
            "git_commit": commit or "unknown"}


def read_run(run):
    """args.json of a run folder, a dict; options that it lacks have their default.

    Raises InputError where there is none, it is damaged, or its noise process computes something
    else today.
    """
    path = Path(run) / "args.json"
    if not path.exists():
        raise InputError(f"{run}: not a run folder (it has no args.json)")
    with reading(path, "not written by train.py"):
        record = json.loads(path.read_text())
        if record.pop("checksum", None) not in (None, checksum(record)):
            raise InputError(f"{path}: changed since train.py wrote it; undo that or, if it is "
                             "meant, remove its checksum")
        options = vars(make_parser().parse_args([])) | record["options"]
        record |= {"options": options, "free": FREE}
        check_record(record)
        process = PROCESSES.get(options["process"])
    if process is None:
        raise InputError(f"{path}: --process {options['process']} is none that train.py knows")
    if record["process_fingerprint"] != fingerprint(process):
        raise InputError(f"{path}: --process {options['process']} computes something else today "
                         "than when this run was trained; undo the change or train anew")
    return record


def run_in(folder):
    """The record of a run folder, as read_run gives it; None where there is no run yet."""
    return read_run(folder) if (Path(folder) / "args.json").exists() else None


def checksum(record):
    """SHA-256 of what args.json holds beside it, so that a change does not pass unnoticed."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_record(record):
    """Raise nearly anything where an option or a field has another type than train.py gives it."""
    kinds = {None: {str}, str: {str}, int: {int}, float: {int, float}}      # of action.type
    for action in make_parser()._actions[1:]:                       # the first is --help
        value = record["options"][action.dest]
        if value is action.default is None or action.type not in kinds:     # a type of your own
            continue
        wanted = kinds[action.type] if action.nargs != 0 else {bool, type(action.default)}
        if not {type(v) for v in (value if isinstance(value, list) else [value])} <= wanted:
            raise ValueError(f"{action.dest}: {value}")
    shape, classes, labels = (record[key] for key in ("image_shape", "classes", "labels"))
    numbers = {type(v) for v in (*shape, *labels, classes, record["options"]["steps"])}
    values = [*record["step_values"], *record["network_values"]]
    if not (numbers == {int} and {type(v) for v in values} <= {int, float}
            and shape[0] == shape[1] in range(4, 2**16) and shape[2:] in ([1], [3])
            and min(labels, default=0) >= 0 and (not classes or max(labels) < classes <= 10**4)
            and all(isinstance(record[key], str) for key in (
                "subset_sha256", "heldout_sha256", "process_fingerprint", "git_commit"))
            and isinstance(record["versions"], dict) and isinstance(record["defaults"], dict)):
        raise ValueError("fields of another kind")


# --- Does today's code compute what a run began with? Asked by value, not by source ---------------


def fingerprint(process):
    """12 hex digits of what a process computes, whatever it is called."""
    t = process.time(torch.arange(1, 64, dtype=torch.float64) / 64)
    values = torch.stack([torch.as_tensor(v).expand_as(t) for v in process.coefficients(t, t)])
    values = values.double().mul(1e6).round().long()
    return hashlib.sha256(values.numpy().tobytes() + f"{process.T}".encode()).hexdigest()[:12]


class Affine(nn.Module):
    """A network of two numbers, w xt + b + label, for step_values; in float64, since they hardly
    move. It has an idle matrix, too, for optimizers that take nothing else."""

    def __init__(self, w):
        super().__init__()
        self.parts = nn.Parameter(torch.tensor([w, 0.0], dtype=torch.float64))
        self.idle = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))

    def forward(self, xt, t, labels=None):
        w, b = self.parts.unbind()
        return w * xt + b + (0 if labels is None else labels.view(-1, 1, 1, 1))


def step_values(options):
    """What the code of today makes of three training steps and an evaluation with these options.

    Of a network of two weights, on noise, once with small and once with large gradients, which a
    clipping would cut: three losses, and by how many lr the weights and their averages move; then
    the evaluation's losses, all and by level. If they change, so has the loss, its weighting, what
    a step draws, the optimizer, the average or the evaluation.
    """
    args = argparse.Namespace(**options | {"batch": 64, "amp": "off"})
    images = torch.randint(256, (64, 4, 4, 1), dtype=torch.uint8, generator=generator("cpu"))
    labels = torch.zeros(64, dtype=torch.int64) if args.conditional else None
    values = []
    for w in (0.5, 20.0):
        with torch.random.fork_rng(devices=[]):
            state = fresh_state(args, Affine(w), torch.device("cpu"))
            for step in (1, 2, 3):
                loss = training_loss(state.net, (images, labels), args, step)
                update(state, loss, step, args.ema)
                values.append(float(loss.detach()))
        parts = [weights for weights in (*state.weights, *state.averages) if weights.dim() == 1]
        values += ((torch.cat(parts) - Affine(w).parts.repeat(2)) / args.lr).tolist()
    mean, levels = evaluate(state.average, PROCESSES[args.process], images, labels, 300, args.amp)
    return [*values, float(mean), *levels.tolist()]


def network_values(net, image_shape, classes):
    """Sixteen numbers that a network, just built by the code of today, gives on the CPU, and as
    many in training mode, by which dropout shows. If they change, so has the network. It comes back
    with other weights, in evaluation mode.
    """
    size, _, channels = image_shape
    g = generator("cpu", "network")
    with torch.no_grad():
        for p in net.parameters():      # what starts at 0 would hide all that comes before it
            fan_in = math.prod(p.shape[1:])
            p.copy_(torch.randn(p.shape, generator=g) * max(1, fan_in) ** -0.5)
        x = torch.randn(2, channels, size, size, generator=g)
        seen = x, torch.tensor([0.2, 0.7]), torch.arange(2) % classes if classes else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trained = copy.deepcopy(net).train()(*seen)
        y = torch.stack([net.eval()(*seen), trained]).flatten(1)
    return y[:, torch.linspace(0, y.shape[1] - 1, 16).long()].flatten().tolist()


def alike(then, now, rounding=1e-3):
    """Whether two lists of what the code computes agree but for rounding.

    then: of a run; it is shorter where less was recorded when the run began: what it has counts.
    """
    return len(then) <= len(now) and np.allclose(then, now[:len(then)], rounding, rounding,
                                                 equal_nan=True)


def differences(old, new):
    """The names of what makes two records those of different runs, sorted; [] for the same run."""
    names = {k for k, value in new["options"].items()
             if k not in (*FREE, "data") and old["options"].get(k) != value}
    for key, name in (("subset_sha256", "training images"), ("heldout_sha256", "held-out images")):
        if old[key] != new[key]:
            names.add(name)
    if names:                                       # then the values below differ because of these
        return sorted(names)
    for key, name, rounding in (("network_values", "network", 1e-3),
                                ("step_values", "loss, optimizer or training step", 2e-5)):
        if not alike(old[key], new[key], rounding):
            names.add(f"{name}, by the code of today")
    return sorted(names)


def identity(record):
    """16 hex digits of what makes a run this run: its options and its training images."""
    defaults = vars(make_parser().parse_args([])) | record["defaults"]
    parts = {k: v for k, v in record["options"].items()
             if k not in (*FREE, "data") and v != defaults.get(k)}
    text = json.dumps([parts, record["subset_sha256"], record["options"]["process"]],
                      sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def claimed(out, record):
    """Make the run folder and hold its lock.

    Raises InputError where the folder holds another run or is in use, OSError where it cannot be
    written.
    """
    if out.is_dir() and not (out / "args.json").exists() and any(out.glob("[!.]*")):
        raise InputError(f"--out {out}: holds files but no args.json; use another folder")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "train", "args.json", "log.csv", "last.pt", "snapshots/*"):
        old = run_in(out)
        if old and (different := differences(old, record)):
            raise InputError(f"--out {out}: holds a run with another {', '.join(different)}; "
                             "use another folder")
        yield


@contextlib.contextmanager
def one_at_a_time(folder):
    """Wait until no other process is in such a block on this folder, where it can be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl
            Path(folder).mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(Path(folder) / ".lock", "a")), fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def locked(run, stage, *files):
    """Hold the run folder for one stage (train, sample or measure), whose `files` (names, patterns)
    lose the temporary files that a kill left behind.

    The lock is the kernel's: it falls with the process, however that ends. Raises InputError where
    another process holds it, OSError where the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        raise InputError("this needs Linux or macOS; on Windows, run it in WSL") from None
    with open(Path(run) / f".{stage}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{run}: another process works in it ({stage}.py)") from None
        for name in map(Path, files):
            for left in Path(run).glob(str(name.parent / f".{name.name}.*.tmp")):
                left.unlink(missing_ok=True)
        yield


DELETE_ADVICE = "to train this run again, delete its last.pt and log.csv"


def load_checkpoint(path, run=None, step=None):
    """A file of torch.save, a dict, its tensors on the CPU; every checksum in it is verified.

    run, step: the identity and step that it must carry. Raises InputError: missing, damaged, or of
    another run or step.
    """
    with reading(path, DELETE_ADVICE):
        check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        owner, found = state["run"], int(state["step"])
    if (run and owner != run) or (step is not None and found != step):
        raise InputError(f"{path}: belongs to another run or step (step {found}); "
                         f"{DELETE_ADVICE}")
    return state


def log_row(state, args, rate, device, train, heldout):
    """One row of log.csv; train and heldout are what evaluate() returns, rate images/s."""
    row = {"step": state.step, "images": state.step * args.batch,
           "train_loss": f"{train[0]:.8g}", "heldout_loss": f"{heldout[0]:.8g}"}
    for name, (_, levels) in (("train", train), ("heldout", heldout)):
        row |= {f"{name}_loss_level{k}": f"{value:.8g}" for k, value in enumerate(levels)}
    return row | {"images_per_second": f"{rate:.1f}", "seconds": f"{state.seconds:.1f}",
                  "machine": f"{device.type} --amp {args.amp} torch {torch.__version__}"}


# --- The machine ----------------------------------------------------------------------------------


class Meter:
    """The last loss, and the first step with a bad one. `loss` and `bad_step` are copies that
    nobody waits for: they may lag behind the device.
    """

    def __init__(self, device):
        self.status = torch.zeros(2, device=device)
        self.seen = torch.zeros(2, pin_memory=device.type == "cuda")

    def record(self, step, loss, world=1):
        """Take the loss of `step`, a tensor on the device; averaged over `world` processes."""
        loss = loss.detach()
        if world > 1:
            torch.distributed.all_reduce(loss)
            loss /= world
        bad = torch.where((self.status[1] == 0) & ~loss.isfinite(), step, self.status[1])
        self.status = torch.stack([loss, bad])
        self.seen.copy_(self.status, non_blocking=True)

    @property
    def loss(self):
        """The last loss seen, a number."""
        return float(self.seen[0])

    @property
    def bad_step(self):
        """The first step seen with a loss that is not finite; 0 if none."""
        return int(self.seen[1])


def check_finite(meter, net, step, kept):
    """Raise FloatingPointError if a loss so far or a weight is not finite. Waits for the device."""
    bad_step = int(meter.status[1])
    norms = torch.stack(torch._foreach_norm(list(net.parameters())))
    if bad_step or not norms.isfinite().all():
        state = f"the last good state, of step {kept}, is kept" if kept else "nothing was saved"
        raise FloatingPointError(f"step {bad_step or step}: the loss or a weight is not finite; "
                                 f"{state}. A lower --lr usually helps")


def seed_network(device, *key):
    """Seed what a network draws by itself, on the CPU and the device.

    torch.manual_seed does that, too, in 0.2 ms: it asks every kind of device that there could be.
    """
    torch.default_generator.manual_seed(seed_of("network", *key))
    if device.type == "cuda":
        torch.cuda.manual_seed(seed_of("network", *key))


def send(x, device, **more):
    """The CPU tensor x on the device; the host does not wait for the copy."""
    pinned = x.pin_memory() if torch.device(device).type == "cuda" else x
    return pinned.to(device, non_blocking=True, **more)


def pick_device(name):
    """torch.device of auto, cpu, cuda or cuda:K. Raises InputError where there is no such one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", name):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:K")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA "
                         "devices that torch can use")
    if kind == "cuda":
        torch.cuda.set_device(int(number or 0))
    return torch.device(name)


def join_processes(device):
    """(device, rank, world size) under torchrun, joined by torch.distributed; else (device, 0, 1).

    On CUDA each process of a machine takes the device of its LOCAL_RANK. Raises InputError.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        return device, 0, 1
    try:
        if device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(hours=1))
    except (LookupError, ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE={world}: the processes cannot be joined; start them with "
                         f"torchrun ({first_line(error)})") from None
    return device, torch.distributed.get_rank(), torch.distributed.get_world_size()


def amp_dtype(device, amp="auto"):
    """torch.bfloat16, torch.float16 or None (no autocast), as --amp and the device say."""
    if amp == "auto":                   # where bfloat16 is emulated, float16 is faster
        amp = ("off" if device.type == "cpu" else
               "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def autocast(device, amp="auto"):
    """Mixed precision on `device`, a context manager; see --amp."""
    dtype = amp_dtype(device, amp)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def compiles(device, choice):
    """Whether networks are compiled on the device; choice: of --compile."""
    return choice == "on" or choice == "auto" and device.type == "cuda"


def compiled(net, device, choice, **more):
    """The net, through torch.compile where --compile and the device say so; `more` goes there."""
    return (torch.compile(net, fullgraph=True, dynamic=False, **more) if compiles(device, choice)
            else net)


def wrap(net, args, device, world):
    """The net as the training step calls it: compiled, and averaging gradients over processes.

    One process on CUDA replays the launches of a step as two CUDA graphs (reduce-overhead), since
    small networks wait for launches.
    """
    one_gpu = device.type == "cuda" and world == 1
    model = compiled(net, device, args.compile, **({"mode": "reduce-overhead"} if one_gpu else {}))
    if world == 1:
        return model
    # Looking for unused weights keeps DDP from regrouping gradients after its first step, which
    # would sum them in another order when a run continues.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def setup_cuda():
    """The same bits every time on one machine, and TF32 for what autocast leaves in float32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Not warn_only: attention's backward pass is the deterministic one only if this is strict.
    torch.use_deterministic_algorithms(True)
    # torch.compile shall choose nothing by timing that changes a sum after a restart. Both settings
    # are its own: `deterministic` is not there in older versions, the other one may go.
    from torch._inductor import config
    for name, value in (("deterministic", True), ("dynamic_scale_rblock", False)):
        if hasattr(config, name):
            setattr(config, name, value)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def say(rank, text):
    """Print a line, once however many processes there are."""
    if rank == 0:
        print(text, flush=True)


# --- Files and errors -----------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user gave is wrong: one line that names the flag or file and what is wrong."""


# A GPU's errors surface at some later, unrelated line: nothing may blame a file for them.
DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


def out_of_memory(error):
    """Whether memory has run out: "GPU", "CPU" or "". Torch says so in several ways."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "CPU"
    full = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(
            text in str(error) for text in ("out of memory", "STATUS_ALLOC_FAILED",
                                            "unable to find an engine")))     # of cuDNN
    return "GPU" if full else ""


def first_line(error):
    """The first line of what an exception says; what kind it is, if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def reading(what, advice=""):
    """Turn whatever goes wrong in a block that reads a file into one InputError line.

    A damaged file can raise nearly anything. Running out of memory is not the file's fault and goes
    through, and so does an InputError.
    """
    try:
        yield
    except (InputError, *DEVICE_ERRORS):
        raise
    except FileNotFoundError:
        raise InputError(f"{what}: no such file (looked for from {Path.cwd()})") from None
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:120]}"
        raise InputError(f"{what}: damaged, or of another kind ({reason})"
                         + (f"; {advice}" if advice else "")) from None


@contextlib.contextmanager
def needs_torchvision(what):
    """Say in one line what to install where torchvision is missing or built for another torch."""
    try:
        yield
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise InputError(f"{what}: torchvision cannot be loaded beside torch {torch.__version__} "
                         f"({first_line(error)}); install the two from the same place, "
                         "as pytorch.org says") from None


def command_line(main):
    """Decorate a script's main(argv): a failure that a user can mend ends it with one line.

    Exit code 2 for bad input, 1 for what the machine could not do (memory, disk) and for a loss
    that is not finite, 130 for Ctrl-C.
    """
    @functools.wraps(main)
    def wrapper(argv=None):
        try:
            return main(argv)
        except InputError as error:
            code, message = 2, f"error: {error}"
        except BrokenPipeError:                 # what read our output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (FloatingPointError, OSError) as error:
            code, message = 1, f"error: {error}"
        except (MemoryError, RuntimeError) as error:
            code, reason = 1, " ".join(str(error).splitlines()[:2]).strip()
            if memory := out_of_memory(error):
                message = (f"error: out of {memory} memory; a smaller --batch (train.py; its "
                           "evaluations take 256 images at once) or --batch-size (sample.py), "
                           "network or --n needs less")
            elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                message = f"error: torch.compile failed ({reason}); --compile off does without it"
            elif any(t in reason for t in ("no kernel image", "NVIDIA driver", "CUDA driver")):
                message = (f"error: this build of torch does not serve this GPU or its driver "
                           f"({reason}); install another, or --device cpu")
            else:
                raise
        except KeyboardInterrupt:
            code, message = 130, "interrupted: the same command continues from what is saved"
        print(message, file=sys.stderr)
        raise SystemExit(code)
    return wrapper


def write_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, flush it to disk, move it into place.

    A reader, a kill or a power cut sees the old file or the new one, never a part of it. Raises
    OSError, naming the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # as torch.save reports a full disk
        if isinstance(error, DEVICE_ERRORS):
            raise
        reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)),
                      None) or first_line(error)
        raise OSError(f"{path}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path, value):
    """torch.save, atomically. Raises OSError."""
    write_atomic(path, lambda file: torch.save(value, file))


def identity_beside(table):
    """The identity in the args.json beside a table; "" where there is none."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((Path(table).parent / "args.json").read_text())["identity"])
    return ""


def row_checks(table, rows):
    """8 hex digits per row (a dict) of a table: of its run, its table, its place and its cells.

    Empty cells do not count.
    """
    run, name = identity_beside(table), Path(table).name
    for k, row in enumerate(rows):
        cells = sorted((c, str(v)) for c, v in row.items() if c != "check" and v not in ("", None))
        key = run, name, f"{k} of {len(rows)}", cells
        yield hashlib.sha256(repr(key).encode()).hexdigest()[:8]


def write_csv(path, rows, columns=None):
    """Write a list of dicts as a CSV file, atomically; a cell is empty where a dict lacks its key.

    columns: the header, needed where the list may be empty; read_csv refuses such a table. The last
    column, check, is row_checks: a table that is changed later, or is another run's, is refused
    when it is read. Raises OSError.
    """
    text = io.StringIO()
    columns = dict.fromkeys(columns or [key for row in rows for key in row])
    table = csv.DictWriter(text, [*columns, "check"] if rows else [*columns], lineterminator="\n")
    table.writeheader()
    table.writerows(row | {"check": check}
                    for row, check in zip(rows, row_checks(path, rows), strict=True))
    if not Path(path).exists() or Path(path).read_bytes() != text.getvalue().encode():
        write_atomic(path, lambda file: file.write(text.getvalue().encode()))


def read_npz(path, keys=None):
    """{key: array} of an .npz file, or of those of `keys` that it has; every checksum is verified.

    Raises nearly anything; see reading().
    """
    check_zip(path)                     # np.load does not see that an array has become shorter
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files if keys is None or key in keys}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("members that are no arrays")
    return arrays


def check_zip(path):
    """Raise ValueError where a zip file, say a .pt or .npz file, is damaged: by its checksums, and
    by what these do not see, two members of one name, or one that is marked as a folder.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (len({member.filename for member in members}) < len(members)
                or any(member.external_attr & 16 for member in members) or archive.testzip()):
            raise ValueError("wrong checksum")


def read_csv(path):
    """The rows of a CSV file as dicts of strings; [] where there is none. Raises InputError: it is
    damaged, changed since it was written, or of another run.
    """
    if not Path(path).exists():
        return []
    with reading(path, "delete it, and the script that wrote it makes it again"), \
            open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
        if any(None in row or None in row.values() for row in rows) or not rows:
            raise ValueError("rows of different lengths, or none")
        for row, check in zip(rows, row_checks(path, rows), strict=True):
            if row.pop("check", "") != check:
                raise ValueError("changed since it was written, or another run's")
        return rows


# --- Command line ---------------------------------------------------------------------------------


@command_line
def main(argv=None):
    """Train as the options say; see the top of the file.

    Raises SystemExit: 2 on bad input, 1 when the loss is not finite or a file cannot be written.
    """
    args = parse(argv)
    if size := args.size or {"cifar10": 32, "digits": 8, "toy": 16}.get(args.data):
        # On "meta", without memory: impossible options end before anything is read or fetched.
        with torch.device("meta"):
            build_net(vars(args), (size, size, 3), 10 if args.conditional else 0)
    device, rank, world = join_processes(pick_device(args.device))
    if args.batch % world:
        raise InputError(f"--batch {args.batch}: {world} processes cannot share it evenly")
    warm = math.ceil((10 * args.ema - 1) / (1 - args.ema))
    if args.ema != make_parser().get_default("ema") and args.steps < warm:
        say(rank, f"--ema {args.ema:g}: makes no difference in {args.steps:,} steps, since until "
                  f"step {warm:,} the average is a shorter one, (1 + step) / (10 + step)")
    wait = torch.distributed.barrier if world > 1 else lambda: None
    if rank:
        wait()                                      # the first process downloads, for all
    out = Path(args.out or f"runs/{run_name(args)}")
    data = load_data(args.data, args.n, args.size, args.offset, not (out / "args.json").exists())
    if not rank:
        wait()
    labels = (data.train_labels.max(), data.heldout_labels.max())
    classes = int(max(labels)) + 1 if args.conditional else 0
    data = of_known_classes(data) if args.conditional else data
    net = build_net(vars(args), data.train_images.shape[1:], classes)
    record = describe(args, data, net, classes)
    try:                        # an option of yours may be of a type that JSON cannot hold
        check_record(json.loads(json.dumps(record)))
    except (TypeError, ValueError) as error:
        raise InputError(f"args.json cannot hold these options: {error}; a number needs type=int "
                         "or type=float in add_argument") from None
    if old := run_in(out):                          # its identity goes by the defaults of its day
        record["defaults"] |= old["defaults"]
    record["identity"] = identity(record)
    with contextlib.nullcontext() if rank else claimed(out, record):
        wait()                                      # until the first process has the folder
        train(args, record, out, data, net, device, rank, world)
        wait()
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
