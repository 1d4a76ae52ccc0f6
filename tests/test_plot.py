"""plot.py: what is drawn for made-up runs whose answers are known, and for a real one."""

import csv
import importlib
import json
import math

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import plot

STEPS = np.array([64, 128, 256, 512, 1024, 2048, 4096])
LEVELS = range(10)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        out.writeheader()
        out.writerows(rows)


def made_up(root, n=16, seed=0, **options):
    """A run whose held-out loss is lowest at step 16 n; half of its samples are copies at 64 n."""
    run = root / "_".join([f"N{n}_s{seed}", *map(str, options.values())])
    (run / "neighbours").mkdir(parents=True)
    options = {"n": n, "seed": seed, "data": "toy"} | options
    (run / "args.json").write_text(json.dumps({"options": options, "parameters": 1}))
    x, copies = np.log(STEPS / (16 * n)), 1 / (1 + (STEPS / (64 * n)) ** -2.0)
    log = [{"step": s, "train_loss": 0.1 * math.exp(-v), "heldout_loss": 0.1 + 0.02 * v**2} for s, v
           in zip(STEPS, x, strict=True)]
    for row in log:
        row |= {f"{split}_level{k}": row[split] for split in ("train_loss", "heldout_loss")
                for k in LEVELS}
    write_csv(run / "log.csv", log)
    metrics = [{"set": "", "step": s, "copy_ratio": c, "copy_low": c / 2, "copy_high": (1 + c) / 2,
                "null_copy_ratio": 0.0, "auth_share": 1 - c, "sharpness": 0.02 + 0.01 * c}
               | {f"{name}_pixels_{split}": 1 + v**2 for name in ("fid", "sw")
                  for split in ("train", "heldout", "replaced")} | {"sw_error_pixels_train": 0.1}
               | {f"floor_level{k}": 0.01 for k in LEVELS}
               for s, v, c in zip(STEPS, x, copies, strict=True)]
    write_csv(run / "metrics.csv", metrics)
    write_csv(run / "controls.csv", [
        {"name": name, "copy_ratio": c, "auth_share": 1 - c, "sharpness": 0.02 + 0.01 * c,
         "fid_pixels_heldout": 1.5, "sw_pixels_train": value}
        for name, c, value in (("heldout", 0.0, 2.0), ("training", 1.0, 0.5))])
    generator = np.random.default_rng(0)
    for step, share in [*zip(STEPS, copies, strict=True), ("heldout", 0), ("exact", 1)]:
        images = generator.integers(0, 256, (12, 8, 8, 1), np.uint8)
        name = step if isinstance(step, str) else f"{step:07d}"
        np.savez(run / f"neighbours/{name}.npz", samples=images, nearest=images,
                 ratios=np.where(np.arange(12) < 12 * share, 0.1, 0.9), threshold=1 / 3)
    return run


def add_tables(run):
    """The tables of a run that not every run has."""
    write_csv(run / "denoisers.csv", [
        {"set": "", "step": s, "level": k, "inputs": inputs, "reference": name, "low": 1, "high": 9,
         "median": 1 + (k - step) * (name == "memorizer") * (inputs == "path") + 0.1 * j}
        for step, s in enumerate(STEPS) for k in LEVELS for j, name in enumerate(plot.REFERENCES)
        for inputs in ("path", "heldout", "training")])
    write_csv(run / "spectrum.csv", [
        {"set": "", "name": name, "step": step} | {f"power_{k}": power for k in range(5)}
        for name, step, power in [*(("", s, 2.0) for s in STEPS), ("heldout", "", 3.0),
                                  ("training", "", 4.0)]])
    write_csv(run / "twin_other.csv", [
        {"step": s, "agreement": 0.5, "agreement_low": 0.4, "agreement_high": 0.6,
         "null_agreement": 0.2, "twin_rms": 0.1, "nearest_train_rms": 0.3,
         "twin_nearest_train_rms": 0.4, "copy_ratio": 0.1} for s in STEPS])
    write_csv(run / "planted.csv", [{"planted": name, "copy_ratio": c, "not_authentic": 1.0} for
                                    name, c in (("exact", 1.0), ("mirrored", 0.25))])


