#!/usr/bin/env python3
"""Run `advdiff purify` on a folder of N mixed images, valid and invalid, and check the outcome of each.

    python benchmarks/folder.py WORK_DIR [-n 10000] [--seed 0]

Valid images are png, jpg, tif and bmp; RGB, grayscale, 1-bit, palette and CMYK; rotated by EXIF; with upper-case
suffixes, in nested folders, with spaces and non-ASCII letters, with equal stems, and behind links; 32 to 2,048 pixels a
side. Invalid ones have 16 bits a channel, transparency, no bytes, half a file, other content, 100 megapixels or too few
pixels, or are broken links, circular links or pipes. The output lies inside the input. The model is the bundled
synthetic-ddpm in one step.

Each image must be purified at its own size, or be reported with a reason. A second run must change nothing. Two
processes that write to one output at once must make the same files as one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = {
    "png": ("png", "RGB"),
    "jpg": ("jpg", "RGB"),
    "tif": ("tif", "RGB"),
    "bmp": ("bmp", "RGB"),
    "upper": ("PNG", "RGB"),
    "gray": ("png", "L"),
    "gray tif": ("tif", "L"),
    "one bit": ("png", "1"),
    "palette": ("png", "P"),
    "CMYK": ("jpg", "CMYK"),
    "turned": ("jpeg", "RGB"),
    "collides": ("bmp", "RGB"),
    "link": ("png", "RGB"),
}
BAD = {
    "16 bits": "more than 8 bits",
    "16 bits RGB": "more than 8 bits",
    "transparent": "has transparent pixels",
    "transparent palette": "has transparent pixels",
    "no bytes": "is not a PNG, JPEG, TIFF or BMP image",
    "half a file": "cannot be decoded",
    "no image": "is not a PNG, JPEG, TIFF or BMP image",
    "100 megapixels": "cut it into tiles",
    "too small": "at least 32x32",
    "link to nothing": "is a broken symbolic link",
    "link in a circle": "is a broken symbolic link",
    "folder in a circle": "is a symbolic link to a folder",
    "pipe": "is not a regular file",
}
FOLDERS = (".", "deep/er/est", "with spaces", "Präparate/リンパ節")


def make(root: Path, n: int, rng: np.random.Generator) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Make N images below `root`; return for each name its kind and, of a good one, its size (H, W) once read."""
    known: dict[str, tuple[str, tuple[int, int] | None]] = {}
    kinds = [*GOOD] * 4 + [kind for kind in BAD if kind != "folder in a circle"]
    for i in range(n):
        kind, folder = kinds[i % len(kinds)], root / FOLDERS[i % len(FOLDERS)]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = (int(2 ** rng.uniform(5, 11 if i % 50 == 0 else 7)) for _ in range(2))
        suffix, mode = GOOD.get(kind, ("png", "RGB"))
        stem = f"{i - 1 if kind == 'collides' else i:06} {kind}" if kind != "turned" else f"{i:06}"
        path = folder / f"{stem}.{suffix}"
        pixels = rng.integers(0, 256, (1 + height // 8, 1 + width // 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        if kind in BAD:
            _make_bad(path, kind, picture)
        elif kind == "link":
            picture.save(root / "target.not-listed", "PNG")
            (root / "target.not-listed").rename(elsewhere := root.parent / f"target{i}")
            path.symlink_to(elsewhere)
        elif kind == "turned":
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(path, exif=exif)
        else:
            picture.convert(mode).save(path)
            if kind == "collides":
                picture.save(path.with_suffix(".jpg"))
                known[path.with_suffix(".jpg").relative_to(root).as_posix()] = kind, (height, width)
        size = None if kind in BAD else (width, height) if kind == "turned" else (height, width)
        known[path.relative_to(root).as_posix()] = kind, size
    (root / "notes.txt").write_text("no image by its name")
    (root / "circle").symlink_to(root)
    known["circle"] = "folder in a circle", None
    return known


def _make_bad(path: Path, kind: str, picture: Image.Image) -> None:
    if kind == "16 bits":
        Image.fromarray(np.zeros((40, 40), np.uint16)).save(path)
    elif kind == "16 bits RGB":
        _deep_png(path)
    elif kind == "transparent":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(path)
    elif kind == "transparent palette":
        palette = picture.convert("P")
        palette.save(path, transparency=palette.getpixel((0, 0)))
    elif kind == "no bytes":
        path.touch()
    elif kind == "half a file":
        picture.resize((200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "no image":
        path.write_text("<html>not found</html>")
    elif kind == "100 megapixels":
        Image.new("1", (10_000, 10_000)).save(path)
    elif kind == "too small":
        picture.resize((31, 64)).save(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "link in a circle" else path.with_name("nothing"))


def _deep_png(path: Path) -> None:
    """Write a PNG of 16 bits a channel, which Pillow does not."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(40 * 6)) * 40)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def start(root: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "advdiff_cli", "purify", str(root), "-m", "synthetic-ddpm", "-o", str(out)]
    command += ["--sampler-steps", "1", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def purify(root: Path, out: Path) -> dict[str, int]:
    running = start(root, out)
    told, log = running.communicate()
    if running.returncode != 3:
        sys.exit(f"purify ended in {running.returncode}: {log[-2000:]}")
    return json.loads(told)


def at_once(root: Path, out: Path) -> list[str]:
    """Run two processes on one output; return what is wrong with how they ended."""
    running = [start(root, out) for _ in range(2)]
    logs = [one.communicate()[1] for one in running]
    ended = sorted((one.returncode, "by another process" in log) for one, log in zip(running, logs, strict=True))
    return [] if ended in ([(1, True), (3, False)], [(3, False)] * 2) else [f"two at once ended in {ended}: {logs}"]


def images(out: Path) -> dict[str, str]:
    found = (p for p in out.rglob("*") if p.suffix.lower() in (".png", ".tif", ".bmp") and p.is_file())
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def check(known: dict, out: Path) -> tuple[Counter, list[str]]:
    """Compare the journal and the images with what was made; return counts by kind, and what is wrong."""
    lines = [json.loads(line) for line in (out / "advdiff.jsonl").read_text().splitlines()[1:]]
    lines = [line for line in lines if line["status"] != "writing"]
    told, wrong, counts = {line["file"]: line for line in lines}, [], Counter()
    if len(told) != len(lines) or told.keys() != known.keys():
        wrong.append(f"named {len(lines)} times, {len(told)} files of {len(known)}")
    for name, (kind, size) in known.items():
        line = told.get(name, {"status": "not named"})
        if size is None:
            good = line["status"] == "failed" and BAD[kind] in line["reason"]
        else:
            good = line["status"] == "ok"
            if good:
                with Image.open(out / line["out"]) as found:
                    good = (found.height, found.width) == size and found.mode == "RGB"
        counts[kind] += good
        if not good:
            wrong.append(f"{name}: {line}")
    if len(images(out)) != sum(size is not None for _, size in known.values()):
        wrong.append(f"{len(images(out))} images in {out}")
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("-n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    root = asked.work / "in"
    root.mkdir(parents=True)  # a new folder
    known = make(root, asked.n, np.random.default_rng(asked.seed))
    wrong = at_once(root, asked.work / "both")
    begun = time.monotonic()
    result = purify(root, root / "out")
    seconds = time.monotonic() - begun
    counts, lost = check(known, root / "out")
    wrong += lost
    if images(asked.work / "both") != images(root / "out"):
        wrong.append("two processes at once made other images than one")
    before = {p: p.lstat().st_mtime_ns for p in (root / "out").rglob("*") if p.name != "advdiff.jsonl"}
    again = purify(root, root / "out")
    if again["purified"] or before != {p: p.lstat().st_mtime_ns for p in before}:
        wrong.append(f"a second run did something: {again}")
    for kind in (*GOOD, *BAD):
        print(f"{kind:22} {'purified' if kind in GOOD else 'named   '} {counts[kind]:6}")
    print(f"{result['purified']} purified and {result['failed']} named in {seconds:.0f} s; {len(wrong)} lost or wrong")
    print("\n".join(wrong[:20]), file=sys.stderr)
    sys.exit(bool(wrong))
