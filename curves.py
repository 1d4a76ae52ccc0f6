"""Runs as curves: what training, sampling and measuring left in tables, read from run folders.

A Run is one training run with one set of samples. It comes from a run folder, from a table
runs.csv that plot.py wrote, or from the study's own curves; runs that differ in one option make a
sweep. Nothing here draws, and nothing needs torch.

tau_mem, the step at which memorization starts, has several definitions (TAUS), each interpolated
between evaluations in log step. Copies are counted above the null.
"""

import collections
import csv
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np

STUDY = Path(__file__).parent / "assets/paper_curves.csv"   # digitised from the study's figures
STUDY_COLUMNS = {"copy_score": "copy_ratio", **{f"{d}_{s}": f"{d}_inception_{s}" for d in (
    "sw", "fid") for s in ("train", "heldout")}}
# Options that do not make another run; args.json says so itself since it has an entry "free".
FREE = {"out", "steps", "images", "device", "compile", "save_minutes"}

Factor = collections.namedtuple("Factor", "label short formula normalised")
# What is known of a factor: T = step * normalised(value, lowest value) is the study's normalised
# time. Any other option can be swept as well; see factor_of.
FACTORS = {"n": Factor("training images N", "N", "step x N_min / N", lambda v, low: low / v),
           "width": Factor("base width", "width", None, None),
           "batch": Factor("batch size B", "B", "step x B / B_min", lambda v, low: v / low),
           "lr": Factor("learning rate", "lr", "step x lr / lr_min", lambda v, low: v / low)}
TAUS = {"heldout_min": "held-out loss lowest", "heldout_25": "held-out loss 25 % up",
        "copy_01": "copy ratio .01", "copy_10": "copy ratio .1", "copy_50": "copy ratio .5",
        "denoisers": "nearer to the memorizer than to any other denoiser",
        **{f"level{k}": f"held-out loss lowest, t {k / 10:.1f} to {(k + 1) / 10:.1f}"
           for k in range(10)}}
COPY_LEVELS = {"copy_01": 0.01, "copy_10": 0.1, "copy_50": 0.5}     # above the null

# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class PlotError(Exception):
    """Something the user gave is wrong; the message is one line."""


def read_rows(path):
    """A CSV file as a list of {column: text}; [] if absent. PlotError where it is not readable."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError, csv.Error) as error:
        raise PlotError(f"{path}: not readable ({error})") from None
    return [{k: v or "" for k, v in row.items() if k is not None} for row in rows]


def number(text):
    """float(text), or nan."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def value_of(cell):
    """An option as a number, True, False, None or a word; a list as one word."""
    try:
        cell = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    return " ".join(map(str, cell)) if isinstance(cell, (list, dict)) else cell


def columns_of(rows, path):
    """Rows as {column: float array}, by rising step, nan where a cell is no number.

    Of several rows of one step the last counts. PlotError where no row has a step.
    """
    by_step = {s: row for row in rows if 0 <= (s := number(row.get("step"))) < math.inf}
    if rows and not by_step:
        raise PlotError(f"{path}: no column 'step' with numbers")
    return {key: np.array([number(by_step[s].get(key)) for s in sorted(by_step)])
            for key in (rows[0] if rows else {})}


class Run:
    """One run with one set of samples: its options, its curves, and what follows from them.

    name, and stem, its form in file names; path of its folder, None where it comes from a table;
    set, the name of the sample set; options {name: value}, sampling settings among them as
    "setting_eta"; log, metrics {column: float array}; controls {name: {column: float}}; tables
    {stem of a CSV file: its rows}; space, the features that distances are taken in.
    """

    def __init__(self, name, options, log, metrics, path=None, set="", **rest):
        self.name, self.options, self.path, self.set = name, options, path, set
        self.log, self.metrics, self.seed = log, metrics, options.get("seed", 0)
        self.controls, self.tables = rest.get("controls", {}), rest.get("tables", {})
        self.free, self.defaults = FREE | rest.get("free", FREE), rest.get("defaults", {})
        self.parameters = number(rest.get("parameters"))
        spaces = [c[3:-6] for c in metrics if c.startswith("sw_") and c.endswith("_train")
                  and not c.startswith("sw_error_")]
        self.space = min(spaces, key=lambda s: (s != "inception", s == "pixels", s), default=None)
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.stem = name if name == plain[:120] else f"{plain[:110]}-{digest}"

    def column(self, name):
        """(steps, values) of a column of log.csv or metrics.csv, finite values at steps > 0.

        "SPACE" in the name stands for run.space. Empty where there is no such column.
        """
        name = name.replace("SPACE", self.space or "SPACE")
        table = self.log if name in self.log else self.metrics
        if name not in table:
            return np.array([]), np.array([])
        keep = np.isfinite(table[name]) & (table["step"] > 0)
        return table["step"][keep], table[name][keep]

    @functools.cached_property
    def onsets(self):
        """{name of TAUS: step}; inf not reached, nan not measured. See onsets_of."""
        return onsets_of(self)

    @property
    def last_step(self):
        """The last step in either table; nan without any."""
        return max((t["step"][-1] for t in (self.log, self.metrics) if t), default=math.nan)

    def key(self, *without):
        """What makes this run another run, as a tuple of pairs; seed and free options do not."""
        return tuple((k, v) for k, v in sorted(self.options.items())
                     if k not in self.free and k not in ("seed", *without))


