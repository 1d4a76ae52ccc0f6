"""Draw the study's figures and test its claims, from the tables in the run folders alone.

    python plot.py runs/digits                      # a sweep: figures, tables in its figures/
    python plot.py runs/                            # every sweep below
    python plot.py runs/digits/N64_w32_B32_lr1e-3_s0        # one run: what it shows, in a few lines
    python plot.py results/digits                   # a sweep again, from its runs.csv alone
    python plot.py runs/digits results/digits       # the union of both, drawn into the first
    python plot.py --paper                          # the study's own curves, judged the same way

Of several roots, a run that two of them have (same name, same set of samples) is taken from the
earlier one. All goes into the figures/ of the first; elsewhere nothing is written or removed.

Four parts, in this order:
    reading   A Run is one training run with one set of samples, from a run folder, from a table
              runs.csv or from the study's own curves. Runs that differ in one option make a sweep.
    claims    Each is a statistic with a 95 % interval, and a region where the claim holds.
    tables    summary.csv (a row per run); runs.csv (a row per run and step) with the smaller tables
              beside it, enough to draw everything but pictures again; claims.md.
    figures   One function for each, and RUN_FIGURES, which says what each of them needs.

tau_mem, the step at which memorization starts, has several definitions (TAUS), each interpolated
between evaluations in log step. Copies are counted above the null. Nothing here needs torch.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

STUDY = Path(__file__).parent / "assets/paper_curves.csv"   # digitised from the study's figures
# Options that may change without making another run, where args.json ("free") names none.
FREE = {"out", "steps", "images", "device", "compile", "save_minutes"}
# A sample is a copy where d1/d2 is lower than the first; by the ends of columns, as in measure.py.
THRESHOLDS = {"": "1/3", "_quarter": "1/4", "_half": "1/2"}

Factor = collections.namedtuple("Factor", "label short formula normalised")
# What is known of a factor: T = step * normalised(value, lowest value) is the study's normalised
# time. Any other option can be swept as well; see factor_of.
FACTORS = {"n": Factor("training images N", "N", "step x (smallest N) / N", lambda v, low: low / v),
           "width": Factor("base width", "width", None, None),
           "batch": Factor("batch size B", "B", "step x B / (smallest B)", lambda v, low: v / low),
           "lr": Factor("learning rate", "lr", "step x lr / (smallest lr)", lambda v, low: v / low)}
LEVELS = 10         # of noise, into which train.py splits the loss
SLICES = [f"t = {k / LEVELS:.1f} to {(k + 1) / LEVELS:.1f}" for k in range(LEVELS)]

# --- Reading --------------------------------------------------------------------------------------


class PlotError(Exception):
    """Something the user gave is wrong; the message is one line."""


def grouped(items, key):
    """Items by what the function `key` says of them: {key: [item]}, in the order of the items."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def read_rows(path):
    """A CSV file as a list of {column: text}; [] if absent. PlotError where it is not readable, was
    changed since it was written, or is another run's (see train.row_checks).
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeError, csv.Error) as error:
        raise PlotError(f"{path}: not readable ({error})") from None
    if not rows:
        raise PlotError(f"{path}: has no rows")
    run = read_args(path.parent).get("identity", "")
    for k, row in enumerate(rows):
        cells = sorted((c, v) for c, v in row.items() if c not in (None, "check") and v)
        check = hashlib.sha256(repr((run, path.name, f"{k} of {len(rows)}", cells)).encode())
        check = check.hexdigest()[:8]
        if row.pop("check", "" if run else check) != check:     # alone, it may have none
            raise PlotError(f"{path}: changed since it was written, or another run's; delete it, "
                            "and the script that wrote it makes it again")
    return [{k: v or "" for k, v in row.items() if k is not None} for row in rows]


def read_args(folder):
    """args.json of a run folder; {} where there is none. PlotError where it is damaged."""
    try:
        record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        digest = record.pop("checksum", None)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        raise PlotError(f"{folder}/args.json: damaged") from None
    if digest not in (None, hashlib.sha256(json.dumps(
            record, sort_keys=True).encode()).hexdigest()):
        raise PlotError(f"{folder}/args.json: changed since train.py wrote it")
    return record


def number(text):
    """float(text), or nan."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def value_of(cell):
    """An option, or its cell in a table, as a number, True, False, None or a word.

    A list is one word, or the number that it holds alone: what is read from a table of it.
    """
    try:
        cell = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    return value_of(" ".join(map(str, cell))) if isinstance(cell, (list, dict)) else cell


def columns_of(rows, path):
    """Rows as {column: float array}, by rising step, nan where a cell is no number.

    Columns without any number are left out; of several rows of one step the last counts.
    PlotError where no row has a step.
    """
    by_step = {s: row for row in rows if 0 <= (s := number(row.get("step"))) < math.inf}
    if rows and not by_step:
        raise PlotError(f"{path}: no column 'step' with numbers")
    columns = {name: np.array([number(by_step[s].get(name)) for s in sorted(by_step)])
               for name in (rows[0] if rows else ()) if "digest" not in name}
    return {name: values for name, values in columns.items() if np.isfinite(values).any()}


