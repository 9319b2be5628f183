"""The report: one page that needs nothing else, with every picture of the run."""

from __future__ import annotations

import base64
import html.parser
import json
import shutil

import numpy as np
import pytest

from common.errors import BadInput
from train.pictures import draw_views
from train.report import write_report


class Page(html.parser.HTMLParser):
    """The sources, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        assert tag not in ("script", "link", "iframe"), tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run_dir(finetuned, sharp_classifier, run_cli, tmp_path_factory):
    """A folder with shards, both trainings and predictions with heat maps."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(finetuned.shards, folder / "shards")
    for name in ("pretrain", "finetune"):
        shutil.copytree(finetuned.root / name, folder / name, ignore=shutil.ignore_patterns("*.pth"))
    run_cli(
        f"infer --model-path {sharp_classifier} --manifest {finetuned.manifest} --findings {finetuned.findings} "
        f"--output-dir {folder}/infer --device cpu"
    )
    return folder


def test_the_page_holds_everything_and_needs_nothing(run_dir):
    count = write_report(run_dir, run_dir / "out" / "page.html")
    text = (run_dir / "out" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "http://" not in text
    assert "https://" not in text
    assert all(link.startswith("#") for link in page.links)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)

    pictures = sorted(run_dir.glob("*/*.png"))
    assert count == len(pictures) == len(page.sources)
    assert {p.name for p in pictures} >= {"views.png", "curves.png"}
    assert sum("heatmap" in p.name for p in pictures) == 4  # two films, two classes
    shown = {base64.b64decode(source.partition(",")[2]) for source in page.sources}
    assert shown == {p.read_bytes() for p in pictures}


def test_the_page_shows_the_runs_figures(run_dir):
    write_report(run_dir, run_dir / "page.html")
    text = " ".join(Page((run_dir / "page.html").read_text(encoding="utf-8")).text)
    metrics = json.loads((run_dir / "finetune/metrics.json").read_text())
    for name, figures in metrics["per_class"].items():
        assert name in text
        assert f"{figures['auc']:.4g}" in text
        assert str(figures["positives"]) in text
    assert "Validation after the last epoch (2), 1 films of 1 patient(s)" in text
    assert "Simulated findings." in text
    assert "1-130_simulated0" in text
    assert "pixel_spacing_mm" in text
    order = [text.index(part) for part in ("Tiles by split", "Last epoch", "Validation after", "Predictions: ")]
    assert order == sorted(order)


def test_names_are_text_and_never_markup(tmp_path):
    (tmp_path / "<b>run").mkdir()
    shutil.copy(_picture(tmp_path), tmp_path / "<b>run" / "<script>x.png")
    write_report(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    Page(text)  # refuses a script tag
    assert "&lt;script&gt;x" in text
    assert "<b>" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds nothing of a run"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(BadInput, match="does not exist"):
        write_report(tmp_path / "gone", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_real_run_is_not_called_simulated(run_dir, tmp_path):
    shutil.copytree(run_dir / "finetune", tmp_path / "finetune")
    config = tmp_path / "finetune/config.yaml"
    config.write_text(config.read_text().replace("simulated_calcification", "calcification"))
    write_report(tmp_path, tmp_path / "page.html")
    assert "Simulated findings." not in (tmp_path / "page.html").read_text(encoding="utf-8")


def _picture(folder):
    draw_views({"tile": np.random.default_rng(0).random((1, 8, 8))}, folder / "views.png")
    return folder / "views.png"
