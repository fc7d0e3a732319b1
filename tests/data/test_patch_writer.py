"""OUT.part, its sidecar, shards, and the two formats."""

import subprocess
import sys
import time
from subprocess import PIPE

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from advdiff_cli.data.atomic_files import atomic_write, set_default_mode
from advdiff_cli.data.merge import merge_sets
from advdiff_cli.data.output_spec import OutputSpec, RowRange, shard_rows
from advdiff_cli.data.patch_set import PatchSet
from advdiff_cli.data.patch_writer import PatchWriter
from advdiff_cli.data.patches import open_patches
from advdiff_cli.data.provenance import canonical_json, recipe
from advdiff_cli.data.resume import resume_params
from advdiff_cli.datasets.synthetic import SyntheticSource
from advdiff_cli.errors import AdvdiffError

N, B = 11, 4
MADE = recipe("test", {"batch_size": B})
OTHER = recipe("test", {"batch_size": 8})


@pytest.fixture(scope="module")
def source():
    return PatchSet(SyntheticSource(N, 0))


def write(out, source, *, stop_after=None, part=None, made=MADE, overwrite=False):
    sink = PatchWriter(OutputSpec(out, made, overwrite=overwrite), source, part or RowRange(0, N, N))
    if sink.up_to_date:
        return 0
    written = 0
    with sink:
        for batch in sink.batches(B):
            if written == stop_after:
                break
            sink.write(batch, source.read(batch.rows).numpy())
            written += 1
    return written


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_written_rows_read_back(tmp_path, source, suffix):
    out = tmp_path / f"a{suffix}"
    assert write(out, source) == 3
    back = open_patches(out)
    assert np.array_equal(back.read(np.arange(N)), source.read(np.arange(N)))
    assert np.array_equal(back.labels, source.labels)
    assert np.array_equal(back.origins(), source.origins())
    assert back.provenance["recipe"] == MADE
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_equal_results_are_equal_files(tmp_path, source, suffix):
    write(tmp_path / f"a{suffix}", source)
    time.sleep(1.1)  # the clock of HDF5 counts seconds
    write(tmp_path / f"b{suffix}", source)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_safetensors_library_reads_what_was_written(tmp_path, source):
    write(tmp_path / "a.safetensors", source)
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("images"), source.read(np.arange(N)).numpy())
        assert np.array_equal(file.get_tensor("labels"), source.labels)


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_resume_does_only_what_is_left(tmp_path, source, suffix):
    out, whole = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert write(out, source, stop_after=1) == 1
    assert not out.exists()
    assert resume_params(out)["batch_size"] == B
    assert write(out, source) == 2
    assert write(out, source) == 0
    write(whole, source)
    assert open_patches(out).fingerprint() == open_patches(whole).fingerprint()


def test_half_a_line_in_the_sidecar_is_not_believed(tmp_path, source):
    out = tmp_path / "a.h5"
    write(out, source, stop_after=1)
    with (tmp_path / "a.h5.part.rows").open("a") as sidecar:
        sidecar.write("[4,8")
    assert write(out, source) == 2


def test_another_recipe_needs_overwrite(tmp_path, source):
    out, other = tmp_path / "a.h5", recipe("test", {"batch_size": 8})
    write(out, source, stop_after=1)
    with pytest.raises(AdvdiffError, match=r"unfinished work of another recipe \(batch_size 4 -> 8\).*--overwrite"):
        write(out, source, made=other)
    write(out, source)
    with pytest.raises(AdvdiffError, match=r"made with other settings \(batch_size 4 -> 8\).*--overwrite"):
        write(out, source, made=other)
    assert write(out, source, made=other, overwrite=True) == 3


def test_a_file_of_somebody_else_is_kept(tmp_path, source):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(AdvdiffError, match="is not a patch set of advdiff"):
        write(out, source)
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_tile_the_rows_in_whole_batches(count):
    parts = [shard_rows(N, B, (i, count)) for i in range(count)]
    assert [p.start for p in parts] == [0, *[p.stop for p in parts[:-1]]]
    assert parts[-1].stop == N
    assert all(p.start % B == 0 for p in parts)


def test_an_empty_shard_is_named():
    with pytest.raises(AdvdiffError, match=r"--shard 0/8 is empty: .*; give at most \d shards"):
        shard_rows(N, B, (0, 8))


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_merged_shards_are_the_file_of_one_run(tmp_path, source, suffix):
    parts = []
    for i in range(3):
        parts.append(tmp_path / f"{i}{suffix}")
        write(parts[-1], source, part=shard_rows(N, B, (i, 3)))
    write(tmp_path / f"one{suffix}", source)
    merge_sets(parts[::-1], tmp_path / f"merged{suffix}", overwrite=False)
    one, merged = (tmp_path / f"{name}{suffix}" for name in ("one", "merged"))
    assert open_patches(one).fingerprint() == open_patches(merged).fingerprint()
    assert open_patches(one).provenance == open_patches(merged).provenance
    if suffix == ".safetensors":
        assert one.read_bytes() == merged.read_bytes()


def test_the_only_shard_keeps_its_recipe(tmp_path, source):
    write(tmp_path / "one.h5", source)
    merge_sets([tmp_path / "one.h5"], tmp_path / "merged.h5", overwrite=False)
    assert open_patches(tmp_path / "merged.h5").provenance == open_patches(tmp_path / "one.h5").provenance