@pytest.fixture(autouse=True)
def coarse():
    """Pictures of few pixels, to save time."""
    with mpl.rc_context({"savefig.dpi": 30}):
        yield


@pytest.fixture
def run(tmp_path):
    add_tables(made_up(tmp_path))
    ((run,),) = plot.find_runs(tmp_path).values()
    return run


@pytest.fixture
def drawn(monkeypatch):
    """A list that receives (figure, title) of all that is drawn, in place of files."""
    figures = []
    monkeypatch.setattr(plot, "save_figure",
                        lambda figure, path, title, *_: figures.append((figure, title)))
    yield figures
    for figure, _ in figures:
        plot.plt.close(figure)


def titled(figure, text):
    """The panel of a figure with this title."""
    (axis,) = [axis for axis in figure.axes if axis.get_title() == text]
    return axis


def labels(axis):
    """{label: line} of a panel's lines, the first of each."""
    lines = {}
    for line in axis.lines:
        lines.setdefault(line.get_label(), line)
    return lines


def test_panels_show_columns_controls_errors_and_onsets(run, drawn):
    plot.plot_run(run, None)
    ((figure, title),) = drawn
    assert "N16_s0" in title and "pixels" in title
    sw = titled(figure, "sliced Wasserstein")
    assert (labels(sw)["train"].get_ydata() == run.metrics["sw_pixels_train"]).all()
    assert labels(sw)["held-out"].get_linestyle() == "--"
    ends = [labels(sw)[text].get_ydata()[0] for _, text in plot.CONTROLS.values()]
    assert ends == [2.0, 0.5]
    band = sw.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(run.metrics["sw_pixels_train"].max() + 0.2)
    copies = titled(figure, "copy ratio (d1/d2 < 1/3)")
    assert labels(copies)["null"].get_linestyle() == ":"
    assert labels(copies)["copy ratio .01"].get_xdata()[0] == plot.onsets(run)["copy_01"]
    del run.metrics["fid_pixels_train"], run.metrics["fid_pixels_heldout"]
    run.controls = {}
    plot.plot_run(run, None)
    assert [text.get_text() for text in titled(drawn[1][0], "FID").texts] == ["not measured"]


def test_a_new_metric_is_one_line(run, drawn, monkeypatch):
    run.metrics["pose"] = np.arange(7.0)
    monkeypatch.setitem(plot.PANELS, "pose", ("pose", "linear", "pose"))
    run.controls["heldout"]["pose"], run.controls["training"]["pose"] = 0.0, 6.0
    plot.plot_metrics(run, None)
    plot.plot_copier(run, None)
    assert (titled(drawn[0][0], "pose").lines[0].get_ydata() == np.arange(7)).all()
    assert "recall" not in [axis.get_title() for axis in drawn[0][0].axes]      # not measured
    names = [text.get_text() for text in drawn[1][0].axes[0].get_yticklabels()]
    assert "pose" in names and "FID to held-out" not in names       # whose two controls are equal


def test_copier_map_goes_from_one_control_to_the_other(run, drawn):
    plot.plot_copier(run, None)
    axis = drawn[0][0].axes[0]
    names = [text.get_text() for text in axis.get_yticklabels()]
    cells = axis.images[0].get_array()
    for name in ("copy ratio (d1/d2 < 1/3)", "authentic share (AuthPct)",
                 "sharpness (gradient energy)"):
        assert [*cells[names.index(name)]] == pytest.approx([*run.metrics["copy_ratio"]])


def test_levels_show_the_floor_and_where_the_loss_turns(run, drawn):
    plot.plot_levels(run, None)
    for axis in drawn[0][0].axes:
        assert axis.get_ylim()[0] < 0 < labels(axis)["perfect memorizer"].get_ydata()[0] == 0.01
        assert labels(axis)["held-out loss turns"].get_xdata()[0] == pytest.approx(256)