@dataclasses.dataclass(eq=False)
class Run:
    """One run with one set of samples: its options, its curves, and what follows from them.

    Beside what it is made of: seed; last_step, in either table, nan without any; controls
    {name: {column: float}}; spaces, the features in which distances were measured, and space, those
    in which they are looked at (see find_runs); stem, the name as file names can hold it.
    """

    name: str
    options: dict                   # {name: value}, sampling settings among them as "setting_eta"
    log: dict                       # {column: float array}
    metrics: dict                   # the same
    path: Path | None = None        # its folder, None where it comes from a table
    set: str = ""                   # the name of the set of samples
    tables: dict = dataclasses.field(default_factory=dict)      # {stem of a CSV file: its rows}
    free: frozenset = frozenset(FREE)                           # options that make no other run
    defaults: dict = dataclasses.field(default_factory=dict)    # {option: its default}
    parameters: float = math.nan
    images: str = ""                                            # hash of the training images
    code: frozenset = frozenset()                               # what its metrics are measured by

    def __post_init__(self):
        if "data" in self.options:              # wherever the file is
            self.options = self.options | {"data": Path(str(self.options["data"])).stem}
        self.seed = self.options.get("seed", 0)
        self.last_step = max((table["step"][-1] for table in (self.log, self.metrics) if table),
                             default=math.nan)
        self.tables = {stem: rows for stem, rows in self.tables.items() if rows}
        self.controls = {row.get("name", ""): {column: number(cell) for column, cell in row.items()
                                               if column not in ("run", "name", "made_of", "code")}
                         for row in self.tables.pop("controls", ())}
        self.spaces = [column[len("sw_"):-len("_train")] for column in self.metrics
                       if re.fullmatch("sw_(?!error_).*_train", column)]
        self.space = space_of([self])
        plain = re.sub(r"[^\w.-]", "_", self.name)
        digest = hashlib.sha256(self.name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.stem = self.name if self.name == plain[:120] else f"{plain[:110]}-{digest}"
        levels = sum(column.startswith("heldout_loss_level") for column in self.log)
        if levels not in (0, LEVELS):
            raise PlotError(f"{self.name}: its loss is kept at {levels} noise levels; LEVELS in "
                            f"plot.py is {LEVELS}")

    def column(self, name):
        """(steps, values) of a column of log.csv or metrics.csv, finite values at steps > 0.

        "SPACE" in the name stands for run.space. Empty where there is no such column. Of two
        evaluations that are much closer than usual, as where a run ended and went on, the later
        one counts: between them a curve's slope is nothing but noise.
        """
        name = name.replace("SPACE", self.space or "SPACE")
        table = self.log if name in self.log else self.metrics
        if name not in table:
            return np.array([]), np.array([])
        keep = np.isfinite(table[name]) & (table["step"] > 0)
        steps, values = table["step"][keep], table[name][keep]
        gaps = np.diff(np.log(steps))
        far = gaps > min(0.25 * np.median(gaps), 0.1) if len(gaps) else []
        keep = np.append(far, len(steps) > 0).astype(bool)[:len(steps)]
        return steps[keep], values[keep]

    def by_step(self, name):
        """A column as {step: value}, see column."""
        return dict(zip(*self.column(name), strict=True))

    def control(self, name, column):
        """The value of a column for a control, nan where there is none."""
        return self.controls.get(name, {}).get(column.replace("SPACE", self.space or ""), math.nan)

    def measured(self):
        """The steps whose samples were measured, sorted."""
        columns = [self.column(name)[0] for name in ("copy_ratio", "sharpness", "sw_SPACE_train")]
        return np.unique(np.concatenate(columns))

    def key(self, *without):
        """What makes this run another run, as a tuple of pairs; seed and free options do not."""
        return tuple((k, v) for k, v in sorted(self.options.items())
                     if k not in self.free and k not in ("seed", *without))


def space_of(runs):
    """The feature space that most runs have; of several Inception's first, pixels last, or None."""
    count = collections.Counter(space for run in runs for space in run.spaces)
    return min(count, key=lambda s: (-count[s], s != "inception", s == "pixels", s), default=None)


def read_beside(folder):
    """The smaller tables of a folder: {stem: rows}."""
    return {path.stem: read_rows(path) for path in sorted(folder.glob("*.csv"))
            if re.fullmatch("controls|denoisers|spectrum|planted|twin_.*", path.stem)}


def read_folder(path):
    """A run folder as a list of Runs, one per set of samples. PlotError where damaged."""
    record = read_args(path)
    try:
        options, defaults = ({k: value_of(v) for k, v in record.get(entry, {}).items()}
                              for entry in ("options", "defaults"))
        more = {"path": path, "defaults": defaults, "free": frozenset(record.get("free", FREE)),
                "parameters": number(record.get("parameters")),
                "images": record.get("subset_sha256", "")}
    except (ValueError, TypeError, AttributeError):
        raise PlotError(f"{path}/args.json: missing or damaged") from None
    options.setdefault("seed", 0)
    log = columns_of(read_rows(path / "log.csv"), path / "log.csv")
    sets = grouped(read_rows(path / "metrics.csv"), lambda row: row.get("set", ""))
    if log:
        sets = sets or {"": []}                 # trained, not measured yet
    beside, runs = read_beside(path), []
    for name, rows in sets.items():
        settings = {k: value_of(v) for row in rows[:1] for k, v in row.items()
                    if k.startswith("setting_") and v}
        tables = {stem: [row for row in table if stem == "denoisers" or row.get("name")
                         or row.get("set", name) == name]
                  for stem, table in beside.items()}
        runs.append(Run("_".join(filter(None, (path.name, name))), options | settings, log,
                        columns_of(rows, path / "metrics.csv"), set=name, tables=tables, **more,
                        code=frozenset(row.get("code", "") for row in rows) - {""}))
    return runs


def read_runs_csv(path):
    """A table with a row per run and step as Runs, one per value of all columns before `step`.

    The smaller tables beside it have a column `run`. PlotError where there is no column `step`.
    """
    rows = read_rows(path)
    if not rows or "step" not in rows[0]:
        raise PlotError(f"{path}: no column 'step'")
    before = list(itertools.takewhile(lambda column: column != "step", rows[0]))
    beside, runs = read_beside(path.parent), []
    for cells, lines in grouped(rows, lambda row: tuple(row[c] for c in before)).items():
        options = dict(zip(before, cells, strict=True))
        name, samples = options.pop("run", "_".join(cells)), options.pop("set", "")
        parameters = number(options.pop("parameters", None))
        options = {k: value_of(v) for k, v in options.items()}
        curves = {c: v for c, v in columns_of(lines, path).items() if c not in before}
        tables = {stem: [row for row in table if row.get("run") == name]
                  for stem, table in beside.items()}
        runs.append(Run(name, options, curves, curves, set=samples, tables=tables,
                        parameters=parameters))
    return runs


@functools.cache
def study_runs():
    """The study's own curves as Runs; a setting that several figures show has repeats."""
    runs, repeats = [], collections.Counter()
    for run in read_runs_csv(STUDY):
        del run.options["factor"]
        setting = tuple(run.options.values())
        run.seed = run.options["seed"] = repeats[setting]
        repeats[setting] += 1
        runs.append(run)
    return runs


def settle(runs, ignore):
    """Give every run the same options: what one lacks, at its default; settings if they matter.

    ignore: options that do not make another run here. A sampling setting counts only where
    differently named sets of samples differ in it: the clipping that a process brings along does
    not. A run without samples counts to the set that most have.
    """
    sets = collections.Counter(run.set for run in runs if run.metrics)
    for run in runs:
        run.set = run.set if run.metrics else max(sets, key=sets.get, default="")
    free = set(ignore).union(*(run.free for run in runs))
    defaults = {k: v for run in reversed(runs) for k, v in run.defaults.items()}
    names = {k for run in runs for k in run.options} - free
    by_set = grouped(runs, lambda run: run.set)
    for name in [k for k in names if k.startswith("setting_")]:
        values = {samples: {run.options[name] for run in group if name in run.options}
                  for samples, group in by_set.items()}
        if len({frozenset(found) for found in values.values() if found}) < 2:
            names.remove(name)
        for run in runs:
            run.options.setdefault(name, min(values[run.set], key=str, default=None))
    for run in runs:
        run.free = free
        run.options = {k: run.options.get(k, defaults.get(k)) for k in sorted(names)}


def run_folders(root):
    """The run folders at or below a folder, sorted: those with an args.json."""
    if (root / "args.json").exists():
        return [root]
    return sorted(path.parent for path in root.rglob("args.json"))


def read_root(root, damaged):
    """The runs at or below a folder: {folder for their figures: [Run]}.

    From run folders or, where there are none, from tables runs.csv, but for those among figures.
    The message of each run that is not readable is added to the list damaged.
    """
    if not root.is_dir():
        raise PlotError(f"{root}: no such folder")
    groups, folders, before = {}, run_folders(root), len(damaged)
    read = read_folder if folders else read_runs_csv
    for path in folders or [path for path in sorted(root.rglob("runs.csv"))
                            if "figures" not in path.relative_to(root).parts]:
        place = (root if path == root else path.parent) / "figures"
        try:
            groups.setdefault(place, []).extend(read(path))
        except PlotError as error:
            damaged.append(str(error))
    groups = {place: runs for place, runs in groups.items() if runs}
    if not groups and len(damaged) == before:
        raise PlotError(f"{root}: no run with a log.csv below it; train one first")
    return groups


def unlike(run, other, ignore):
    """The options, sorted, that two runs both have and that differ; training images, too."""
    names = run.options.keys() & other.options.keys() - run.free - {*ignore}
    return sorted(name for name in names if run.options[name] != other.options[name]) + [
        "training images"] * bool(run.images and other.images and run.images != other.images)


def union(found, ignore):
    """The runs of several roots, sorted by name: of two with one name and one set of samples that
    of the earlier root. PlotError where the two differ in an option."""
    runs = []
    for groups in found:
        earlier = {(run.name, run.set): run for run in runs}
        for run in itertools.chain(*groups.values()):
            first = earlier.get((run.name, run.set))
            if first is None:
                runs.append(run)
            elif other := unlike(first, run, ignore):
                raise PlotError(f"{run.name}: two of these folders have a run of this name, with "
                                f"another {', '.join(other)}")
    return sorted(runs, key=lambda run: run.name)


def find_runs(*roots, damaged=None, ignore=()):
    """The runs at or below some folders, grouped: {folder for figures: [Run]}.

    Of several roots the union, see the top; PlotError where a run that two of them have, by its
    name and its set of samples, differs in an option. Runs that no chain of changes of one option
    connects are put into folders of their own, named by what differs. ignore: see settle. damaged:
    a list that takes the message of each run that is not readable; PlotError where no run is.
    """
    roots, damaged = [Path(root) for root in roots], [] if damaged is None else damaged
    found = [read_root(root, damaged) for root in roots]
    if not any(found):
        raise PlotError("; ".join(damaged))
    groups = found[0] if len(roots) == 1 else {roots[0] / "figures": union(found, ignore)}
    everything = [*itertools.chain(*groups.values())]
    for name in ignore:
        if not any(name in run.options for run in everything):
            raise PlotError(f"--ignore {name}: no run has such an option")
    for runs in groups.values():
        settle(runs, ignore)
        for same in grouped(runs, lambda run: (run.key(), run.seed, run.set)).values():
            if ignore and len(same) > 1:
                raise PlotError(f"--ignore: {same[0].name} and {same[1].name} would be one run")
    found = {place / name: family for place, runs in groups.items()
             for name, family in families(runs).items()}
    for family in found.values():
        space = space_of(family)                # all of a family are looked at in one
        for run in family:
            run.space = space if space in run.spaces else None
    return found


def families(runs):
    """Runs grouped so that each differs from another of its group in one option at most.

    {name: [Run]}: "" for a single group, else what differs between the groups.
    """
    groups = []
    for run in runs:
        linked = [group for group in groups if any(
            sum(a != b for a, b in zip(run.key(), other.key(), strict=True)) <= 1
            for other in group)]
        groups = [group for group in groups if group not in linked]
        groups.append([*itertools.chain(*linked), run])
    if len(groups) == 1:
        return {"": runs}
    values = [{k: "-".join(sorted({str(run.options[k]) for run in group}))
               for k, _ in runs[0].key()} for group in groups]
    names = ["_".join(k + v for k, v in own.items() if any(other[k] != v for other in values))
             for own in values]
    names = [re.sub(r"[^\w.-]", "-", name)[:100] for name in names]
    return {name if names.count(name) == 1 else f"{name}_{k}": group
            for k, (name, group) in enumerate(zip(names, groups, strict=True))}


class Slice(dict):
    """{value of a factor: [Run, one per seed]}, all else equal.

    fixed {option: its value here}, of the options that vary elsewhere; count: of so many slices it
    is the widest.
    """

    def __init__(self, values, fixed, count):
        super().__init__(values)
        self.fixed, self.count = fixed, count

    @property
    def where(self):
        """What is fixed, in words."""
        fixed = "; fixed: " + ", ".join(label_of(*pair) for pair in self.fixed.items())
        return (fixed * bool(self.fixed)
                + f"; the widest of {self.count} such sweeps" * (self.count > 1))


def longest(runs):
    """One run per setting, set of samples and seed: of those that were measured, if any, the one
    that got farthest.
    """
    same = grouped(runs, lambda run: (run.key(), run.set, run.seed)).values()
    return [max(group, key=lambda run: (bool(run.metrics), run.last_step)) for group in same]


def usual(runs):
    """The runs with the set of samples that most have; of one setting and seed, the longest."""
    sets = collections.Counter(run.set for run in runs)
    return longest(run for run in runs if run.set == max(sets, key=sets.get))


def slices_of(runs, factor):
    """Every set of runs where this option alone varies: [{its value: [Run, one per seed]}]."""
    slices = [grouped(alike, lambda run: run.options[factor])
              for alike in grouped(longest(runs), lambda run: run.key(factor)).values()]
    return [values for values in slices if len(values) > 1]


def sweeps(runs):
    """{factor: Slice}: for every option that varies, the widest set of runs where it alone does.

    Among the usual runs, but for sampling settings. sample.py's --switch, which concerns single
    snapshots, has a figure of its own instead.
    """
    varying = [k for k, v in runs[0].key() if k != "setting_switch"
               and any(run.options[k] != v for run in runs)]
    found, judged = {}, usual(runs)
    for factor in sorted(varying, key=lambda k: [*FACTORS, k].index(k)):
        if slices := slices_of(runs if factor.startswith("setting_") else judged, factor):
            widest = max(slices, key=lambda values: (len(values), sum(map(len, values.values()))))
            order = sorted(widest, key=lambda v: (isinstance(v, str), v or 0))  # numbers first
            options = widest[order[0]][0].options
            found[factor] = Slice({value: widest[value] for value in order},
                                  {k: options[k] for k in varying if k != factor}, len(slices))
    return found


def factor_of(name):
    """The Factor of an option: from FACTORS, or plain words and no normalised time."""
    plain = name.removeprefix("setting_").replace("_", " ")
    return FACTORS.get(name, Factor(plain, plain, None, None))


def label_of(factor, value):
    """N = 2048, B = 16, process = flow, ..."""
    text = f"{value:g}" if type(value) in (int, float) else value
    return f"{factor_of(factor).short} = {text}"


# --- Claims: onsets, best fidelity ----------------------------------------------------------------


def lasting(values):
    """The lower of each value and its successor: a fluke of one evaluation does not count."""
    return np.minimum(values, [*values[1:], math.inf])


def crossing(steps, values, level):
    """The first step at which `values` reach `level`, linear in log step; inf where they do not.

    They must be there at the next evaluation, too, if there is one.
    """
    above = np.flatnonzero(lasting(values) >= level)
    if not len(above):
        return math.inf
    k = above[0]
    if k == 0 or values[k] == level:
        return float(steps[k])
    part = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(np.exp(np.log(steps[k - 1]) + part * np.log(steps[k] / steps[k - 1])))


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


def null_copies(run):
    """The median null of a run's copy ratio, 0 where it has none."""
    return float(np.median([*run.column("null_copy_ratio")[1]] or [0]))


def excess(run):
    """(steps, copy ratio above its null) of a run: shares of its samples."""
    steps, copies = run.column("copy_ratio")
    return steps, copies - null_copies(run)


def nearest_denoiser(run):
    """(steps, mean over noise levels of log(distance to the nearest other / to the memorizer)).

    From denoisers.csv, on the inputs that the sampler meets; above 0 the net is nearer to the exact
    denoiser of its training images than to any of the others (population, Gaussian, local).
    """
    logs, ratios = {}, {}       # {(step, noise level): {denoiser: log distance}}, {step: [ratio]}
    for row in run.tables.get("denoisers", []):
        step, distance = number(row.get("step")), number(row.get("median"))
        if row.get("inputs") == "path" and distance >= 0 and step > 0:
            distances = logs.setdefault((step, row.get("level")), {})
            distances[row.get("reference")] = math.log(max(distance, 1e-12))
    for (step, _), distances in sorted(logs.items()):
        own = distances.pop("memorizer", None)
        if own is not None and distances:
            ratios.setdefault(step, []).append(min(distances.values()) - own)
    return np.array([*ratios]), np.array([*map(np.mean, ratios.values())])


def loss_up(share):
    """The curve of a Definition: held-out loss, which is to rise by a share above its lowest."""
    def curve(run):
        steps, values = run.column("heldout_loss")
        k = int(np.argmin(values)) if len(values) else 0
        return steps[k:], values[k:], values[k] * (1 + share) if len(values) else math.nan
    return curve


# A definition of tau_mem: its label; curve(run) -> (steps, values, level), the level that values
# reach at the onset, None where they are lowest there; copies: whether values are copy ratios.
Definition = collections.namedtuple("Definition", "label curve copies", defaults=(False,))
TAUS = {"heldout_min": Definition("held-out loss lowest",
                                  lambda run: (*run.column("heldout_loss"), None)),
        "heldout_25": Definition("held-out loss 25 % up", loss_up(0.25)),
        "copy_01": Definition("copy ratio .01", lambda run: (*excess(run), 0.01), True),
        "copy_10": Definition("copy ratio .1", lambda run: (*excess(run), 0.1), True),
        "copy_50": Definition("copy ratio .5", lambda run: (*excess(run), 0.5), True),
        "denoisers": Definition("nearer to the memorizer than to any other denoiser",
                                lambda run: (*nearest_denoiser(run), 0.0)),
        **{f"level{k}": Definition(f"held-out loss lowest, {SLICES[k]}", lambda run, k=k: (
            *run.column(f"heldout_loss_level{k}"), None)) for k in range(LEVELS)}}


@functools.cache
def onsets(run):
    """The onset of memorization by each definition of TAUS: {name: step}.

    inf not reached, nan not measured.
    """
    found = dict.fromkeys(TAUS, math.nan)
    for name, definition in TAUS.items():
        steps, values, level = definition.curve(run)
        if len(steps):
            found[name] = (lowest(steps, values) if level is None
                           else crossing(steps, values, level))
    return found


def copies_reach(run, share):
    """The step at which the copy ratio, above its null, reaches a share: inf never, nan unknown."""
    steps, copies = excess(run)
    return crossing(steps, copies, share) if len(steps) else math.nan


def lowest_sw(run, after, until):
    """(value, step) of the lowest sliced Wasserstein distance to held-out images at steps in
    (after, until], nans where there is none. The value at `until` is interpolated in log step, so
    that a curve which still falls there does not depend on where its evaluations lie.
    """
    steps, distance = run.column("sw_SPACE_heldout")
    if len(steps) and steps[0] < until < steps[-1]:
        at, value = np.searchsorted(steps, until), np.interp(np.log(until), np.log(steps), distance)
        steps, distance = np.insert(steps, at, until), np.insert(distance, at, value)
    inside = (steps > after) & ~(steps > until)     # to the end where copies were not measured
    return min(zip(distance[inside].tolist(), steps[inside].tolist(), strict=True),
               default=(math.nan, math.nan))


def best_fidelity(run):
    """The lowest sliced Wasserstein distance to held-out images up to copy ratio .01.

    (value, step, improving), nan where no distance was measured. improving: a better one may have
    gone unseen, since this is the run's last evaluation or the only one before its copies.
    """
    steps, until = run.column("sw_SPACE_heldout")[0], copies_reach(run, 0.01)
    value, step = lowest_sw(run, 0, until)
    return value, step, bool(step == max(steps, default=0) or (~(steps > until)).sum() == 1)


def second_peak(values, before):
    """Where a curve of positive values turns: (best, peak, rise, fall).

    best: the index of the lowest value among those where `before`; peak: of the highest value from
    there on; rise from best to peak, and fall from peak to the lowest after it: factors.
    """
    k = int(np.argmin(np.where(before, values, np.inf)))
    j = k + int(np.argmax(values[k:]))
    return k, j, values[j] / values[k], values[j] / values[j:].min()


def paired(run, *columns):
    """(steps, values (columns, steps)) at the steps where all columns are finite and positive."""
    curves = [run.by_step(column) for column in columns]
    steps = [s for s in curves[0] if all(curve.get(s, 0) > 0 for curve in curves)]
    return np.array(steps), np.array([[curve[s] for s in steps] for curve in curves])


def hump(run):
    """The step where SW to held-out peaks after the best fidelity, nan where it does not.

    A peak rises from the best fidelity, and falls again, by a tenth or more.
    """
    steps, (distances,) = paired(run, "sw_SPACE_heldout")
    before = steps <= best_fidelity(run)[1]
    if not before.any():
        return math.nan
    _, peak, rise, fall = second_peak(distances, before)
    return steps[peak] if min(rise, fall) >= 1.1 else math.nan


def to_keep(run):
    """The snapshot a user would keep: (step, SW to held-out, copy ratio), nans where none is.

    The best fidelity among those whose copy ratio is not above its null: at most .01 above, or
    with overlapping 95 % intervals.
    """
    distance, copies, null, low, null_high = map(run.by_step, (
        "sw_SPACE_heldout", "copy_ratio", "null_copy_ratio", "copy_low", "null_copy_high"))
    honest = [s for s in distance if s in copies and (
        copies[s] <= null.get(s, 0) + 0.01 or low.get(s, 1) <= null_high.get(s, 0))]
    if not honest:
        return math.nan, math.nan, math.nan
    step = min(honest, key=distance.get)
    return step, distance[step], copies[step]


# --- Claims: statistics ---------------------------------------------------------------------------

# A statistic is a function run -> Point: the logarithm of a positive number, None where it was not
# measured. Its error has two parts: the scatter from run to run, pooled over all settings with two
# seeds or more (the study's own where there are none), and what is known of this run alone, its
# variance: how many samples it has and how far apart its evaluations are.
Point = collections.namedtuple("Point", "value variance bound")   # bound: 1 truth above, -1 below
# A value with its 95 % interval, and in words what it rests on or, if nan, why it is not tested.
Result = collections.namedtuple("Result", "text value low high borrowed intercept",
                                defaults=(*[math.nan] * 3, False, math.nan))
# Standard error of an interpolated step, as a share of the gap between evaluations: how far the
# study's curves move when every second evaluation is left out.
CROSSING_ERROR, LOWEST_ERROR = 0.07, 0.2
# The copy ratios, above the null, from which and to which a memorization rate is taken.
RATE_FROM, RATE_TO = 0.02, 0.1


def t95(dof):
    """The 97.5 % quantile of Student's t, to one per cent."""
    table = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return table[dof] if dof < len(table) else 1.96 + 2.6 / dof


def step_variance(run, steps, values, step, error):
    """The variance of the logarithm of a step at which a curve turns or crosses a level.

    Of two parts: the gap between evaluations; where run is given, whose values are then shares of
    its samples above the null (see excess), the number of samples.
    """
    k = int(np.clip(np.searchsorted(steps, step), 1, len(steps) - 1))
    gap, rise = math.log(steps[k] / steps[k - 1]), values[k] - values[k - 1]
    samples, sampling = sample_count(run) if run else 0, 0.0
    if samples and rise > 0:                    # binomial, by the curve's slope in log step
        part = float(np.interp(math.log(step), np.log(steps), values)) + null_copies(run)
        sampling = max(part * (1 - part) / samples * (gap / rise)**2, 0.0)
    return (error * gap)**2 + sampling


def sample_count(run):
    """The number of samples per snapshot, the median over snapshots; 0 where it is not known."""
    return float(np.median([*run.column("samples")[1]] or [0]))


def has_log(value):
    """Whether an option's value is a positive, finite number."""
    return type(value) in (int, float) and 0 < value < math.inf


def onset(name):
    """The statistic log(tau_mem), by a definition of TAUS.

    A run that ends before is a lower bound; one at its first evaluation is an upper bound.
    """
    def point(run):
        step = onsets(run)[name]
        steps, values, level = TAUS[name].curve(run)
        if math.isnan(step):
            return None
        if math.isinf(step) or step <= steps[0]:
            late, near = math.isinf(step), 2 if level is None else 1
            # A curve that is lowest at its end may turn up to half a gap before it.
            ends = steps[-near:] if late else steps[:near]
            return Point(float(np.log(ends).mean()), 0.0, 1 if late else -1)
        error = LOWEST_ERROR if level is None else CROSSING_ERROR
        counted = run if TAUS[name].copies else None        # whose samples were counted
        variance = step_variance(counted, steps, values, step, error)
        return Point(math.log(step), variance, 0)
    point.stand_in = onset("heldout_min") if name.startswith("level") else point
    return point


def sw_error(run, step):
    """The relative standard error of SW to held-out images, at the evaluation nearest to a step."""
    errors, values = map(run.by_step, ("sw_error_SPACE_heldout", "sw_SPACE_heldout"))
    near = min(errors, key=lambda other: abs(math.log(other / step)), default=None)
    return errors[near] / values[near] if near else 0.0


def best(run):
    """The statistic log(best fidelity); an upper bound where a better one may be unseen."""
    value, step, improving = best_fidelity(run)
    if not value > 0:
        return None
    return Point(math.log(value), sw_error(run, step)**2, -1 if improving else 0)


def rate(high):
    """The statistic log(memorization rate): (high - RATE_FROM) over the doublings that it takes.

    high: a copy ratio above the null. None where a run does not reach it.
    """
    def point(run):
        steps, copies = excess(run)
        start, end = (crossing(steps, copies, level) for level in (RATE_FROM, high))
        if math.isinf(end) or end <= start:
            return None
        took = math.log(end / start)
        variance = sum(step_variance(run, steps, copies, s, CROSSING_ERROR) for s in (start, end))
        early = start <= steps[0]               # it began before the first evaluation
        speed = (high - RATE_FROM) * math.log(2) / took
        return Point(math.log(speed), variance / took**2, -int(early))
    point.stand_in = point if high <= RATE_TO else rate(RATE_TO)
    return point


def scatter(runs, statistic):
    """(variance between runs of one setting, degrees of freedom, whether borrowed).

    Pooled over all settings; the study's own where these runs have no repeats. It holds a part of
    the errors that the points carry, too, so that intervals are rather too wide than too narrow.
    """
    points = [[point.value for point in map(statistic, group) if point and not point.bound]
              for group in grouped(runs, Run.key).values()]
    settings = [values for values in points if values]
    squares = sum(float(np.var(values)) * len(values) for values in settings)
    dof = sum(len(values) - 1 for values in settings)
    if dof or runs is study_runs():
        return squares / dof if dof else 0.0, dof, False
    # Too few of the study's runs reach some statistics: a related one's scatter stands for theirs.
    return *scatter(study_runs(), getattr(statistic, "stand_in", statistic))[:2], True


def inverse_mills(z):
    """E[u | u > z] of a standard normal u: its density over its tail."""
    return (math.sqrt(2 / math.pi) * math.exp(-z * z / 2) / math.erfc(z / math.sqrt(2))
            if z < 30 else z + 1 / z)


def fit_line(x, y, variance, bound):
    """(slope, intercept, standard error of the slope, misfit) of a line with known errors.

    Arrays (n,). misfit, at least 1: how much farther points that are not bounds lie from the line
    than their errors allow (Birge's ratio). By maximum likelihood; a bound is replaced by its
    expectation beyond it (Tobit), so that one which the line satisfies with ease hardly counts.
    """
    sigma = np.sqrt(np.maximum(variance, 1e-12))
    filled, weight = y, sigma**-2
    for _ in range(1000):                       # expectation-maximization
        # M: the line through the points and the bounds' expectations
        dx = x - np.average(x, weights=weight)
        slope = float((weight * dx * filled).sum() / (weight * dx**2).sum())
        line = np.average(filled, weights=weight) + slope * dx
        # E: where a bound's truth is, if it lies beyond the bound and about the line
        z = bound * (y - line) / sigma
        mills = np.array([*map(inverse_mills, z)])
        filled, last = np.where(bound, line + bound * sigma * mills, y), filled
        if np.abs(filled - last).max() < 1e-6:
            break
    weight = weight * np.where(bound, mills * (mills - z), 1)   # what a bound says of the line
    spread = (weight * (x - np.average(x, weights=weight))**2).sum()
    exact = bound == 0
    misfit = (((y - line) / sigma)[exact]**2).sum() / max(exact.sum() - 2, 1)
    return slope, float(line[0] - slope * x[0]), spread**-0.5, math.sqrt(max(1, misfit))


def exponent(groups, runs, statistic, times=False):
    """The slope of a statistic against log(factor) over a Slice, as a Result.

    runs: all that are judged, for the scatter; times: of statistic x factor. Bounds are left out
    of the value; its interval covers the fits without and with them: no power law holds for ever.
    """
    if not all(map(has_log, groups)):
        return Result("its values have no logarithm")
    points = [(math.log(value), *point) for value, group in groups.items()
              for point in map(statistic, group) if point]
    x, y, variance, bound = np.array(points).reshape(-1, 4).T
    y = y + times * x
    between, dof, borrowed = scatter(runs, statistic)
    if not dof:
        return Result("no repeats known")
    if len({*x}) < 3 or len({*x[bound == 0]}) < 2:
        return Result("fewer than three values reached it")
    fits = [fit_line(x[use], y[use], variance[use] + between, bound[use])
            for use in (bound == 0, np.isfinite(bound))]
    # Where the points leave the line by more than their errors, its slope is known less well, since
    # it may be no power law: by how much, these few points say.
    misfit, total = fits[0][3], sum(map(len, groups.values()))
    if misfit > 1:
        dof = max(1, min(dof, (bound == 0).sum() - 2))
    half = t95(dof) * misfit
    text = f"{len({*x})} values, {total} runs"
    for count, what in (((bound > 0).sum(), "not reached"), ((bound < 0).sum(), "upper bounds"),
                        (total - len(x), "not measured")):
        text += f", {count} {what}" if count else ""
    return Result(f"{text}; scatter {math.sqrt(between):.2g}", fits[0][0],
                  min(slope - half * error for slope, _, error, _ in fits),
                  max(slope + half * error for slope, _, error, _ in fits), borrowed, fits[0][1])


# --- Claims: the study's --------------------------------------------------------------------------


def common_rate(groups):
    """(rate statistic, words) over the copy ratios that all compared runs share.

    Runs that do not reach copy ratio .1 above the null are not compared.
    """
    high = min((lasting(excess(run)[1]).max() for group in groups.values() for run in group
                if math.isfinite(copies_reach(run, RATE_TO))), default=RATE_TO)
    high = min(high, 0.9)
    return rate(high), f"copy ratio {RATE_FROM:g} to {high:.2g}"


def rate_exponent(groups, runs):
    """Claim 3b: the slope of the memorization rate."""
    statistic, span = common_rate(groups)
    result = exponent(groups, runs, statistic)
    return result._replace(text=f"{span}; {result.text}")


def largest_gap(variances, dof):
    """The 95 % quantile of the largest |difference| between any two means, over its error, where
    all are equal (Tukey's range, of unequal variances): of 4,000 draws. `dof`: of the variance.
    """
    draw = np.random.default_rng(0)
    means = draw.standard_normal((4000, len(variances))) * np.sqrt(variances)
    means /= np.sqrt(draw.chisquare(dof, (4000, 1)) / dof)
    gaps = [np.abs(means[:, i] - means[:, j]) / math.sqrt(variances[i] + variances[j])
            for i, j in itertools.combinations(range(len(variances)), 2)]
    return float(np.quantile(np.max(gaps, 0), 0.95))


def rate_spread(groups, runs):
    """Claim 5b: the largest factor between the rates at two values.

    Its interval: up to the largest that any pair could have, from the largest that is left of a
    pair's difference where the pair was picked from so many.
    """
    statistic, span = common_rate(groups)
    between, dof, borrowed = scatter(runs, statistic)
    rates = []                                  # (mean, its variance) of each value of the factor
    for group in groups.values():
        points = [point for point in map(statistic, group) if point and not point.bound]
        if points:
            values, variances, _ = zip(*points, strict=True)
            rates.append((np.mean(values), (between + np.mean(variances)) / len(points)))
    if len(rates) < 3 or not dof:
        return Result("fewer than three values reached copy ratio .1")
    gaps = [(abs(a - b), math.sqrt(a_variance + b_variance))
            for (a, a_variance), (b, b_variance) in itertools.combinations(rates, 2)]
    low = -largest_gap([variance for _, variance in rates], dof)
    largest = [math.exp(max(0.0, *(gap + factor * error for gap, error in gaps)))
               for factor in (0, low, t95(dof))]
    listed = ", ".join(f"{math.exp(mean):.3f}" for mean, _ in rates)
    return Result(f"{listed} per doubling, {span}; scatter {math.sqrt(between):.2g}", *largest,
                  borrowed)


def through_onset(runs, *columns):
    """Of each run that reaches copy ratio .1: (run, steps, values (columns, steps), before, after).

    See paired; before, after (steps): up to copy ratio .01, some; from there up to .5, if any.
    """
    for run in runs:
        steps, values = paired(run, *columns)
        before = steps <= copies_reach(run, 0.01)
        if math.isfinite(copies_reach(run, 0.1)) and before.any():
            yield run, steps, values, before, ~before & (steps <= copies_reach(run, 0.5))


def equal_distances(kind, runs):
    """Claim 1: by which factor a distance to train / to held-out ("sw", "fid") changes by copies.

    Only where both splits are as many images: the training images as many as the samples, or more.
    """
    changes, memorizers, columns = [], [], (f"{kind}_SPACE_train", f"{kind}_SPACE_heldout")
    for run, _, (train, heldout), before, after in through_onset(runs, *columns):
        if after.any() and run.options.get("n", math.inf) >= sample_count(run):
            ratio = np.log(train / heldout)
            changes.append(ratio[after][-1] - np.median(ratio[before]))
            all_copies = np.divide(*(run.control("training", column) for column in columns))
            memorizers.append(all_copies / math.exp(np.median(ratio[before])))
    if len(changes) < 3:
        return Result("fewer than three runs that reach copy ratio .1 and have as many training "
                      "images as samples")
    mean, error = np.mean(changes), np.std(changes, ddof=1) / math.sqrt(len(changes))
    half = t95(len(changes) - 1) * error
    least, most, *interval = (math.exp(change) for change in (
        min(changes), max(changes), mean, mean - half, mean + half))
    known = [change for change in memorizers if change > 0]
    text = f"; a perfect memorizer {min(known):.2f} to {max(known):.2f}" if known else ""
    return Result(f"{len(changes)} runs, {least:.2f} to {most:.2f}{text}", *interval)


def share_of_runs(hits, text):
    """A Result from booleans, one per run, with the interval of their share by Wilson's formula.

    Four of four, 6 % by chance, cannot decide.
    """
    k, n = sum(hits), len(hits)
    if n < 3:
        return Result(f"fewer than three runs {text}")
    low, high = 0.0, 1.0
    if n > 4:
        centre = (k + 1.92) / (n + 3.84)
        half = 1.96 * math.sqrt(k * (n - k) / n + 0.96) / (n + 3.84)
        low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Result(f"{k} of {n} runs {text}", k / n, low, high)


def double_descent(runs):
    """Claim 2: the share of runs with copies whose SW and FID, to both splits, descend twice."""
    hits = []
    columns = [f"{kind}_SPACE_{split}" for kind in ("sw", "fid") for split in ("train", "heldout")]
    for _, _, values, before, _ in through_onset(runs, *columns):
        bests, _, rises, falls = np.transpose([second_peak(v, before) for v in values])
        in_step = np.abs(bests[:2] - bests[2:]).max() <= 1      # SW and FID, of each split
        hits.append(in_step and rises.min() >= 1.5 and falls.min() >= 1.1)
    return share_of_runs(hits, "that reach copy ratio .1")


def gains_before(runs):
    """Claim 7: the share of runs whose best fidelity lies before their first copies.

    Only where the two differ by more than two of their errors.
    """
    ratios, hits = [], []
    for run, *_, after in through_onset(runs, "sw_SPACE_heldout"):
        if after.any():
            start, end = (copies_reach(run, share) for share in (0.01, 0.5))
            (first, step), (then, later) = lowest_sw(run, 0, start), lowest_sw(run, start, end)
            ratios.append(then / first)
            error = math.hypot(sw_error(run, step), sw_error(run, later))
            if abs(math.log(ratios[-1])) > 2 * error:
                hits.append(ratios[-1] > 1)
    span = f", {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
    return share_of_runs(hits, f"that reach copy ratio .1{span}"
                         + f", {len(ratios) - len(hits)} more within two errors"
                         * (len(ratios) > len(hits)))


def onset_slope(groups, runs, times=False):
    """The slope of the onset, or of onset x factor; see exponent."""
    return exponent(groups, runs, onset(ONSET_BY), times)


def best_slope(groups, runs):
    """The slope of the best fidelity; see exponent."""
    return exponent(groups, runs, best)


# A claim, the statistic that decides it, the region where it holds, in words and in numbers, the
# factor whose sweep it needs, and the function that gives the Result.
Claim = collections.namedtuple("Claim", "number text statistic where region factor test")
ONSET_BY = "heldout_25"         # of TAUS, what the claims call the onset
TAU = f"slope of log {{}} ({TAUS[ONSET_BY].label}) against log {{}}"
BEST = "slope of log best SW against log {}"
RATIO = "{0} train / {0} held-out, last up to copy ratio .5 over median before .01"
EQUAL = "within a factor of 1.25", (1 / 1.25, 1.25)
UP, DOWN = ("above 0", (0.0, math.inf)), ("below 0", (-math.inf, 0.0))
OFTEN = "in more than half of the runs", (0.5, math.inf)
CLAIMS = [
    Claim("1a", "SW to train and held-out stay nearly equal: it does not see copying",
          RATIO.format("SW"), *EQUAL, None, functools.partial(equal_distances, "sw")),
    Claim("1b", "FID to train and held-out stay nearly equal: it does not see copying",
          RATIO.format("FID"), *EQUAL, None, functools.partial(equal_distances, "fid")),
    Claim("2", "FID and SW show a double descent, against both splits, in step",
          "both rise by 1.5 after their best, then fall by 1.1; bests within one evaluation",
          *OFTEN, None, double_descent),
    Claim("3a", "Onset is proportional to N", TAU.format("tau_mem", "N"),
          "1 ± .25", (0.75, 1.25), "n", onset_slope),
    Claim("3b", "Larger N memorizes more slowly", "slope of log rate against log N",
          *DOWN, "n", rate_exponent),
    Claim("3c", "Larger N has better best fidelity", BEST.format("N"), *DOWN, "n", best_slope),
    Claim("4a", "Larger models start earlier", TAU.format("tau_mem", "width"),
          *DOWN, "width", onset_slope),
    Claim("4b", "Larger models have better best fidelity", BEST.format("width"),
          *DOWN, "width", best_slope),
    Claim("5a", "Onset, in steps, is proportional to 1/B", TAU.format("tau_mem", "B"),
          "-1 ± .25", (-1.25, -0.75), "batch", onset_slope),
    Claim("5b", "The rate does not depend on B", "largest factor between two rates",
          "below 1.5", (0.0, 1.5), "batch", rate_spread),
    Claim("5c", "Smaller B has better best fidelity", BEST.format("B"), *UP, "batch", best_slope),
    Claim("6a", "Onset, in steps x lr, comes later at larger lr",
          TAU.format("(tau_mem x lr)", "lr"),
          *UP, "lr", functools.partial(onset_slope, times=True)),
    Claim("6b", "Larger lr has better best fidelity", BEST.format("lr"), *DOWN, "lr", best_slope),
    Claim("7", "All gains in fidelity are made before the onset",
          "lowest SW from copy ratio .01 to .5 over lowest before, above 1",
          *OFTEN, None, gains_before)]


def judge(runs):
    """[(Claim, Result, verdict)]: the study's claims, tested on these runs.

    supported: the interval lies inside the region; contradicted: outside; undecided: neither; not
    tested: too few values.
    """
    runs = usual(runs)
    found, rows = sweeps(runs), []
    for claim in CLAIMS:
        if not claim.factor:
            result = claim.test(runs)
        elif claim.factor in found:
            result = claim.test(found[claim.factor], runs)
        else:
            result = Result("no sweep of it")
        low, high = claim.region
        inside = low < result.low and result.high < high
        outside = result.high < low or result.low > high
        verdict = ("not tested" if math.isnan(result.value) else "supported" if inside
                   else "contradicted" if outside else "undecided")
        rows.append((claim, result, verdict + ", scatter borrowed" * result.borrowed))
    return rows


# --- Tables ---------------------------------------------------------------------------------------


def number_text(value, count=4):
    """A number as text, with so many digits; nothing for nan and inf."""
    return f"{value:.{count}g}" if math.isfinite(value) else ""


def summarize(run):
    """One row of summary.csv, as texts; empty cells for what was not measured."""
    row = {"run": run.name, **dict(run.key()), "seed": run.seed,
           "parameters": number_text(run.parameters, 12),
           "last_step": number_text(run.last_step, 12)}
    for name in TAUS:
        point = onset(name)(run)
        cells = [f"tau_{name}", f"tau_{name}_low", f"tau_{name}_high"]
        row |= dict.fromkeys(cells, "")
        if point and point.bound:
            row[cells[0]] = f"{'>' if point.bound > 0 else '<'}{math.exp(point.value):.0f}"
        elif point:
            for cell, z in zip(cells, (0, -1.96, 1.96), strict=True):
                row[cell] = f"{math.exp(point.value + z * math.sqrt(point.variance)):.0f}"
    value, step, improving = best_fidelity(run)
    speed, kept = rate(RATE_TO)(run), to_keep(run)
    last, null = (number_text([math.nan, *run.column(column)[1]][-1])
                  for column in ("copy_ratio", "null_copy_ratio"))
    return row | {"rate_to_copy_10": number_text(math.exp(speed.value)) if speed else "",
                  "best_sw_heldout": "<" * improving + number_text(value),
                  "best_sw_step": number_text(round(step, 0), 12),
                  "hump_step": number_text(hump(run), 12),
                  "keep_step": number_text(kept[0], 12), "keep_sw_heldout": number_text(kept[1]),
                  "keep_copy_ratio": number_text(kept[2]), "space": run.space or "",
                  "last_copy_ratio": last, "null_copy_ratio": null}


def run_text(run):
    """What one run shows, in a few lines."""
    row = {column: cell or "-" for column, cell in summarize(run).items()}
    lines = [f"{run.name}, {row['last_step']} steps"]
    for name, (text, *_) in TAUS.items():
        step, *ends = (row[f"tau_{name}{end}"] for end in ("", "_low", "_high"))
        if step != "-" and not name.startswith("level"):
            interval = "" if "-" in ends else f" [{', '.join(ends)}]"
            lines.append(f"  {text}: step {step}{interval}")
    if run.metrics:
        lines += [f"  lowest SW to held-out before copies: {row['best_sw_heldout']}, at step "
                  + f"{row['best_sw_step']} ({run.space or 'not measured'})",
                  f"  to keep: step {row['keep_step']}: SW to held-out {row['keep_sw_heldout']}, "
                  + f"copy ratio {row['keep_copy_ratio']}",
                  f"  copies at the end: {row['last_copy_ratio']}; null {row['null_copy_ratio']}"]
    exact = run.controls.get("exact", {}).get("copy_ratio", math.nan)
    if not math.isnan(exact):
        lines.append(f"  copies among the samples of the exact denoiser: {exact:.4g}")
    for name, rows in run.tables.items():
        if name.startswith("twin_"):
            lines.append(f"  agreement with {name[5:]} at the end: {rows[-1].get('agreement')}; of "
                         f"pairs from different noise: {rows[-1].get('null_agreement')}")
    if planted := run.tables.get("planted"):
        lines.append("  planted copies that are found: " + ", ".join(
            f"{row.get('planted')} {number(row.get('copy_ratio')):.3g}" for row in planted))
    return "\n".join(lines)


def markdown(columns, rows):
    """A table as text."""
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |"
                     for row in (columns, ["---"] * len(columns), *rows))


