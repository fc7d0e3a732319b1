"""Tables of labels: which columns are read, and what is refused."""

import pytest

from advdiff_cli.data.label_table import read_labels
from advdiff_cli.errors import AdvdiffError


@pytest.mark.parametrize(
    "raw",
    [
        b"a.png,0\nb.png,1\n",
        b"file,label\na.png,0\nb.png,1\n",
        b"file,label,fold\na.png,0,1\nb.png,1,0\n",
        b"fold,Label,Filename\n3,0,a.png\n4, 1 ,b.png\n",
        b"\xef\xbb\xbffile,label\r\na.png,0\r\nb.png,1\r\n",
        "file,label\na.png,0\nb.png,1\nb.png,1\n".encode("utf-16"),
    ],
)
def test_labels_are_those_of_the_label_column(tmp_path, raw):
    (tmp_path / "t.csv").write_bytes(raw)
    assert read_labels(tmp_path / "t.csv") == {"a.png": 0, "b.png": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"a.png,0,1\n", "has 3 columns and no header"),
        (b"a,b,fold\nx,0,1\n", "no header"),
        (b"file,fold\na.png,0\n", "does not name one column of files and one of labels"),
        (b"file,label,class\na.png,0,1\n", "does not name one column"),
        (b"file,label\na.png,0\na.png,1\n", "labels a.png twice"),
        (b"file,label\na.png,2\n", "line 2 of .* labels a.png 2; 0 or 1"),
        (b"a.png,\n", "line 1 of .* labels a.png with nothing"),
        (b"file,label\na.png\n", "line 2 of .* has 1 columns"),
        (b"file,label\n\xe9.png,0\n", "save it as UTF-8"),
        ("file,label\n".encode("utf-16-le"), "save it as UTF-8"),
        (b"file,label\n" + b"x" * 200_000 + b",1\n", "field larger than field limit"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, raw, message):
    (tmp_path / "t.csv").write_bytes(raw)
    with pytest.raises(AdvdiffError, match=message):
        read_labels(tmp_path / "t.csv")