def test_missing_and_doubled_shards_are_refused(tmp_path, source):
    parts = []
    for i in range(3):
        parts.append(tmp_path / f"{i}.h5")
        write(parts[-1], source, part=shard_rows(N, B, (i, 3)))
    for chosen, message in ((parts[1:], "rows 0 to 3 are in no shard"), (parts[:2], "rows 8 to 10 are in no shard")):
        with pytest.raises(AdvdiffError, match=message):
            merge_sets(chosen, tmp_path / "m.h5", overwrite=False)
    with pytest.raises(AdvdiffError, match="more than one shard"):
        merge_sets([*parts, parts[1]], tmp_path / "m.h5", overwrite=False)
    assert not (tmp_path / "m.h5").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_resume_under_other_versions_keeps_every_row(tmp_path, source, suffix, monkeypatch):
    """What is recorded beside the recipe may differ in length; the rows lie where the file's own header says."""
    from advdiff_cli.data import provenance

    out = tmp_path / f"a{suffix}"
    write(out, source, stop_after=1)
    monkeypatch.setattr(provenance, "version", lambda package: "1.2.3+a-much-longer-version")
    write(out, source)
    assert np.array_equal(open_patches(out).read(np.arange(N)), source.read(np.arange(N)))


def test_half_a_line_does_not_spoil_the_next(tmp_path, source):
    out = tmp_path / "a.h5"
    write(out, source, stop_after=1)
    with (tmp_path / "a.h5.part.rows").open("a") as sidecar:
        sidecar.write("[4,8")
    write(out, source, stop_after=1)
    assert write(out, source) == 1
    assert np.array_equal(open_patches(out).read(np.arange(N)), source.read(np.arange(N)))


def test_overwrite_forgets_the_rows_of_the_earlier_work(tmp_path, source, monkeypatch):
    """A new .part that dies before its sidecar is written is not believed to hold the old one's rows."""
    out = tmp_path / "a.safetensors"
    write(out, source, stop_after=2)
    real = canonical_json

    def dies(value):
        if isinstance(value, dict) and "recorded" in value and value["recipe"] == OTHER and dies.armed:
            raise OSError("the disk is full")
        return real(value)

    dies.armed = True
    monkeypatch.setattr("advdiff_cli.data.row_journal.canonical_json", dies)
    with pytest.raises(OSError, match="full"):
        write(out, source, made=OTHER, overwrite=True)
    dies.armed = False
    assert write(out, source) == 3
    assert np.array_equal(open_patches(out).read(np.arange(N)), source.read(np.arange(N)))


def test_what_safetensors_writes_is_readable_like_other_files(tmp_path):
    """It leaves files to their owner alone; on a shared disk models and predictions are for others too."""
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "a.safetensors") as fresh:
        save_file({"x": torch.zeros(1)}, fresh)
    (tmp_path / "model").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "w.safetensors")
    set_default_mode(tmp_path / "model")
    for file in (tmp_path / "a.safetensors", tmp_path / "model" / "w.safetensors"):
        assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def _truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 20])


def _rewrite_journal(text):
    def change(file):
        file.with_name(file.name + ".rows").write_text(text)

    return change


def _add_lines(file):
    with file.with_name(file.name + ".rows").open("a") as journal:
        journal.write('{"rows": 3}\n[4,99,1]\n[8,11,7]\n')


DAMAGE = {
    "truncated": _truncate,
    "a bit flipped": None,
    "no journal": lambda file: file.with_name(file.name + ".rows").unlink(),
    "no rows": lambda file: file.unlink(),
    "empty journal": _rewrite_journal(""),
    "another journal": _rewrite_journal("[[[[\n[0,4,1]\n"),
    "bad lines": _add_lines,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_damaged_unfinished_work_is_made_again_and_told(tmp_path, source, suffix, damage, caplog):
    out, whole = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    images = source.read(np.arange(N)).numpy()
    mark = images[2].tobytes()

    def write_marked(path, stop):
        with PatchWriter(OutputSpec(path, MADE), source, RowRange(0, N, N)) as sink:
            for k, batch in enumerate(sink.batches(B)):
                if k == stop:
                    break
                sink.write(batch, images[batch.rows])

    write_marked(whole, None)
    write_marked(out, 2)
    if damage == "a bit flipped":
        work = out.with_name(out.name + ".part")
        raw = bytearray(work.read_bytes())
        raw[raw.index(mark) + 2] ^= 1
        work.write_bytes(raw)
    else:
        DAMAGE[damage](out.with_name(out.name + ".part"))
    write_marked(out, None)
    assert open_patches(out).fingerprint() == open_patches(whole).fingerprint()
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, whole.name]
    if damage not in ("no rows", "no journal"):
        assert "damaged" in caplog.text


def test_unfinished_work_that_would_replace_a_result_does_not_hide_it(tmp_path, source):
    out = tmp_path / "a.h5"
    write(out, source)
    write(out, source, made=OTHER, overwrite=True, stop_after=1)
    assert resume_params(out)["batch_size"] == B
    assert write(out, source) == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".h5"])
def test_killed_right_after_the_rename(tmp_path, source, suffix):
    out = tmp_path / f"a{suffix}"
    write(out, source)
    out.with_name(out.name + ".part.rows").write_text("of the finished work\n")
    assert write(out, source) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_unfinished_work_that_another_process_reads_is_not_begun_again(tmp_path, source):
    out = tmp_path / "a.h5"
    write(out, source, stop_after=2)
    reading = "import h5py, sys; f = h5py.File(sys.argv[1], 'r'); print(flush=True); sys.stdin.read()"
    work = str(out) + ".part"
    with subprocess.Popen([sys.executable, "-c", reading, work], stdin=PIPE, stdout=PIPE) as other:
        other.stdout.readline()
        with pytest.raises(AdvdiffError, match="is in use by another process"):
            write(out, source)
        other.stdin.close()
    assert write(out, source) == 1