def interval_text(result):
    """A cell of claims.md: the value and its interval."""
    return "-" if math.isnan(result.value) else (
        f"{result.value:.2f} [{result.low:.2f}, {result.high:.2f}]")


def heading(runs, judged):
    """The first line of claims.md: of how many of these runs it is, and in which features."""
    repeats = collections.Counter(run.key() for run in judged).values()
    more, bare = (sum(run.set != judged[0].set for run in runs),
                  sum(run.space is None for run in judged))
    text = (f"{len(judged)} runs of {len(repeats)} settings, {sum(c > 1 for c in repeats)} with "
            f"repeats; distances in {next((run.space for run in judged if run.space), '-')}")
    if 0 < bare < len(judged):
        text += f" ({bare} of the runs: none)"
    if more:
        text += f"; {more} other sets of samples are not judged"
    return text + ". In brackets: 95 % intervals. Definitions: results/README.md."


def claims_text(runs, found, study):
    """claims.md: the claims and their verdicts; exponents by each definition; onsets of each run.

    study: whether the study's own curves stand beside these runs.
    """
    judged = usual(runs)
    text = [heading(runs, judged)]
    text += [f"{factor_of(name).label}: {', '.join(map(str, groups))}{groups.where}."
             for name, groups in found.items()]

    rows = [[claim.number, claim.text, f"{claim.statistic}: {claim.where}",
             f"{interval_text(result)} ({result.text})", verdict]
            for claim, result, verdict in judge(runs)]
    if study:
        for row, (_, result, verdict) in zip(rows, judge(study_runs()), strict=True):
            row.append(f"{interval_text(result)} {verdict}")
    text.append(markdown(["", "claim", "supported where", "these runs", "verdict"]
                         + ["the study's curves"] * study, rows))

    taus = [name for name in TAUS if not all(math.isnan(onsets(run)[name]) for run in runs)]
    rows = []
    for name in taus:
        slopes = [exponent(groups, judged, onset(name)) for groups in found.values()]
        if not all(math.isnan(slope.value) for slope in slopes):
            rows.append([TAUS[name].label, *(interval_text(slope) + " (borrowed)" * slope.borrowed
                                       for slope in slopes)])
    if rows:
        text += ["Slopes of the onset of memorization, log-log, by its definition:",
                 markdown(["onset", *(factor_of(name).label for name in found)], rows)]

    columns = ["run", "last_step", *(f"tau_{name}" for name in taus if "level" not in name),
               "best_sw_heldout", "best_sw_step", "hump_step", "keep_step", "last_copy_ratio",
               "null_copy_ratio"]
    text += ["Onsets in steps (>: not reached), best fidelity (<: still improving), the peak of SW"
             + " after it, what to keep:", markdown(columns, [
                 [row[column] or "-" for column in columns] for row in map(summarize, runs)])]
    return "\n\n".join(text) + "\n"


