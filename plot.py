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
import math
import sys
import zipfile
import zlib
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from claims import describe, keep_line, write, write_tables
from curves import FACTORS, TAUS, PlotError, factor_of, find_runs, label_of, study_runs, sweeps

mpl.use("Agg")
mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.4,
                     "legend.frameon": False, "figure.constrained_layout.use": True,
                     "savefig.dpi": 160})

# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

LOWEST_LOSS = 1e-4          # where the axes of the loss by noise level end


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step."""
    return sorted((run.path / "neighbours" / run.set).glob("[0-9]*.npz")) if run.path else []


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, max(count, 1))]


def draw(axis, runs, column, scale=1.0, **style):
    """The mean over seeds of a column against step * scale, and the seeds' range as a band."""
    tables = [dict(zip(*run.column(column), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    if not steps:
        return
    values = np.array([[t[s] for s in steps] for t in tables])
    x = np.array(steps) * scale
    axis.plot(x, values.mean(0), marker="." if len(steps) == 1 else None, **style)
    if len(runs) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=style.get("color"), alpha=0.15,
                          linewidth=0)


def four_panels(axes, runs, color, scale=1.0, label=None):
    """Loss, copy ratio with its null, sliced Wasserstein, FID: train solid, held-out dashed."""
    for axis, column in ((axes[0], "{}_loss"), (axes[2], "sw_SPACE_{}"),
                         (axes[3], "fid_SPACE_{}")):
        draw(axis, runs, column.format("train"), scale, color=color, label=label)
        draw(axis, runs, column.format("heldout"), scale, color=color, linestyle="--")
    draw(axes[1], runs, "copy_ratio", scale, color=color, label=label)
    draw(axes[1], runs, "null_copy_ratio", scale, color=color, linestyle=":", linewidth=1)


def short(value, _=None):
    """A tick's label: 0.05, 20, 1k, 2.5k, 100k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def log_ticks(axis):
    """Readable ticks on a log axis: 1, 2, 5 where it spans less than two decades, else 1 only."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(short))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def dress(axes, space, xlabel):
    """Titles, scales and labels of a row of four panels."""
    unit = {"inception": "Inception features", None: "not measured"}.get(space, space)
    for axis, title, scale in zip(axes, (
            "loss", "copy ratio (d1/d2 < 1/3)", f"sliced Wasserstein, {unit}", f"FID, {unit}"),
            ("log", "linear", "log", "log"), strict=True):
        axis.set(title=title, xlabel=xlabel, xscale="log", yscale=scale)
        log_ticks(axis.xaxis)
        if scale == "log":
            log_ticks(axis.yaxis)
    axes[1].set_ylim(-0.03, 1.03)


def line_key(figure, handles=()):
    """One legend above the panels: the runs' colours, then what the line styles mean."""
    styles = [mpl.lines.Line2D([], [], color="0.3", linestyle=s, label=text) for s, text in
              (("-", "train"), ("--", "held-out"), (":", "null: held-out images"))]
    figure.legend(handles=[*handles, *styles], loc="outside upper center",
                  ncols=len(handles) + 3)


def plot_run(run, path):
    """Four panels of one run, with tau_mem by its lowest held-out loss and by copy ratio .01."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), sharex=True)
    four_panels(axes, [run], "C0")
    dress(axes, run.space, "step")
    onset = run.onsets
    for axis in axes:
        for name, style in (("heldout_min", (0, (1, 1))), ("copy_01", (0, (5, 2)))):
            if math.isfinite(onset[name]):
                axis.axvline(onset[name], color="C3", linewidth=1, linestyle=style)
    marks = [mpl.lines.Line2D([], [], color="C3", linewidth=1, linestyle=style, label=TAUS[name])
             for name, style in (("heldout_min", (0, (1, 1))), ("copy_01", (0, (5, 2))))]
    line_key(figure, marks)
    save(figure, path)


def plot_sweep(factor, groups, path):
    """Four panels of a sweep, a colour a value: against raw steps and, below, normalised time."""
    rows = 2 if factor in FACTORS and FACTORS[factor].normalised else 1
    figure, axes = plt.subplots(rows, 4, figsize=(13, 3.1 * rows), squeeze=False, sharey="col")
    colors = palette(len(groups))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(colors, groups.items(), strict=True):
        four_panels(axes[0], runs, color)
        if rows == 2:
            scale = FACTORS[factor].normalised(value, min(groups))
            four_panels(axes[1], runs, color, scale)
    dress(axes[0], space, "step")
    if rows == 2:
        formula = {"n": "step x N_min / N", "batch": "step x B / B_min",
                   "lr": "step x lr / lr_min"}[factor]
        dress(axes[1], space, f"normalised time T = {formula}")
    line_key(figure, [mpl.lines.Line2D([], [], color=c, label=label_of(factor, v))
                      for c, v in zip(colors, groups, strict=True)])
    save(figure, path)


def plot_samples(run, path, images=8, columns=6):
    """Samples from the same noise at several steps, each beside its nearest training image."""
    files = snapshot_files(run)
    chosen = {*np.linspace(0, len(files) - 1, columns).round().astype(int)}
    files = [files[k] for k in sorted(chosen)]
    zoom = max(1, 64 // read_neighbours(files[0], "samples").shape[1])
    size = zoom * read_neighbours(files[0], "samples").shape[1]
    cell, pair = round(1.06 * size), round(2.3 * size)      # from a picture, a pair to the next
    canvas = np.full((images * cell, len(files) * pair, 3), 255, np.uint8)
    figure = plt.figure(figsize=(max(6.0, 1.5 * len(files)), 0.7 * images + 0.7), layout="none")
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98), anchor="NW")
    for column, file in enumerate(files):
        ratios = read_neighbours(file, "ratios")
        axis.text(column * pair, -0.12 * size, f"step {int(file.stem)}", fontsize=8)
        for k, name in enumerate(("samples", "nearest")):
            left = column * pair + k * cell
            for row, picture in enumerate(read_neighbours(file, name)[:images]):
                top = row * cell
                canvas[top:top + size, left:left + size] = picture.repeat(zoom, 0).repeat(zoom, 1)
                if name == "samples" and ratios[row] < 1 / 3:
                    axis.add_patch(plt.Rectangle((left, top), size, size, fill=False,
                                                 edgecolor="C3", linewidth=2.5))
    axis.text(0, -0.75 * size, f"{run.name}: sample | nearest training image", fontsize=8)
    axis.text(0, -0.45 * size, "Red: a copy (d1/d2 < 1/3). A row has the same noise.", fontsize=8)
    axis.imshow(canvas, interpolation="nearest")
    axis.set(xlim=(-4, canvas.shape[1]), ylim=(canvas.shape[0], -size))
    axis.set_axis_off()
    save(figure, path)


def plot_levels(run, path):
    """Train and held-out loss in ten slices of t: where in the noise memorization shows."""
    figure, axes = plt.subplots(2, 5, figsize=(13, 4.6), sharex=True)
    for k, axis in enumerate(axes.flat):
        draw(axis, [run], f"train_loss_level{k}", color="C0", label="train")
        draw(axis, [run], f"heldout_loss_level{k}", color="C0", linestyle="--", label="held-out")
        _, floor = run.column(f"floor_level{k}")
        if len(floor):
            axis.axhline(max(floor[-1], LOWEST_LOSS), color="C1", linestyle="--", linewidth=2.5,
                         clip_on=False, label=f"perfect memorizer ({LOWEST_LOSS:g} or less: below)")
        side = {0: ", least noise", 9: ", most noise"}.get(k, "")
        axis.set(xscale="log", yscale="log", title=f"t in [{k / 10:.1f}, {(k + 1) / 10:.1f}]{side}")
        axis.set_ylim(bottom=LOWEST_LOSS)
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, path)


def plot_ratios(run, path, columns=6):
    """The whole curve of d1/d2: the share of samples below each value, and of the controls."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    names = [p.stem for p in snapshot_files(run)]
    chosen = {*np.linspace(0, len(names) - 1, columns).round().astype(int)}
    curves = [(names[k], f"step {int(names[k])}", {"color": color})
              for k, color in zip(sorted(chosen), palette(len(chosen)), strict=True)]
    curves += [("heldout", "held-out images", {"color": "0.2", "linestyle": ":"}),
               ("leave_one_out", "training images, left out", {"color": "0.6", "linestyle": ":"}),
               ("exact", "perfect memorizer", {"color": "C3", "linestyle": "--"})]
    for name, label, style in curves:
        file = run.path / f"neighbours/{name}.npz"
        if file.exists():
            ratios = np.sort(read_neighbours(file, "ratios"))
            axis.step(ratios, (np.arange(len(ratios)) + 1) / len(ratios), where="post",
                      label=f"{label} ({len(ratios)})", **style)
    for threshold in (1 / 4, 1 / 3, 1 / 2):
        axis.axvline(threshold, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel="d1/d2 (lines: 1/4, 1/3, 1/2)", ylabel="share of images below", xlim=(0, 1))
    axis.legend(fontsize=7)
    save(figure, path)


def plot_tau(factor, groups, path):
    """tau_mem by each definition against the factor, with log-log fits; not drawn if none known."""
    onsets = [tau for runs in groups.values() for run in runs for tau in run.onsets.values()]
    if not np.isfinite(onsets).any():
        return
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for color, marker, (name, text) in zip(palette(5), "os^Dv", TAUS.items(), strict=False):
        points = [(value, run.onsets[name]) for value, runs in groups.items() for run in runs]
        points = np.array([p for p in points if math.isfinite(p[1])])
        if not len(points):
            continue
        fit = power_law(points)
        axis.loglog(*points.T, marker, color=color, markersize=5, label=text if not fit else
                    f"{text}: slope {fit[0]:.2f}" + (f" ± {fit[2]:.2f}" if fit[2] else ""))
        if fit:
            x = np.array([points[:, 0].min(), points[:, 0].max()])
            axis.loglog(x, np.exp(fit[1]) * x**fit[0], color=color, linewidth=1)
    ticks = sorted(groups)
    axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    log_ticks(axis.yaxis)
    axis.set(xlabel=factor_of(factor).label, ylabel="onset of memorization, step")
    figure.legend(fontsize=8, loc="outside right center")
    save(figure, path)


def plot_novelty(factor, groups, path):
    """Fidelity against novelty through training, a curve a value of the factor."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
        for k, run in enumerate(runs):
            (_, copies), (_, distance) = run.column("copy_ratio"), run.column("sw_SPACE_heldout")
            if len(copies) == len(distance) and len(copies):
                axis.plot(1 - copies, distance, ".-", color=color, markersize=4,
                          label=None if k else label_of(factor, value))
                axis.plot(1 - copies[-1], distance[-1], "o", color=color, markersize=7)
    axis.set(xlabel="novelty: 1 - copy ratio", yscale="log",
             ylabel=f"sliced Wasserstein to held-out, {space}  (lower is better)")
    log_ticks(axis.yaxis)
    axis.set_title("through training; the large dot is the end", fontsize=9)
    axis.legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    """Write a figure, whole or not at all, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write(path, buffer.getvalue())


def power_law(points):
    """Least-squares line through log-log points (n, 2): (slope, intercept, slope's standard error).

    The error is None for two values of x. None where there are fewer than two.
    """
    x, y = np.log(points).T
    if len(np.unique(x)) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    if len(x) < 3:
        return slope, intercept, None
    residual = y - slope * x - intercept
    error = math.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean())**2).sum())
    return slope, intercept, error


def draw_all(runs, found, folder, study=None):
    """All figures of comparable runs and of their sweeps (found, see sweeps) into a folder.

    study: the study's own sweeps, to be drawn beside these.
    """
    for run in runs:
        plot_run(run, folder / f"run_{run.stem}.png")
        plot_levels(run, folder / f"levels_{run.stem}.png")
        if snapshot_files(run):
            plot_samples(run, folder / f"samples_{run.stem}.png")
            plot_ratios(run, folder / f"ratios_{run.stem}.png")
    for factor, groups in found.items():
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png")
        plot_tau(factor, groups, folder / f"tau_{factor}.png")
        plot_novelty(factor, groups, folder / f"novelty_{factor}.png")


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
