from __future__ import annotations

from batchnorm.bench import measure, summary


def row(shape: tuple[int, ...], phase: str, ours: float, torch: float) -> measure.Row:
    seconds = {"ours": ours, "torch": torch, "floor": ours / 2}
    return measure.Row("test", shape, "channels first", "float32", phase, seconds, {"ours": 2**20, "torch": None})


def test_the_sentences_follow_from_the_rows() -> None:
    rows = [row((2, 3), "both", 0.001, 0.004), row((4, 5), "both", 0.002, 0.002), row((4, 5), "forward", 1, 100)]
    section = summary.section(rows, warm=False)
    assert section.summary == [
        "Forward and backward, float32, against torch: geometric mean 2.00 over 2 cases, "
        "least 1.00 at (4, 5), channels first."
    ]
    assert section.tables[0].columns == ("case", "phase", "ours", "torch, x", "over floor", "peak, MiB: ours/torch")
    assert section.tables[0].rows[0] == ("(2, 3) channels first float32", "both", "1.000", "4.00", "2.00", "1/?")
    assert "fresh outputs" in section.tables[0].caption
    assert "warm outputs" in summary.section(rows, warm=True).tables[0].caption


def test_a_contender_that_sat_a_case_out_leaves_a_gap() -> None:
    rows = [row((2, 3), "both", 0.001, 0.004)]
    rows[0].seconds["jax"] = 0.002
    rows.append(row((4, 5), "both", 0.002, 0.002))
    cells = summary.section(rows, warm=False).tables[0].rows
    assert cells[0][3:5] == ("4.00", "2.00")
    assert cells[1][3:5] == ("1.00", "")