def curve_rows(run):
    """The rows of runs.csv of one run: what it is, then `step`, then log and metrics."""
    before = {"run": run.name, "set": run.set, "parameters": number_text(run.parameters, 12),
              "seed": run.seed}
    before |= {k: v if isinstance(v, str) else json.dumps(v) for k, v in run.key()}
    columns = {c: dict(zip(table["step"], table[c], strict=True))
               for table in (run.metrics, run.log) for c in table
               if c != "step" and "setting_" not in c}
    return [before | {"step": number_text(step, 12)} | {
        c: number_text(values.get(step, math.nan), 8) for c, values in columns.items()}
        for step in sorted(set().union(*columns.values()))]


WRITTEN = []            # every file of this call, see report


def write(path, data):
    """Write bytes or text through a temporary file."""
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")
    WRITTEN.append(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_tables(runs, found, folder, study=False):
    """summary.csv, runs.csv and the tables beside it; claims.md where there are several runs."""
    tables = {"summary": [summarize(run) for run in runs],
              "runs": [row for run in runs for row in curve_rows(run)]}
    for run in runs:
        controls = [{"name": name} | {c: number_text(value, 6) for c, value in row.items()}
                    for name, row in run.controls.items()]
        for stem, rows in {"controls": controls, **run.tables}.items():
            tables.setdefault(stem, []).extend({"run": run.name} | {
                c: number_text(number(v), 6)
                if len(v) > 8 and "." in v and math.isfinite(number(v)) else v
                for c, v in row.items() if c != "made_of"} for row in rows)
    for stem, rows in tables.items():
        text = io.StringIO()
        columns = dict.fromkeys(column for row in rows for column in row)   # of all rows, in order
        out = csv.DictWriter(text, columns, lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
        if rows:
            write(folder / f"{stem}.csv", text.getvalue())
    if len(usual(runs)) > 1:
        write(folder / "claims.md", claims_text(runs, found, study))


# --- Figures --------------------------------------------------------------------------------------

mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "axes.titlesize": 10, "lines.linewidth": 1.6,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130,
                     "figure.constrained_layout.use": True})

