"""Every run, fine-tuning and benchmark ends with a page, and runs are put side by side."""

from __future__ import annotations

from pathlib import Path

from tests.journeys.command import checkpoint, done, refused
from tests.report.pages import Page


def test_runs_leave_a_report_of_their_own(trained: Path, tuned: Path) -> None:
    page = Page(trained / "report.html")
    assert page.foreign() == []
    assert "700 cells: 630 train, 70 validate" in page.text
    assert "All 70 validation cells." in page.text
    assert "scmodelforge train --config" in page.text
    assert "Predictions of cell_type" in Page(tuned / "report.html").text


def test_report_again_and_compare(trained: Path, tuned: Path, tmp_path: Path) -> None:
    assert done("report", trained).out == f"Report: {trained / 'report.html'}\n"
    output = tmp_path / "new" / "both.html"
    assert done("compare", trained, tuned, "--output", output).out == f"Comparison: {output}\n"
    text = Page(output).text
    assert "trained tuned" in text
    assert "These runs differ in what they learn" in text
    refused("compare", trained, words=("at least two run folders",))
    refused("report", tmp_path, words=("is no run folder", "run.json"))


def test_a_benchmark_with_output_has_a_page_beside_it(
    trained: Path, config: Path, cells: Path, tmp_path: Path
) -> None:
    output = tmp_path / "metrics.json"
    answer = done(
        *(
            "benchmark",
            "--config",
            config,
            "--model",
            checkpoint(trained),
            "--data",
            cells,
            "--output",
            output,
        )
    )
    assert f"Report:  {tmp_path / 'metrics.html'}\n" in answer.out
    page = Page(tmp_path / "metrics.html")
    assert page.foreign() == []
    assert "All 700 cells of the benchmark." in page.text
    assert "Linear probe" in page.text
    assert any("UMAP coloured by Label: cell_type" in (a.get("aria-label") or "") for _, a in page.tags)
