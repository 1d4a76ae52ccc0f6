"""Draw images from the snapshots of a run, from the same noise at every snapshot.

    python sample.py runs/first                     # every snapshot that has no samples yet
    python sample.py runs/first --steps-only 64 1024 --num 10000
    python sample.py runs/first --eta 1             # other settings, side by side
    python sample.py runs/first --exact --num 512   # the perfect memorizer, a positive control

Writes samples/STEP.npz (images uint8 NHWC, labels int64, -1 where the model is unconditional) and
samples/STEP.png; with other settings than the defaults, in a folder named by them, say
samples/eta1/. Image i is a function of the weights, the settings and i alone: not of --num, nor,
beyond rounding (that of bfloat16, where --amp is on), of --batch-size and the machine.

Equation numbers: "Song" is arXiv 2010.02502 (DDIM), "Ho" is arXiv 2006.11239 (DDPM), "Liu" is arXiv
2209.03003.
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from train import (
    PROCESSES,
    InputError,
    alike,
    amp_dtype,
    as_shown,
    autocast,
    build_net,
    command_line,
    compiled,
    compiles,
    generator,
    identity,
    load_checkpoint,
    load_subset,
    locked,
    network_values,
    pick_device,
    read_npz,
    read_run,
    reading,
    send,
    to_float,
    to_uint8,
    write_atomic,
)

OUTSIDE = 1.05          # a value beyond it has left the range of the images, [-1, 1]

# --- The sampler ----------------------------------------------------------------------------------


def sampling_times(process, steps):
    """The sampler's times, steps + 1 of them from 1 down to 0, float32 on the CPU.

    Raises InputError if there are not so many.
    """
    if not 1 <= steps <= (process.T or 10**6):
        raise InputError(f"--sampling-steps {steps}: must be 1 to {process.T or 10**6}")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    # float32, as train.py draws them, holds k/1000 well enough to find k again.
    return (torch.round(t * process.T) / process.T if process.T else t).float()


def ddim_step(process, xt, prediction, t, t_next, eta=0.0, z=None, clip=False):
    """One update of x from time t to t_next < t: x at t_next, and the x0 that it heads for.

    All images share the times, 0-d tensors on the CPU. xt, prediction, z (B, C, H, W); prediction
    the network's at t; z standard normal noise, unused where eta is 0. eta 0 is DDIM, and for
    rectified flow the Euler step of dx/dt = eps - x0; eta 1 is DDPM's ancestral step. clip: clamp
    x0 to [-1, 1] before it is used, and let eps follow; the x0 returned is not clamped.
    """
    (a, s), (a_next, s_next) = process.schedule(t), process.schedule(t_next)
    x0, eps = process.x0_eps(xt, prediction, t)
    unclamped = x0
    if clip:                                            # as the code of Ho et al. does
        # x/0 where a(1) is 0: nothing is known. But a prediction that is not finite stays so.
        x0 = x0.nan_to_num(0, 1, -1).clamp(-1, 1) + 0 * prediction
        eps = (xt - a * x0) / s
    # Song, eq. 16, for any a and s: sigma^2 = eta^2 (s'^2 / s^2) (s^2 - (a / a')^2 s'^2); at eta 1
    # it is the variance of the posterior q(x' | xt, x0) (Ho, eq. 7).
    variance = eta**2 * (s_next / s) ** 2 * (s**2 - (a / a_next) ** 2 * s_next**2).clamp(min=0)
    # Song, eq. 12: x' = a' x0 + sqrt(s'^2 - sigma^2) eps + sigma z
    x = a_next * x0 + (s_next**2 - variance).clamp(min=0).sqrt() * eps
    return (x + variance.sqrt() * z if eta else x), unclamped


@torch.inference_mode()
def sample(net, process, shape, seeds, steps, eta=0.0, clip=False, labels=None, device="cpu",
           progress=None):
    """Images float32 (B, C, H, W), one for each of `seeds`, in [-1, 1] if clipped; and (B,), the
    share of each one's values that had left the range (beyond 1.05) before the last clamping.

    net(xt, t, labels) -> prediction; shape (C, H, W); labels int64 (B,) on the device, or None;
    seeds: a (seed, image index) pair per image, of which all its noise is a function (drawn on the
    CPU, so that it is the same on every device). The net gets one xt, which each step overwrites.
    Raises InputError where the process has fewer than `steps` times.
    """
    generators = [generator("cpu", "sample", *pair) for pair in seeds]

    def noise():
        z = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return send(z, device, memory_format=torch.channels_last)
    times = sampling_times(process, steps)
    on_device = send(times, device)                     # for the net; the arithmetic needs no copy
    x = noise()
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        prediction = net(x, on_device[k].expand(len(x)), labels).float()
        new, x0 = ddim_step(process, x, prediction, t, t_next, eta, noise() if eta else None, clip)
        x.copy_(new)                # x keeps its strides, so that a net is compiled only for them
        if progress:
            progress(len(x))
    return x, (x0.abs() > OUTSIDE).float().mean((1, 2, 3))


# --- The perfect memorizer ------------------------------------------------------------------------


def exact_denoiser(xt, a, s, images):
    """The posterior mean E[x0 | xt] when x0 is one of `images`, each as likely.

    xt (B, C, H, W), images (N, C, H, W), both float, in [-1, 1] for pictures; a, s: numbers or
    (B,), xt = a x0 + s eps. Returns (B, C, H, W) of xt's type. In float64: at little noise images
    that differ in one number only must be told apart. Memory: two float64 copies of the images and
    3 B x N numbers.
    """
    x, y = xt.flatten(1).double(), images.flatten(1).double()
    a, s = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1) for v in (a, s))
    # p(x0 = y_i | xt) ~ exp(-|xt - a y_i|^2 / 2 s^2); |xt|^2 is the same for all i and falls out of
    # the softmax. Measured from the mean image, the numbers are smaller and lose fewer bits.
    center = y.mean(0)
    x, y = x - a * center, y - center
    logits = (x @ y.T - 0.5 * a * y.square().sum(1)) * (a / s.clamp(min=1e-12) ** 2)
    return (logits.softmax(dim=1) @ y + center).reshape(xt.shape).to(xt.dtype)


def as_network(make, process, images, labels=None, least=1):
    """A denoiser known in closed form as one more network: net(xt, t, labels) -> prediction.

    make(images (N, C, H, W)) -> f(xt, a, s) -> x0. labels (N,): of the images; then class k's is
    made of that class (of all images, where the class has fewer than `least`).
    """
    @functools.cache
    def of_class(k):
        own = images if k is None else images[labels == k]
        return make(own if len(own) >= least else images)

    def net(xt, t, wanted=None):
        (a, s), x0 = process.schedule(t), torch.empty_like(xt)
        for k in [None] if labels is None else wanted.unique().tolist():
            rows = slice(None) if k is None else wanted == k
            x0[rows] = of_class(k)(xt[rows], a[rows], s[rows])
        return process.predict_given_x0(xt, x0, t)
    return net


def memorizer(process, images, labels=None):
    """The perfect memorizer of images (N, C, H, W), labels (N,) or None, as a network.

    No network has a lower training loss.
    """
    return as_network(lambda known: functools.partial(exact_denoiser, images=known),
                      process, images, labels)


# --- Files ----------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """A samples file: images uint8 (n, H, W, C), labels (n,), the settings that made them, the
    share of values that left the range, the step ("exact" for the memorizer's), all that made it.
    """
    images: np.ndarray
    labels: np.ndarray
    settings: dict
    out_of_range: float
    name: str
    made: dict


def set_name(settings, process):
    """The folder of samples with these settings: what differs from the defaults, "" for none."""
    def word(key, value):
        key = {"sampling_steps": "steps"}.get(key, key)
        if isinstance(value, bool):
            return key if value else f"no-{key}"
        if isinstance(value, list):
            return key + "-".join(map(str, value))
        return f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
    defaults = default_settings(process)
    name = "_".join(word(k, v) for k, v in settings.items() if v != defaults.get(k))
    return name.replace("/", "-")                   # the name is a folder's


def sample_sets(run):
    """{set name: [steps, sorted]} of a run's samples files; see set_name."""
    found, folder = {}, Path(run) / "samples"
    for path in sorted(folder.rglob("*.npz")):
        if re.fullmatch(r"\d{7,}", path.stem):
            name = "/".join(path.relative_to(folder).parts[:-1])
            found.setdefault(name, []).append(int(path.stem))
    return {name: sorted(steps) for name, steps in found.items()}


def samples_path(run, name, step):
    """The samples file of a set's snapshot, or, step being "exact", of the memorizer."""
    return Path(run) / "samples" / name / (f"{step}.npz" if step == "exact" else f"{step:07d}.npz")


def sampler_values(process, settings, exact=False):
    """What the code of today draws in three steps, sixteen numbers per network; if they change, so
    has what draws. Of a network whose x0 stays in [-1, 1], of one whose x0 does not, which shows
    the clipping, and, if `exact`, of a memorizer.
    """
    def known(xt, t, labels, size=1):
        share = 0.7 if labels is None else 0.8 + 0.1 * labels.view(-1, 1, 1, 1)
        return process.predict_given_x0(xt, size * share * xt.sin(), t)
    images = torch.linspace(-1, 1, 48).sin().reshape(3, 1, 4, 4)
    nets = [known, functools.partial(known, size=3)]
    if exact:
        nets.append(memorizer(process, images))
    settings = settings | {"sampling_steps": min(3, settings["sampling_steps"]), "seed": 0}
    drawn = [sample_with(settings, to_draw_with(settings, net, net), process, (1, 4, 4), [0],
                         torch.zeros(1, dtype=torch.int64))[0] for net in nets]
    return torch.cat(drawn).flatten().tolist()


def write_samples(path, images, labels, settings, out_of_range, run, **made):
    """A samples file with what made it (settings, the run's identity, `made`), and a PNG of the
    first 64, each atomically.
    """
    n, H, W, C = images[:64].shape
    sheet = np.full((-(-n // 8) * (H + 1) + 1, 8 * (W + 1) + 1, C), 255, np.uint8)
    for i, image in enumerate(images[:64]):
        top, left = i // 8 * (H + 1) + 1, i % 8 * (W + 1) + 1
        sheet[top:top + H, left:left + W] = image
    picture = Image.fromarray(sheet.squeeze(2) if C == 1 else sheet)
    write_atomic(path.with_suffix(".png"), lambda f: picture.save(f, format="png"))
    write_atomic(path, lambda f: np.savez(
        f, images=images, labels=labels, out_of_range=out_of_range,
        made_by=json.dumps({"settings": settings, "run": run, "name": path.stem, **made})))


def read_samples(path, run=None):
    """The Samples of a file. Raises InputError: damaged, renamed, or of another run (an identity).
    """
    with reading(path, "delete it and run sample.py again"):
        arrays = read_npz(path)
        made = json.loads(str(arrays["made_by"]))
        found = Samples(arrays["images"], arrays["labels"], dict(made["settings"]),
                        float(arrays["out_of_range"]), made["name"], made)
        if (found.images.dtype != np.uint8 or found.images.ndim != 4
                or found.labels.shape != found.images.shape[:1]):
            raise ValueError("images or labels of another kind")
    if found.name != path.stem or (run and made.get("run", run) != run):
        raise InputError(f"{path}: holds samples of another run or step ({found.name}); "
                         "delete it and run sample.py again")
    return found


def made_by(path):
    """What made a samples file, a dict, without reading its images. Raises InputError."""
    with reading(path, "delete it and run sample.py again"), np.load(path) as arrays:
        return dict(json.loads(str(arrays["made_by"])))


def weights_today(run, record, settings, name):
    """A digest, 12 hex digits, of the weights that a snapshot's samples are drawn with, from the
    checksums in its file alone; "" where it is gone, and for "exact".
    """
    if name == "exact":
        return ""
    digest = hashlib.sha256()
    for step in filter(None, (name, switch_of(settings)[0])):
        path = Path(run) / f"snapshots/{step:07d}.pt"
        if not path.exists():
            return ""
        with reading(path), zipfile.ZipFile(path) as archive:
            digest.update(repr([info.CRC for info in archive.infolist()
                                if "/data/" in info.filename]).encode())
    return digest.hexdigest()[:12]


def what_changed(made, weights, sampler=None):
    """Which of "weights" and "sampler" made a samples file and is another today; "" for neither.

    made: of Samples; weights, sampler: weights_today, sampler_values. Weights that are gone today
    pass, and so does a file of your own making that does not say.
    """
    if weights and made.get("weights", weights) != weights:
        return "weights"
    same = sampler is None or alike(made.get("sampler", sampler), sampler)
    return "" if same else "sampler"


def is_done(path, settings, num, run, defaults, weights, sampler):
    """Whether a samples file holds at least `num` images drawn with these settings.

    run: the run's identity; defaults: of settings that are newer than the file; weights, sampler:
    of weights_today and sampler_values. Raises InputError where anything else made the file.
    """
    if not path.exists():
        return False
    found = read_samples(path, run)
    settings_then = defaults | found.settings
    if settings_then != settings:
        different = ", ".join(f"{k} {v}" for k, v in settings_then.items() if v != settings.get(k))
        raise InputError(f"{path}: was made with {different}; delete it")
    if what := what_changed(found.made, weights, sampler):
        other = "other weights" if what == "weights" else "another sampler"
        raise InputError(f"{path}: was drawn by {other} than there is now; delete what is older "
                         f"than that in {path.parent}, or move it away")
    return len(found.images) >= num


def snapshots(run):
    """The steps of a run's snapshots, sorted."""
    return sorted(int(p.stem) for p in (Path(run) / "snapshots").glob("*.pt")
                  if re.fullmatch(r"\d{7,}", p.stem))


def load_net(run, record, device):
    """The network of a run on the device, in eval mode; load_ema gives it weights."""
    with reading(f"{run}/args.json", "not written by train.py"):
        net = build_net(record["options"], record["image_shape"], record["classes"])
    today = network_values(net, record["image_shape"], record["classes"])
    if not alike(record["network_values"], today):
        raise InputError(f"{run}: its network is another one by the code of today; undo the "
                         "change, or give it an option of its own")
    return net.to(device, memory_format=torch.channels_last).eval()


def load_ema(net, run, record, step):
    """Give `net` the averaged weights of a snapshot.

    Raises InputError: missing, damaged, of another run or step.
    """
    path = Path(run) / f"snapshots/{step:07d}.pt"
    state = load_checkpoint(path, identity(record), step)
    with reading(path, f"or {run}/args.json describes another network"):
        if "net" in state:                          # its checksums are not those of the average
            raise ValueError("a copy of last.pt")
        net.load_state_dict(state["ema"])


# --- Command line ---------------------------------------------------------------------------------

# Options that say which images, where or how fast. All others are settings: they name the set.
NO_SETTINGS = ("run", "num", "steps_only", "exact", "data", "batch_size", "device", "compile",
               "amp")


def make_parser():
    """The command line of sample.py."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", type=Path, help="run folder written by train.py")
    p.add_argument("--num", type=int, default=2048, help="images per snapshot")
    p.add_argument("--steps-only", type=int, nargs="+", metavar="STEP",
                   help="only the snapshots of these steps")
    p.add_argument("--sampling-steps", type=int, default=250, help="network evaluations per image")
    p.add_argument("--eta", type=float, default=0.0,
                   help="0 deterministic (DDIM, Euler) to 1 ancestral (DDPM)")
    p.add_argument("--clip", action=argparse.BooleanOptionalAction, help="clamp x0 to [-1, 1] at "
                   "each step (by default as the noise process needs it: ddpm yes, flow no)")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--switch", default="", metavar="STEP@T", help="from time T (1 noise, 0 image) "
                   "on, draw with the weights of snapshot STEP instead, say 4096@0.5")
    p.add_argument("--exact", action="store_true", help="sample with the closed-form optimal "
                   "denoiser of the training subset instead of the network, into exact.npz")
    p.add_argument("--data", help="where the training images are, if not where train.py found them "
                   "(for --exact)")
    p.add_argument("--batch-size", type=int, help="images at a time (CUDA: 1024, CPU: 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--compile", choices=("auto", "on", "off"), default="auto",
                   help="torch.compile; auto: on CUDA")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                   help="autocast; see train.py")
    return p


def parse(argv):
    """The options. Raises InputError on values that make no sense."""
    args = make_parser().parse_args(argv)
    if not 0 < args.num < 10**8 or (args.batch_size is not None and args.batch_size < 1):
        raise InputError("--num and --batch-size: must be at least 1, --num below 1e8")
    if not 0 <= args.eta <= 1:
        raise InputError(f"--eta {args.eta}: must be 0 to 1")
    if args.switch:
        if args.exact:
            raise InputError("--switch and --exact: give one of them")
        if not re.fullmatch(r"[1-9]\d*@0?\.\d*[1-9]", args.switch):
            raise InputError(f"--switch {args.switch}: must be a snapshot's step and a time "
                             "between 0 and 1, say 4096@0.5")
        args.switch = args.switch.replace("@.", "@0.")          # one name for one time
    if args.exact and args.steps_only:
        raise InputError("--steps-only: --exact draws without a snapshot")
    return args


def settings_of(args, process):
    """What the samples are a function of, beside the weights: {option: value}.

    Raises InputError where JSON, as which a samples file holds them, cannot.
    """
    settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
    if args.clip is None:
        settings["clip"] = process.clip
    try:
        return json.loads(json.dumps(settings))         # as a file gives them back
    except TypeError as error:
        raise InputError(f"a samples file cannot hold these options: {error}") from None


def switch_of(settings):
    """--switch as numbers: the snapshot that takes over, and the time; (None, 0) without one."""
    step, _, t = settings.get("switch", "").partition("@")
    return (int(step), float(t)) if step else (None, 0.0)


def default_settings(process):
    """The settings of `sample.py RUN` without options."""
    return settings_of(make_parser().parse_args([""]), process)


def sample_with(settings, net, process, shape, images, labels=None, device="cpu", progress=None):
    """sample, of these image indices: the place where settings become its arguments."""
    return sample(net, process, shape, [(settings["seed"], i) for i in images],
                  settings["sampling_steps"], settings["eta"], settings["clip"], labels, device,
                  progress)


def to_draw_with(settings, early, late):
    """The net(xt, t, labels) that the sampler asks: `late` from the time of --switch on."""
    _, switch_at = switch_of(settings)

    def net(xt, t, labels):
        # Asking for t waits for the device; without a switch there is nothing to ask.
        return (late if switch_at and t[0] <= switch_at else early)(xt, t, labels)
    return net


def draw(args, net, process, settings, record, device, name):
    """The images uint8 (num, H, W, C), labels (num,) and share of values out of range of a net."""
    (H, W, C), wanted = record["image_shape"], record["labels"]
    batch = min(args.num, args.batch_size or (1024 if device.type == "cuda" else 64))
    labels = torch.tensor([wanted[i % len(wanted)] if record["classes"] else -1
                           for i in range(args.num + batch)])
    images, outside, finite = [], [], []
    padded = compiles(device, args.compile)         # what is compiled for one shape serves them all
    with tqdm(total=args.num * settings["sampling_steps"], desc=name, unit="eval",
              unit_scale=True, disable=None, leave=False) as bar:
        for first in range(0, args.num, batch):
            stop = first + batch if padded else min(first + batch, args.num)
            label = send(labels[first:stop], device) if record["classes"] else None
            x, out = sample_with(settings, net, process, (C, H, W), range(first, stop), label,
                                 device, bar.update)
            images.append(to_uint8(x))
            outside.append(out)
            finite.append(x.isfinite().all())
    if not torch.stack(finite).all():
        raise InputError(f"{args.run}: {name} makes samples that are not finite; if it is a "
                         "snapshot, delete it")
    images = torch.cat(images)[:args.num].cpu().numpy()
    return images, labels[:args.num].numpy(), float(torch.cat(outside)[:args.num].mean())


def network(args, process, settings, record, device):
    """The net(xt, t, labels) to draw with, and load(step), which gives it a snapshot's weights.

    With --switch it is two networks, one for the times above its T, one for the others.
    """
    if args.exact:
        data = load_subset(args.run, record, args.data)
        known, labels = as_shown(*(torch.from_numpy(x).to(device) for x in data[:2]),
                                 record["options"]["flip"])
        return (memorizer(process, to_float(known).contiguous(),
                          labels if record["classes"] else None), lambda step: None)
    net = load_net(args.run, record, device)
    early = late = compiled(net, device, args.compile)
    if args.switch:
        second = load_net(args.run, record, device)
        load_ema(second, args.run, record, switch_of(settings)[0])
        late = compiled(second, device, args.compile)
    chosen = to_draw_with(settings, early, late)

    def autocasted(xt, t, labels):
        with autocast(device, args.amp):
            return chosen(xt, t, labels)
    return autocasted, lambda step: load_ema(net, args.run, record, step)


@command_line
def main(argv=None):
    """Sample every snapshot that is not done; see the module's docstring.

    Raises SystemExit(2) on bad input.
    """
    args = parse(argv)
    record, device = read_run(args.run), pick_device(args.device)
    process = PROCESSES[record["options"]["process"]]
    settings = settings_of(args, process)
    sampling_times(process, settings["sampling_steps"])     # may raise, before any work
    steps = snapshots(args.run)
    wanted = [("--steps-only", step) for step in args.steps_only or ()]
    wanted += [("--switch", switch_of(settings)[0])] if args.switch else []
    for flag, step in wanted:
        if step not in steps:
            raise InputError(f"{flag} {step}: {args.run}/snapshots has no snapshot of that step, "
                             f"only of {', '.join(map(str, steps)) or 'none'}")
    if not args.exact and not steps:
        raise InputError(f"{args.run}: has no snapshots; train it first")
    place, run = set_name(settings, process), identity(record)
    paths = {name: samples_path(args.run, place, name)
             for name in (["exact"] if args.exact else args.steps_only or steps)}
    with locked(args.run, "sample", "samples/*", "samples/*/*"):
        sampler = sampler_values(process, settings, args.exact)
        made = {name: {"weights": weights_today(args.run, record, settings, name),
                       "sampler": sampler} for name in paths}
        todo = {name: path for name, path in paths.items() if not is_done(
            path, settings, args.num, run, default_settings(process), **made[name])}
        print(f"{args.run}: {len(todo)} of {len(paths)} "
              f"{'controls' if args.exact else 'snapshots'} to sample, {args.num} images each, "
              f"on {device}", flush=True)
        if not todo:
            return
        net, load = network(args, process, settings, record, device)
        for name, path in todo.items():
            load(name)
            images, labels, outside = draw(args, net, process, settings, record, device, path.stem)
            write_samples(path, images, labels, settings, outside, run, **made[name],
                          precision=str(amp_dtype(device, args.amp) or torch.float32))
            print(f"{path}: {args.num} images", flush=True)


if __name__ == "__main__":
    main()