# A colour per role in every figure, told apart by colour-blind readers (Okabe and Ito, 2008).
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"
REFERENCES = {"gaussian": "#E69F00", "local": "#AA4499", "population": GREEN, "memorizer": RED}
SCALES = ("log", "linear",
          "share",          # 0 to 1
          "cut")            # linear from 0, less the first values, of no skill yet
# Panels: title, scale of y, columns of log.csv and metrics.csv. A new metric is one line here.
PANELS = {
    "loss": ("loss", "log", "train_loss heldout_loss"),
    "copy": (f"copy ratio (d1/d2 < {THRESHOLDS['']})", "share", "copy_ratio null_copy_ratio"),
    "sw": ("sliced Wasserstein", "log", "sw_SPACE_train sw_SPACE_heldout"),
    "fid": ("FID", "log", "fid_SPACE_train fid_SPACE_heldout"),
    "kid": ("KID", "cut", "kid_SPACE_train kid_SPACE_heldout"),
    "precision": ("precision", "share", "precision_SPACE_train precision_SPACE_heldout"),
    "recall": ("recall", "share", "recall_SPACE_train recall_SPACE_heldout"),
    "sw_replaced": ("SW, samples and replaced", "log", "sw_SPACE_heldout sw_SPACE_replaced"),
    "kid_replaced": ("KID, samples and replaced", "cut", "kid_SPACE_heldout kid_SPACE_replaced"),
    "fid_replaced": ("FID, samples and replaced", "log", "fid_SPACE_heldout fid_SPACE_replaced"),
    **{f"copy{end}": (f"copies, d1/d2 < {below}", "share", f"copy_ratio{end} null_copy_ratio{end}")
       for end, below in THRESHOLDS.items() if end},
    "sscd": ("copies by SSCD", "share", "sscd_ratio null_sscd_ratio"),
    "auth": ("authentic share (AuthPct)", "share", "auth_share null_auth_share blurred_auth_share"),
    "nearest": ("rms to nearest training image", "linear", "nearest_rms blurred_nearest_rms"),
    "mixture": ("residual as a mixture of ten", "linear",
                "mixture_residual blurred_mixture_residual"),
    "near": ("near another sample alone", "linear", "near_samples"),
    "sharpness": ("sharpness (gradient energy)", "linear", "sharpness"),
    "contrast": ("contrast", "linear", "contrast"),
    "range": ("values out of range", "linear", "out_of_range"),
    "agreement": ("agreement of twins", "share", "agreement null_agreement"),
    "twins": ("distance, median rms", "linear",
              "twin_rms nearest_train_rms twin_nearest_train_rms")}