def test_the_map_of_denoisers_names_the_nearest(run, drawn):
    for row in run.tables["denoisers"]:         # too near to the Gaussian to tell
        if (row["inputs"], row["reference"], row["level"]) == ("heldout", "local", "3"):
            row["median"] = "1.01"
    plot.plot_denoisers(run, None)
    title = "nearest on {} (grey: two within 2 %)"
    path, held = (titled(drawn[0][0], title.format(name)).images[0].get_array()
                  for name in ("its own sampling path", "noised held-out images"))
    names = list(plot.REFERENCES)
    for level in LEVELS:
        for step in range(len(STEPS)):
            nearest = "memorizer" if level < step else "gaussian"
            assert names[path[level, step]] == nearest, (level, step)
    assert held.mask[3].all() and not np.delete(held.mask, 3, 0).any() and (held == 0).all()


def with_hump(run):
    """The same run, but its sliced Wasserstein distance rises to a hump at step 512."""
    run.metrics["sw_pixels_heldout"] = np.array([2.0, 1, 2, 4, 3, 2, 1.5])
    run.metrics["sharpness"] = np.array([0.06, 0.05, 0.04, 0.03, 0.02, 0.03, 0.04])
    return run


def test_the_spectrum_is_relative_to_the_training_images(run, drawn):
    plot.plot_hump(run, None)
    lines = labels(titled(drawn[0][0], "power / training images' power"))
    power = {text.split(":")[0]: line.get_ydata() for text, line in lines.items()}
    assert (power["held-out images"] == 0.75).all()
    assert set(power) >= {"best", "end"} and "hump" not in power     # SW falls, then only rises
    assert (power["best"] == 0.5).all()
    plot.plot_hump(with_hump(run), None)
    marked = labels(titled(drawn[1][0], "power / training images' power"))
    assert {"hump: step 512", "least sharp: step 1,024"} <= {*marked}


def test_copies_have_a_red_frame_and_their_ratio(run, drawn):
    plot.plot_samples(run, None, steps=5)
    axis = drawn[0][0].axes[0]
    files = plot.pick(run, 5)
    copies = sum((plot.read_neighbours(file, "ratios")[:10] < 1 / 3).sum() for file in files)
    assert 0 < copies < 50
    assert sum(patch.get_linewidth() > 0 for patch in axis.patches) == copies
    assert [t.get_text() for t in axis.texts].count("0.10") == copies


def test_pictures_are_picked_from_both_phases(run):
    steps = [int(file.stem) for file in plot.pick(run, 4)]
    assert steps[0] == 64 and steps[-1] == 4096 and len(steps) == 4
    assert 64 < steps[1] < 1024 <= steps[2] < 4096      # copies are half of the samples at 1,024
    assert [int(file.stem) for file in plot.pick(run, 100)] == STEPS.tolist()


def test_the_film_is_short_and_holds_its_end(run, tmp_path):
    plot.plot_film(run, tmp_path / "film.gif", frames=3)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.size == (672, 336)
        durations = [film.seek(k) or film.info["duration"] for k in range(film.n_frames)]
    assert durations == [500, 500, 2500]
    assert (tmp_path / "film.gif").stat().st_size < 500_000


def test_a_sweep_of_words_zeros_and_seeds(tmp_path, drawn):
    for process in ("ddpm", "flow"):
        for seed in (0, 1):
            made_up(tmp_path, seed=seed, process=process)
    made_up(tmp_path, process="flow", dropout=0.0)
    made_up(tmp_path, process="flow", dropout=0.1)
    (runs,) = plot.find_runs(tmp_path).values()
    for factor, groups in plot.sweeps(runs).items():
        plot.plot_sweep(factor, groups, None)
        plot.plot_onset(factor, groups, None, runs)
        assert len(drawn[-2][0].axes) == 4
        text = [label for axis in drawn[-2][0].axes for label in labels(axis)]
        assert set(text) >= {plot.label_of(factor, value) for value in groups}
        ticks = [tick.get_text() for tick in drawn[-1][0].axes[0].get_xticklabels()]
        assert ticks == [plot.label_of(factor, value).split(" = ")[1] for value in groups]
    assert {"process", "dropout"} <= set(plot.sweeps(runs))


