"""Where the output of an input of a folder goes."""

import errno
from pathlib import Path

from advdiff_cli.data.folder_journal import FolderEntry
from advdiff_cli.errors import AdvdiffError


def output_target(out: Path, entry: FolderEntry) -> Path:
    """Return the path of an output in the folder `out`, and make its parent folder.

    Raises:
        AdvdiffError: The name is too long, is that of a folder, or leads out of the folder.
    """
    target = out / entry.out
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        is_folder = target.is_dir()
    except FileExistsError:
        raise AdvdiffError(f"{target.parent} is a file, and a folder is needed there; move it") from None
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise
        raise AdvdiffError(f"{target} is too long a name for this disk; shorten the name of the input") from None
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise AdvdiffError(f"{target.parent} is a link to a place outside {out}; remove it")
    if is_folder:
        raise AdvdiffError(f"{target} is a folder, and an image is to be written there; move it")
    return target
