"""Draw images from the snapshots of a run, from the same noise at every snapshot.

    python sample.py runs/N16_w32_B16_lr2e-3_s0         # every snapshot that has no samples yet
    python sample.py runs/N2048_w128_B16_lr1e-4_s0 --steps-only 1024 65536 --num 10000
    # the perfect memorizer, a positive control
    python sample.py runs/N2048_w128_B16_lr1e-4_s0 --exact --num 512

Writes samples/STEP.npz (images uint8 NHWC, labels int64; -1 where the model is unconditional) and
samples/STEP.png.
Image i is a function of the weights, the seed and i alone: not of --num, nor of --batch-size beyond
rounding.

Equation numbers: "Song" is arXiv 2010.02502 (DDIM), "Ho" is arXiv 2006.11239 (DDPM), "Liu" is arXiv
2209.03003.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from train import (
    PROCESSES,
    UNREADABLE,
    InputError,
    autocast,
    build_net,
    command_line,
    expand,
    generator,
    load_checkpoint,
    load_data,
    pick_device,
    read_run,
    subset_hash,
    to_float,
    write_atomic,
)

# --------------------------------------------------------------------------------------------------
# The sampler
# --------------------------------------------------------------------------------------------------


def ddim_step(process, xt, prediction, t, t_next, eta, z):
    """One update of x from time t to t_next < t.

    All images share the times, Python numbers or 0-d tensors. xt, prediction, z (B, C, H, W); z
    standard normal noise (unused where eta is 0), prediction the network's at t. eta 0 is DDIM, and
    for rectified flow the Euler step of dx/dt = eps - x0; eta 1 is DDPM's ancestral step.
    """
    a, s = process.a_s(t)
    a_next, s_next = process.a_s(t_next)
    x0, eps = process.split(xt, prediction, a, s)
    # Song, eq. 16, for any a and s: sigma^2 = eta^2 (s'^2 / s^2) (s^2 - (a / a')^2 s'^2); at eta 1
    # it is the variance of the posterior q(x' | xt, x0) (Ho, eq. 7).
    variance = eta**2 * (s_next / s) ** 2 * (s**2 - (a / a_next) ** 2 * s_next**2).clamp(min=0)
    # Song, eq. 12: x' = a' x0 + sqrt(s'^2 - sigma^2) eps + sigma z
    x = a_next * x0 + (s_next**2 - variance).clamp(min=0).sqrt() * eps
    return x + variance.sqrt() * z if eta else x


@torch.inference_mode()
def sample(predict, process, shape, seeds, steps, eta=0.0, device="cpu", progress=None):
    """Images in [-1, 1], not clipped, float32 (B, C, H, W), one for each of `seeds`.

    predict(xt, t) -> prediction, with t (B,) in [0, 1]; shape (C, H, W); seeds: a (seed, image
    index) pair an image, of which all its noise is a function (drawn on the CPU, so that it is the
    same on every device).
    Raises InputError where the process has fewer than `steps` times.
    """
    generators = [generator("cpu", "sample", *pair) for pair in seeds]

    def noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    # The times are cast as train.py draws them: float32 holds k/1000 well enough to find k again.
    times = process.times(steps).float().to(device)
    x = noise().contiguous(memory_format=torch.channels_last)
    for t, t_next in itertools.pairwise(times):
        prediction = predict(x, t.expand(len(x))).float()
        x = ddim_step(process, x, prediction, t, t_next, eta, noise() if eta else None)
        if progress:
            progress(len(x))
    return x


def exact_denoiser(xt, a, s, images):
    """The posterior mean E[x0 | xt] when x0 is one of `images`, each as likely.

    What a perfect memorizer predicts. xt (B, C, H, W), images (N, C, H, W), both float, in [-1, 1]
    for pictures; a, s: numbers or (B,), xt = a x0 + s eps.
    Returns (B, C, H, W). Memory: 2 B x N floats beyond the inputs.
    """
    x, y = xt.flatten(1), images.flatten(1)
    a, s = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1) for v in (a, s))
    # p(x0 = y_i | xt) ~ exp(-|xt - a y_i|^2 / 2 s^2); |xt|^2 is the same for all i and falls out of
    # the softmax.
    # Measured from the mean image, the numbers are smaller and the differences lose fewer bits.
    center = y.mean(0)
    x, y = x - a * center, y - center
    logits = (x @ y.T - 0.5 * a * y.square().sum(1)) * (a / s.clamp(min=1e-12) ** 2)
    return (logits.softmax(dim=1) @ y + center).reshape(xt.shape)


def exact_predictor(process, images, labels=None):
    """A predict(xt, t) for sample() made of exact_denoiser.

    labels: a pair of (N,) for the images, (B,) wanted.
    """
    def predict(xt, t):
        a, s = process.a_s(t)
        if labels is None:
            x0 = exact_denoiser(xt, a, s, images)
        else:
            x0 = torch.empty_like(xt)
            for label in labels[1].unique():
                want = labels[1] == label
                x0[want] = exact_denoiser(xt[want], a[want], s[want], images[labels[0] == label])
        # xt = a x0 + s eps gives eps, so c x0 + d eps
        return process.c * x0 + process.d * (xt - expand(a, xt) * x0) / expand(s, xt)
    return predict


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def write_samples(run, name, images, labels, settings):
    """samples/NAME.npz with the settings that made it, and a PNG grid of the first 64.

    Both atomically.
    """
    from torchvision.utils import save_image
    first = torch.from_numpy(images[:64]).permute(0, 3, 1, 2) / 255
    write_atomic(run / f"samples/{name}.png",
                 lambda f: save_image(first, f, format="png", nrow=8, padding=1, pad_value=1))
    write_atomic(run / f"samples/{name}.npz",
                 lambda f: np.savez(f, images=images, labels=labels,
                                    settings=json.dumps(settings, sort_keys=True)))


def read_samples(path):
    """images uint8 (n, H, W, C), labels (n,), settings (dict) of a samples file.

    Raises InputError if damaged.
    """
    try:
        with np.load(path) as archive:
            return archive["images"], archive["labels"], json.loads(str(archive["settings"]))
    except UNREADABLE as error:
        raise InputError(f"{path}: no readable samples file "
                         f"({type(error).__name__}: {error})") from None


def is_done(path, settings, num):
    """Whether a samples file holds at least `num` images made with these settings.

    Raises InputError on other settings.
    """
    if not path.exists():
        return False
    images, _, found = read_samples(path)
    if found != settings:
        different = ", ".join(f"{k} {found.get(k)}" for k in settings
                              if found.get(k) != settings[k])
        raise InputError(f"{path}: was made with {different}; use the same, or delete the file")
    return len(images) >= num


def snapshots(run):
    """The steps of a run's snapshots, sorted."""
    return sorted(int(p.stem) for p in (Path(run) / "snapshots").glob("[0-9]*.pt"))


