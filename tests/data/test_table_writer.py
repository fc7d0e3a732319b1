"""Tables: resumed from OUT.part, checked by checksums, recorded in OUT.advdiff, sharded and merged."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from advdiff_cli.data.merge import merge_tables
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.provenance import recipe
from advdiff_cli.data.table_writer import TableWriter, read_csv, recorded_table, table_resume_params
from advdiff_cli.errors import AdvdiffError

N, B = 11, 4
HEADER = ("name", "value")
MADE = recipe("test", {"alpha": 0.05})
OTHER = recipe("test", {"alpha": 0.01})
LINES = [[f"patch {i}, \u00e9\udcff", str(i * i)] for i in range(N)]


def write(out, *, stop_after=None, part=None, made=MADE, overwrite=False):
    """Write lines; return how many batches were written."""
    writer = TableWriter(OutputSpec(out, made, overwrite=overwrite), HEADER, part or RowRange(0, N, N))
    if writer.up_to_date:
        return 0
    written = 0
    with writer:
        for batch in writer.batches(B):
            if written == stop_after:
                break
            writer.write(batch, [LINES[i] for i in batch.rows])
            written += 1
    return written


def test_what_is_written_reads_back(tmp_path):
    out = tmp_path / "t.csv"
    assert write(out) == 3
    header, lines = read_csv(out)
    assert (header, lines) == (list(HEADER), LINES)
    assert recorded_table(out)["recipe"] == MADE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.csv.advdiff"]
    assert write(out) == 0


def test_resume_does_only_what_is_left(tmp_path):
    out = tmp_path / "t.csv"
    assert write(out, stop_after=1) == 1
    assert not out.exists()
    assert table_resume_params(out) == {"alpha": 0.05}
    assert write(out) == 2
    assert read_csv(out)[1] == LINES


def test_unfinished_work_of_another_recipe_is_refused(tmp_path):
    out = tmp_path / "t.csv"
    write(out, stop_after=1)
    with pytest.raises(AdvdiffError, match=r"holds unfinished work of another recipe \(alpha 0.05 -> 0.01\)"):
        write(out, made=OTHER)
    assert write(out, made=OTHER, overwrite=True) == 3
    with pytest.raises(AdvdiffError, match=r"was made with other settings"):
        write(out)


def test_a_table_that_is_not_ours_is_kept(tmp_path):
    out = tmp_path / "t.csv"
    out.write_text("mine")
    with pytest.raises(AdvdiffError, match="was not made by this command"):
        write(out)
    assert out.read_text() == "mine"
    assert write(out, overwrite=True) == 3
    out.write_bytes(out.read_bytes() + b"edited")
    with pytest.raises(AdvdiffError, match="was not made by this command"):
        write(out)


def test_an_input_is_never_replaced(tmp_path):
    out = tmp_path / "labels.csv"
    out.write_text("file,label\n")
    with pytest.raises(AdvdiffError, match="is an input of this command"):
        TableWriter(OutputSpec(out, MADE, overwrite=True), HEADER, RowRange(0, N, N), read=[out])
    assert out.read_text() == "file,label\n"


def test_shards_merge_to_the_whole(tmp_path):
    write(tmp_path / "whole.csv")
    parts = [tmp_path / f"{i}.csv" for i in range(2)]
    for i, part in enumerate(parts):
        write(part, part=shard_rows(N, B, (i, 2)))
    with pytest.raises(AdvdiffError, match=r"rows 4 to 10 are in no shard"):
        merge_tables(parts[:1], tmp_path / "merged.csv", overwrite=False)
    merge_tables(parts[::-1], tmp_path / "merged.csv", overwrite=False)
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert recorded_table(tmp_path / "merged.csv")["recipe"] == MADE
    assert write(tmp_path / "merged.csv") == 0
    parts[0].write_text("edited")
    with pytest.raises(AdvdiffError, match="is not a table of advdiff predict, certify or evaluate, or was"):
        merge_tables(parts, tmp_path / "again.csv", overwrite=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_to_unfinished_work_is_told_and_made_again(tmp_path, caplog, data):
    out = tmp_path / "t.csv"
    for file in tmp_path.iterdir():
        file.unlink()
    write(out, stop_after=2)
    work = tmp_path / "t.csv.part"
    raw = bytearray(work.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw = raw[:at]
    else:
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    work.write_bytes(raw)
    caplog.clear()
    try:
        redone = write(out)
    except AdvdiffError as e:
        assert "another recipe" in str(e)  # the damage is in the recipe, and it is a valid one
        return
    assert read_csv(out)[1] == LINES
    assert redone == 1 or "damaged" in caplog.text or at + 8 >= len(raw)  # a killed process leaves half a line


def test_a_record_of_anything_is_no_record(tmp_path):
    out = tmp_path / "t.csv"
    write(out)
    record = tmp_path / "t.csv.advdiff"
    good = json.loads(record.read_text())
    for wrong in ({"recipe": []}, {"recipe": {"command": 1, "parameters": {}}}, [], None, 1, "x" * 9):
        record.write_text(json.dumps(good | {"provenance": wrong}))
        assert recorded_table(out) is None
        with pytest.raises(AdvdiffError):
            write(out)
    record.write_text(json.dumps(good))
    assert write(out) == 0