LEVEL_PANELS = {f"level{k}": (SLICES[k], "cut",
                              f"train_loss_level{k} heldout_loss_level{k} floor_level{k}")
                for k in range(LEVELS)}
PANELS |= LEVEL_PANELS
FOUR = ["loss", "copy", "sw", "fid"]            # the study's own; of sweeps, and of run_RUN.png
# How a column is drawn: line, colour (None: the run's), label; by the first word here that is in
# its name, so that their order matters.
STYLES = {"null": (":", GREY, "null"), "floor": ("-", RED, "perfect memorizer"),
          "blurred": ("-.", GREEN, "held-out images, blurred until as sharp"),
          "replaced": ("-.", None, "samples replaced by nearest training images"),
          "twin_nearest": ("--", RED, "twin to its nearest training image"),
          "nearest_train": ("-", RED, "sample to its nearest training image"),
          "twin_rms": ("-", None, "sample to the twin's, from the same noise"),
          "heldout": ("--", None, "held-out"), "train": ("-", None, "train"), "": ("-", None, None)}
CONTROLS = {"heldout": (GREEN, "held-out images: a perfect generalizer"),
            "training": (RED, "training images: a perfect memorizer")}
MARKS = {"heldout_25": (0, (1, 1.5)), "copy_01": (0, (4, 2))}       # onsets drawn in panels


def words(text, half=29):
    """A name as a figure shows it: shortened in its middle, no mathematics."""
    short = text if len(text) <= 2 * half + 2 else f"{text[:half]}…{text[-half:]}"
    return short.replace("$", r"\$")


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return mpl.colormaps["viridis"](np.linspace(0, 0.88, count))


def styles_of(columns):
    """{column: (line, colour, label)} of a panel's columns, see STYLES. Where it knows no label for
    two or more, each gets a line and its name as the label."""
    styles = {column: next(style for word, style in STYLES.items()
                           if f"_{word}_" in f"_{column}_" or not word)
              for column in columns.split()}
    plain = [column for column, (_, _, label) in styles.items() if label is None]
    if len(plain) > 1:
        for column, line in zip(plain, itertools.cycle(("-", "--", "-.", ":"))):
            styles[column] = line, None, words(column.replace("_SPACE", ""))
    return styles


def tick_text(value, _):
    """The label of a tick: 1M, 200k, 0.5."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def not_measured(axis):
    """Say so in a panel, once."""
    if not axis.texts:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)


def dress(axis, title, scale, xlabel=""):
    """Title, scales and few, readable ticks of a panel against training steps."""
    if scale not in SCALES:
        raise PlotError(f"PANELS: {title}: scale {scale}, must be one of {', '.join(SCALES)}")
    if not any(len(line.get_xdata()) for line in axis.lines):
        not_measured(axis)
        return axis.set(title=title, xlabel=xlabel)
    axis.set(title=title, xlabel=xlabel, xscale="log", yscale="log" if scale == "log" else "linear")
    if scale == "share":
        axis.set_ylim(-0.04, 1.04)
    if scale == "cut":
        cut(axis)
    for side in [axis.xaxis, axis.yaxis] if scale == "log" else [axis.xaxis]:
        low, high = side.get_view_interval()
        locator = mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,))
        side.set_major_locator(mpl.ticker.MaxNLocator(4) if high < 5 * low else locator)
        side.set_major_formatter(tick_text)
        side.set_minor_locator(mpl.ticker.NullLocator())


def cut(axis):
    """Limit y to what the curves reach once they have come down to twice their median: the values
    before, of a network without skill yet, would press all later ones flat."""
    # Not the controls, lines across the panel, whose x are in its units.
    curves = [line.get_ydata() for line in axis.lines if line.get_transform() == axis.transData]
    curves = [y for y in curves if len(y)]
    tops = [y[np.argmax(y <= 2 * np.median(y)):].max() for y in curves]
    if curves:
        axis.set_ylim(min(-0.066 * max(tops), *(1.1 * y.min() for y in curves)),
                      min(axis.get_ylim()[1], 1.1 * max(tops)))


def curve(axis, runs, column, style, color, scale=1, label=None, errors=False):
    """A column against step * scale: the mean over runs, in a band that is their range.

    style: of styles_of; its colour comes before the one given here, its label after. errors: the
    band is a 95 % interval instead, the first run's, from the columns beside this one: copy_low and
    copy_high, or twice sw_error_...
    """
    steps = np.unique(np.concatenate([run.column(column)[0] for run in runs]))
    if not len(steps):
        return

    def at_steps(run, name):
        x, y = run.column(name)
        return (np.interp(np.log(steps), np.log(x), y, math.nan, math.nan) if len(x)
                else np.full(len(steps), math.nan))
    values = np.array([at_steps(run, column) for run in runs])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    if errors and "SPACE" in column:
        error = at_steps(runs[0], column.replace("_", "_error_", 1))
        low, high = low - 2 * error, high + 2 * error
    elif errors:
        name = column if "ratio" in column else f"{column}_ratio"
        low, high = (at_steps(runs[0], name.replace("ratio", end)) for end in ("low", "high"))
    line, own_color, own_label = style
    color = own_color or color
    axis.plot(steps * scale, np.nanmean(values, 0), color=color, linestyle=line,
              marker="." if len(steps) == 1 else None, label=own_label if label is None else label)
    axis.fill_between(steps * scale, low, high, color=color, alpha=0.2, linewidth=0)


def panels(run, rows, size):
    """A figure with a panel of one run for each name of PANELS in rows, and its axes by name.

    Panels show the columns, their controls as thin lines, and the onsets of MARKS.
    """
    figure, axes = plt.subplot_mosaic(rows, figsize=size, empty_sentinel="")
    figure.supxlabel("training step", fontsize="medium")
    for name in [name for name in axes if name in PANELS]:
        axis, (title, scale, columns) = axes[name], PANELS[name]
        styles = styles_of(columns)
        for column, style in styles.items():
            curve(axis, [run], column, style, BLUE, errors=True)
        if not axis.lines:
            not_measured(axis)                  # though its controls may be
        for column, (key, (color, label)) in itertools.product(styles, CONTROLS.items()):
            value = run.control(key, column)
            drawable = value > 0 or (math.isfinite(value) and scale != "log")
            if drawable and "blurred" not in column:        # which is a control itself
                axis.axhline(value, color=color, linestyle=styles[column][0], linewidth=1.1,
                             label=label)
        for mark, line in MARKS.items():
            if math.isfinite(onsets(run)[mark]):
                axis.axvline(onsets(run)[mark], color="0.25", linestyle=line, linewidth=1,
                             label=TAUS[mark].label)
        dress(axis, title, scale)
    return figure, axes


def heat(axis, cells, columns, rows, colors, **more):
    """Cells (rows, columns) as an image, with the names of all rows and of 12 columns at most."""
    colormap = mpl.colors.LinearSegmentedColormap.from_list("", colors).with_extremes(bad="0.65")
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", cmap=colormap, **more)
    shown = range(0, len(columns), -(-len(columns) // 12))
    axis.set_xticks(shown, [columns[k] for k in shown])
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return image


def save_figure(figure, path, title, loc="upper center"):
    """Write a figure, whole or not at all, with its title and one legend outside; close it."""
    handles = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    # as many legend columns as fit: in characters, 12.5 an inch
    widths, room = [len(text) + 9 for text in handles], 12.5 * figure.get_figwidth()
    fits = [n for n in range(2, len(widths) + 1)
            if sum(max(part) for part in np.array_split(widths, n)) < room]
    figure.legend(handles.values(), handles, loc=f"outside {loc}", title=title, labelspacing=0.7,
                  title_fontsize="large", ncols=max(fits, default=1) if "upper" in loc else 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write(path, buffer.getvalue())


def draw_study(axis, run, other, panel):
    """The study's curves (other, a Run) in a run's panel: grey, as far as its own go.

    Shares are compared as they are; all else is multiplied by what makes held-out curves lowest at
    one height, since neither its loss nor its features are the same.
    """
    _, kind, columns = PANELS[panel]
    styles, curves, factor = styles_of(columns), {}, 1
    for column in styles:
        (steps, ours), (x, theirs) = run.column(column), other.column(column)
        within = (x >= min(steps, default=math.inf)) & (x <= max(steps, default=0))
        if within.any():
            curves[column] = x[within], theirs[within]
            if kind != "share":                             # the last column's counts: held-out
                factor = ours.min() / theirs[within].min()
    for column, (x, theirs) in curves.items():
        axis.plot(x, theirs * factor, color="0.6", linestyle=styles[column][0], linewidth=0.9,
                  zorder=1)
    if curves:
        axis.plot([], [], color="0.6", label="the study, scaled until held-out curves are lowest "
                                             "at one height")


def plot_run(run, path, rows=(FOUR,), study=()):
    """Panels of one run, the study's four: train solid, held-out dashed, controls, onsets.

    study: the study's runs with the same settings, to be drawn behind.
    """
    figure, axes = panels(run, list(rows), (2.75 * len(rows[0]) + 2, 2.6 * len(rows) + 1.4))
    for other, (name, axis) in itertools.product(study, axes.items()):
        draw_study(axis, run, other, name)
    save_figure(figure, path, "\n".join(map(words, run.name.split("\n")))
                + (f"; features: {run.space}" if run.space else ""))


def plot_metrics(run, path):
    """Every metric of PANELS that the run has, through training, with its controls."""
    width = 5                                   # panels per row
    names = [name for name, (_, _, columns) in PANELS.items() if name not in LEVEL_PANELS
             and any(len(run.column(column)[0]) for column in columns.split())]
    names += [""] * (-len(names) % width)
    plot_run(run, path, [names[k:k + width] for k in range(0, len(names), width)])


def plot_levels(run, path):
    """Loss by noise level, the perfect memorizer's too, and where held-out loss turns."""
    names = list(LEVEL_PANELS)
    names += [""] * (LEVELS % 2)
    half = len(names) // 2
    figure, axes = panels(run, [names[:half], names[half:]], (13, 5.4))
    for name, axis in axes.items():
        _, loss = run.column(f"heldout_loss_{name}")
        turn = onsets(run)[name]
        if math.isfinite(turn):
            axis.plot(turn, loss.min(), "v", color="0.25", label="held-out loss turns")
    save_figure(figure, path,
                f"{words(run.name)}: loss by noise level t (0: no noise, 1: noise alone)")


