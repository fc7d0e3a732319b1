"""The names of PCam's HDF5 files, and where a split lies in a folder of them."""

from pathlib import Path

from advdiff_cli.errors import AdvdiffError

SPLITS = ("train", "valid", "test")
PREFIX = "camelyonpatch_level_2_split"


def split_name(split: str) -> str:
    """Return train, valid or test; `val` means valid.

    Raises:
        AdvdiffError: There is no such split.
    """
    name = "valid" if split == "val" else split
    if name not in SPLITS:
        raise AdvdiffError(f"no PCam split is called {split}; choose from {', '.join(SPLITS)}")
    return name


def labels_file(images: Path) -> Path | None:
    """Return where the labels of PCam's _x.h5 file are, the _y.h5 file next to it; None for another file."""
    if not images.name.endswith("_x.h5"):
        return None
    return images.with_name(images.name.removesuffix("_x.h5") + "_y.h5")


def pcam_folder(data_dir: Path) -> Path:
    """Return the folder of the files: `data_dir` if it holds them, else torchvision's <root>/pcam."""
    return data_dir if any(data_dir.glob(f"{PREFIX}_*")) else data_dir / "pcam"


def holds_pcam(folder: Path) -> bool:
    """Return whether there are PCam's image files in or below a folder."""
    return any(pcam_folder(folder).glob(f"{PREFIX}_*_x.h5"))


def find_split(folder: Path, split: str | None) -> Path | None:
    """Return the _x.h5 file of a split in or below `folder`, or None where there are no PCam files.

    Raises:
        AdvdiffError: There are PCam files, and the split is not given or not among them.
    """
    files = sorted(pcam_folder(folder).glob(f"{PREFIX}_*_x.h5"))
    if not files:
        if split is not None:
            raise AdvdiffError(f"{folder} holds no PCam files ({PREFIX}_*_x.h5), which --split selects from")
        return None
    available = [f.name.removeprefix(f"{PREFIX}_").removesuffix("_x.h5") for f in files]
    if split is None:
        raise AdvdiffError(
            f"{folder} holds the PCam splits {', '.join(available)}; choose one with --split, or name its _x.h5 file"
        )
    if split_name(split) not in available:
        raise AdvdiffError(f"{folder} has no split {split_name(split)}, only {', '.join(available)}")
    return pcam_folder(folder) / f"{PREFIX}_{split_name(split)}_x.h5"