def load_ema(net, run, name):
    """Give `net` the EMA weights of a snapshot.

    Raises InputError: missing, damaged, another shape.
    """
    path = Path(run) / f"snapshots/{name}.pt"
    state = load_checkpoint(path)
    try:
        net.load_state_dict(state["ema"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path}: does not hold the weights that {run}/args.json "
                         "describes") from None


def load_subset(run, record, data=None):
    """The Data that a run was trained on, checked by its hash.

    `data` is another place of the same images.
    """
    options = record["options"]
    loaded = load_data(data or options["data"], options["n"], options["size"], options["offset"])
    if subset_hash(loaded) != record["subset_sha256"]:
        raise InputError(f"--data {data or options['data']}: not the images that {run} "
                         "was trained on")
    return loaded


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse(argv):
    """The options. Raises InputError on values that make no sense."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", type=Path, help="run folder written by train.py")
    p.add_argument("--num", type=int, default=2048, help="images a snapshot")
    p.add_argument("--steps-only", type=int, nargs="+", metavar="STEP",
                   help="only the snapshots of these steps")
    p.add_argument("--sampling-steps", type=int, default=250, help="network evaluations an image")
    p.add_argument("--eta", type=float, default=0.0,
                   help="0 deterministic (DDIM, Euler) to 1 ancestral (DDPM)")
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument("--exact", action="store_true", help="sample with the closed-form optimal "
                   "denoiser of the training subset instead of the network, into samples/exact.npz")
    p.add_argument("--data", help="where the training images are, if not where train.py found them "
                   "(for --exact)")
    p.add_argument("--batch-size", type=int, help="images at a time (CUDA: 1024, CPU: 64)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                   help="torch.compile, CUDA only")
    p.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                   help="autocast; see train.py")
    args = p.parse_args(argv)
    if args.num < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise InputError("--num and --batch-size: must be at least 1")
    if not 0 <= args.eta <= 1:
        raise InputError(f"--eta {args.eta}: must be 0 to 1")
    return args


def draw(args, predict_for, process, record, device, name):
    """The images uint8 (num, H, W, C) and labels (num,) of one snapshot.

    predict_for(labels) -> predict.
    """
    H, W, C = record["image_shape"]
    batch = args.batch_size or (1024 if device.type == "cuda" else 64)
    classes = record["classes"]
    images, labels = [], []
    with tqdm(total=args.num * args.sampling_steps, desc=name, unit="eval", unit_scale=True,
              disable=None, leave=False) as bar:
        for first in range(0, args.num, batch):
            index = range(first, min(first + batch, args.num))
            label = torch.tensor([i % classes if classes else -1 for i in index])
            x = sample(predict_for(label.to(device)), process, (C, H, W),
                       [(args.seed, i) for i in index], args.sampling_steps, args.eta, device,
                       bar.update)
            if not x.isfinite().all():
                raise InputError(f"{args.run}: snapshot {name} makes samples that are not finite; "
                                 "delete it")
            x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            images.append(x.permute(0, 2, 3, 1).cpu().numpy())
            labels.append(label.numpy())
    return np.concatenate(images), np.concatenate(labels)


@command_line
def main(argv=None):
    """Sample every snapshot that is not done; see the module's docstring.

    Raises SystemExit(2) on bad input.
    """
    args = parse(argv)
    record, device = read_run(args.run), pick_device(args.device)
    process = PROCESSES[record["options"]["process"]]
    process.times(args.sampling_steps)
    steps = snapshots(args.run)
    for step in args.steps_only or ():
        if step not in steps:
            raise InputError(f"--steps-only {step}: {args.run}/snapshots has no snapshot of that "
                             "step")
    names = ["exact"] if args.exact else [f"{step:07d}" for step in args.steps_only or steps]
    if not names:
        raise InputError(f"{args.run}: has no snapshots; train it first")
    settings = {"eta": args.eta, "sampling_steps": args.sampling_steps, "seed": args.seed}
    todo = [n for n in names if not is_done(args.run / f"samples/{n}.npz", settings, args.num)]
    print(f"{args.run}: {len(todo)} of {len(names)} snapshots to sample, {args.num} images each, "
          f"on {device}", flush=True)
    if not todo:
        return

    if args.exact:
        data = load_subset(args.run, record, args.data)
        known, classes = (torch.from_numpy(x).to(device)
                          for x in (data.train_images, data.train_labels))
        known = to_float(known).contiguous()
    else:
        net = build_net(record["options"], record["image_shape"][2], record["classes"])
        net = net.to(device, memory_format=torch.channels_last).eval()
        compiled = (torch.compile(net, fullgraph=True)
                    if args.compile and device.type == "cuda" else net)

    def predict_for(label):
        """predict(xt, t) of the images with these labels."""
        if args.exact:
            return exact_predictor(process, known, (classes, label) if record["classes"] else None)

        def predict(xt, t):
            with autocast(device, args.amp):
                return compiled(xt, t, label if record["classes"] else None)
        return predict

    for name in todo:
        if not args.exact:
            load_ema(net, args.run, name)
        write_samples(args.run, name, *draw(args, predict_for, process, record, device, name),
                      settings)
        print(f"{args.run}/samples/{name}.npz: {args.num} images", flush=True)


if __name__ == "__main__":
    main()
