"""Draw the study's figures and test its claims, from the tables in the run folders alone.

    python plot.py runs/toy                         # a sweep: figures, tables in runs/toy/figures
    python plot.py runs/                            # every sweep below
    python plot.py runs/toy/N16_w32_B16_lr2e-3_s0   # one run: what it shows, in a few lines
    python plot.py results/mini                     # a sweep again, from its runs.csv alone
    python plot.py --paper                          # the study's own curves, judged the same way

Beside the figures it writes summary.csv, runs.csv and claims.md. How runs are read: curves.py; what
the verdicts rest on: claims.py.
"""

import argparse
import io
import itertools
import math
import sys
import zipfile
import zlib
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from claims import describe, exponent, keep_line, onset, write, write_tables
from curves import (
    TAUS,
    PlotError,
    Run,
    best_fidelity,
    columns_of,
    factor_of,
    find_runs,
    label_of,
    number,
    study_runs,
    sweeps,
)

mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "axes.titlesize": 10, "lines.linewidth": 1.6,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130,
                     "figure.constrained_layout.use": True})

# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

# A colour per role in every figure, told apart by colour-blind readers (Okabe and Ito, 2008).
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"
REFERENCES = {"gaussian": "#E69F00", "local": "#AA4499", "population": GREEN, "memorizer": RED}
# Panels: title, scale of y, columns of log.csv and metrics.csv. A new metric is one line here.
PANELS = {
    "loss": ("loss", "log", "train_loss heldout_loss"),
    "copy": ("copy ratio (d1/d2 < 1/3)", "share", "copy_ratio null_copy_ratio"),
    "sw": ("sliced Wasserstein", "log", "sw_SPACE_train sw_SPACE_heldout"),
    "fid": ("FID", "log", "fid_SPACE_train fid_SPACE_heldout"),
    "kid": ("KID", "linear", "kid_SPACE_train kid_SPACE_heldout"),
    "precision": ("precision", "share", "precision_SPACE_train precision_SPACE_heldout"),
    "recall": ("recall", "share", "recall_SPACE_train recall_SPACE_heldout"),
    "sw_replaced": ("sliced Wasserstein", "log", "sw_SPACE_heldout sw_SPACE_replaced"),
    "fid_replaced": ("FID", "log", "fid_SPACE_heldout fid_SPACE_replaced"),
    "quarter": ("copies, d1/d2 < 1/4", "share", "copy_ratio_quarter null_copy_ratio_quarter"),
    "half": ("copies, d1/d2 < 1/2", "share", "copy_ratio_half null_copy_ratio_half"),
    "sscd": ("copies, SSCD > .6", "share", "sscd_ratio null_sscd_ratio"),
    "auth": ("authentic share (AuthPct)", "share", "auth_share null_auth_share"),
    "nearest": ("rms to nearest training image", "linear", "nearest_rms"),
    "mixture": ("residual as a mixture of ten", "linear", "mixture_residual"),
    "near": ("near another sample alone", "linear", "near_samples"),
    "sharpness": ("sharpness (gradient energy)", "linear", "sharpness"),
    "contrast": ("contrast", "linear", "contrast"),
    "range": ("values out of range", "linear", "out_of_range"),
    "agreement": ("agreement of twins", "share", "agreement null_agreement"),
    "twins": ("distance, median rms", "log", "twin_rms nearest_train_rms twin_nearest_train_rms")}
LEVELS = {f"level{k}": (f"t = {k / 10:.1f} to {k / 10 + 0.1:.1f}", "linear",
                        f"train_loss_level{k} heldout_loss_level{k} floor_level{k}")
          for k in range(10)}
PANELS |= LEVELS
FOUR = ["loss", "copy", "sw", "fid"]            # the study's own
# How a column is drawn, by a word in its name: line, colour (None: the run's), label.
STYLES = {"null": (":", GREY, "null"), "floor": ("-", RED, "perfect memorizer"),
          "replaced": ("-.", None, "samples replaced by nearest training images"),
          "twin_nearest": ("--", RED, "twin to its nearest training image"),
          "nearest_train": ("-", RED, "sample to its nearest training image"),
          "twin_rms": ("-", None, "sample to the twin's, from the same noise"),
          "heldout": ("--", None, "held-out"), "train": ("-", None, "train"), "": ("-", None, None)}
