"""Pages of comparisons and of networks: what they say, that they say it safely, and that they need nothing else."""

import csv
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import sukashi
from cases import a_curve
from sukashi.core import code, files
from sukashi.core.errors import DataError, UsageError
from sukashi.core.experiment import Trial
from sukashi.core.files import FORMAT
from sukashi.core.stats import crossed, least_images, paired
from sukashi.core.types import Curve, Plan, Site
from sukashi.criteria.plans import plan_arrays
from sukashi.experiments.compare.contenders import save_curve
from sukashi.experiments.train import page as train_page
from sukashi.experiments.workspace import Record, Workspace
from sukashi.measures import curves
from sukashi.report import figures, glossary, networks, tables
from sukashi.report.words import number, printed

CRITERIA = {"random": 22, "magnitude": 36, "taylor": 38, "cbp": 34, "amp": 45, "cswap": 40, "drift": 52}
SITES = tuple(Site(f"layer{1 + i // 4}.{i % 4}.conv1", "channel", 16 * 2 ** (i // 4)) for i in range(12))
N_CLASSES, N_IMAGES = 10, 500
MODEL = {"spec": "sukashi:cifar_resnet20", "weights_sha256": "0" * 64}
DATA = {"spec": "cifar10", "calibration": 32}
READING = {"model": "sukashi:cifar_resnet20", "data": "my cifar10", "weights": "w.safetensors"}
COMMAND = "sukashi compare sukashi:cifar_resnet20 --data cifar10 --criteria random,drift --seeds 5 --out runs/cifar10"


def a_plan(criterion: str, seed: int) -> Plan:
    rng = np.random.default_rng([seed, CRITERIA.get(criterion, 0)])
    order = [(s, u) for s, site in enumerate(SITES) for u in range(site.n_units)]
    order = [order[i] for i in rng.permutation(len(order))]
    category = {}
    if criterion in ("amp", "cswap", "drift"):
        names = ("detrimental", "neutral", "critical")
        for pair in order:
            critical = 0.8 - 0.06 * pair[0]
            category[pair] = str(rng.choice(names, p=[0.6 * (1 - critical), 0.4 * (1 - critical), critical]))
    return Plan.build(SITES, order, method=criterion, category=category, n_images=30, passes=(60, 110))


def a_result(criterion: str, seed: int, **changes: Any) -> tuple[Curve, dict[str, Any]]:
    """Accuracy that falls from .92 to chance along a sigmoid, later for a better criterion."""
    rng = np.random.default_rng([seed, CRITERIA.get(criterion, 0), 1])
    middle = CRITERIA.get(criterion, 30) / 92 + rng.normal(0, 0.008) * (criterion != "magnitude")
    ratio = np.arange(20) / 20
    n_removed = np.round(ratio * 448).astype(int)
    if criterion in ("amp", "cswap", "drift"):
        n_removed = np.concatenate([n_removed, [60, 110]])
        ratio = np.concatenate([ratio, [np.nan, np.nan]])
    fraction = 1 - (1 - n_removed / 448) ** 1.3
    accuracy = 0.1 + 0.82 / (1 + np.exp((fraction - middle) / 0.06)) * (1 + np.exp(-middle / 0.06))
    correct = rng.permuted(np.arange(N_IMAGES) / N_IMAGES)[None] < accuracy[:, None]
    ids = [f"test/{i}" for i in range(N_IMAGES)]
    target = np.arange(N_IMAGES) % N_CLASSES
    curve = a_curve(correct, fraction, ratio=ratio, n_removed=n_removed, target=target, image_ids=ids)
    measured, at = curve.accuracy[:20], fraction[:20]
    area = np.trapezoid(measured, at) + (1 - at[-1]) * (measured[-1] + 0.1) / 2
    result = {
        "sauce": 100 * area,
        "relative_sauce": 100 * area / curve.accuracy[0],
        "dense_accuracy": curve.accuracy[0],
        "chance": 0.1,
        "class_names": [f"class {k}" for k in range(N_CLASSES)],
        "notes": [],
        "warnings": [],
        "n_evaluations": 12_345,
        "cost": {
            "dense": {"parameters": 269722, "flops": 81.6e6, "bytes": 1_102_000},
            "cut": {"parameters": 91000, "flops": 33.1e6, "bytes": 390_000},
        },
    }
    return curve, {**result, **changes}


def nothing(desk: Any) -> None:
    raise AssertionError("all trials are filled in")


def a_trial(criterion: str, seed: int) -> Trial:
    about = {"model": MODEL, "data": DATA}
    return Trial({**about, "criterion": criterion, "seed": seed}, nothing)


def finish(space: Workspace, trial: Trial, curve: Curve, result: dict[str, Any]) -> None:
    about = trial.about
    with space.lease(trial) as desk:
        assert desk is not None
        desk.save("plan", plan_arrays(a_plan(about["criterion"], about["seed"])))
        save_curve(desk, curve)
        desk.finish(result)


def fill(folder: Path, criteria: Iterable[str], seeds: int, **changes: Any) -> Workspace:
    identity = {
        "model": MODEL,
        "data": DATA,
        "criteria": list(criteria),
        "seeds": seeds,
        "ratios": [0.0, 0.05, 0.1, 0.5],
        "mode": "cut",
        "exclude": [],
        "options": {criterion: {} for criterion in criteria},
    }
    space, trials = Workspace(folder), [a_trial(criterion, seed) for criterion in criteria for seed in range(seeds)]
    space.claim("compare", identity, trials, shown={"margin": 0.05, "reading": READING})
    space.log("run", command=COMMAND, hardware="2 cores of an x86-64 machine")
    for trial in trials:
        criterion, seed = trial.about["criterion"], trial.about["seed"]
        finish(space, trial, *a_result(criterion, seed, **changes))
        space.log("latency", trial=trial.key, dense_ms=[5.2] * 6, cut_ms=[2.9 + 0.1 * seed] * 6)
    return space


def paged(folder: Path | Workspace, **options: Any) -> str:
    """The page of a folder, written anew."""
    place = folder.folder if isinstance(folder, Workspace) else folder
    return Path(sukashi.results(place, **options).report).read_text()


def altered(record: Record, **changes: Any) -> None:
    """Change the result of a finished trial."""
    sealed(record, {**record.kept, "result": {**record.result, **changes}})


def sealed(record: Record, kept: dict[str, Any]) -> None:
    """Put another content in the place of a finished trial's."""
    kept["sha256"] = hashlib.sha256(files.canonical(kept)).hexdigest()
    (record.folder / "trial.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("compared") / "compared", CRITERIA, 5).folder


@pytest.fixture(scope="module")
def page(compared: Path) -> str:
    return paged(compared)


class _Reader(html.parser.HTMLParser):
    """The tags of a page with their attributes, its words, and the cells of its tables by heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.heading = ""
        self.feed(text)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "table":
            self.tables[self.heading] = []
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data
        if "h2" in self.open:
            self.heading += data
        if "td" in self.open or "th" in self.open:
            row = self.tables[self.heading][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the table below a heading, by their first cell."""
    return {row[0]: row[1:] for row in _Reader(text).tables[heading]}


def named(text: str, name: str) -> dict[str, list[str]]:
    """Rows of the table of a name, by their first cell."""
    table = next(table for table in tables.tables_of(text) if table.name == name)
    return {row[0].text: [" ".join(filter(None, (of.text, of.small))) for of in row[1:]] for row in table.rows}


def areas(criterion: str, *, relative: bool = False) -> np.ndarray:
    return np.array([curves.areas(a_result(criterion, seed)[0], 0.1, relative=relative) for seed in range(5)])


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    tags = _Reader(page).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in tags:
        for name, value in attributes.items():
            assert name not in ("srcset", "action", "background")
            # What may be missing is no part of the page: its own places, and files that lie beside it.
            assert name != "href" or re.fullmatch(r"#[\w-]+|(figures|tables)/[\w-]+\.(svg|png|csv|tex)", str(value))
            assert name != "src" or str(value).startswith("data:image/png;base64,")
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_every_figure_is_also_a_file(compared: Path, page: str) -> None:
    files = {path.name: path for path in (compared / "figures").iterdir()}
    assert set(files) == {f"{name}.{form}" for name in ("curves", "units", "categories") for form in ("png", "svg")}
    assert page.count("data:image/png") == 3
    for path in (path for path in files.values() if path.suffix == ".png"):
        with Image.open(path) as image:
            assert "Software" not in image.info
            seen = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
        wanted = networks.CATEGORY_COLOURS if path.name == "categories.png" else figures.COLOURS
        shown = ("critical", "neutral", "detrimental") if path.name == "categories.png" else CRITERIA
        assert {tuple(bytes.fromhex(wanted[name][1:])) for name in shown} <= seen


def test_every_table_is_also_a_file_that_says_the_same(compared: Path, page: str) -> None:
    with (compared / "tables" / "criteria.csv").open() as file:
        header, *rows = csv.reader(file)
    until = "at most 5 points lower, up to"
    assert header == [
        *("criterion", "SAUCE", "SAUCE: 95% interval, low", "SAUCE: 95% interval, high", "seeds", f"{until} --ratio"),
        *(f"{until} parameters, %", f"{until} FLOPs, %", f"{until} accuracy, %"),
        *(f"{until} accuracy, %: 95% interval, low", f"{until} accuracy, %: 95% interval, high"),
    ]
    shown = cells(page, "")
    for name, sauce, low, high, *others in rows:
        assert shown[name][0] == f"{sauce} {low} – {high}"
        whole = f"{' '.join(others[:-2])} {others[-2]} – {others[-1]}"
        assert " ".join(shown[name][1:]) == (whole if "none" not in others else f"{others[0]} none")
    with (compared / "tables" / "differences.csv").open() as file:
        header, *minus = csv.reader(file)
    assert header == ["minus", "difference", "95% interval, low", "95% interval, high", "p", "p, Holm", "seeds"]
    assert all(float(low) < float(difference) < float(high) for _, difference, low, high, *_ in minus)
    with (compared / "tables" / "ratios.csv").open() as file:
        measured = list(csv.DictReader(file))
    assert [row["criterion"] for row in measured[::4]] == [row[0] for row in rows], "said in each of its rows"
    tex = (compared / "tables" / "costs.tex").read_text()
    assert r"latency, ms (median) & 5.20 & 3.10 ($\times$ 0.60 (0.56 to 0.63)) &" in tex
    assert r"data.spec & cifar10 \\" in (compared / "tables" / "settings.tex").read_text()


def test_tables_know_spans_groups_and_what_latex_reads() -> None:
    (table,) = tables.tables_of(
        """<table data-name="a" data-groups="by"><caption>50% of <b>x_1</b></caption>
        <thead><tr><th rowspan="2">model</th><th colspan="2">so</th></tr><tr><th>p</th><th>q</th></tr></thead>
        <tbody><tr><th colspan="3">lrp</th></tr>
        <tr><th>a &amp; b</th><td>1 <small title="low">-0.4 – 2</small></td><td>#</td>
        </tr></tbody></table>"""
    )
    assert table.columns == ["by", "model", "so p", "so q"]
    assert table.csv().decode() == 'by,model,so p,"so p: low, low","so p: low, high",so q\nlrp,a & b,1,-0.4,2,#\n'
    assert table.tex().decode().splitlines()[1:] == [
        *(r"\begin{tabular}{lrrr}", r"\toprule", r"by & model & so p & so q \\", r"\midrule"),
        *(r"lrp & a \& b & 1 ($-$0.4 -- 2) & \# \\", r"\bottomrule", r"\end{tabular}"),
    ]
    assert table.tex().decode().startswith(r"% 50\% of x\_1; needs \usepackage{booktabs}")


def test_files_of_an_earlier_page_are_gone(compared: Path, page: str) -> None:
    for name in ("figures/old.png", "tables/old.csv", "tables/note.txt"):
        (compared / name).write_text("old")
    assert paged(compared) == page
    assert not (compared / "figures" / "old.png").exists()
    assert not (compared / "tables" / "old.csv").exists()
    (compared / "tables" / "note.txt").unlink()  # of somebody else


def test_words_are_explained_where_a_page_first_says_them(page: str) -> None:
    assert re.search('<a class="word" href="#word-sauce" title="100 times the area', page)
    assert page.count('href="#word-sauce"') == 1
    listed = re.findall('<dt id="word-(.*?)">', page)
    assert {"sauce", "relative-sauce", "criterion", "unit", "holm", "tango", "critical", "flops"} <= set(listed)
    assert not {"gini", "rewinding", "wilson"} & set(listed), "of other pages"
    said = glossary.explained('<pre>dense</pre><p class="dense">condensed, relative SAUCE</p><!-- words -->')
    assert said.startswith('<pre>dense</pre><p class="dense">condensed, <a class="word" href="#word-relative-sauce"')
    assert re.findall('<dt id="(.*?)">', said) == ["word-relative-sauce", "word-sauce"]
    other = "passes timed in turns; a dot at each of their points; images held out by the hash of their names"
    assert re.findall('<dt id="(.*?)">', glossary.explained(f"<p>{other}</p><!-- words -->")) == ["word-held-out"]
    own = "after each progressive pass; at most 5 points lower; held out by seed 0"
    assert set(re.findall('href="#word-(.*?)"', glossary.explained(f"<p>{own}</p><!-- words -->"))) == {
        *("progressive-pass", "point", "held-out-by-seed")
    }


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_on_a_telephone_nothing_but_tables_and_wide_figures_scrolls_sideways(
    compared: Path, page: str, tmp_path: Path
) -> None:
    """Chromium makes no window of 400 pixels, so that the page is a frame of one that tells its width."""
    (tmp_path / "frame.html").write_text(
        f"""<iframe id="f" src="{(compared / "report.html").as_uri()}" width="400" height="900"></iframe>
        <p id="said"></p><script>onload = () => {{
        const page = document.getElementById("f").contentDocument.documentElement;
        document.getElementById("said").textContent = `${{page.scrollWidth}} of ${{page.clientWidth}}`; }}</script>"""
    )
    asked = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--dump-dom",
    ]
    asked += [f"--user-data-dir={tmp_path}/profile", (tmp_path / "frame.html").as_uri()]
    seen = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search('<p id="said">(.*?)</p>', seen)[1] == "400 of 400"


def test_the_same_results_give_the_same_page(compared: Path, page: str) -> None:
    def beside() -> dict[Path, bytes]:
        return {path: path.read_bytes() for name in ("figures", "tables") for path in (compared / name).iterdir()}

    before = beside()
    assert paged(compared) == page
    assert beside() == before


def test_the_verdict_names_the_leader_its_lead_and_the_rule(page: str) -> None:
    words = _Reader(page).words
    gaps = crossed(areas("drift") - areas("amp"))
    assert (
        f"drift leads: SAUCE {areas('drift').mean():.1f}, {gaps.mean:.1f} above amp, the next best (95% interval "
        f"{gaps.low:.1f} to {gaps.high:.1f}, 5 seeds, p < 0.0001 corrected)." in words
    )
    assert "p < 0.05 after Holm's correction over all 21 pairs" in words


def shown_up_to(criterion: str, margin: float = 0.05) -> float:
    return curves.lossless([a_result(criterion, seed)[0] for seed in range(5)], margin, level=1 - 0.025 / len(CRITERIA))


def test_the_first_table_says_how_far_each_criterion_goes(page: str) -> None:
    table = cells(page, "")
    assert list(table)[2:] == ["drift", "amp", "cswap", "taylor", "magnitude", "cbp", "random"]
    found = crossed(areas("cswap"), bounds=(0, 100))
    ratio, rows = shown_up_to("cswap"), [a_result("cswap", seed)[0] for seed in range(5)]
    (place,) = np.flatnonzero(rows[0].ratio == ratio)
    gone, right = rows[0].fraction[place], crossed([curve.correct[place] for curve in rows], bounds=(0, 1))
    assert table["cswap"] == [
        f"{found.mean:.1f} {found.low:.1f} – {found.high:.1f}",
        "5",
        f"{ratio:g}",
        f"{100 * gone:.1f}",
        f"{100 * (1 - rows[0].flops[place] / rows[0].flops[0]):.1f}",
        f"{100 * right.mean:.1f} {100 * right.low:.1f} – {100 * right.high:.1f}",
    ]
    last = cells(page, "Accuracy by what is gone")["cswap"]
    assert last[-3:] == [
        f"{areas('cswap', relative=True).mean():.1f}",
        f"{100 * rows[0].fraction.max():.1f}%",
        "12,345",
    ]


def test_the_heading_says_how_far_to_cut_with_the_command(page: str) -> None:
    """With the criterion whose cut goes furthest in parameters while every seed's is shown to lose at most 5 points."""
    ratio, rows = shown_up_to("drift"), [a_result("drift", seed)[0] for seed in range(5)]
    assert ratio == max(map(shown_up_to, CRITERIA)) > 0
    (place,) = np.flatnonzero(rows[0].ratio == ratio)
    curve, accuracy = rows[0], np.mean([curve.accuracy[place] for curve in rows])
    words = _Reader(page).words
    assert (
        f"Cut {curve.n_removed[place] / 448:.1%} of the units with drift ({curve.fraction[place]:.1%} of the "
        f"parameters, {1 - curve.flops[place] / 1000:.1%} of the FLOPs): accuracy {accuracy:.1%} (mean of 5 seeds) "
        f"instead of {curve.accuracy[0]:.1%} on {N_IMAGES} test images, shown to be at most 5 points lower over all "
        "classes together." in words
    )
    command = next(line for line in words.split("sukashi prune ")[1:])
    for part in ("--data 'my cifar10'", "--criterion drift", f"--ratio {ratio:g}", "--weights w.safetensors"):
        assert part in command
    assert f"--out runs/drift-{100 * ratio:g}" in command
    assert "--round-to 1" in command, "the very network that was measured"


def test_a_class_that_is_lost_is_the_heading(tmp_path: Path) -> None:
    """Of 500 images 20 are of the last class, and what is cut loses those alone: 4 points of accuracy, and a class."""
    space = fill(tmp_path / "compared", ["drift"], 2)
    for record in space.records():
        target = np.minimum(np.arange(N_IMAGES) * N_CLASSES // 480, N_CLASSES - 1)
        target[480:], target[432:480] = 9, 8
        correct = np.ones((4, N_IMAGES), dtype=bool)
        correct[2:, 481:] = False
        ids = [f"test/{i}" for i in range(N_IMAGES)]
        units = np.array([0, 22, 45, 224])
        about = {"ratio": [0, 0.05, 0.1, 0.5], "n_removed": units, "target": target, "image_ids": ids}
        shutil.rmtree(record.folder)
        finish(
            space,
            a_trial("drift", record.about["seed"]),
            a_curve(correct, units / 448, **about),
            record.result | {"dense_accuracy": 1.0},
        )
    page = paged(space, margin=0.08)
    heading = re.search("<h1>(.*?)</h1>", page, re.DOTALL)
    assert heading is not None
    assert heading.group(1).startswith("class 9 falls from 100 to 5% where 50.0% of the units with drift (")
    assert (
        "though accuracy as a whole, 96.2% (mean of 2 seeds) instead of 100.0% on 500 test images, is shown to be "
        "at most 8 points lower" in page
    )
    assert cells(page, "Class by class")["class 9"][0] == "20"
    assert "<strong>class 9</strong>" in page


@pytest.mark.slow
def test_two_seeds_are_shown_each_and_one_answer_to_every_image_is_told(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift", "amp"], 2)
    for record in space.records():
        name, seed = record.about["criterion"], record.about["seed"]
        curve, result = a_result(name, seed)
        if name == "amp" or seed == 0:
            curve.answer[curve.ratio >= 0.5] = seed
        shutil.rmtree(record.folder)
        finish(space, a_trial(name, seed), curve, result)
    page = paged(space)
    said = "One and the same answer to every image is all that is left from ratio 0.5 on by amp."
    assert said in _Reader(page).words
    assert said in sukashi.results(space.folder).text()
    rows = [row for row in _Reader(page).tables["All measured ratios"] if row[-1] not in ("–", "one answer")]
    assert [row[-1] for row in rows] == ["1 of 2", "2 of 2"]
    each = [100 * a_result("drift", seed)[0].accuracy[10] for seed in range(2)]
    assert rows[0][-2] == f"{np.mean(each):.1f} {each[0]:.1f}, {each[1]:.1f}", "two seeds bound too little"
    assert "with two seeds, which bound too little, each of them" in _Reader(page).words


def test_too_few_images_are_said_with_what_they_can_show(tmp_path: Path) -> None:
    words = _Reader(paged(fill(tmp_path / "compared", ["drift", "amp"], 2), margin=0.001)).words
    assert "How far one may cut can't be said with 500 test images: 5,019 could show" in words
    able = float(re.search(r"Give --margin (0\.\d+), the least that 500 images can show", words).group(1))
    assert least_images(able, level=1 - 0.025 / 2) <= 500 < least_images(able - 0.001, level=1 - 0.025 / 2)


def test_equal_criteria_are_said_to_hide_each_other(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift", "amp", "cbp"], 1)
    record = next(record for record in space.records() if record.about["criterion"] == "amp")
    shutil.rmtree(record.folder)
    finish(space, a_trial("amp", 0), a_result("drift", 0)[0], record.result)
    assert re.search("(amp and drift|drift and amp) are equal on every seed", paged(space))


def test_accuracy_is_interpolated_and_never_beyond_what_was_measured(tmp_path: Path) -> None:
    """One criterion whose two points are known: 90 % dense, 50 % at 40 % removed, so 75 % at 15 %."""
    correct = np.zeros((2, 100), dtype=bool)
    correct[0, :90] = correct[1, :50] = True
    curve = a_curve(correct, [0, 0.4], ratio=[0, 0.5], n_removed=[0, 9])
    space, trial = Workspace(tmp_path), a_trial("cswap", 0)
    identity = {**trial.about, "mode": "cut", "ratios": [0, 0.5], "options": {"cswap": {}}, "exclude": []}
    space.claim("compare", identity, [trial], shown={"margin": 0.01, "reading": READING})
    finish(space, trial, curve, a_result("cswap", 0)[1] | {"n_evaluations": 0})
    page = paged(space)
    row = cells(page, "Accuracy by what is gone")["cswap"]
    assert [cell.split()[0] for cell in row[:4]] == ["75.0", "60.0", "–", "–"]
    assert row[-1] == "not counted", "its plan looked at images, and counted nothing"
    low, high = map(float, re.findall(r"[\d.]+", row[0])[1:])
    spread = np.array([1.0] * 50 + [0.625] * 40 + [0.0] * 10).std() / 10  # of an image's mean at 15 of 40 %
    assert (high - low) / (2 * 1.96) == pytest.approx(100 * spread, rel=0.15)
    assert "cswap was measured only up to 40.0% of the parameters removed" in _Reader(page).words


@pytest.mark.slow
def test_the_margin_is_that_of_the_run_unless_another_is_given(compared: Path, tmp_path: Path) -> None:
    shutil.copytree(compared, tmp_path / "compared")
    rows = {}
    for margin in (None, 0.3):
        page = paged(tmp_path / "compared", **({} if margin is None else {"margin": margin}))
        assert f"at most {100 * (margin or 0.05):g} points" in _Reader(page).words
        rows[margin] = float(cells(page, "")["drift"][2])
    assert 0 < rows[None] < rows[0.3]


def test_passes_are_listed_in_order(page: str) -> None:
    rows = [row for row in _Reader(page).tables["After each progressive pass"] if row[2].startswith("13.4")]
    assert len(rows) == 3
    assert rows[0][:2] == ["drift", "1"]
    accuracy = np.mean([a_result("drift", seed)[0].accuracy[-2] for seed in range(5)])
    fraction = 1 - (1 - 60 / 448) ** 1.3
    assert rows[0][2] == "13.4", "the same on all seeds"
    assert rows[0][3] == f"{100 * fraction:.1f}"
    assert rows[0][4].startswith(f"{100 * accuracy:.1f} ")


def test_costs_stand_beside_the_dense_network(page: str) -> None:
    table = cells(page, "What it costs to run")
    assert table["figure"][:2] == ["dense", "drift"]
    assert table["parameters"][:2] == ["270 k", "91 k × 0.34"]
    assert table["latency, ms (median)"][:2] == ["5.20", "3.10 × 0.60 (0.56 to 0.63)"]  # of 2.9, 3.0, .. 3.3
    assert table["file size"][0] == "1.1 MB"
    assert "beside the dense one, with half of the units removed." in _Reader(page).words
    assert "2 cores of an x86-64 machine" in page


def test_the_worst_classes_come_first(page: str) -> None:
    table = _Reader(page).tables["Class by class"][1:]
    lost = [float(row[-1].split()[0]) for row in table]
    assert lost == sorted(lost)
    assert sorted(row[0] for row in table) == [f"class {k}" for k in range(10)]
    ratio, found = shown_up_to("drift"), [a_result("drift", seed)[0] for seed in range(5)]
    own, (place,) = found[0].target == int(table[0][0][-1]), np.flatnonzero(found[0].ratio == ratio)
    dense, cut = (100 * np.mean([curve.correct[row, own].mean() for curve in found]) for row in (0, place))
    assert table[0][1] == "50"
    assert [cell.split()[0] for cell in table[0][2:]] == [f"{dense:.1f}", f"{cut:.1f}", f"{cut - dense:+.1f}"]
    change = paired([curve.correct[place, own].astype(int) - curve.correct[0, own] for curve in found])
    assert table[0][-1].split()[1:] == [f"{100 * change.low:+.1f}", "–", f"{100 * change.high:+.1f}"]
    small = "Too few images to show that a class loses at most 5 points, even where all answers are equal: "
    assert small + f"{table[0][0]} (50), " in _Reader(page).words
    assert "and 7 more classes; it takes 73." in _Reader(page).words


def test_it_says_how_to_see_it_again(page: str) -> None:
    assert f"<pre>{COMMAND}</pre>" in page
    settings = cells(page, "How it was done")
    assert settings["seeds finished"] == ["0, 1, 2, 3, 4"]
    assert settings["test images"] == ["500"]
    assert settings["versions"] == [", ".join(f"{name} {version}" for name, version in code.versions().items())]
    assert settings["model.spec"] == ["sukashi:cifar_resnet20"]


def test_trials_of_different_versions_are_told_apart(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift", "random"], 2)
    kept = space.records()[0].kept
    kept["versions"]["torch"] = "1.0"
    sealed(space.records()[0], kept)
    result = sukashi.results(space.folder)
    mixed = (
        f"trials of this folder were done by different versions: 3 by torch {code.versions()['torch']} and 1 by torch "
        "1.0; another folder makes them alike"
    )
    assert [made["trials"] for made in result.versions] == [3, 1]
    assert json.loads((space.folder / "results.json").read_text())["versions"] == result.versions
    assert f"note: {mixed}" in result.text()
    page = Path(result.report).read_text()
    assert _Reader(page).words.count(mixed) == 1
    assert "torch 1.0" in cells(page, "How it was done")["versions of 1 trial"][0]
    assert "torch 1.0" not in cells(page, "How it was done")["versions of 3 trials"][0]


def test_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    words = _Reader(paged(fill(tmp_path / "compared", ["drift", "random"], 1))).words
    assert "drift leads" not in words
    assert "drift has the highest SAUCE" in words
    assert "one seed can't tell whether another would agree" in words
    assert "--seeds 5 adds seeds to this folder" in words


def test_what_the_seeds_do_not_separate_does_not_lead(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift", "mine"], 4)
    for record in space.records():
        seed = record.about["seed"]
        if record.about["criterion"] == "mine":
            curve = a_result("drift", seed)[0]
            # Some images are never wrong in half of the seeds, and about as many always in the others.
            curve.correct[1:, : 75 if seed % 2 else 100] = seed % 2 == 0
            shutil.rmtree(record.folder)
            finish(space, a_trial("mine", seed), curve, a_result("mine", seed)[1])
    words = _Reader(paged(space)).words
    assert re.search("no criterion leads: (drift|mine) has the highest SAUCE", words)
    assert re.search(r"is not separated from (mine|drift) \((mine|drift): \d+\.\d lower, 95% interval -", words)
    assert "4 seeds can't tell; --seeds 5 adds to this folder" in words


def test_markup_in_names_is_shown_and_not_run(tmp_path: Path) -> None:
    attack = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    space = fill(
        tmp_path / "compared",
        [attack, "random"],
        2,
        class_names=[attack] * N_CLASSES,
        warnings=[f"2 bad images were left out: {attack}.png"],
    )
    space.log("run", command=attack, hardware=attack)
    page = paged(space)
    assert _Reader(page).words.count(attack) >= 10
    assert "script" not in {tag for tag, _ in _Reader(page).tags}
    assert all(str(attributes.get("src")).startswith("data:") for tag, attributes in _Reader(page).tags if tag == "img")


def test_warnings_are_shown_once(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift", "random"], 2, warnings=["3 bad images were left out: a.png, b.png"])
    for seed in range(2):
        space.log("latency", trial=a_trial("random", seed).key, dense_ms=[5.2] * 6, cut_ms=[9.9] * 6)
    before = Path(sukashi.results(space.folder).out, "results.json").read_bytes()
    assert b"3 bad images" in before
    assert b"times as long" not in before, "a clock decides it"
    (space.records()[0].folder / "trial.json").unlink()
    words = _Reader(paged(space)).words
    assert words.count("3 bad images were left out") == 1
    assert "3 of 4 trials are finished" in words
    assert "random: the cut network takes" in words
    assert "drift: the cut network takes" not in words


def answers(target: np.ndarray, **given: np.ndarray) -> dict[str, np.ndarray]:
    """What networks answered, as they are kept."""
    found = {"target": target, "image_ids": np.arange(len(target)).astype(str)}
    for name, answer in given.items():
        found |= {f"{name} answer": answer, f"{name} correct": (answer == target).astype(np.uint8)}
        found[f"{name} confidence"] = np.full(len(target), 0.9)
    return found


def cut_answers() -> dict[str, np.ndarray]:
    """Of 1,234 images 700 of the first class, all right before and half of them after, and 534 of the last."""
    target = np.repeat([0, 2], [700, 534]).astype(np.int32)
    dense, pruned = target.copy(), target.copy()
    dense[:23] = 2  # 98.1 % are right
    pruned[:350] = 2
    return answers(target, dense=dense, pruned=pruned)


ANSWERS = cut_answers()


def pruned(
    folder: Path, about: dict[str, Any], result: dict[str, Any], clock: dict[str, Any], *, one_answer: bool = False
) -> Workspace:
    """The folder of a pruned network, but for the network."""
    whole = {"model": MODEL | {"spec": "sukashi:digits_cnn"}, "data": DATA | {"spec": "digits"}}
    whole |= {"ratio_asked": 0.5, "scope": None, "sampling": "random", "repair": "none", "options": {}, "seed": 0}
    whole |= about
    space, trial = Workspace(folder), Trial(whole, nothing, place=".")
    space.claim("prune", whole, [trial])
    space.log("run", command="sukashi prune sukashi:digits_cnn")
    for batch_size, times in clock.items():
        space.log("latency", batch_size=batch_size, **times)
    with space.lease(trial) as desk:
        assert desk is not None
        if "scope" not in about:
            desk.save("plan", plan_arrays(a_plan(about["criterion"], 0)))
        first = answers(ANSWERS["target"], pruned=np.zeros(1234, dtype=np.int32)) if one_answer else {}
        desk.save("answers", ANSWERS | first)
        desk.finish(
            {"units_removed": None, "weights_removed": None, "layers": [], "notes": [], "warnings": [], **result}
        )
    return space


def test_a_pruned_folder(tmp_path: Path) -> None:
    dense = {"accuracy": 0.981, "parameters": 10000, "flops": 400}
    small = {"accuracy": 0.95, "parameters": 4000, "flops": 100}
    result = {
        "dense": dense,
        "pruned": small,
        "units_removed": 0.45,
        "n_images": 1234,
        "class_names": ["zero", "one", "two"],
        "warnings": ["class one has no image"],
    }
    about = {"criterion": "cswap", "mode": "cut", "round_to": 8}
    clock = {
        32: {"dense_ms": [2.0] * 6, "cut_ms": [3.0] * 6, "onnx_ms": [1.0] * 6},
        1: {"dense_ms": [1.0] * 6, "cut_ms": [0.9, 1.1] * 3},
    }
    space = pruned(tmp_path, about, result, clock)
    page = paged(space)
    words = _Reader(page).words
    assert (
        "Zero falls from 97 to 50%, accuracy on 1,234 test images goes from 98.1% to 95.0% (-3.1), parameters -60%, "
        in words
    )
    assert "FLOPs -75%, latency +50% for 32 images at once, not shown to change for one image." in words
    assert "95% intervals for new images: the pruned network's accuracy 93.6% to 96.1%" in words
    assert named(page, "classes")["zero"][3] == "-46.7 -50.4 – -43.0", "Tango's of 350 to 23 in 700"
    assert "class one has no image" in words
    assert (
        "pruned, 32 images at once: the cut network takes 1.50 (1.50 to 1.50) times as long as the dense one" in words
    )
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text())["classes"]["rows"]] == [
        "zero",
        "two",
    ], "class one has no image"
    costs = cells(page, "What it costs to run")
    assert costs["accuracy on 1,234 test images"] == ["98.1%", "95.0%"]
    assert costs["units removed"] == ["–", "45.0%"]
    assert costs["parameters removed"] == ["–", "60.0%"]
    assert costs["latency, ms (median), of 32 images"] == ["2.00", "3.00 × 1.50 (1.50 to 1.50)"]
    assert costs["latency, ms (median), of 1 image"] == ["1.00", "1.00 × 1.00 (0.90 to 1.10)"]
    assert costs["latency, ms (median), the ONNX file, of 32 images"] == ["2.00", "1.00 × 0.50 (0.50 to 0.50)"]
    assert (tmp_path / "figures" / "categories.png").exists()
    assert "sukashi prune sukashi:digits_cnn" in words
    assert cells(page, "How it was done")["ratio_asked"] == ["0.5"]
    told = (tmp_path / "results.json").read_text()
    assert "class one has no image" in told
    assert "times as long" not in told, "a clock decides it"
    assert "latency" not in told


def test_a_cut_that_leaves_one_answer_says_so_first(tmp_path: Path) -> None:
    figures = {"accuracy": 700 / 1234, "parameters": 10, "flops": 4, "peak_bytes": 4096, "batch_size": 32}
    result = {"dense": figures, "pruned": figures, "units_removed": 0.9, "n_images": 1234}
    about = {"criterion": "cswap", "mode": "cut", "round_to": 1}
    clock = {32: {"dense_ms": [2.0] * 6, "cut_ms": [3.0] * 6}}
    space = pruned(tmp_path, about, result | {"class_names": ["zero", "one", "two"]}, clock, one_answer=True)
    page = paged(space)
    heading = re.search("<h1>(.*?)</h1>", page, re.DOTALL)
    assert heading is not None
    assert heading.group(1).startswith("The pruned network takes every image for zero, accuracy on 1,234 test images")
    assert named(page, "all-classes")["balanced accuracy, %"][1] == "50.0 (one answer for all)"
    assert "peak memory, of 32 images" in cells(page, "What it costs to run")
    assert "latency, ms (median), of 32 images" in cells(page, "What it costs to run")


def test_a_sparse_folder_says_what_zeros_are_not(tmp_path: Path) -> None:
    dense = {"accuracy": 0.981, "zeros_in_all": 0.0, "zeros_in_masked_layers": 0.0}
    sparse = {"accuracy": 0.95, "zeros_in_all": 0.4, "zeros_in_masked_layers": 0.5}
    same = {"parameters": 3000, "flops": 100}
    result = {
        "dense": dense | same,
        "pruned": sparse | same,
        "weights_removed": 0.5,
        "layers": [
            {"layer": "fc<1>", "shape": [8, 250], "weights": 2000, "removed": 1200},
            {"layer": "fc2", "shape": [4, 100], "weights": 400, "removed": 0},
        ],
        "n_images": 1234,
        "class_names": ["zero", "one", "two"],
    }
    clock = {32: {"dense_ms": [2.0] * 6, "cut_ms": [3.0] * 6}}
    space = pruned(tmp_path, {"criterion": "wanda", "scope": "row"}, result, clock)
    page = paged(space)
    words = _Reader(page).words
    assert (
        "accuracy on 1,234 test images goes from 98.1% to 95.0% (-3.1), with 50.0% of the masked layers' weights"
        in words
    )
    assert "(40.0% of all parameters) at zero; it is as large and as slow as before." in words
    assert "Masked zeros are not compression" in words
    assert "neither size nor latency falls" in words
    assert "the pruned network's accuracy 93.6% to 96.1%" in words
    assert cells(page, "Where the zeros are") == {
        "layer": ["weight", "weights", "removed", "share"],
        "fc<1>": ["8 × 250", "2,000", "1,200", "60.0%"],
        "fc2": ["4 × 100", "400", "0", "0.0%"],
        "all": ["", "2,400", "1,200", "50.0%"],
    }
    costs = cells(page, "What it costs to run")
    assert costs["zeros in all parameters"] == ["0.0%", "40.0%"]
    assert costs["zeros in the masked layers"] == ["0.0%", "50.0%"]
    assert costs["weights removed"] == ["–", "50.0%"]
    assert not {"units removed", "parameters removed"} & set(costs)
    assert "fc<1>" not in page
    assert "times as long" not in words, "a clock's noise is no finding"
    assert not re.search(r"\bcut\b", words)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no experiment \(no experiment.json\): give the `out` of an "):
        sukashi.results(tmp_path)
    trial, space = a_trial("drift", 0), Workspace(tmp_path / "compared")
    space.claim("compare", {"mode": "cut"}, [trial], shown={"margin": 0.01})
    with pytest.raises(UsageError, match=r"no finished trial: give the same `sukashi.compare` again"):
        sukashi.results(space.folder)
    cut = Workspace(tmp_path / "pruned")
    cut.claim("prune", {}, [Trial({}, nothing, place=".")])
    with pytest.raises(UsageError, match=r"no finished network: give the same `sukashi.prune` again"):
        sukashi.results(cut.folder)
    for folder in (space.folder, cut.folder):
        assert not (folder / "report.html").exists()
        assert not (folder / "results.json").exists()
    about = json.loads((space.folder / "experiment.json").read_text())
    for version in (1, FORMAT + 1, None):
        (space.folder / "experiment.json").write_text(json.dumps({**about, "format": version}))
        with pytest.raises(UsageError, match=f"has format {version}, this version reads {FORMAT}"):
            sukashi.results(space.folder)
    (space.folder / "experiment.json").write_text("{")
    with pytest.raises(DataError, match=r"experiment\.json can't be read"):
        sukashi.results(space.folder)


def test_what_was_altered_is_not_believed(tmp_path: Path) -> None:
    space = fill(tmp_path / "compared", ["drift"], 2)
    first = space.records()[0].folder / "curve.npz"
    other = space.records()[1].folder / "curve.npz"
    first.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"curve\.npz can't be read \(it was altered\): remove its folder"):
        paged(space)
    first.unlink()
    with pytest.raises(DataError, match=r"curve\.npz can't be read \(No such file"):
        paged(space)


def test_trials_on_different_images_are_not_compared(tmp_path: Path) -> None:
    space, other = fill(tmp_path / "compared", ["drift", "random"], 1), a_trial("other", 0)
    space.claim("compare", space.identity, [a_trial("drift", 0), a_trial("random", 0), other])
    curve, result = a_result("random", 0)
    ids = tuple(f"train/{i}" for i in range(N_IMAGES))
    finish(space, other, replace(curve, image_ids=ids), result)
    with pytest.raises(DataError, match="different images"):
        paged(space)


def test_the_page_of_a_training_shows_every_epoch_and_the_one_kept(tmp_path: Path) -> None:
    entry = {"train_loss": 1.5, "val_loss": 1.25, "val_accuracy": 0.5, "lr": 0.05}
    history: list[dict[str, Any]] = [{**entry, "epoch": 1}, {**entry, "epoch": 2, "val_loss": 1.375}]
    about = {"model": MODEL | {"spec": "sukashi:digits_cnn"}, "data": DATA, "training": {"lr": 0.05}, "seed": 0}
    space, trial = Workspace(tmp_path), Trial(about, nothing, place=".")
    result = {
        **{"accuracy": 0.75, "accuracy_before": 0.5, "n_images": 400, "epochs": 2, "epoch": 1},
        **{
            "validation": {"loss": 1.25, "accuracy": 0.5},
            "n_validation": 100,
            "weights_removed": None,
            "zeros_in_masked_layers": None,
        },
        "class_names": ["cat", "<dog>"],
        **{"history": history, "notes": ["mind <this>"], "warnings": []},
    }
    space.claim("train", about, [trial])
    space.log("run", command="sukashi finetune x", versions={"torch": "2"})
    speed = [{"images_per_second": 300.0, "waiting": 0.01}, {"images_per_second": 600.0, "waiting": 0.04}]
    space.log("speed", trial=trial.key, epochs=speed)
    target = np.repeat([0, 1], [375, 25]).astype(np.int32)
    right = np.where(np.arange(400) < 394, target, 0)  # of the second class 19 of 25
    with space.lease(trial) as desk:
        assert desk is not None
        desk.save("answers", answers(target, before=np.zeros_like(target), trained=right))
        desk.finish(result)
    page = paged(space)
    by_class = named(page, "classes")
    assert by_class["<dog>"][:3] == ["25", "0.0 0.0 – 13.3", "76.0 56.6 – 88.5"], "Wilson's, as on every page"
    assert by_class["<dog>"][3].startswith("+76.0 +")
    assert named(page, "all-classes")["balanced accuracy, %"][0] == "50.0 (one answer for all)", "whatever the images"
    for said in (
        "75.0% of 400 test images are right, 50.0% before (+25.0).",
        "Weights of epoch 1 of 2 epochs",
        "validation loss and accuracy on 100 images",
        "1.3750",
        "400 images a second, 2.0% of the time",
        "<pre>sukashi finetune x</pre>",
    ):
        assert said in page
    assert re.search(
        r"^test accuracy +75.0% \(before: 50.0%\) on 400 test images$", sukashi.results(tmp_path).text(), re.M
    )
    assert re.search(r"^validation accuracy +50.0% on 100 images$", sukashi.results(tmp_path).text(), re.M)
    assert "<strong>1</strong>" in page
    assert "&lt;dog&gt;" in page
    assert "mind &lt;this&gt;" in page
    assert "<dog>" not in page
    told = json.loads((tmp_path / "results.json").read_text())
    assert not {"images_per_second", "waiting", "resumed"} & set(told)
    history[0]["val_loss"] = history[0]["val_accuracy"] = None
    altered(space.records()[0], history=history)
    assert "learning rate" in paged(space)


def test_a_dollar_in_a_name_is_a_dollar_in_every_text_of_a_figure():
    """Texts, ticks, titles and legends, with a formula that is none."""
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_title("$\\frac$")
    axes.plot([0, 1], label="$a_$")
    axes.legend()
    axes.set_xticks([0, 1], ["$x^$", "y"])
    axes.annotate("$^$", (0, 0))
    axes.bar(["$1_$", "$2_$"], [1, 2])
    assert figures.drawn(figure).png.startswith(b"\x89PNG")


def test_axes_of_shares_stay_within_them_and_epochs_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(train_page.figures, "drawn", drawn.append)
    for accuracies in ([0.99], [0.2, 1.0], [0.0]):
        entry = {"train_loss": 0.5, "val_loss": 0.25, "lr": 0.05}
        history = [{**entry, "epoch": i + 1, "val_accuracy": of} for i, of in enumerate(accuracies)]
        train_page._draw_epochs(history, 1)
        losses, right = drawn[-1].axes
        assert 0 <= right.get_ylim()[0] < min(accuracies) or min(accuracies) == 0
        assert max(accuracies) < right.get_ylim()[1] <= 1.01
        assert losses.get_ylim()[0] == 0
        low, high = right.get_xlim()
        assert [tick for tick in right.get_xticks() if low <= tick <= high] == list(range(1, len(accuracies) + 1))


def test_milliseconds_have_three_digits() -> None:
    told = [printed(ms, "ms") for ms in (0.05312, 5.2, 53.12, 531.2, 5312.0, 0.0, None)]
    assert told == ["0.0531", "5.20", "53.1", "531", "5,312", "0", "–"]


def test_a_folder_of_several_experiments_names_them(compared: Path) -> None:
    with pytest.raises(UsageError, match=f"is no experiment but holds 1 experiment: give {compared}$"):
        sukashi.results(compared.parent)


def test_nothing_is_written_with_a_sign_that_it_does_not_have() -> None:
    """-0.04 to one digit is 0.0, wherever differences are written."""
    assert (number(-0.04), number(-0.04, sign=True), number(0.04, 2, sign=True)) == ("0.0", "+0.0", "+0.04")
    for path in Path(sukashi.__file__).parent.rglob("*"):
        if path.suffix in (".py", ".j2"):
            assert not re.search(r":\+\.\d[f%]|%\+\.\d", path.read_text()), f"{path}: a z belongs after the sign"
