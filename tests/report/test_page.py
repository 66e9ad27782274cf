"""Pictures, and the page in a real browser."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lapora import metrics
from lapora.cli.app import app
from lapora.errors import DataError
from lapora.report.figures import evaluation_pictures, save_pictures, to_svg
from lapora.report.figures.style import Picture
from lapora.report.page import Page, PageTable, verdict, write_page
from lapora.storage.saved import SavedPosterior

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">&lt;"


@pytest.fixture(scope="module")
def tables():
    generator = torch.Generator().manual_seed(0)
    log_map = torch.log_softmax(4 * torch.randn(200, 3, generator=generator).double(), dim=1)
    targets = torch.where(
        torch.rand(200, generator=generator) < 0.7, log_map.argmax(1), torch.randint(0, 3, (200,), generator=generator)
    )
    return {
        "constant": metrics.constant_predictor(targets, 3),
        "map": log_map,
        "temperature": torch.log_softmax(log_map / 3, dim=1),
        "laplace default (mc-joint)": torch.log_softmax(log_map / 2, dim=1),
        "laplace other (probit)": torch.log_softmax(log_map / 4, dim=1),
    }, targets


def test_pictures_are_named_written_and_the_same_each_time(tables, tmp_path):
    after = ["laplace default (mc-joint)", "laplace other (probit)"]
    pictures = evaluation_pictures(*tables, after)
    assert [picture.name for picture in pictures] == [
        "reliability-laplace-default-mc-joint",
        "confidence-laplace-default-mc-joint",
        "reliability-laplace-other-probit",
        "confidence-laplace-other-probit",
        "risk-coverage",
    ]
    files = save_pictures(pictures, tmp_path / "new" / "folder")
    assert len(files) == 10 and all(file.stat().st_size > 2000 for file in files)
    assert to_svg(evaluation_pictures(*tables, after)[0].figure) == to_svg(pictures[0].figure)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_pictures(pictures, tmp_path / "file")


def test_a_picture_that_does_not_fit_on_the_disk_leaves_the_old_one(monkeypatch, tmp_path):
    figure = Figure()
    save_pictures([Picture("one", "caption", figure)], tmp_path)
    before = (tmp_path / "one.png").read_bytes()
    figure.suptitle("other")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        save_pictures([Picture("one", "caption", figure)], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "one.svg"]
    assert (tmp_path / "one.png").read_bytes() == before


def test_counts_and_axes_of_the_reliability_diagram(tables):
    (picture, *_) = evaluation_pictures(*tables, ["laplace default (mc-joint)"], "boolq, 200 rows of validation")
    assert picture.figure.get_suptitle() == "boolq, 200 rows of validation"
    upper, _, lower, _ = picture.figure.axes
    counts = [int(text.get_text()) for text in lower.texts]
    assert sum(counts) == 200
    assert counts == [each.count for each in metrics.reliability_bins(tables[0]["map"], tables[1]) if each.count]
    assert "ECE" in upper.get_title() and upper.get_xlim()[0] < 1 / 3
    bars = [bar for bar in lower.patches if bar.get_height()]
    assert {len(bars), len(counts)} == {len(counts)} and min(counts) < 10 < max(counts)
    assert [bar.get_facecolor()[3] == 0 for bar in bars] == [count < 10 for count in counts], "few rows: hollow"


@pytest.mark.parametrize(
    ("difference", "interval", "rows", "words"),
    [
        (-0.2, [-0.3, -0.1], 50, "better calibrated than the plain adapter: NLL 0.500 against 0.700"),
        (0.2, [0.1, 0.3], 50, "worse than the plain adapter"),
        (-0.2, [-0.4, 0.1], 50, "no better than the plain adapter"),
        (-0.2, [-0.3, -0.1], 19, "too few to judge by"),
    ],
)
def test_the_verdict_is_a_sentence(difference, interval, rows, words):
    plain = {"method": "map", "nll": 0.7, "ece": 0.2}
    laplace = {"method": "laplace", "name": "default", "link": "mc-joint", "nll": 0.5, "ece": 0.1}
    laplace["difference_to_map"] = {"nll": {"value": difference, "interval": interval}}
    assert words in verdict({"n": rows, "results": [plain, laplace]})
    assert verdict({"n": rows, "results": [plain]}) == "The plain adapter has an NLL of 0.700 and an ECE of 0.200."


def test_curves_are_told_apart_without_colour(tables):
    risk = evaluation_pictures(*tables, ["temperature"])[-1]
    (axis,) = risk.figure.axes
    looks = {(line.get_marker(), str(line.get_linestyle())) for line in axis.lines}
    assert len(looks) == len(axis.lines) == 4
    assert all(list(line.get_xdata()) == sorted(line.get_xdata()) for line in axis.lines)


def test_every_posterior_has_a_risk_curve_before_its_further_links(tables):
    log_ps, targets = tables
    generator = torch.Generator().manual_seed(1)
    many = {"map": log_ps["map"]}
    for name in ("default", "diag", "full"):
        for link in ("mc-joint", "mc-indep", "probit", "bridge"):
            noise = torch.randn(200, 3, generator=generator).double()
            many[f"laplace {name} ({link})"] = torch.log_softmax(log_ps["map"] / 2 + noise, dim=1)
    first = [f"laplace {name} (mc-joint)" for name in ("default", "diag", "full")]
    picture = evaluation_pictures(many, targets, first)[-1]
    drawn = [line.get_label() for line in picture.figure.axes[0].lines]
    assert [label.partition(":")[0] for label in drawn[:4]] == ["map", *first]
    assert len(drawn) == 8 and "5 more are in the table" in picture.caption


def test_methods_that_order_rows_alike_share_a_curve():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(torch.randn(50, 2, generator=generator).double(), dim=1)
    alike = {"map": log_p, "temperature": torch.log_softmax(log_p / 2, dim=1)}
    risk = evaluation_pictures(alike, torch.randint(0, 2, (50,), generator=generator), ["temperature"])[-1]
    assert [line.get_label().split(":")[0] for line in risk.figure.axes[0].lines] == ["map, temperature"]


def test_a_page_that_is_a_symlink_is_written_where_it_points(tmp_path):
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    write_page(tmp_path / "link.html", Page("title", {}, []))
    assert (tmp_path / "link.html").is_symlink() and "title" in (tmp_path / "real.html").read_text()


def test_figures_of_similar_names_are_kept_apart():
    tables = {label: torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log() for label in ("map", "laplace a_b", "laplace a-b")}
    pictures = evaluation_pictures(tables, torch.tensor([0, 1]), ["laplace a_b", "laplace a-b"], "rows")
    assert len({picture.name for picture in pictures}) == len(pictures) == 5


def test_everything_on_the_page_is_escaped_and_nothing_is_fetched(tmp_path):
    page = Page(
        NASTY,
        {NASTY: NASTY},
        [PageTable(NASTY, [NASTY], [[NASTY]], NASTY)],
        [(NASTY, b"<svg/>")],
        [NASTY],
        {NASTY: NASTY},
    )
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert "Content-Security-Policy" in text
    assert not re.search(r"(?:src|href)=\"(?!data:image/svg)", text) and "url(" not in text and "@import" not in text
    with pytest.raises(DataError, match="cannot be written"):
        write_page(tmp_path / "nowhere" / "page.html", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; .ci/run installs Debian's")
def test_the_page_in_chromium(demo, tmp_path, capsys):
    """The page of a real run: laid out, pictures drawn, nothing wider than the window, no script of the data's run."""
    adapter = tmp_path / "adapter"
    shutil.copytree(demo / "adapter", adapter)
    SavedPosterior(adapter / "laplace" / "default").rewrite_manifest({"note": NASTY})
    page = tmp_path / "page.html"
    arguments = ["--limit", "80", "--methods", "all", "--coverage", "0.8", "--report", str(page), "--json"]
    app(["eval", str(adapter), *arguments], standalone_mode=False)
    record = json.loads(capsys.readouterr().out)

    # What the browser made of it is asked by a script of the test's own, which the page's policy would stop.
    measured = tmp_path / "measured.html"
    policy = re.compile(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>")
    text = page.read_text()
    assert policy.search(text)
    measure = """<script>addEventListener("load", () => {
      const images = [...document.images];
      document.title = JSON.stringify({
        title: document.title,
        images: images.map(i => i.complete && i.naturalWidth > 200 && i.alt.length > 20 && i.clientWidth > 200),
        rows: document.querySelectorAll("tbody tr").length,
        overflow: document.documentElement.scrollWidth - innerWidth,
        cut: [...document.querySelectorAll("h1, h2, figcaption, .warning, .facts td")]
          .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline").length,
        text: document.body.innerText.includes("onerror"),
      });
    });</script></body>"""
    measured.write_text(policy.sub("", text).replace("</body>", measure))
    for width in (1280, 420):
        dumped = chromium(f"--window-size={width},900", "--dump-dom", measured.as_uri())
        found = json.loads(re.search(r"<title>(.*?)</title>", dumped, flags=re.S)[1].replace("&amp;", "&"))
        assert found["title"] == "farm: is adapter calibrated?"
        assert found["images"] == [True] * 3
        assert found["rows"] >= 2 * len(record["results"])
        assert found["overflow"] <= 0 and found["cut"] == 0, (width, found)

    chromium("--window-size=1280,2400", f"--screenshot={tmp_path / 'page.png'}", page.as_uri())
    pixels = matplotlib.image.imread(io.BytesIO((tmp_path / "page.png").read_bytes()))[..., :3]
    ink = pixels.mean(axis=2) < 0.5
    assert pixels.shape[:2] == (2400, 1280) and 0.005 < ink.mean() < 0.5
    # Ink all the way down to the pictures, none at the edges.
    assert all(part.any() for part in np.array_split(ink[:2000], 8)) and not ink[:, :8].any() and not ink[:, -24:].any()


def chromium(*arguments: str) -> str:
    # No sandbox: in a container, as root, Chromium has none to offer; the page is the test's own.
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def test_neighboring_precisions_of_equal_scores_are_one_row_of_inspect():
    from rich.console import Console

    from lapora.report.tables import _validation_curve
    from lapora.storage.manifest import CurvePoint, Scores, Validation

    scores = [0.7, 0.6, 0.50001, 0.50002, 0.50003]
    curve = [CurvePoint(nll=nll, ece=0.1, accuracy=0.5, precision=10.0**k) for k, nll in enumerate(scores)]
    record = Validation(
        split="validation",
        n=9,
        link="mc-joint",
        scheme="scalar",
        rows=[],
        curve=curve,
        map=Scores(nll=0.50003, ece=0.1, accuracy=0.5),
    )
    console = Console(width=80, record=True)
    console.print(_validation_curve(record))
    text = console.export_text()
    assert "100 to 1e+04" in text and "1e+03" not in text
    assert [line for line in text.splitlines() if "0.600" in line and "10 " in line]
    assert max(map(len, text.splitlines())) <= 80