def read_beside(folder):
    """The smaller tables of a folder: {stem: rows}."""
    return {p.stem: read_rows(p) for p in sorted(folder.glob("*.csv"))
            if p.stem in ("denoisers", "spectrum", "planted") or p.stem.startswith("twin_")}


def control_columns(rows):
    """Rows of controls.csv as {name: {column: float}}."""
    return {row.get("name", ""): {k: number(v) for k, v in row.items() if k not in ("run", "name")}
            for row in rows}


def read_folder(path):
    """A run folder as a list of Runs, one per set of samples. PlotError where damaged."""
    try:
        record = json.loads((path / "args.json").read_text(encoding="utf-8"))
        options, rest = ({k: value_of(v) for k, v in record[name].items()} if name in record
                         else {} for name in ("options", "defaults"))
        rest = {"defaults": rest, "free": {*record.get("free", ())},
                "parameters": record.get("parameters")}
        options["seed"] = options.get("seed", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PlotError(f"{path}/args.json: missing or damaged") from None
    log, sets = columns_of(read_rows(path / "log.csv"), path / "log.csv"), {}
    for row in read_rows(path / "metrics.csv"):
        sets.setdefault(row.get("set", ""), []).append(row)
    tables, runs = read_beside(path), []
    rest["controls"] = control_columns(read_rows(path / "controls.csv"))
    for name, rows in sets.items() if sets or not log else [("", [])]:
        settings = {k: value_of(v) for k, v in (rows or [{}])[0].items()
                    if k.startswith("setting_") and v}
        rest["tables"] = {stem: [r for r in table if r.get("name") or r.get("set", name) == name]
                          for stem, table in tables.items()}
        runs.append(Run("_".join(filter(None, (path.name, name))), options | settings, log,
                        columns_of(rows, path / "metrics.csv"), path, name, **rest))
    return runs


def read_table(path, rename=None):
    """A table with a row per run and step as Runs, one per value of all columns before `step`.

    rename {column: name here}. The smaller tables beside it have a column `run`. PlotError where
    there is no column `step`.
    """
    rows, groups = read_rows(path), {}
    if not rows or "step" not in rows[0]:
        raise PlotError(f"{path}: no column 'step'")
    heads = list(itertools.takewhile(lambda k: k != "step", rows[0]))
    for row in rows:
        groups.setdefault(tuple(row[k] for k in heads), []).append(
            {(rename or {}).get(k, k): v for k, v in row.items() if k not in heads})
    beside, runs = read_beside(path.parent), []
    controls = read_rows(path.parent / "controls.csv")
    for head, lines in groups.items():
        texts = dict(zip(heads, head, strict=True))
        name, set_ = texts.pop("run", "_".join(head)), texts.pop("set", "")
        options = {k: value_of(v) for k, v in texts.items()}
        curves = {k: v for k, v in columns_of(lines, path).items()
                  if k == "step" or np.isfinite(v).any()}
        tables = {stem: mine for stem, table in beside.items()
                  if (mine := [row for row in table if row.get("run") == name])}
        runs.append(Run(name, options, curves, curves, set=set_, tables=tables,
                        parameters=options.pop("parameters", None), controls=control_columns(
                            row for row in controls if row.get("run") == name)))
    return runs


@functools.lru_cache
def study_runs():
    """The study's own curves as Runs; what several of its figures show counts as repeats."""
    runs, seeds = read_table(STUDY, STUDY_COLUMNS), collections.Counter()
    for run in runs:
        run.options.pop("factor")
        run.name = run.stem = f"study_{run.name}"
        run.seed = run.options["seed"] = seeds[run.key()]
        seeds[run.key()] += 1
    return runs


def settle(runs):
    """Give every run the same options: what one lacks, at its default; settings if they matter.

    A sampling setting counts only where differently named sets of samples differ in it: the
    clipping that a process brings along does not.
    """
    free = set().union(*(run.free for run in runs))
    defaults = {k: v for run in reversed(runs) for k, v in run.defaults.items()}
    names = {k for run in runs for k in run.options} - free
    for name in sorted(k for k in names if k.startswith("setting_")):
        by_set = {}                             # the values in sets of one name
        for run in runs:
            by_set.setdefault(run.set, set()).update(
                [run.options[name]] if name in run.options else [])
        if len({frozenset(values) for values in by_set.values() if values}) < 2:
            names.remove(name)
        for run in runs:
            run.options.setdefault(name, min(by_set[run.set], key=str, default=None))
    for run in runs:
        run.free = free
        run.options = {k: run.options.get(k, defaults.get(k)) for k in sorted(names)}


def find_runs(root, damaged=None):
    """The runs at or below a folder, grouped: {folder for figures: [Run]}.

    Run folders, or else tables runs.csv. Runs that no chain of changes of one option connects are
    put into folders of their own, named by what differs. damaged: a list to which the message of
    each unreadable run is added; without it such a run raises PlotError.
    """
    root, groups, messages = Path(root), {}, [] if damaged is None else damaged
    if not root.is_dir():
        raise PlotError(f"{root}: no such folder")
    single = (root / "args.json").exists()
    paths = [root] if single else sorted(p.parent for p in root.rglob("args.json"))
    for path in paths or sorted(root.rglob("runs.csv")):
        folder = (path if single else path.parent) / ("figures" if paths else "")
        try:
            groups.setdefault(folder, []).extend((read_folder if paths else read_table)(path))
        except PlotError as error:
            if damaged is None:
                raise
            messages.append(str(error))
    groups = {folder: runs for folder, runs in groups.items() if runs}
    if not groups:
        raise PlotError("; ".join(messages) or
                        f"{root}: no run with a log.csv below it; train one first")
    for runs in groups.values():
        settle(runs)
    return {folder / name: family for folder, runs in groups.items()
            for name, family in families(runs).items()}


def families(runs):
    """Runs grouped so that each differs from another of its group in one option at most.

    {name: [Run]}: "" for a single group, else what differs between the groups.
    """
    groups = []
    for run in runs:
        linked = [g for g in groups if any(
            sum(a != b for a, b in zip(run.key(), other.key(), strict=True)) <= 1 for other in g)]
        groups = [g for g in groups if g not in linked] + [[r for g in linked for r in g] + [run]]
    if len(groups) == 1:
        return {"": runs}
    sets = [{k: sorted({str(r.options[k]) for r in g}) for k, _ in runs[0].key()} for g in groups]
    names = ["_".join(k + "-".join(s[k]) for k in s if any(o[k] != s[k] for o in sets))
             for s in sets]
    names = ["".join(c if c.isalnum() or c in "._-" else "-" for c in n)[:100] for n in names]
    return {n if names.count(n) == 1 else f"{n}_{k}": g
            for k, (n, g) in enumerate(zip(names, groups, strict=True))}


class Slice(dict):
    """{value of a factor: [Run, one per seed]}, all else equal.

    fixed {option: its value here}, of the options that vary elsewhere; others: how many slices
    there are beside this, the widest.
    """

    fixed, others = {}, 0


def sweeps(runs):
    """{factor: Slice}: for every option that varies, the widest set of runs where it alone does."""
    varying = [k for k, v in runs[0].key() if any(r.options[k] != v for r in runs)]
    found = {}
    for factor in sorted(varying, key=lambda k: [*FACTORS, k].index(k)):
        slices = {}
        for run in runs:
            seeds = slices.setdefault(run.key(factor), {}).setdefault(run.options[factor], {})
            if run.seed not in seeds or seeds[run.seed].last_step < run.last_step:
                seeds[run.seed] = run               # the longest of two equal runs
        several = [{v: [*seeds.values()] for v, seeds in values.items()}
                   for values in slices.values() if len(values) > 1]
        if several:
            widest = max(several, key=lambda v: (len(v), sum(map(len, v.values()))))
            found[factor] = Slice(sorted(widest.items(), key=lambda item: (
                isinstance(item[0], str), item[0] or 0)))
            options = next(iter(widest.values()))[0].options
            found[factor].fixed = {k: options[k] for k in varying if k != factor}
            found[factor].others = len(several) - 1
    return found


def factor_of(name):
    """The Factor of an option: from FACTORS, or plain words and no normalised time."""
    plain = name.removeprefix("setting_").replace("_", " ")
    return FACTORS.get(name, Factor(plain, plain, None, None))


def label_of(factor, value):
    """N = 2048, B = 16, process = flow, ..."""
    text = f"{value:g}" if type(value) in (int, float) else value
    return f"{factor_of(factor).short} = {text}"


# --------------------------------------------------------------------------------------------------
# Onset, best fidelity
# --------------------------------------------------------------------------------------------------


def crossing(steps, values, level):
    """The first step at which `values` reach `level`, linear in log step; inf where they do not."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return math.inf
    k = above[0]
    if k == 0:
        return float(steps[0])
    share = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(np.exp(np.log(steps[k - 1]) + share * np.log(steps[k] / steps[k - 1])))


def lowest(steps, values):
    """The step of the lowest value, by a parabola in log step; inf where it is the last one."""
    k = int(np.argmin(values))
    if k == len(values) - 1:
        return math.inf
    if k == 0:
        return float(steps[0])
    x, y = np.log(steps[k - 1:k + 2]), values[k - 1:k + 2]
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(x[1] - b / (2 * a))) if a > 0 else float(steps[k])


def excess(run):
    """(steps, copy ratio above its null) of a run: shares of its samples."""
    steps, copies = run.column("copy_ratio")
    _, null = run.column("null_copy_ratio")
    return steps, copies - (float(np.median(null)) if len(null) else 0)


def nearest_denoiser(run):
    """(steps, mean over noise levels of log(distance to the nearest other / to the memorizer)).

    From denoisers.csv, on the inputs that the sampler meets; above 0 the net is nearer to the exact
    denoiser of its training images than to any of the others (population, Gaussian, local).
    """
    found = {}
    for row in run.tables.get("denoisers", []):
        step, distance = number(row.get("step")), number(row.get("median"))
        if row.get("inputs") == "path" and distance >= 0 and step > 0:
            at = found.setdefault(step, {}).setdefault(row.get("level"), {})
            at[row.get("reference")] = math.log(max(distance, 1e-12))
    ratios = {step: [min(at.values()) - own for at in levels.values()
                     if (own := at.pop("memorizer", None)) is not None and at]
              for step, levels in sorted(found.items())}
    steps = [step for step, values in ratios.items() if values]
    return np.array(steps), np.array([np.mean(ratios[step]) for step in steps])


def onsets_of(run):
    """The onset of memorization by each definition of TAUS: {name: step}.

    inf not reached, nan not measured.
    """
    curves = {name: (crossing, *excess(run), level) for name, level in COPY_LEVELS.items()}
    curves |= {f"level{k}": (lowest, *run.column(f"heldout_loss_level{k}")) for k in range(10)}
    steps, loss = run.column("heldout_loss")
    k = int(np.argmin(loss)) if len(loss) else 0
    curves["heldout_min"] = lowest, steps, loss
    curves["heldout_25"] = crossing, steps[k:], loss[k:], 1.25 * min(loss, default=0)
    curves["denoisers"] = crossing, *nearest_denoiser(run), 0.0
    return {name: curves[name][0](*curves[name][1:]) if len(curves[name][1]) else math.nan
            for name in TAUS}


def best_fidelity(run):
    """The lowest sliced Wasserstein distance to held-out images before copy ratio .01.

    (value, step, whether it is the run's last evaluation, and so may still improve); nan where no
    distance was measured.
    """
    steps, distance = run.column("sw_SPACE_heldout")
    before = ~(steps > run.onsets["copy_01"])   # all of them where copies were not measured
    if not before.any():
        return math.nan, math.nan, False
    k = int(np.argmin(distance[before]))
    return float(distance[k]), float(steps[k]), k == len(steps) - 1


def second_peak(values, before):
    """Where a curve of positive values turns: (index of the lowest of those where `before`, index
    of the highest after it, the rise between them and the fall after, as factors).
    """
    k = int(np.argmin(np.where(before, values, np.inf)))
    j = k + int(np.argmax(values[k:]))
    return k, j, values[j] / values[k], values[j] / values[j:].min()


def to_keep(run):
    """The snapshot a user would keep: (step, SW to held-out, copy ratio), nans where none is.

    The best fidelity among those whose copy ratio is not above its null: at most .01 above, or
    with overlapping 95 % intervals.
    """
    distance, copies, null, low, null_high = (dict(zip(*run.column(c), strict=True)) for c in (
        "sw_SPACE_heldout", "copy_ratio", "null_copy_ratio", "copy_low", "null_copy_high"))
    honest = [s for s in distance if s in copies and (
        copies[s] <= null.get(s, 0) + 0.01 or low.get(s, 1) <= null_high.get(s, 0))]
    step = min(honest, key=distance.get, default=None)
    return (step, distance[step], copies[step]) if honest else (math.nan,) * 3