def test_sweeps_are_also_drawn_in_normalised_time_and_over_the_study(tmp_path, drawn):
    for n in (16, 32):
        made_up(tmp_path, n=n)
    (runs,) = plot.find_runs(tmp_path).values()
    ((factor, groups),) = plot.sweeps(runs).items()
    plot.plot_sweep(factor, groups, None, plot.sweeps(plot.study_runs())["n"])
    figure, title = drawn[0]
    assert title == "training images N"
    below = [axis for axis in figure.axes if axis.get_xlabel() == "T = step x (smallest N) / N"]
    assert len(below) == 4
    halved = labels(below[0])["N = 32"].get_xdata()
    assert halved == pytest.approx(STEPS / 2)
    assert len(figure.axes) == 16                       # a panel of the study's behind each
    assert sum("study" in text for axis in figure.axes for text in labels(axis)) == 8


def test_a_run_of_the_studys_settings_is_drawn_before_its_curves(tmp_path, drawn):
    for width in (64, 128):
        made_up(tmp_path, n=2048, width=width, batch=128, lr=1e-4)
    (runs,) = plot.find_runs(tmp_path).values()
    plot.draw_all(runs, {}, tmp_path, plot.study_runs(), [])
    both = {run.options["width"]: next(figure for figure, title in drawn if title.startswith(
        plot.words(run.name)) and len(figure.axes) == 4) for run in runs}
    assert {width: any("study" in text for axis in figure.axes for text in labels(axis))
            for width, figure in both.items()} == {64: False, 128: True}

    run, study = runs[0], plot.study_runs()[-1]
    plot.plot_run(run, None, study=[study])
    for name, column in (("loss", "heldout_loss"), ("copy ratio (d1/d2 < 1/3)", "copy_ratio"),
                         ("FID", "fid_pixels_heldout")):
        *_, line, _ = [line for line in titled(drawn[-1][0], name).lines
                       if line.get_color() == "0.6"]
        (steps, ours), (x, theirs) = run.column(column), study.column(column.replace("pixels",
                                                                                     "SPACE"))
        within = (x >= steps[0]) & (x <= steps[-1])
        assert 3 < within.sum() < len(x) and (line.get_xdata() == x[within]).all()
        factor = 1 if "copy" in column else ours.min() / theirs[within].min()
        assert line.get_ydata() == pytest.approx(theirs[within] * factor)


def test_everything_is_drawn(tmp_path):
    add_tables(made_up(tmp_path))
    made_up(tmp_path, seed=1)
    made_up(tmp_path, n=32)
    plot.main([str(tmp_path)])
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {f"{kind}_N16_s0.png" for kind in ("run", "metrics", "levels", "samples", "ratios",
                                              "denoisers", "hump", "copier", "planted")} <= names
    assert {"film_N16_s0.gif", "twins_N16_s0_other.png", "film_N32_s0.gif"} <= names
    assert {name for name in names if "N16_s1" in name} == {"run_N16_s1.png"}   # a second seed
    assert {"sweep_n.png", "onset_n.png"} <= names
    assert [name for name in names if name.startswith(".")] == [".drawn"]


def test_a_denoiser_of_your_own_is_drawn(run, drawn):
    rows = run.tables["denoisers"]
    run.tables["denoisers"] = rows + [row | {"reference": "mine", "median": "-99"} for row in rows
                                      if row["reference"] == "local"]
    plot.plot_denoisers(run, None)
    ((figure, _),) = drawn
    assert "mine" in labels(titled(figure, "t = 0.3 to 0.4, its own path"))
    (image,) = titled(figure, "nearest on its own sampling path (grey: two within 2 %)").images
    assert (image.get_array() == len(plot.REFERENCES)).all()


def test_one_run_is_told_in_a_few_lines(run):
    text = plot.run_text(run)
    row = plot.summarize(run)
    assert f"copy ratio .1: step {row['tau_copy_10']} [{row['tau_copy_10_low']}, " in text
    assert "agreement with other at the end: 0.5; of pairs from different noise: 0.2" in text
    assert "planted copies that are found: exact 1, mirrored 0.25" in text
    assert "level" not in text


