from __future__ import annotations

import dataclasses

from batchnorm.bench import cuda, measure, summary


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


def test_half_precision_beside_float32_on_large_inputs() -> None:
    def both(dtype: str, shape: tuple[int, ...], ours: float) -> measure.Row:
        return dataclasses.replace(row(shape, "both", ours, 1.0), dtype=dtype)

    large, larger, small = (1000, 9000), (3000, 3000), (2000, 2000)
    rows = [both("float32", large, 2.0), both("float16", large, 1.0), both("float32", larger, 0.5)]
    rows += [both("float16", larger, 1.0), both("float32", small, 9.0), both("float16", small, 1.0)]
    rows += [both("bfloat16", small, 1.0), dataclasses.replace(rows[1], phase="forward")]
    said = [line for line in summary.section(rows, warm=False).summary if "as fast as in float32" in line]
    assert said == [
        "Above 8 million values, ours in float16 is 1.00 times as fast as in float32 (geometric mean of 2 cases, "
        "least 0.50 at (3000, 3000), channels first)."
    ]
    assert not any("float32)" in line for line in summary.section(rows[1:2], warm=False).summary)


def test_what_was_measured_on_a_gpu() -> None:
    seconds = {"ours": 0.001, "torch": 0.002, "ours graph": 0.0005, "torch graph": 0.0015}
    small = measure.Row("test", (2, 3), "channels first", "float16", "both", seconds, {"ours": 0}, True, 0.9)
    large = dataclasses.replace(small, seconds={"ours": 0.004, "torch": 0.005}, residual=False, copy_share=None)
    section = summary.section([small, large], warm=False, gpu=cuda.Gpu("a GPU", 1, 2.5e12))
    table = section.tables[0]
    assert table.caption.startswith("medians in ms on a GPU, where a copy moves 2500 GB/s")
    assert table.columns[2:7] == ("ours", "torch, x", "ours graph, ms", "torch graph, x", "of a copy's speed")
    assert table.rows[0][:7] == (
        "(2, 3) channels first float16 + residual",
        *("both", "1.000", "2.00", "0.5000", "3.00", "90%"),
    )
    assert table.rows[1][2:7] == ("4.000", "1.25", "", "", "")
    assert section.summary[0].endswith("least 1.25 at (2, 3), channels first.")