def plot_hump(run, path):
    """The study's panels; below, what the samples are: sharp or averages; and their spectrum."""
    figure, axes = panels(run, [["loss", "copy", "sw", "fid", "power"],
                                ["kid_replaced", "sharpness", "contrast", "mixture", "power"]],
                          (16, 6.4))
    spectrum = axes.pop("power")
    powers = {row.get("name") or number(row["step"]):
              np.array([number(v) for k, v in row.items() if k.startswith("power_")])
              for row in run.tables["spectrum"]}
    until, sharp = best_fidelity(run)[1], run.by_step("sharpness")
    best_step = max((step for step in sharp if step <= until), default=math.nan)
    blurred = min((step for step in sharp if step >= best_step), key=sharp.get, default=math.nan)
    # Where two are one step the later name counts; nan: there is none.
    places = {blurred: "least sharp", run.column("sw_SPACE_heldout")[0][-1]: "end",
              hump(run): "hump", best_step: "best"}
    steps = sorted(step for step in places if not math.isnan(step))
    curves = [(step, "o-", color, f"{places[step]}: step {step:,.0f}")
              for step, color in zip(steps, palette(len(steps)), strict=True) if step in powers]
    for key, line, color, label in [*curves, ("heldout", "-", *CONTROLS["heldout"])]:
        ratio = powers[key] / powers["training"]
        spectrum.plot(np.arange(1, len(ratio)), ratio[1:], line, color=color, label=label)
    for axis, (step, _, color, _) in itertools.product(axes.values(), curves):
        axis.plot(step, 0, "^", color=color, clip_on=False, zorder=9,
                  transform=axis.get_xaxis_transform())
    spectrum.axhline(1, color=RED, linewidth=1.1)
    spectrum.set(title="power / training images' power", xlabel="cycles per image")
    save_figure(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_twins(run, path):
    """Agreement of two models trained on other images, its null, copies and distances."""
    for name in [name for name in run.tables if name.startswith("twin_")]:
        twins = Run(f"{run.name}\nand {name[5:]}", {}, run.log,
                    columns_of(run.tables[name], name))
        plot_run(twins, path.with_name(f"{path.stem}_{name[5:]}.png"),
                 [["loss", "agreement", "copy", "twins"]])


def plot_planted(run, path):
    """What each measure of copying catches of planted copies, and of held-out images."""
    rows = run.tables["planted"]
    names = {f"copy_ratio{end}": f"d1/d2 < {below}" for end, below in sorted(
        THRESHOLDS.items(), key=lambda item: Fraction(item[1]))}
    names |= {"not_authentic": "not authentic", "sscd_ratio": "copies by SSCD"}
    names = {column: label for column, label in names.items() if column in rows[0]}
    cells = np.array([[number(row[column]) for column in names] for row in rows])
    figure, axis = plt.subplots(figsize=(1.5 * len(names) + 2, 0.4 * len(rows) + 1.2))
    heat(axis, cells, [*names.values()], [row["planted"] for row in rows], ["white", RED],
         vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(cells):
        axis.text(column, row, f"{value:.0%}", ha="center", va="center")
    save_figure(figure, path, f"{words(run.name)}: share called copies")


def plot_copier(run, path):
    """Which metric tells a copier: each through training, between its two controls as 0 and 1."""
    rows, close, neither, steps = {}, [], [], run.measured()
    for title, _, columns in PANELS.values():
        for column, (_, _, label) in styles_of(columns).items():
            zero, one = (run.control(key, column) for key in CONTROLS)
            found, own = run.by_step(column), words(column.replace("_SPACE", ""))
            if "replaced" in title or label not in (None, "train", "held-out", own):
                continue                        # it is in another panel, or no metric
            if not found or not abs(one - zero) > 0:
                continue
            name = (title if label is None else f"{title} to {label}" if label in (
                "train", "held-out") else label)
            values = np.array([(found.get(s, math.nan) - zero) / (one - zero) for s in steps])
            if abs(one - zero) <= 0.1 * max(abs(zero), abs(one)):
                close.append(name)              # controls too close to tell
            elif (np.abs(values - 0.5) <= 0.8).any():
                rows[name] = values
            else:
                neither.append(name)

    def order(name):                            # by the step from which on it sees copies
        seen = np.where(np.abs(rows[name] - 0.5) <= 0.8, rows[name], -9)
        return max(np.flatnonzero(seen < 0.5), default=-1), -seen[-1]
    names = sorted(rows, key=order)
    note = [textwrap.fill(f"{what}: {', '.join(found)}", 100) for what, found in (
        ("Like neither throughout", neither), ("The two controls are too close to tell", close))
            if found]
    figure, axis = plt.subplots(figsize=(9.5, 0.33 * len(rows) + 2 + 0.3 * len(note)))
    image = heat(axis, np.ma.masked_outside([rows[name] for name in names], -0.3, 1.3),
                 [f"{step:,.0f}" for step in steps], names, [GREEN, "#f4f4f4", RED], vmin=0, vmax=1)
    axis.set(xlabel="\n".join(["training step; grey: like neither", *note]))
    figure.colorbar(image, aspect=30, ticks=[0, 0.5, 1]).set_ticklabels(
        ["as held-out\nimages", "halfway", "as training\nimages"])
    save_figure(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_denoisers(run, path):
    """How far the network's x0 is from each reference, and which is nearest: where and when."""
    rows, levels = run.tables["denoisers"], [int(LEVELS * x) for x in (0.1, 0.3, 0.5, 0.8)]
    others = {row["reference"]: None for row in rows if row["reference"] not in REFERENCES}
    colors = REFERENCES | dict(zip(others, palette(len(others)), strict=True))
    names = list(colors)
    inputs = {"path": "its own sampling path", "heldout": "noised held-out images"}
    steps = sorted({number(row["step"]) for row in rows})
    # of each kind of inputs: (reference, level, step, median and the ends of its interval)
    cells = {kind: np.full((len(names), LEVELS, len(steps), 3), math.inf) for kind in inputs}
    for row in rows:
        if row["inputs"] in inputs:
            place = (names.index(row["reference"]), int(number(row["level"])),
                     steps.index(number(row["step"])))
            cells[row["inputs"]][place] = [number(row[c]) for c in ("median", "low", "high")]
    figure, axes = plt.subplot_mosaic([[*levels], ["path", "path", "heldout", "heldout"]],
                                      figsize=(13, 7.2))
    for level in levels:
        for (name, color), distances in zip(colors.items(), cells["path"], strict=True):
            median, low, high = distances[level].T
            axes[level].plot(steps, median, color=color, label=name)
            axes[level].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        dress(axes[level], f"{SLICES[level]}, its own path", "log")
    axes[levels[0]].set_ylabel("rms distance to the network's x0")
    for kind, text in inputs.items():
        medians = cells[kind][..., 0]
        first, second = np.sort(medians, 0)[:2]
        nearest = np.ma.masked_where(~(first < 0.98 * second), medians.argmin(0))
        heat(axes[kind], nearest, [f"{step:,.0f}" for step in steps],
             SLICES, [*colors.values()], origin="lower", vmin=0, vmax=len(names) - 1)
        axes[kind].set_title(f"nearest on {text} (grey: two within 2 %)")
    figure.supxlabel("training step", fontsize="medium")
    save_figure(figure, path, f"{words(run.name)}: which denoiser is the network?")


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def copied(file):
    """Which of a neighbours file's samples are copies. Raises PlotError where they were measured
    with another threshold than the figures' titles say."""
    threshold, below = float(read_neighbours(file, "threshold")), THRESHOLDS[""]
    if threshold != float(Fraction(below)):
        raise PlotError(f"{file}: was measured with a threshold of {threshold:.4g}, not {below}; "
                        "change THRESHOLDS in plot.py as in measure.py")
    return read_neighbours(file, "ratios") < threshold


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step; [] where it has no folder."""
    return sorted((run.path / "neighbours" / run.set).glob("[0-9]*.npz")) if run.path else []


def pick(run, count):
    """At most `count` neighbours files, evenly in log step plus copy ratio: both phases show."""
    files = snapshot_files(run)
    steps = np.log([float(file.stem) for file in files])
    copies = [np.mean(copied(file)) for file in files]
    way = (steps - steps[0]) / max(np.ptp(steps), 1e-9) + np.maximum.accumulate(copies)
    places = np.linspace(way[0], way[-1], count)
    return [files[k] for k in sorted({int(np.abs(way - place).argmin()) for place in places})]


def plot_ratios(run, path):
    """The whole curve of d1/d2: the share of samples below each value, and of the controls."""
    figure, axis = plt.subplots(figsize=(7, 4.8))
    files = pick(run, 6)
    curves = [(file, f"step {int(file.stem):,}", color, "-")
              for file, color in zip(files, palette(len(files)), strict=True)]
    curves += [(run.path / f"neighbours/{name}.npz", label, color, "--") for name, label, color in (
        ("heldout", "held-out images", GREEN), ("exact", "perfect memorizer", RED),
        ("leave_one_out", "training images, left out", GREY))]
    for file, label, color, line in curves:
        if file.exists():
            ratios = np.sort(read_neighbours(file, "ratios"))
            below = np.arange(len(ratios) + 1) / len(ratios)
            axis.step(np.maximum([0, *ratios, 1], 0.02), [*below, 1], where="post", label=label,
                      color=color, linestyle=line)
    for value in map(Fraction, THRESHOLDS.values()):
        axis.axvline(value, color="0.75", linewidth=0.8, zorder=0)
    lines = ", ".join(sorted(THRESHOLDS.values(), key=Fraction))
    dress(axis, "", "share", f"d1/d2 (lines: {lines}; values below .02 are drawn at .02)")
    axis.set(ylabel="share of images below", xlim=(0.0185, 1))
    save_figure(figure, path, words(run.name))


def strip(axis, file, top, label):
    """Ten of a neighbours file's pictures, d1/d2 of each, and their nearest training images."""
    samples, nearest, ratios = (read_neighbours(file, key)[:10]
                                for key in ("samples", "nearest", "ratios"))
    axis.text(0, top - 0.12, f"{label}, d1/d2 (framed: a copy), nearest training images")
    for k, (ratio, copy) in enumerate(zip(ratios, copied(file), strict=False)):
        left = 1.1 * k
        for picture, y in ((samples[k], top), (nearest[k], top + 1.4)):
            axis.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)), interpolation="nearest",
                        extent=(left, left + 1, y + 1, y))
        color, weight, width = (RED, "bold", 2.5) if copy else ("0.3", None, 0)
        axis.text(left + 0.5, top + 1.1, f"{ratio:.2f}", ha="center", va="top",
                  fontsize="small", color=color, weight=weight)
        axis.add_patch(plt.Rectangle((left, top), 1, 1, fill=False, edgecolor=color,
                                     linewidth=width))
    axis.set(xlim=(-0.05, 1.1 * len(ratios)), ylim=(top + 2.5, -0.6))
    axis.set_axis_off()


def plot_samples(run, path, steps=5):
    """Samples at several steps, a column from the same noise, above nearest training images."""
    files = pick(run, steps)
    figure, axis = plt.subplots(figsize=(9, 2.6 * len(files) + 0.5))
    for row, file in enumerate(files):
        strip(axis, file, 3.2 * row, f"step {int(file.stem):,}: samples")
    save_figure(figure, path, words(run.name))


def draw_frame(figure, run, file):
    """A frame of the film: the pictures of a neighbours file, and where on the curves it is."""
    axis = figure.add_axes((0.01, 0, 0.73, 0.9), anchor="N")
    strip(axis, file, 0, "samples")
    heldout = run.path / "neighbours/heldout.npz"
    if heldout.exists():
        strip(axis, heldout, 3.1, "held-out images")
    figure.text(0.012, 0.92, f"training step {int(file.stem):,}", fontsize=12, weight="bold")
    for bottom, name in ((0.57, "loss"), (0.1, "copy")):
        title, scale, columns = PANELS[name]
        small = figure.add_axes((0.79, bottom, 0.2, 0.34))
        for column, style in styles_of(columns).items():
            curve(small, [run], column, style, BLUE)
        small.axvline(int(file.stem), color=RED, linewidth=2, alpha=0.7)
        dress(small, title, scale)
        small.xaxis.set_major_locator(mpl.ticker.LogLocator())      # there is no room for more


def plot_film(run, path, frames=13):
    """A film through training: samples and held-out images as in `strip`, loss and copy ratio.

    Of as many colours as 500 kB allow; its last frame stays for 2.5 seconds.
    """
    pictures = []
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 8,
                         "figure.constrained_layout.use": False}):
        for file in pick(run, frames):
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


