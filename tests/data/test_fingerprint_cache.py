"""Fingerprints of large files are read once, and never taken for those of what the file became."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from advdiff_cli.data import fingerprint_cache
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.selection import Selection

OLD = 1_700_000_000


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a set of random patches, every file counting as large, and as written long enough ago; return its path."""
    monkeypatch.setattr(fingerprint_cache, "_MIN_BYTES", 0)
    monkeypatch.setattr(fingerprint_cache, "_SETTLE_SECONDS", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(seed: int):
        images = np.random.default_rng(seed).integers(0, 256, (6, 3, 32, 32), np.uint8)
        path = tmp_path / "set.safetensors"
        save_file({"images": images, "labels": np.arange(6) % 2}, path)
        os.utime(path, (OLD, OLD))
        return path

    return write


def reads(path, selection=None):
    """Return the fingerprint of a set and how many rows were read for it."""
    patches, count = open_patches(path, selection=selection or Selection()), []
    read = patches.source.read
    patches.source.read = lambda rows: count.append(len(rows)) or read(rows)
    return patches.fingerprint(), sum(count)


def test_a_second_command_reads_nothing_for_the_same_fingerprint(written):
    path = written(0)
    first, read = reads(path)
    assert read == 6
    assert reads(path) == (first, 0)
    other, read = reads(path, Selection(limit=3))
    assert other != first and read == 3


def test_what_is_written_anew_is_read_anew(written):
    first, _ = reads(written(0))
    path = written(1)  # the same name, size and time of writing
    second, read = reads(path)
    assert second != first and read == 6
    written(0)
    assert reads(path) == (first, 6)


def test_a_file_written_just_now_is_not_remembered(written, monkeypatch):
    monkeypatch.setattr(fingerprint_cache, "_SETTLE_SECONDS", 10.0)
    path = written(0)
    assert reads(path)[1] == reads(path)[1] == 6


@pytest.mark.parametrize("spoilt", [b"", b"\xff\xfe", b"0" * 63, b"g" * 64])
def test_a_spoilt_memory_is_made_again(written, tmp_path, spoilt):
    first, _ = reads(path := written(0))
    (kept,) = (tmp_path / "cache" / "advdiff" / "fingerprints").iterdir()
    kept.write_bytes(spoilt)
    assert reads(path) == (first, 6)
    assert reads(path) == (first, 0)


def test_a_home_that_cannot_be_written_to_costs_reading_alone(written, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder would be")
    path = written(0)
    assert reads(path) == reads(path)
    assert reads(path)[1] == 6
