"""The report: one page that needs nothing else, in the order of the pipeline, readable on a desk, a phone and on paper."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.train.byol.pictures import draw_views
from mammostream.train.report import report
from mammostream.train.report.pictures import heat_map_scores
from mammostream.train.report.report import write_report

VOID = {"meta", "img", "br", "hr", "input", "link"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(html.parser.HTMLParser):
    """The sources, links, pictures' texts and text of a page; refuses tags that are not closed and anything that runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.links, self.alternatives, self.ids, self.text = [], [], [], [], []
        self._open = []
        self.boxes = []  # the classes around each table and picture
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        if tag == "img":
            self.alternatives.append(attributes["alt"])
        if tag in ("img", "table"):
            self.boxes.append(" ".join(of.get("class") or "" for _, of in self._open))
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self._open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder, tmp_path):
    count = write_report(folder, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert count == len(page.sources)
    return text, page


@pytest.fixture(scope="module")
def run_dir(finetuned, sharp_classifier, run_cli, tmp_path_factory):
    """A folder with preview, shards, both trainings, predictions with contact sheets and heat maps, and an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    run_cli(
        f"preview --manifest {finetuned.manifest} --tile-size 32 --stride 32 --pixel-spacing 0.4 --output-dir {folder}/preview"
    )
    shutil.copytree(finetuned.shards, folder / "shards")
    for name in ("pretrain", "finetune"):
        shutil.copytree(finetuned.root / name, folder / name, ignore=shutil.ignore_patterns("*.pth"))
    run_cli(
        f"infer --model-path {sharp_classifier} --manifest {finetuned.manifest} --findings {finetuned.findings} "
        f"--output-dir {folder}/infer --device cpu --sheet-tiles 6"
    )
    run_cli(
        f"evaluate --predictions {folder}/infer/predictions.parquet --labels {finetuned.val_csv} --output-dir {folder}/evaluate"
    )
    return folder


@pytest.fixture(scope="module")
def page(run_dir, tmp_path_factory):
    return page_of(run_dir, tmp_path_factory.mktemp("page"))


def test_the_page_needs_nothing_else(page):
    text, parsed = page
    assert "://" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!data:)", text)
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert len(set(parsed.ids)) == len(parsed.ids)
    for source in parsed.sources:
        kind, _, data = source.partition(";base64,")
        assert kind in ("data:image/png", "data:image/webp")
        Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()


def test_the_page_holds_every_picture_contact_sheets_first(run_dir, page):
    _, parsed = page
    pictures = [path for path in run_dir.glob("*/*.png") if path.stem != "curves"]
    assert {p.name for p in pictures} >= {
        "views.png",
        "contact_sheet.png",
        "roc.png",
        "reliability.png",
        "top_tiles_bright.png",
    }
    assert sum("heatmap" in p.name for p in pictures) == 4  # two films, two classes
    curves = [alternative for alternative in parsed.alternatives if alternative.endswith("by step")]
    errors = [alternative for alternative in parsed.alternatives if alternative.startswith("False ")]
    assert len(parsed.sources) == len(pictures) + len(curves) + len(errors)
    for wanted in ("loss", "z std", "effective rank", "learning rate", "momentum", "val loss", "mean AUC"):
        assert f"{wanted} by step" in curves
    assert all(parsed.alternatives)

    def places(beginning):
        return [i for i, alternative in enumerate(parsed.alternatives) if alternative.startswith(beginning)]

    assert places("Contact sheet: films") == [0]
    assert max(places("Contact sheet: the highest tiles")) < min(places("Heat map over a film"))


def test_the_page_goes_along_the_road(page):
    assert re.findall(r"<h2>(\S+) <small>(\S+)</small>", page[0]) == [
        ("Films", "preview"),
        ("Data", "shards"),
        ("Pre-training", "pretrain"),
        ("Fine-tuning", "finetune"),
        ("Predictions", "infer"),
        ("Evaluation", "evaluate"),
        ("Errors", "evaluate"),
    ]


def test_the_page_shows_the_runs_figures(run_dir, page):
    text = " ".join(page[1].text)
    for name, figures in json.loads((run_dir / "finetune/metrics.json").read_text())["per_class"].items():
        assert name in text
        assert f"{figures['auc']:.4g}" in text
        low, high = figures["intervals"]["auc"] or (None, None)
        assert low is None or f"{low:.3f} - {high:.3f}" in text
    evaluated = json.loads((run_dir / "evaluate/metrics.json").read_text())["per_class"]["bright"]
    for name in ("auc", "ap", "brier", "ece"):
        assert f"{evaluated[name]:.4g}" in text
    images = pd.read_parquet(run_dir / "shards/images.parquet")
    for column in ("candidates", "rejected_intensity", "kept_both_rules"):
        for count in images.groupby("split")[column].sum():
            assert str(count) in text
    assert "Validation after the last epoch (2), 1 films of 1 patient(s)" in text
    assert "Simulated findings." in text
    assert "not for diagnostic use" in text
    for part in ("1-130_simulated0", "pixel_spacing_mm", "model_sha256", "version of imagecodecs", "hidden_dim: 32", "torch"):
        assert part in text, part


def test_tables_and_pictures_scroll_in_boxes_of_their_own(page):
    text, parsed = page
    assert all("scroll" in box for box in parsed.boxes)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert re.search(r"\.scroll \{[^}]*overflow: auto", style)
    assert "@media print" in style
    assert "@media (max-width" in style
    assert 'name="viewport" content="width=device-width' in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_sideways_scrolling(run_dir, page, tmp_path, width):
    """The page in a frame as wide as a screen; a script in the frame's parent measures it and no request fails."""
    (tmp_path / "page.html").write_text(page[0], encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"<!doctype html><iframe src='page.html' style='width:{width}px;height:900px;border:0'></iframe><p id=out></p><script>"
        "onload = () => { const d = frames[0].document, e = d.documentElement;"
        "const broken = [...d.images].filter(i => !i.naturalWidth).length;"
        "document.getElementById('out').textContent = `measured ${e.scrollWidth} ${e.clientWidth} ${broken} ${d.images.length}`"
        "}</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/chromium", f"--window-size={width + 200},1000"]
    shown = subprocess.run([*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120).stdout
    content, visible, broken, images = map(int, re.search(r"measured (\d+) (\d+) (\d+) (\d+)", shown).groups())
    assert width - 20 <= visible <= width
    assert content <= visible
    assert broken == 0
    assert images == len(page[1].sources)


# ---------------------------------------------------------------- what goes wrong in a run is told


def test_a_collapse_is_told_at_the_top(tmp_path):
    lines = [{"step": step, "loss": -0.5, "collapse": int(step == 20)} for step in (10, 20, 30)]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = " ".join(page_of(tmp_path, tmp_path)[1].text)
    assert "the collapse alarm rang at 1 of 3 readings, first at step 20" in " ".join(text.split())
    assert text.index("Collapse.") < text.index("Pre-training")
    (tmp_path / "pretrain/metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "Collapse." not in " ".join(page_of(tmp_path, tmp_path)[1].text)


def test_a_killed_training_has_its_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": -0.5, "mfu_percent": 12.5}\n{"step": 20, "lo')
    _, parsed = page_of(tmp_path, tmp_path)
    assert parsed.alternatives == ["loss by step", "MFU percent by step"]


def test_a_killed_fine_tuning_is_no_pre_training(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train_loss": 0.5, "val_loss": 0.6}\n')
    assert "<h2>Fine-tuning" in page_of(tmp_path, tmp_path)[0]


def test_failed_films_and_images_have_their_reasons(run_dir, tmp_path):
    for name in ("shards", "infer"):
        shutil.copytree(run_dir / name, tmp_path / "run" / name, ignore=shutil.ignore_patterns("*.png"))
    images = pd.read_parquet(tmp_path / "run/shards/images.parquet")
    images.loc[0, "reason"] = "its codestream is cut off"
    images.to_parquet(tmp_path / "run/shards/images.parquet")
    path = tmp_path / "run/infer/image_predictions.parquet"
    predicted = pd.read_parquet(path)
    lost = predicted.iloc[[0]].assign(image_id="lost", reason="no tile passed", **{"max:bright": np.nan})
    pd.concat([predicted, lost]).to_parquet(path)
    text = " ".join(page_of(tmp_path / "run", tmp_path)[1].text)
    assert "its codestream is cut off" in text
    assert f"{len(images)}, 1 failed" in text
    assert "no tile passed" in text
    assert f"{len(predicted)}, 1 failed" in text


def test_probes_are_shown(tmp_path):
    row = {"network": "byol", "probe": "kNN", "level": "tile", "class": "mass", "share": 0.1, "auc": 0.8125, "sd": 0.01}
    rows = [
        row | {"low": 0.7, "high": 0.9, "patients": 12},
        row | {"network": "random", "auc": None, "low": None, "high": None},
    ]
    (tmp_path / "probe.json").write_text(json.dumps({"rows": rows, "folds": "5-fold", "notes": ["few patients"], "seeds": [0]}))
    text = " ".join(page_of(tmp_path, tmp_path)[1].text)
    for part in ("0.8125", "random", "few patients", "Probe"):
        assert part in text


# ---------------------------------------------------------------- a page of bounded size


def test_large_pictures_are_shrunk_and_small_ones_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(0, 200, (20, 25, 3), dtype=np.uint8), np.ones((80, 80, 1), np.uint8))
    Image.fromarray(smooth + rng.integers(0, 8, smooth.shape, dtype=np.uint8)).save(
        tmp_path / "heatmap_large.png", compress_level=1
    )
    draw_views({"tile": rng.random((1, 8, 8))}, tmp_path / "views.png")
    sources = [source.partition(";base64,") for source in page_of(tmp_path, tmp_path)[1].sources]
    small, large = (base64.b64decode(data) for _, _, data in sources)
    assert small == (tmp_path / "views.png").read_bytes()
    picture = np.asarray(Image.open(io.BytesIO(large)).convert("RGB")).astype(int)
    assert picture.shape == (1280, 1600, 3)
    assert len(large) < (tmp_path / "heatmap_large.png").stat().st_size / 4
    expected = np.asarray(Image.fromarray(smooth).resize((1600, 1280))).astype(int)
    assert np.abs(picture - expected).mean() < 12


def test_of_many_pictures_each_folder_keeps_its_first(tmp_path, monkeypatch):
    for folder, count in (("a", 30), ("b", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.fromarray(np.full((20, 20, 3), i, np.uint8)).save(tmp_path / folder / f"{i:02d}.png")
    text, parsed = page_of(tmp_path, tmp_path)
    assert len(parsed.sources) == 24 + 3
    assert "6 more pictures lie in a" in text
    monkeypatch.setattr(report, "PICTURE_BYTES", 10 * len(parsed.sources[0]))
    text, parsed = page_of(tmp_path, tmp_path)
    assert 6 <= len(parsed.sources) <= 10
    assert {"00", "01", "02"} <= set(parsed.alternatives)
    assert "more pictures lie in a" in text
    assert "more pictures lie in b" not in text  # its three come before a's fourth


def test_the_highest_heat_maps_come_first(run_dir, tmp_path):
    folder = tmp_path / "infer"
    shutil.copytree(run_dir / "infer", folder)
    images = pd.read_parquet(folder / "image_predictions.parquet")
    scores = heat_map_scores(images, ["bright"])
    first = max(scores, key=scores.get)
    alternatives = [a for a in page_of(tmp_path, tmp_path)[1].alternatives if "bright" in a and a.startswith("Heat map")]
    assert alternatives[0] == f"Heat map over a film: {first.removeprefix('heatmap_')}"


# ---------------------------------------------------------------- other folders


def test_names_are_text_and_never_markup(tmp_path):
    (tmp_path / "<b>run").mkdir()
    draw_views({"tile": np.random.default_rng(0).random((1, 8, 8))}, tmp_path / "<b>run" / "<script>x.png")
    text, _ = page_of(tmp_path, tmp_path)  # the parser refuses a script tag
    assert "&lt;script&gt;x" in text
    assert "<b>" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds nothing of a run"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(BadInput, match="does not exist"):
        write_report(tmp_path / "gone", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_real_run_is_not_called_simulated(run_dir, tmp_path):
    shutil.copytree(run_dir / "finetune", tmp_path / "finetune", ignore=shutil.ignore_patterns("metrics.jsonl", "*.png"))
    config = tmp_path / "finetune/config.yaml"
    config.write_text(config.read_text().replace("simulated_calcification", "calcification"))
    write_report(tmp_path, tmp_path / "page.html")
    assert "Simulated findings." not in (tmp_path / "page.html").read_text(encoding="utf-8")