def plot_sweep(factor, groups, path, study=None):
    """The study's panels of a sweep, a colour per value: by raw step and by normalised time.

    study: the study's own sweep; thin, grey, on a scale of its own: for its shape alone.
    """
    title, _, formula, normalised = factor_of(factor)
    times = {"training step": lambda value: 1}
    if normalised:
        times[f"T = {formula}"] = lambda value: normalised(value, min(groups))
    figure, axes = plt.subplots(len(times), len(FOUR), squeeze=False,
                                figsize=(3.25 * len(FOUR), 3 * len(times) + 0.9))
    places = zip(axes.flat, itertools.product(times.items(), FOUR), strict=True)
    for axis, ((time, scale), name) in places:
        panel, kind, columns = PANELS[name]
        styles = styles_of(columns)
        for column, style in styles.items():
            line, _, text = style
            for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
                curve(axis, runs, column, style, color, scale(value),
                      words(label_of(factor, value)) if line == "-" else "")
            axis.plot([], [], color="0.25", linestyle=line, label=text)
        floors = [run.control("heldout", columns.split()[-1]) for runs in groups.values()
                  for run in runs if "SPACE_heldout" in columns]
        if np.isfinite(floors).any():
            axis.axhline(np.nanmedian(floors), color="0.25", linestyle=(0, (8, 2, 1, 2)),
                         linewidth=0.9, label="held-out images to other held-out images")
        if study:
            behind = axis.twinx()
            for (column, style), (value, runs) in itertools.product(styles.items(), study.items()):
                curve(behind, runs, column, style, "0.75", scale(value), "")
            plt.setp(behind.lines, linewidth=0.9)
            behind.set(yscale="log" if kind == "log" else "linear", zorder=-1)
            behind.yaxis.set_visible(False)
            axis.patch.set_visible(False)
            axis.plot([], [], color="0.75", label="the study, not to this scale: compare shapes")
        dress(axis, panel, kind, time)
    save_figure(figure, path, words(title + groups.where, 60))


def plot_onset(factor, groups, path, runs):
    """The onset by each definition against the factor, with its 95 % interval and power laws.

    An arrow: the onset lies beyond. runs: all that are judged, for the scatter.
    """
    numeric = all(map(has_log, groups))
    note = "definitions stand side by side; bars: 95 %, of each run alone"
    names = [name for name in TAUS if "level" not in name and any(
        math.isfinite(onsets(run)[name]) for group in groups.values() for run in group)]
    figure, axis = plt.subplots(figsize=(10.5, 4.8))
    for k, (name, color) in enumerate(zip(names, palette(len(names)), strict=True)):
        style = {"color": color, "marker": "osDPX*"[k % 6], "linestyle": ""}
        for at, (value, group) in enumerate(groups.items()):
            x = value * 1.035**k if numeric else at + 0.04 * k       # side by side
            for point in filter(None, map(onset(name), group)):
                step, spread = math.exp(point.value), math.exp(1.96 * math.sqrt(point.variance))
                error = 0.2 * step if point.bound else [[step - step / spread],
                                                        [step * spread - step]]
                axis.errorbar(x, step, error, **style, lolims=point.bound > 0,
                              uplims=point.bound < 0)
                note += "; arrow: lies beyond" * bool(point.bound and "arrow" not in note)
        slope, text = exponent(groups, runs, onset(name)), textwrap.fill(TAUS[name].label, 28)
        if math.isfinite(slope.value):
            text, style["linestyle"] = f"{text}\nslope {interval_text(slope)}", "-"
            ends = np.array([min(groups), max(groups)])
            axis.plot(ends * 1.035**k, math.exp(slope.intercept) * ends**slope.value, color=color,
                      linewidth=1)
        axis.plot([], [], label=text, linewidth=1, **style)
    label = factor_of(factor).label
    dress(axis, note, "log", label)
    axis.set(ylabel="onset of memorization, training step", xscale="log" if numeric else "linear")
    axis.set_xticks([*groups] if numeric else range(len(groups)),
                    [words(label_of(factor, value).split(" = ")[1]) for value in groups])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    save_figure(figure, path, "onset by its definition", "right")


def plot_switch(runs, path):
    """What samples are like that one snapshot draws down to time t and another from there on.

    runs: of one training run, the sets of samples drawn with sample.py's --switch and the one
    without. At t = 0 stands the first snapshot alone, at t = 1 the second.
    """
    alone = [run for run in runs if not run.options["setting_switch"]]
    pairs = {}                                  # {(first step, second step): {t: Run}}
    for run in runs:
        if run not in alone:
            second, t = map(float, run.options["setting_switch"].split("@"))
            for first in run.measured():
                pairs.setdefault((first, second), {})[t] = run
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9))
    for axis, name in zip(axes, ("sw", "kid", "sharpness"), strict=True):
        title, _, columns = PANELS[name]
        column = columns.split()[-1]
        for (pair, by_time), color in zip(pairs.items(), palette(len(pairs)), strict=True):
            drawn = {t: (run, pair[0]) for t, run in by_time.items()}
            for run in alone:
                drawn |= {0: (run, pair[0]), 1: (run, pair[1])}
            error = column.replace("_", "_error_", 1) if "SPACE" in column else ""
            points, errors = ({t: run.by_step(name).get(step) for t, (run, step) in drawn.items()}
                              for name in (column, error))
            times = sorted(t for t, value in points.items() if value is not None)
            axis.errorbar(times, [points[t] for t in times], [2 * (errors[t] or 0) for t in times],
                          fmt="o-", color=color, capsize=3,
                          label="first step {:,.0f}, then step {:,.0f}".format(*pair))
        axis.set(title=title + " to held-out" * ("heldout" in column),
                 xlabel="t where the second takes over")
        axis.set_xticks(np.linspace(0, 1, 5), ["0: first\nalone", "0.25", "0.5", "0.75",
                                               "1: second\nalone"])
    save_figure(figure, path, f"{words((alone or runs)[0].name)}: two snapshots in turn")


# A figure of a run: its file, what draws it, and whether a run has what it shows.
RUN_FIGURES = (
    ("run_{}.png", plot_run, lambda run: True),
    ("metrics_{}.png", plot_metrics, lambda run: "auth_share" in run.metrics),
    ("levels_{}.png", plot_levels, lambda run: "heldout_loss_level0" in run.log),
    ("samples_{}.png", plot_samples, lambda run: snapshot_files(run)),
    ("ratios_{}.png", plot_ratios, lambda run: snapshot_files(run)),
    ("film_{}.gif", plot_film, lambda run: snapshot_files(run)),
    ("denoisers_{}.png", plot_denoisers, lambda run: "denoisers" in run.tables),
    ("hump_{}.png", plot_hump, lambda run: run.space and "spectrum" in run.tables),
    ("copier_{}.png", plot_copier, lambda run: run.space and "training" in run.controls),
    ("twins_{}.png", plot_twins, lambda run: any(s.startswith("twin_") for s in run.tables)),
    ("planted_{}.png", plot_planted, lambda run: "planted" in run.tables))


def same_setting(run, other):
    """Whether a run has the settings of one of the study's, whose options are what it swept."""
    return all(run.options.get(option) == value for option, value in other.options.items()
               if option != "seed")


def draw_all(runs, found, folder, study, damaged):
    """Every figure that runs and their sweeps (found, see sweeps) have the data for.

    Of several seeds the first gets all figures, the others their curves. study: the study's own
    runs, to be drawn behind these, or []. damaged: a list that takes the message of each file that
    cannot be read.
    """
    seen = set()
    for run in [run for run in runs if not run.options.get("setting_switch")]:
        for name, draw, has in RUN_FIGURES:
            if (draw is plot_run or (run.key(), draw) not in seen) and has(run):
                more = {"study": [other for other in study if same_setting(run, other)]}
                try:
                    draw(run, folder / name.format(run.stem), **more if draw is plot_run else {})
                except PlotError as error:
                    damaged.append(str(error))
                seen.add((run.key(), draw))
    switched = [run for run in runs if "setting_switch" in run.options]     # it varies, then
    for sets in grouped(switched, lambda run: (run.key("setting_switch"), run.seed)).values():
        if any(run.options["setting_switch"] for run in sets):
            plot_switch(sets, folder / f"switch_{sets[0].stem}.png")
    for factor, groups in found.items():
        behind = sweeps(study) if study else {}
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png", behind.get(factor))
        plot_onset(factor, groups, folder / f"onset_{factor}.png", usual(runs))


# --- Command line ---------------------------------------------------------------------------------


def measured_unlike(runs):
    """The metrics, sorted, that were measured by other code in one row than in another."""
    by = {}
    for metric, code in (word.split(":") for run in runs for text in run.code
                         for word in text.split()):
        by.setdefault(metric, set()).add(code)
    return sorted(metric for metric, codes in by.items() if len(codes) > 1)


def report(roots, study, ignore):
    """Draw, judge and print everything below the roots; the messages of unreadable runs.

    What an earlier call drew (it left a list, .drawn) and this one did not is removed.
    """
    damaged, WRITTEN[:] = [], []
    groups = (find_runs(*roots, damaged=damaged, ignore=ignore) if roots else
              {Path("paper_figures"): study_runs()})
    study = study and bool(roots)
    for folder, runs in groups.items():
        found = sweeps(runs)
        write_tables(runs, found, folder, study)
        draw_all(runs, found, folder, study_runs() if study else [], damaged)
        if unlike := measured_unlike(runs):
            print(f"warning: {folder}: not all measured by the same code of {', '.join(unlike)}; "
                  "measure.py RUN measures anew what is old", file=sys.stderr)
        print(f"{folder}: {len(runs)} run{'s' * (len(runs) > 1)} drawn")
        print("\n".join(map(run_text, runs)) if len(usual(runs)) == 1 else
              (folder / "claims.md").read_text(encoding="utf-8"))
    if roots:
        for place in {folder.parent if folder.parent.name == "figures" else folder
                      for folder in groups}:
            now, old = {str(path.relative_to(place)) for path in WRITTEN
                        if path.is_relative_to(place)}, set()
            with contextlib.suppress(FileNotFoundError):
                old = {*(place / ".drawn").read_text(encoding="utf-8").split("\n")} - {"", *now}
            for name in [] if damaged else old:
                if (place / name).resolve().is_relative_to(place.resolve()):
                    (place / name).unlink(missing_ok=True)
            write(place / ".drawn", "\n".join(sorted(now | old if damaged else now)))
    return damaged


def main(argv=None):
    """Draw and judge everything below the roots.

    Raises SystemExit: 2 on bad input, 1 where a run was left out, 130 when interrupted.
    """
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("roots", nargs="*", metavar="root", help="a run folder, a folder of runs, or a "
                   "folder with runs.csv; of several, the union of their runs is drawn into the "
                   "figures/ of the first, and a run that two of them have is taken from the first")
    p.add_argument("--ignore", nargs="+", default=(), metavar="OPTION", help="options of train.py "
                   "that shall not make another run here, say eval_images")
    p.add_argument("--paper", action="store_true", help="set the study's own curves beside these "
                   "runs; without a folder, draw and judge them alone, into paper_figures/")
    args = p.parse_args(argv)
    if not (args.roots or args.paper):
        p.error("a folder, or --paper")
    if args.ignore and not args.roots:
        p.error("--ignore: names options of a folder's runs, and there is no folder")
    for stream in (sys.stdout, sys.stderr):         # names of runs that the locale cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        damaged = report(args.roots, args.paper, [name.replace("-", "_") for name in args.ignore])
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