CONTROLS = {"heldout": (GREEN, "held-out images: a perfect generalizer"),
            "training": (RED, "training images: a perfect memorizer")}
MARKS = {"heldout_25": (0, (1, 1.5)), "copy_01": (0, (4, 2))}       # onsets drawn in panels


def words(text):
    """A name as a figure shows it: shortened in its middle, no mathematics."""
    return (text if len(text) <= 60 else f"{text[:29]}…{text[-29:]}").replace("$", r"\$")


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return mpl.colormaps["viridis"](np.linspace(0, 0.88, count))


def style_of(column):
    """The line, colour and label of a column, see STYLES."""
    return next(style for word, style in STYLES.items() if word in column)


def control(run, name, column):
    """The value of a column for a control, nan where there is none."""
    return run.controls.get(name, {}).get(column.replace("SPACE", run.space or ""), math.nan)


def dress(axis, title="", scale="linear", xlabel=""):
    """Title, scales and few, readable ticks of a panel against training steps."""
    axis.set(title=title, xlabel=xlabel, xscale="log", yscale="log" if scale == "log" else "linear")
    if scale == "share":
        axis.set_ylim(-0.04, 1.04)
    for side in [axis.xaxis] + [axis.yaxis] * (scale == "log"):
        low, high = side.get_view_interval()
        side.set_major_locator(mpl.ticker.MaxNLocator(4) if high < 5 * low else
                               mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        side.set_major_formatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else
                                 f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
        side.set_minor_locator(mpl.ticker.NullLocator())


def curve(axis, runs, column, color, scale=1, label=None, errors=False):
    """A column against step * scale: mean over seeds, in a band of their range or of one's error.

    The error comes from columns beside it: copy_low, copy_high or, twice, sw_error_...
    """
    def at(run, name):
        x, y = run.column(name)
        return np.interp(np.log(steps), np.log(x), y, math.nan, math.nan) if len(x) else math.nan
    steps = np.unique(np.concatenate([run.column(column)[0] for run in runs]))
    if not len(steps):
        return
    values = np.array([at(run, column) * np.ones(len(steps)) for run in runs])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    if errors and "SPACE" in column:
        low, high = (low + k * at(runs[0], column.replace("_", "_error_", 1)) for k in (-2, 2))
    elif errors:
        low, high = (at(runs[0], column.replace("ratio", end) if "ratio" in column else
                        f"{column}_{end}") for end in ("low", "high"))
    line, own, name = style_of(column)
    axis.plot(steps * scale, np.nanmean(values, 0), color=own or color, linestyle=line,
              marker="." if len(steps) == 1 else None, label=name if label is None else label)
    axis.fill_between(steps * scale, low, high, color=own or color, alpha=0.2, linewidth=0)


def panels(run, rows, size):
    """A figure with a panel of one run for each name of PANELS in rows, and its axes by name.

    Panels show the columns, their controls as thin lines, and the onsets of MARKS.
    """
    figure, axes = plt.subplot_mosaic(rows, figsize=size, empty_sentinel="")
    figure.supxlabel("training step", fontsize="medium")
    for axis, (title, scale, columns) in [(axes[name], PANELS[name]) for name in axes if
                                          name in PANELS]:
        for column in columns.split():
            curve(axis, [run], column, BLUE, errors=True)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)
        for column, (key, (color, label)) in itertools.product(columns.split(), CONTROLS.items()):
            value = control(run, key, column)
            if value > 0 or (math.isfinite(value) and scale != "log"):
                axis.axhline(value, color=color, linestyle=style_of(column)[0], linewidth=1.1,
                             label=label)
        for mark, line in MARKS.items():
            if math.isfinite(run.onsets[mark]):
                axis.axvline(run.onsets[mark], color="0.25", linestyle=line, linewidth=1,
                             label=TAUS[mark])
        dress(axis, title, scale)
    return figure, axes


