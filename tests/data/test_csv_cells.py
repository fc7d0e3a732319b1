"""Cells of tables: texts that spreadsheets and terminals leave alone, and that are read back as they were."""

import csv

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from advdiff_cli.data.csv_cells import quote, unquote
from advdiff_cli.data.table_writer import read_csv, write_csv


@given(st.text())
@example("'\\x1b")
@example("=a\\\x1b[31m")
@example("\\x1b")
@example("\udcff=")
def test_a_text_is_read_back(text):
    cell = quote(text)
    assert unquote(cell) == text
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")) or float(cell) is not None
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in cell)


@pytest.mark.parametrize("text", ["a.png", "-1", "+2.5e3", "0/a=b.png", "b é\\c.png", "1-2"])
def test_plain_texts_and_numbers_stay(text):
    assert quote(text) == text


def test_names_of_files_in_tables(advdiff, classifier, tmp_path):
    from PIL import Image

    names = ["=HYPERLINK(1).png", "+1.png", "-a.png", "@SUM(A1).png", "'quoted.png", "red\x1b[31m.png", "plain.png"]
    (tmp_path / "in" / "0").mkdir(parents=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / "in" / "0" / name)
    out, predictions = tmp_path / "p.csv", tmp_path / "e.csv"
    advdiff("predict", tmp_path / "in", "-c", classifier, "-o", out)
    raw = list(csv.reader(out.read_text().splitlines()))
    assert sorted(line[0] for line in read_csv(out)[1]) == sorted(f"0/{name}" for name in names)
    assert b"\x1b" not in out.read_bytes()
    advdiff("predict", f"{tmp_path}/in/0/*.png", "-c", classifier, "-o", out, "--overwrite")
    raw = [line[0] for line in csv.reader(out.read_text().splitlines())][1:]
    assert "'=HYPERLINK(1).png" in raw
    assert "'red\\x1b[31m.png" in raw
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in raw)
    assert sorted(line[0] for line in read_csv(out)[1]) == sorted(names)
    evaluate = ["evaluate", tmp_path / "in", "-c", classifier, "--predictions", predictions, "--json"]
    assert advdiff(*evaluate).json == advdiff(*evaluate).json
    assert b"\x1b" not in predictions.read_bytes()


def test_a_table_is_copied_as_it_is(tmp_path):
    lines = [["=a", "1"], ["-2", "x,y\n"], ["'", ""]]
    write_csv(tmp_path / "a.csv", ["name", "p"], lines)
    header, found = read_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", header, found)
    assert found == lines
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