def test_a_sweep_that_is_not_measured_yet_is_drawn(tmp_path):
    for run in (made_up(tmp_path, n=n) for n in (16, 32)):
        for path in run.rglob("*.*"):
            if path.name not in ("args.json", "log.csv"):
                path.unlink()
    plot.main([str(tmp_path)])
    assert {"sweep_n.png", "onset_n.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, to save time: tables and verdicts only."""
    monkeypatch.setattr(plot, "draw_all", lambda *_: None)


def files_of(root):
    """{file below a folder: (inode, content)}."""
    return {path: (path.stat().st_ino, path.read_bytes())
            for path in root.rglob("*") if path.is_file()}


def tables_of(folder, runs):
    """A folder of tables, of nothing but these runs."""
    (found,) = plot.find_runs(runs).values()
    plot.write_tables(found, plot.sweeps(found), folder)
    return folder


NS = (16, 32, 64, 128)


@pytest.mark.parametrize("folders_first", [True, False])
def test_half_in_folders_and_half_in_tables_is_one_sweep(tmp_path, folders_first):
    for k, n in enumerate(NS):
        for seed in (0, 1):
            options = {"mults": [1], "ema": None, "lr": 1e-4, "out": f"x{n}"}
            made_up(tmp_path / "all", n, seed, **options)
            made_up(tmp_path / ("half" if k % 2 else "other"), n, seed, **options)
    tables = tables_of(tmp_path / "tables", tmp_path / "other")
    roots = [tmp_path / "half", tables] if folders_first else [tables, tmp_path / "half"]
    ((place, runs),) = plot.find_runs(*roots).items()
    assert place == roots[0] / "figures"
    (whole,) = plot.find_runs(tmp_path / "all").values()
    assert [(run.name, run.key()) for run in runs] == [(run.name, run.key()) for run in whole]
    assert sorted(run.path is None for run in runs) == [False] * 4 + [True] * 4
    found, expected = plot.sweeps(runs), plot.sweeps(whole)
    assert {f: [*groups] for f, groups in found.items()} == {"n": [*NS]}
    assert all(len(group) == 2 for group in found["n"].values())
    for name in plot.TAUS:
        slopes = [plot.exponent(sweep["n"], part, plot.onset(name))
                  for sweep, part in ((found, runs), (expected, whole))]
        assert slopes[0][1:4] == pytest.approx(slopes[1][1:4], rel=1e-4, abs=1e-6, nan_ok=True)
        assert slopes[0].text == slopes[1].text
    assert [word for *_, word in plot.judge(runs)] == [word for *_, word in plot.judge(whole)]


def test_a_run_is_taken_from_the_first_root_that_has_it(tmp_path):
    for root, ns in (("a", (16, 32)), ("b", (32, 64)), ("c", (64, 16))):
        for n in ns:
            made_up(tmp_path / root, n)
    (runs,) = plot.find_runs(*(tmp_path / root for root in "abc")).values()
    assert [(run.path.parent.name, run.name) for run in runs] == [
        ("a", "N16_s0"), ("a", "N32_s0"), ("b", "N64_s0")]
    # a run folder is a root, too; another set of samples of a run is another run
    metrics = tmp_path / "b/N32_s0/metrics.csv"
    metrics.write_text(metrics.read_text().replace("\n,", "\neta1,"))
    runs = plot.find_runs(tmp_path / "a/N32_s0", tmp_path / "b")
    assert [*runs] == [tmp_path / "a/N32_s0/figures"]
    assert [run.name for run in runs.popitem()[1]] == ["N32_s0", "N32_s0_eta1", "N64_s0"]


def test_nothing_is_written_or_removed_in_the_other_roots(tmp_path, undrawn, capsys):
    made_up(tmp_path / "a", 16)
    made_up(tmp_path / "b", 32)
    made_up(tmp_path / "c", 64)
    tables = tables_of(tmp_path / "tables", tmp_path / "c")
    stale = []
    for folder in (tmp_path / "a/figures", tmp_path / "b/figures", tables):
        folder.mkdir(exist_ok=True)
        stale.append(folder / "run_gone.png")
        stale[-1].write_bytes(b"")
        if folder.name == "figures":
            (folder / ".drawn").write_text("run_gone.png")
    other = files_of(tmp_path / "b") | files_of(tables)
    roots = [str(root) for root in (tmp_path / "a", tmp_path / "b", tables)]
    plot.main(roots)
    assert f"{tmp_path / 'a/figures'}: 3 runs drawn" in capsys.readouterr().out
    assert files_of(tmp_path / "b") | files_of(tables) == other
    assert not stale[0].exists()
    assert {path.name for path in (tmp_path / "a/figures").iterdir()} == {
        "runs.csv", "summary.csv", "controls.csv", "claims.md", ".drawn"}
    first = files_of(tmp_path / "a")
    plot.main(roots[::-1])
    assert files_of(tmp_path / "a") == first and stale[2].exists()
    with open(tables / "figures/summary.csv", newline="") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"N64_s0", "N32_s0", "N16_s0"}


