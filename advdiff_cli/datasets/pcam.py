"""The registry of PatchCamelyon's files on Zenodo: sizes and hashes.

Source: Veeling et al. 2018, arXiv:1806.03962; Zenodo record 2546921, CC0. Sizes and SHA-256 agree between independent
sources. The MD5s in PCam's own README are swapped between valid and test, and are not used.
"""

from dataclasses import dataclass

from advdiff_cli.data.pcam_files import PREFIX

MIRROR = "https://zenodo.org/records/2546921/files"


@dataclass(frozen=True)
class RemoteFile:
    """A file of the record.

    Args:
        size: Bytes of the file as served.
        sha256: Its SHA-256.
        unpacked: For a gzipped file, bytes of the datasets in it.
        unpacked_md5: For a gzipped file, the MD5 of the unpacked file.
        md5: Its MD5, where no SHA-256 is known.
    """

    size: int | None
    sha256: str | None = None
    unpacked: int | None = None
    unpacked_md5: str | None = None
    md5: str | None = None


Registry = dict[str, RemoteFile]

REGISTRY: Registry = {
    f"{PREFIX}_train_x.h5.gz": RemoteFile(
        6_421_353_462,
        "d619e741468a7ab35c7e4a75e6821b7e7e6c9411705d45708f2a0efc8960656c",
        7_247_757_312,
        "01844da899645b4d6f84946d417ba453",
    ),
    f"{PREFIX}_train_y.h5.gz": RemoteFile(
        21_378,
        "b74126d2c01b20d3661f9b46765d29cf4e4fba6faba29c8e0d09d406331ab75a",
        262_144,
        "0781386bf6c2fb62d58ff18891466aca",
    ),
    f"{PREFIX}_valid_x.h5.gz": RemoteFile(
        805_965_320,
        "f82ee1670d027b4ec388048d9eabc2186b77c009655dae76d624c0ecb053ccb2",
        905_969_664,
        "81cf9680f1724c40673f10dc88e909b1",
    ),
    f"{PREFIX}_valid_y.h5.gz": RemoteFile(
        3_038,
        "ce1ae30f08feb468447971cfd0472e7becd0ad96d877c64120c72571439ae48c",
        32_768,
        "94d8aacc249253159ce2a2e78a86e658",
    ),
    f"{PREFIX}_test_x.h5.gz": RemoteFile(
        800_875_929,
        "79174c2201ad521602a5888be8f36ee10875f37403dd3f2086caf2182ef87245",
        905_969_664,
        "2614b2e6717d6356be141d9d6dbfcb7e",
    ),
    f"{PREFIX}_test_y.h5.gz": RemoteFile(
        3_040,
        "0a522005fccc8bbd04c5a117bfaf81d8da2676f03a29d7499f71d0a0bd6068ef",
        32_768,
        "11ed647efe9fe457a4eb45df1dba19ba",
    ),
}
"""File name -> sizes and hashes, as in the registries of tensorflow-datasets, torchvision and eva."""

METADATA: Registry = {
    f"{PREFIX}_train_meta.csv": RemoteFile(None, md5="5a3dd671e465cfd74b5b822125e65b0a"),
    f"{PREFIX}_valid_meta.csv": RemoteFile(None, md5="67589e00a4a37ec317f2d1932c7502ca"),
    f"{PREFIX}_test_meta.csv": RemoteFile(None, md5="3455fd69135b66734e1008f3af684566"),
}
"""Where each patch was cut from: coordinates, slide (wsi), and whether it holds tumor."""
