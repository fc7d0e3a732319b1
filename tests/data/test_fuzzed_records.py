"""Tables, metadata, names and work in progress of any content: what is read is right, or refused in one line."""

import io
import json
import os
import string
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import origins
from safetensors.numpy import save_file

from advdiff_cli.data.folder_journal import JOURNAL, FolderEntry, output_name, parse_lines
from advdiff_cli.data.folder_writer import FolderWriter
from advdiff_cli.data.image_files import image_metadata, image_size, read_image
from advdiff_cli.data.image_folder import find_images
from advdiff_cli.data.label_table import read_labels
from advdiff_cli.data.output_spec import OutputSpec, RowRange
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import recipe
from advdiff_cli.data.recorded_files import check_replaceable, record_of, recorded_write
from advdiff_cli.data.row_journal import work_files
from advdiff_cli.errors import AdvdiffError
from advdiff_cli.evaluation.comparison import EvaluatedSet
from advdiff_cli.evaluation.metrics import Predictions
from advdiff_cli.evaluation.predictions_csv import read_predictions, write_predictions

MADE = recipe("test", {"seed": 0})
N = 8
QUIET = settings(max_examples=80, deadline=None)

NASTY = [
    b"\0",
    b"\xff\xfe",
    b"\r",
    b"\n",
    b",",
    b'"',
    b"'",
    b"-1",
    b"1e999",
    b"nan",
    b"[",
    b"{",
    b"null",
    b"9" * 40,
    b"",
]
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 12), st.sampled_from(NASTY) | st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)
"""Where bytes are replaced, how many, and by what."""


def changed(raw, changes):
    for place, length, by in changes:
        at = int(place * max(len(raw), 1))
        raw = raw[:at] + by + raw[at + length :]
    return raw


@contextmanager
def folder():
    with TemporaryDirectory() as name:
        yield Path(name)


def one_line(problem):
    assert str(problem)
    assert "\n" not in str(problem).strip()


@QUIET
@given(CHANGES)
def test_label_tables(changes):
    good = "file,label\n" + "".join(f"a/{i}.png,{i % 2}\n" for i in range(6))
    with folder() as place:
        (place / "labels.csv").write_bytes(changed(good.encode(), changes))
        try:
            labels = read_labels(place / "labels.csv")
        except AdvdiffError as e:
            one_line(e)
        else:
            assert set(labels.values()) <= {0, 1}


@pytest.mark.parametrize("p1", ["nan", "-0.1", "1.5", "inf"])
def test_probabilities_that_are_none(tmp_path, p1):
    one = EvaluatedSet("a", origins(range(1)), np.arange(1), Predictions(np.array([0]), np.full((1, 1), 0.25)), [])
    write_predictions(tmp_path / "p.csv", [(one, ["x"])])
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace("0.25", p1))
    with pytest.raises(AdvdiffError, match="is damaged"):
        read_predictions(tmp_path / "p.csv")


@QUIET
@given(CHANGES)
def test_tables_of_predictions(changes):
    one = EvaluatedSet(
        "a", origins(range(3)), np.arange(3), Predictions(np.array([0, 1, 1]), np.full((3, 2), 0.25)), []
    )
    with folder() as place:
        write_predictions(place / "p.csv", [(one, ["x.png", "y,z.png", "\udcff"])])
        (place / "p.csv").write_bytes(changed((place / "p.csv").read_bytes(), changes))
        try:
            found = read_predictions(place / "p.csv")
        except AdvdiffError as e:
            one_line(e)
        else:
            for s in found:
                assert set(s.predictions.labels.tolist()) <= {0, 1}
                assert ((s.predictions.p1 >= 0) & (s.predictions.p1 <= 1)).all()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as main() does
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@QUIET
@given(CHANGES)
def test_exif(form, changes):
    """Pixels do not depend on metadata, except that a valid orientation turns them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "tile"
    picture, raw = Image.fromarray(pixels), io.BytesIO()
    picture.save(raw, form, exif=exif, dpi=(72, 72))
    suffix = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif"}[form]
    whole = raw.getvalue()
    start = whole.index(b"Exif" if form == "JPEG" else b"eXIf" if form == "PNG" else b"tile")
    with folder() as place:
        file = place / f"a{suffix}"
        file.write_bytes(whole[:start] + changed(whole[start : start + 120], changes) + whole[start + 120 :])
        image_size(file)
        try:
            found = read_image(file)
            image_metadata(file)
        except AdvdiffError as e:
            one_line(e)
        else:
            assert found.shape in ((3, 56, 40), (3, 40, 56))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A patch set that is read at once."""
    file = tmp_path_factory.mktemp("source") / "a.safetensors"
    pixels = np.random.default_rng(0).random((N, 3, 32, 32), np.float32)
    save_file({"images": pixels, "labels": np.arange(N) % 2}, file)
    return open_patches(file)