def test_runs_of_one_name_and_other_images_are_not_one_run(tmp_path, undrawn, refused):
    for root, images in (("a", "cats"), ("b", "dogs")):
        record = made_up(tmp_path / root, 16) / "args.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"subset_sha256": images}))
    refused(plot.main, [tmp_path / "a", tmp_path / "b"], "N16_s0", "another training images")


def test_runs_measured_by_other_code_are_named(tmp_path, undrawn, capsys):
    for n, code in ((16, "copying:1 kid:1"), (32, "copying:2 kid:1")):
        table = made_up(tmp_path, n) / "metrics.csv"
        with open(table) as file:
            rows = [row | {"code": code} for row in csv.DictReader(file)]
        write_csv(table, rows)
    plot.main([str(tmp_path)])
    assert "not all measured by the same code of copying; measure.py" in capsys.readouterr().err


def test_the_style_of_a_column_goes_by_whole_words():
    for column, word in (("restraint_score", ""), ("sw_SPACE_train", "train"),
                         ("twin_nearest_train_rms", "twin_nearest")):
        assert plot.styles_of(column) == {column: plot.STYLES[word]}
    two = plot.styles_of("red_mean blue_mean null_mean")        # told apart, and named
    assert two["red_mean"][0] != two["blue_mean"][0] and two["blue_mean"][2] == "blue_mean"
    assert two["null_mean"] == plot.STYLES["null"]


def test_every_root_needs_a_run(tmp_path, undrawn, refused):
    made_up(tmp_path / "a", 16)
    (tmp_path / "empty").mkdir()
    refused(plot.main, [tmp_path / "a", tmp_path / "none"], "none", "no such folder")
    refused(plot.main, [tmp_path / "a", tmp_path / "empty"], "empty", "no run")
    (made_up(tmp_path / "b", 32) / "args.json").write_text("{")
    with pytest.raises(SystemExit) as stop:         # what is damaged is left out, as in one root
        plot.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert stop.value.code == 1 and (tmp_path / "a/figures/runs.csv").exists()


def test_names_are_drawn_as_they_are(tmp_path):
    made_up(tmp_path, tag="$x_{2$" + "y" * 80)
    ((run,),) = plot.find_runs(tmp_path).values()
    plot.plot_run(run, tmp_path / "run.png")
    assert plot.words("$x$" + "y" * 80) == r"\$x\$" + "y" * 26 + "…" + "y" * 29


def test_damaged_neighbours_are_named(run):
    (run.path / "neighbours/0000256.npz").write_bytes(b"PK")
    with pytest.raises(plot.PlotError, match=r"0000256.npz: damaged"):
        plot.plot_samples(run, None)


def test_a_threshold_changed_in_one_place_is_refused(run, monkeypatch):
    monkeypatch.setitem(plot.THRESHOLDS, "", "1/4")
    with pytest.raises(plot.PlotError, match="threshold of 0.3333, not 1/4"):
        plot.plot_samples(run, None)


def test_a_damaged_file_of_neighbours_costs_its_own_figures_alone(tmp_path, capsys):
    for n in (16, 32):
        made_up(tmp_path, n)
    broken = next(tmp_path.rglob("N16_s0")) / "neighbours/0000256.npz"
    broken.write_bytes(b"PK")
    with pytest.raises(SystemExit) as end:
        plot.main([str(tmp_path)])
    assert end.value.code == 1 and "0000256.npz: damaged" in capsys.readouterr().err
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"sweep_n.png", "run_N16_s0.png", "samples_N32_s0.png", "film_N32_s0.gif"} <= drawn
    assert "samples_N16_s0.png" not in drawn