def heat(axis, cells, columns, rows, colors, **more):
    """Cells (rows, columns) as colours, with their names, of columns at most 12."""
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", **more,
                        cmap=mpl.colors.LinearSegmentedColormap.from_list("", colors, bad="0.65"))
    shown = range(0, len(columns), -(-len(columns) // 12))
    axis.set_xticks(shown, [columns[k] for k in shown])
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return image


def save(figure, path, title):
    """Write a figure, whole or not at all, with its title and one legend above; close it."""
    handles = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    widths = [len(text) + 9 for text in handles]            # in characters, 12.5 an inch
    fits = [n for n in range(2, len(widths) + 1) if 12.5 * figure.get_figwidth() > sum(
        max(part) for part in np.array_split(widths, n))]
    figure.legend(handles.values(), handles, loc="outside upper center", title=title,
                  title_fontsize="large", ncols=max(fits, default=1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write(path, buffer.getvalue())


def plot_run(run, path, rows=(FOUR,)):
    """Panels of one run, the study's four: train solid, held-out dashed, controls, onsets."""
    save(panels(run, list(rows), (2.75 * len(rows[0]) + 2, 2.6 * len(rows) + 1.4))[0], path,
         words(run.name) + f"; features: {run.space}" * bool(run.space))


def plot_metrics(run, path, columns=5):
    """Every metric of PANELS that the run has, through training, with its controls."""
    names = [name for name, panel in PANELS.items() if name not in LEVELS and any(
        len(run.column(column)[0]) for column in panel[2].split())]
    names += [""] * (-len(names) % columns)
    plot_run(run, path, [names[k:k + columns] for k in range(0, len(names), columns)])


def plot_levels(run, path):
    """Loss by noise level, the perfect memorizer's too, and where held-out loss turns."""
    names = list(LEVELS)
    figure, axes = panels(run, [names[:5], names[5:]], (13, 5.4))
    for name, axis in axes.items():
        loss = run.column(f"heldout_loss_{name}")[1]
        if math.isfinite(run.onsets[name]):
            axis.plot(run.onsets[name], loss.min(), "v", color="0.25", label="held-out loss turns")
        if len(loss):                           # the first values, of no skill yet, may lie above
            top = min(axis.get_ylim()[1], 1.1 * max(3 * np.median(loss), loss[-1]))
            axis.set_ylim(-0.06 * top, top)
    save(figure, path, f"{words(run.name)}: loss by noise level t (0: no noise, 1: noise alone)")


def plot_hump(run, path):
    """The study's panels; below, what the samples are: sharp or averages; and their spectrum."""
    figure, axes = panels(run, [[*FOUR, "power"], ["sharpness", "contrast", "sw_replaced",
                                                   "mixture", "power"]], (16, 6.4))
    steps, values = run.column("sw_SPACE_heldout")
    places = {int(np.argmax(steps == best_fidelity(run)[1])): "best", len(steps) - 1: "end"}
    rise = values - np.maximum(values[min(places)], np.minimum.accumulate(values[::-1])[::-1])
    if rise[min(places):].max() > 0.1 * values[min(places)]:
        places[min(places) + int(rise[min(places):].argmax())] = "hump"
    power = {row.get("name") or number(row["step"]): np.array(
        [number(v) for k, v in row.items() if k.startswith("power_")])
        for row in run.tables["spectrum"]}
    shown = [(steps[k], f"{places[k]}: step {steps[k]:,.0f}", color, "o-") for k, color in zip(
        sorted(places), palette(len(places)), strict=True) if steps[k] in power]
    for key, label, color, line in [*shown, ("heldout", "held-out images", GREEN, "--")]:
        ratio = power[key] / power["training"]
        axes["power"].plot(np.arange(1, len(ratio)), ratio[1:], line, color=color, label=label)
        for name in set(axes) - {"power"} if line == "o-" else ():
            axes[name].plot(key, 0, "^", color=color, clip_on=False, zorder=9,
                            transform=axes[name].get_xaxis_transform())
    axes["power"].axhline(1, color=RED, linewidth=1.1)
    axes["power"].set(title="power over training images'", xlabel="cycles per image")
    save(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_twins(run, path):
    """Agreement of two models trained on other images, its null, copies and distances."""
    for name in [name for name in run.tables if name.startswith("twin_")]:
        twins = Run(f"{run.name} and {name[5:]}", {}, {}, columns_of(run.tables[name], name))
        plot_run(twins, path.with_name(f"{path.stem}_{name[5:]}.png"),
                 [["agreement", "copy", "twins"]])


def plot_planted(run, path):
    """What each measure of copying catches of planted copies, and of held-out images."""
    rows = run.tables["planted"]
    names = {"copy_ratio_quarter": "d1/d2 < 1/4", "copy_ratio": "d1/d2 < 1/3", "copy_ratio_half":
             "d1/d2 < 1/2", "not_authentic": "not authentic", "sscd_ratio": "SSCD > .6"}
    names = {column: label for column, label in names.items() if column in rows[0]}
    cells = np.array([[number(row[column]) for column in names] for row in rows])
    figure, axis = plt.subplots(figsize=(1.5 * len(names) + 2, 0.4 * len(rows) + 1.2))
    heat(axis, cells, [*names.values()], [row["planted"] for row in rows], ["white", RED],
         vmin=0, vmax=1)
    for place, value in np.ndenumerate(cells):
        axis.text(*place[::-1], f"{value:.0%}", ha="center", va="center")
    save(figure, path, f"{words(run.name)}: share called copies")


def plot_copier(run, path):
    """Which metric tells a copier: each through training, between its two controls as 0 and 1."""
    rows, steps = {}, [f"{step:,.0f}" for step in run.metrics["step"]]
    for title, _, columns in PANELS.values():
        for column in columns.split():
            zero, one = (control(run, key, column) for key in CONTROLS)
            values = run.metrics.get(column.replace("SPACE", run.space))
            label = style_of(column)[2]
            if values is not None and abs(one - zero) > 0 and label in (None, "train", "held-out"):
                far = abs(one - zero) > 0.1 * max(abs(zero), abs(one))
                name = (f"{title} to {label}" if label else title) + ("" if far else " (*)")
                rows.setdefault(name, (values - zero) / (one - zero) if far else values * math.nan)
    rows = dict(sorted(rows.items(), key=lambda r: max([-1, *np.flatnonzero(~(r[1] >= 0.5))])))
    figure, axis = plt.subplots(figsize=(9.5, 0.33 * len(rows) + 2))
    image = heat(axis, np.ma.masked_outside([*rows.values()], -0.3, 1.3), steps, [*rows],
                 [GREEN, "#f4f4f4", RED], vmin=0, vmax=1)
    axis.set(xlabel="training step; grey: like neither; *: the two controls are too close to tell")
    figure.colorbar(image, aspect=30, ticks=[0, 0.5, 1]).set_ticklabels(
        ["as held-out\nimages", "halfway", "as training\nimages"])
    save(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_denoisers(run, path, levels=(1, 3, 5, 8)):
    """How far the network's x0 is from each reference, and which is nearest: where and when."""
    rows, names = run.tables["denoisers"], list(REFERENCES)
    inputs = {"path": "its own sampling path", "heldout": "noised held-out images"}
    steps = sorted({number(row["step"]) for row in rows})
    cells = np.full((len(inputs), len(names), 10, len(steps), 3), math.inf)
    for row in rows:
        if row["inputs"] in inputs and row["reference"] in names:
            place = ([*inputs].index(row["inputs"]), names.index(row["reference"]),
                     int(number(row["level"])), steps.index(number(row["step"])))
            cells[place] = [number(row[column]) for column in ("median", "low", "high")]
    figure, axes = plt.subplot_mosaic([[*levels], ["path", "path", "heldout", "heldout"]],
                                      figsize=(13, 7.2))
    for level in levels:
        for k, (name, color) in enumerate(REFERENCES.items()):
            median, low, high = cells[0, k, level].T
            axes[level].plot(steps, median, color=color, label=name)
            axes[level].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        dress(axes[level], f"{LEVELS[f'level{level}'][0]}, its own path", "log")
    axes[levels[0]].set_ylabel("rms distance to the network's x0")
    for k, (name, text) in enumerate(inputs.items()):
        heat(axes[name], cells[k, ..., 0].argmin(0), [f"{step:,.0f}" for step in steps],
             [title for title, _, _ in LEVELS.values()], [*REFERENCES.values()], origin="lower",
             vmin=0, vmax=len(names) - 1)
        axes[name].set_title(f"nearest reference on {text}")
    figure.supxlabel("training step", fontsize="medium")
    save(figure, path, f"{words(run.name)}: which denoiser is the network?")


def plot_ratios(run, path, steps=6):
    """The whole curve of d1/d2: the share of samples below each value, and of the controls."""
    figure, axis = plt.subplots(figsize=(7, 4.8))
    files = pick(run, steps)
    curves = [(file, f"step {int(file.stem):,}", color, "-")
              for file, color in zip(files, palette(len(files)), strict=True)]
    curves += [(run.path / f"neighbours/{name}.npz", label, color, "--") for name, label, color in (
        ("heldout", "held-out images", GREEN), ("exact", "perfect memorizer", RED),
        ("leave_one_out", "training images, left out", GREY))]
    for file, label, color, line in [curve for curve in curves if curve[0].exists()]:
        ratios = np.sort(read_neighbours(file, "ratios"))
        axis.step(np.maximum([0, *ratios, 1], 0.02), [*np.arange(len(ratios) + 1) / len(ratios), 1],
                  where="post", label=label, color=color, linestyle=line)
    for value in (1 / 4, 1 / 3, 1 / 2):
        axis.axvline(value, color="0.75", linewidth=0.8, zorder=0)
    dress(axis, "", "share", "d1/d2 (lines: 1/4, 1/3, 1/2; values below .02 are drawn at .02)")
    axis.set(ylabel="share of images below", xlim=(0.0185, 1))
    save(figure, path, words(run.name))


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step; [] where it has no folder."""
    return sorted((run.path / "neighbours" / run.set).glob("[0-9]*.npz")) if run.path else []


def pick(run, count):
    """At most `count` neighbours files, evenly along log step and copy ratio: both phases seen."""
    files = snapshot_files(run)
    steps = np.log([float(file.stem) for file in files])
    copies = [np.mean(read_neighbours(file, "ratios") < 1 / 3) for file in files]
    way = (steps - steps[0]) / max(np.ptp(steps), 1e-9) + np.maximum.accumulate(copies)
    return [files[k] for k in sorted({int(np.abs(way - place).argmin())
                                      for place in np.linspace(way[0], way[-1], count)})]


def strip(axis, file, top, label, count=10):
    """A row of a neighbours file's pictures, d1/d2 of each, and their nearest training images."""
    samples, nearest, ratios = (read_neighbours(file, k)[:count]
                                for k in ("samples", "nearest", "ratios"))
    axis.text(0, top - 0.12, f"{label}, d1/d2 (red: a copy), nearest training images")
    for k, ratio in enumerate(ratios):
        for picture, y in ((samples[k], top), (nearest[k], top + 1.4)):
            axis.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)), interpolation="nearest",
                        extent=(1.1 * k, 1.1 * k + 1, y + 1, y))
        color, weight, width = (RED, "bold", 2.5) if ratio < 1 / 3 else ("0.3", None, 0)
        axis.text(1.1 * k + 0.5, top + 1.05, f"{ratio:.2f}", ha="center", va="top",
                  fontsize="small", color=color, weight=weight)
        axis.add_patch(plt.Rectangle((1.1 * k, top), 1, 1, fill=False, edgecolor=color,
                                     linewidth=width))
    axis.set(xlim=(-0.05, 1.1 * len(ratios)), ylim=(top + 2.5, -0.6))
    axis.set_axis_off()


def plot_samples(run, path, steps=5):
    """Samples at several steps, a column from the same noise, above nearest training images."""
    files = pick(run, steps)
    figure, axis = plt.subplots(figsize=(9, 2.6 * len(files) + 0.5))
    for row, file in enumerate(files):
        strip(axis, file, 3.2 * row, f"step {int(file.stem):,}: samples")
    save(figure, path, words(run.name))


def plot_film(run, path, frames=13):
    """A film through training: samples and held-out images as in `strip`, loss and copy ratio.

    Of as many colours as 500 kB allow; its last frame stays for 2.5 seconds.
    """
    pictures, files = [], pick(run, frames)
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 8,
                         "figure.constrained_layout.use": False}):
        for file in files:
            figure = plt.figure(figsize=(6.72, 3.36), dpi=100)
            draw_frame(figure, run, file)
            figure.canvas.draw()
            pictures.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
            plt.close(figure)
    for colors in (256, 128, 64, 32, 16):
        first, *others = [picture.quantize(colors) for picture in pictures]
        buffer = io.BytesIO()
        first.save(buffer, "GIF", save_all=True, append_images=others, loop=0,
                   duration=[500] * len(others) + [2500])
        if buffer.tell() < 500_000:
            break
    write(path, buffer.getvalue())


def draw_frame(figure, run, file):
    """A frame of the film: the pictures of a neighbours file, and where on the curves it is."""
    axis = figure.add_axes((0.01, 0, 0.73, 0.9), anchor="N")
    strip(axis, file, 0, "samples")
    held = run.path / "neighbours/heldout.npz"
    if held.exists():
        with np.load(held) as arrays:               # older files hold distances alone
            shown = "samples" in arrays
        if shown:
            strip(axis, held, 3.1, "held-out images")
    figure.text(0.012, 0.92, f"training step {int(file.stem):,}", fontsize=12, weight="bold")
    for place, name in ((0.57, "loss"), (0.1, "copy")):
        small = figure.add_axes((0.79, place, 0.2, 0.34))
        for column in PANELS[name][2].split():
            curve(small, [run], column, BLUE)
        small.axvline(int(file.stem), color=RED, linewidth=2, alpha=0.7)
        dress(small, *PANELS[name][:2])


def plot_sweep(factor, groups, path, study=None):
    """The study's panels of a sweep, a colour per value: by raw step and by normalised time.

    study: the study's own sweep; thin, grey, on a scale of its own: for its shape alone.
    """
    label, _, formula, normalised = factor_of(factor)
    times = {"training step": lambda value: 1}
    if normalised:
        times[f"T = {formula}"] = lambda value: normalised(value, min(groups))
    figure, axes = plt.subplots(len(times), 4, figsize=(13, 3 * len(times) + 0.9), squeeze=False)
    for row, (time, scale) in zip(axes, times.items(), strict=True):
        for axis, name in zip(row, FOUR, strict=True):
            title, kind, columns = PANELS[name]
            for column in columns.split():
                line, _, text = style_of(column)
                for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
                    curve(axis, runs, column, color, scale(value),
                          label_of(factor, value) if line == "-" else "")
                axis.plot([], [], color="0.25", linestyle=line, label=text)
            if study:
                draw_behind(axis, study, PANELS[name], scale)
            dress(axis, title, kind, time)
    fixed = ", ".join(label_of(k, v) for k, v in groups.fixed.items())
    others = f"; the widest of {groups.others + 1} such sweeps" * bool(groups.others)
    save(figure, path, words(label + f"; fixed: {fixed}" * bool(fixed) + others))


def draw_behind(axis, study, panel, scale):
    """The study's curves behind a panel's, thin and grey, with an axis of their own."""
    behind = axis.twinx()
    for column, (value, runs) in itertools.product(panel[2].split(), study.items()):
        curve(behind, runs, column, "0.75", scale(value), "")
    plt.setp(behind.lines, linewidth=0.9)
    behind.set(yscale="log" if panel[1] == "log" else "linear", zorder=-1)
    behind.yaxis.set_visible(False)
    axis.patch.set_visible(False)
    axis.plot([], [], color="0.75", label="the study, not to this scale: compare shapes")


def plot_onset(factor, groups, path, runs):
    """The onset by each definition against the factor, with its 95 % interval and power laws.

    An arrow: the onset lies beyond. runs: all runs, for the scatter of the slope's interval.
    """
    numbers = all(type(v) in (int, float) and 0 < v < math.inf for v in groups)
    names = [name for name in TAUS if "level" not in name and any(
        math.isfinite(run.onsets[name]) for group in groups.values() for run in group)]
    figure, axis = plt.subplots(figsize=(9, 5.4))
    for k, (name, color) in enumerate(zip(names, palette(len(names)), strict=True)):
        style = {"color": color, "marker": "osDPX*"[k % 6], "linewidth": 1}
        for at, (value, group) in enumerate(groups.items()):
            x = value * 1.02**k if numbers else at + 0.04 * k
            for point in filter(None, map(onset(name), group)):
                step, spread = math.exp(point.value), math.exp(1.96 * math.sqrt(point.variance))
                error = [[step - step / spread], [step * spread - step]]
                axis.errorbar(x, step, error if point.bound == 0 else 0.2 * step, **style,
                              lolims=point.bound > 0, uplims=point.bound < 0)
        slope = exponent(groups, runs, onset(name))
        law = f": slope {slope.value:.2f} [{slope.low:.2f}, {slope.high:.2f}]"
        axis.plot([], [], label=TAUS[name] + law * math.isfinite(slope.value), **style)
        if math.isfinite(slope.value):
            ends = np.array([min(groups), max(groups)])
            axis.plot(ends * 1.02**k, math.exp(slope.intercept) * ends**slope.value, color=color,
                      linewidth=1)
    dress(axis, "arrow: earlier or later than that", "log", factor_of(factor).label)
    axis.set(ylabel="onset of memorization, training step", xscale="log" if numbers else "linear")
    axis.set_xticks([*groups] if numbers else range(len(groups)),
                    [label_of(factor, v).split(" = ")[1] for v in groups])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    save(figure, path, f"{factor_of(factor).label}: onset")


# A figure of a run: its file, what draws it, the columns and tables it needs (their beginnings).
RUN_FIGURES = (("run_{}.png", plot_run, "step"), ("metrics_{}.png", plot_metrics, "auth_share"),
               ("levels_{}.png", plot_levels, "heldout_loss_level"),
               ("samples_{}.png", plot_samples, "neighbours"),
               ("ratios_{}.png", plot_ratios, "neighbours"),
               ("film_{}.gif", plot_film, "neighbours"),
               ("denoisers_{}.png", plot_denoisers, "denoisers"),
               ("hump_{}.png", plot_hump, "spectrum sw_"),
               ("copier_{}.png", plot_copier, "training sw_"),
               ("twins_{}.png", plot_twins, "twin_"), ("planted_{}.png", plot_planted, "planted"))


def draw_all(runs, found, folder, study=None):
    """Every figure that runs and their sweeps (found, see sweeps) have the data for.

    Of several seeds the first gets all figures, the others their curves. study: the study's own
    sweeps, to be drawn beside these.
    """
    first = {}
    for run in runs:
        data = [*run.log, *run.metrics, *(name for name, rows in run.tables.items() if rows),
                *(f"{name} control" for name in run.controls),
                "neighbours" * bool(snapshot_files(run))]
        for name, draw, needs in RUN_FIGURES:
            if (name.startswith("run") or first.setdefault(run.key(), run) is run) and all(
                    any(key.startswith(need) for key in data) for need in needs.split()):
                draw(run, folder / name.format(run.stem))
    for factor, groups in found.items():
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png", (study or {}).get(factor))
        plot_onset(factor, groups, folder / f"onset_{factor}.png", runs)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

# The first words of the files that this script, or an earlier version of it, writes.
FIGURES = {"run", "metrics", "levels", "samples", "ratios", "film", "denoisers", "hump", "copier",
           "twins", "planted", "sweep", "onset", "tau", "novelty"}


def drawn_files(folder):
    """{what an earlier call may have written for a folder, its families included: its inode}."""
    files = (folder.parent if folder.parent.name == "figures" else folder).rglob("*.*")
    return {p: p.stat().st_ino for p in files if p.name in ("claims.md", "summary.csv", "runs.csv")
            or p.suffix in (".png", ".gif") and p.stem.split("_")[0] in FIGURES}


def report(root, study):
    """Draw, judge and print everything below a folder; the messages of unreadable runs.

    A file written anew has a new inode; what an earlier call left and this one did not is removed,
    but not beside tables, from which pictures cannot be drawn again.
    """
    damaged = []
    groups = find_runs(root, damaged) if root else {Path("paper_figures"): study_runs()}
    old = {file: inode for folder, runs in groups.items() if runs[0].path
           for file, inode in drawn_files(folder).items()}
    study = study and root is not None
    for folder, runs in groups.items():
        found = sweeps(runs)
        write_tables(runs, found, folder, study)
        draw_all(runs, found, folder, sweeps(study_runs()) if study else {})
        print(f"{folder}: {len(runs)} run{'s' * (len(runs) > 1)} drawn")
        print("\n".join(describe(runs[0])) if len(runs) == 1 else (
            folder / "claims.md").read_text(encoding="utf-8"))
        print("\n".join(keep_line(run) for run in runs if run.metrics))
    for file, inode in old.items():
        if file.exists() and file.stat().st_ino == inode:
            file.unlink()
    return damaged


def main(argv=None):
    """Draw and judge everything below a folder.

    Raises SystemExit: 2 on bad input, 1 where a run was left out, 130 when interrupted.
    """
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("root", nargs="?", help="a run folder, or a folder with runs, or with runs.csv")
    p.add_argument("--paper", action="store_true", help="set the study's own curves beside these "
                   "runs; without a folder, draw and judge them alone, into paper_figures/")
    args = p.parse_args(argv)
    if not (args.root or args.paper):
        p.error("a folder, or --paper")
    for stream in (sys.stdout, sys.stderr):         # names of runs that the locale cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        damaged = report(args.root, args.paper)
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    for message in damaged:
        print(f"warning: {message}; left out", file=sys.stderr)
    if damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