@QUIET
@given(CHANGES, st.sampled_from([".h5", ".safetensors"]), st.booleans())
def test_work_in_progress(source, changes, suffix, of_journal):
    """Rows are those of the source after any damage, or the work is refused."""
    with folder() as place:
        output = OutputSpec(place / f"a{suffix}", MADE)

        def run(stop_after):
            with PatchWriter(output, source, RowRange(0, N, N)) as writer:
                for k, batch in enumerate(writer.batches(2)):
                    if k == stop_after:
                        return
                    writer.write(batch, source.read(batch.rows).numpy())

        run(2)
        file = work_files(output.path)[of_journal]
        file.write_bytes(changed(file.read_bytes(), changes))
        try:
            run(None)
        except AdvdiffError as e:
            one_line(e)
            assert not output.path.exists()
        else:
            assert np.array_equal(open_patches(output.path).read(np.arange(N)), source.read(np.arange(N)))


@QUIET
@given(CHANGES)
def test_journals_of_folders(changes):
    """A damaged journal is refused, or its images are made again; nothing outside the folder is touched."""
    pixels = np.zeros((3, 32, 32), np.uint8)
    with folder() as place:
        (place / "mine.png").write_bytes(b"mine")
        out = place / "out"
        entries = [FolderEntry(f"{i}.png", str(i) * 64, f"{i}.png") for i in range(3)]
        with FolderWriter(OutputSpec(out, MADE)) as writer:
            for entry in entries:
                writer.write(entry, pixels, {})
        raw = (out / JOURNAL).read_bytes().replace(b'"out":"1.png"', b'"out":"../mine.png"')
        (out / JOURNAL).write_bytes(changed(raw, changes))
        try:
            with FolderWriter(OutputSpec(out, MADE)) as writer:
                for entry in entries:
                    if not writer.is_done(entry):
                        writer.write(entry, pixels, {})
        except AdvdiffError as e:
            one_line(e)
        else:
            assert all(np.array_equal(read_image(out / e.out), pixels) for e in entries)
        assert (place / "mine.png").read_bytes() == b"mine"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("file status out size a".split()), inner)
    ),
    max_leaves=6,
)


@QUIET
@given(st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=4))
def test_lines_of_journals(lines):
    for line in parse_lines(lines):
        assert line is None or line.status in ("ok", "failed", "writing", "unsure")


@QUIET
@given(CHANGES)
def test_records(changes):
    with folder() as place:
        file = place / "a.csv"
        output = OutputSpec(record_of(file), MADE)
        with recorded_write(output, file) as temporary:
            temporary.write_text("x")
        output.path.write_bytes(changed(output.path.read_bytes(), changes))
        try:
            check_replaceable(output, [file])
        except AdvdiffError as e:
            one_line(e)
        assert file.read_text() == "x"


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=[]), min_size=1, max_size=20
) | st.sampled_from(["..", "...", "-o", "~", "$HOME", "a.jpg.png", ".png", "\n", "\u202e", "con", "a" * 200])


@QUIET
@given(st.lists(st.tuples(NAMES, st.sampled_from([".png", ".PNG", ".jpg", ".jpeg", ".tif", ".bmp"])), max_size=5))
def test_names(names):
    """Images of any name go to files of their own, and a second run finds them."""
    pixels = np.zeros((3, 32, 32), np.uint8)
    with folder() as place:
        (place / "in").mkdir()
        for name, suffix in names:
            try:
                raw = os.fsencode(name + suffix)
                Path(os.fsdecode(bytes(place / "in") + b"/" + raw)).write_bytes(b"x")
            except (UnicodeEncodeError, OSError):
                continue  # the disk does not take this name
        found = find_images(str(place / "in"))
        entries = [FolderEntry(found.name(f), "0" * 64, output_name(found.name(f))) for f in found.files]
        assert len({e.out for e in entries}) == len(entries)
        with FolderWriter(OutputSpec(place / "out", MADE)) as writer:
            for entry in entries:
                writer.write(entry, pixels, {})
        assert all(np.array_equal(read_image(place / "out" / e.out), pixels) for e in entries)
        with FolderWriter(OutputSpec(place / "out", MADE)) as writer:
            assert all(writer.is_done(e) for e in entries)
        assert all(c in string.printable for c in (place / "out" / JOURNAL).read_text())