def test_the_same_file_of_data_elsewhere_is_the_same_data(tmp_path):
    for root, place in (("a", "x/c.npz"), ("b", "c.npz")):
        for n in (16, 32) if root == "a" else (32, 64):
            made_up(tmp_path / root, n, data=place)
    ((runs),) = plot.find_runs(tmp_path / "a", tmp_path / "b").values()
    assert [*plot.sweeps(runs)["n"]] == [16, 32, 64]


def test_a_panel_more_in_the_sweeps(tmp_path, monkeypatch):
    for n in (16, 32):
        made_up(tmp_path, n)
    monkeypatch.setattr(plot, "FOUR", [*plot.FOUR, "sharpness"])
    ((runs),) = plot.find_runs(tmp_path).values()
    plot.plot_sweep("n", plot.sweeps(runs)["n"], tmp_path / "sweep_n.png")
    assert (tmp_path / "sweep_n.png").exists()


def test_a_real_run_is_drawn(tiny_run):
    plot.main([str(tiny_run)])
    kinds = {path.name.split("_")[0] for path in (tiny_run / "figures").iterdir()}
    assert {"run", "metrics", "levels", "samples", "ratios", "film"} <= kinds


@pytest.mark.parametrize("name", ["train", "sample", "measure", "plot"])
def test_every_script_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_two_snapshots_in_turn_are_drawn_against_the_time_of_the_switch(tmp_path, monkeypatch):
    run = made_up(tmp_path)
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    copies = {row["step"]: float(row["copy_ratio"]) for row in rows}
    for first, second in (("64", "4096"), ("4096", "64")):
        rows += [{"set": f"switch{second}@{t}", "step": first, "setting_switch": f"{second}@{t}",
                  "copy_ratio": t, "sharpness": 2 * t, "sw_pixels_train": 1, "sw_pixels_heldout": t}
                 for t in (0.5, 0.25)]
    write_csv(run / "metrics.csv", rows)
    seen = {}

    def keep(figure, path, title, real=plot.save_figure):
        if path.name.startswith("switch"):
            seen.update({axis.get_title(): [line.get_xydata().tolist() for line in axis.lines
                                            if line.get_marker() == "o"] for axis in figure.axes})
        real(figure, path, title)
    monkeypatch.setattr(plot, "save_figure", keep)
    plot.main([str(tmp_path)])
    lines = sorted(seen["sharpness (gradient energy)"])
    ends = sorted(0.02 + 0.01 * copies[step] for step in ("64", "4096"))
    assert all([x for x, _ in line] == [0, 0.25, 0.5, 1] for line in lines)
    assert all([y for _, y in line[1:3]] == [0.5, 1.0] for line in lines)
    assert [lines[0][k][1] for k in (0, -1)] == pytest.approx(ends)
    assert [lines[1][k][1] for k in (-1, 0)] == pytest.approx(ends)
    drawn = {file.name.split("_")[0] for file in tmp_path.rglob("*.png")}
    assert "switch" in drawn and "onset" not in drawn and "sweep" not in drawn


def test_the_first_values_are_cut_off_but_no_hump(run):
    run.metrics["kid_pixels_heldout"] = np.array([9.0, 2, 0.2, 0.1, 0.1, 0.9, 0.3])
    figure, axes = plot.panels(run, [["kid"]], (3, 3))
    low, high = axes["kid"].get_ylim()
    assert 0.9 < high < 2 and low < 0
    plot.plt.close(figure)


def test_losses_at_other_noise_levels_than_plot_knows_are_refused(tmp_path, capsys):
    levels = {f"heldout_loss_level{k}": np.linspace(1, 0.5, 3) for k in range(12)}
    steps = np.array([64.0, 91, 128])
    with pytest.raises(plot.PlotError, match="12 noise levels; LEVELS in plot.py is 10"):
        plot.Run("r", {}, {"step": steps, **levels}, {})


def test_a_panel_of_an_unknown_scale_is_refused(monkeypatch):
    axis = plot.plt.figure().add_subplot()
    with pytest.raises(plot.PlotError, match="scale logarithmic"):
        plot.dress(axis, "mine", "logarithmic")
    plot.plt.close("all")
