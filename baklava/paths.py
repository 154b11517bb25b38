"""Folders of what outlives a run: a cache for what can be made again, and the results."""

import errno
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baklava.console import log
from baklava.errors import UserError

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE_ERRORS = (*DISK_FULL_ERRORS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class UserFolder:
    """A folder of the user, and the variables that name it.

    Attributes:
        own_variable: names the folder itself.
        xdg_variable: names the folder that it lies in, if the first one is not set.
        fallback: where it lies in the home folder, if neither is set.
    """

    own_variable: str
    xdg_variable: str
    fallback: str

    @property
    def variable(self) -> str:
        """The variable that is in effect."""
        return next((name for name in (self.own_variable, self.xdg_variable) if os.environ.get(name)), "HOME")

    @property
    def path(self) -> Path:
        """The folder; raises UserError if it is in a home folder that is not known."""
        variable = self.variable
        value = os.environ.get(variable, "")
        if variable == "HOME":
            return home_dir() / self.fallback / "baklava"
        try:
            folder = Path(value).expanduser().absolute()
        except RuntimeError:
            raise UserError(f"{variable} is {value}, and nobody's home folder is known by that; write it out") from None
        return folder if variable == self.own_variable else folder / "baklava"

    def remedy(self, error: OSError) -> str:
        """Return what to do if the folder takes no file."""
        if error.errno in DISK_FULL_ERRORS:
            return f"free some space, or set {self.own_variable} to a folder on another disk"
        if self.variable == self.own_variable:
            return f"set {self.own_variable} to a writable folder"
        origin = self.variable if os.environ.get(self.variable) else "the home folder"
        return f"set {self.own_variable} to a writable folder; now it follows from {origin}"


CACHE = UserFolder("BAKLAVA_CACHE", "XDG_CACHE_HOME", ".cache")
DATA = UserFolder("BAKLAVA_DATA", "XDG_DATA_HOME", ".local/share")

LFS_HEADER = b"version https://git-lfs.github.com/spec/"
"""Start of the file that Git LFS leaves in place of one that it has not fetched."""


def cache_dir() -> Path:
    """Return the folder of what can be downloaded or computed again: texts, the converted demo model, profiles.

    It is `$BAKLAVA_CACHE`, `$XDG_CACHE_HOME/baklava` or `~/.cache/baklava`, whichever is set first.
    """
    return CACHE.path


def data_dir() -> Path:
    """Return the folder of results: the tracking database and its artifacts.

    It is `$BAKLAVA_DATA`, `$XDG_DATA_HOME/baklava` or `~/.local/share/baklava`, whichever is set first.
    """
    return DATA.path


def tracking_uri() -> str:
    """Return where trials and registered plans are: `$MLFLOW_TRACKING_URI`, or else a database in the data folder.

    Raises:
        UserError: it begins with a tilde, which MLflow takes for the name of a folder.
    """
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and re.match(r"(\w+:/*)?~", named):
        raise UserError(f"MLFLOW_TRACKING_URI is {named}, and ~ is no home folder there; write the folder out")
    return named or f"sqlite:///{data_dir() / 'mlflow.db'}"


def home_dir() -> Path:
    """Return the home folder; it is `/` for a user without one, as in containers."""
    try:
        return Path.home().absolute()
    except RuntimeError:
        return Path("/")


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be written to a folder, which need not exist yet.

    It writes one for a moment, since permissions say nothing of read-only mounts and full disks.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(bytes(4096))
        file.flush()


def check_temp_dir() -> None:
    """Raise UserError if no folder takes temporary files."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("temporary files can be written nowhere; set TMPDIR to a writable folder") from None


def reason_of(error: OSError) -> str:
    """Return what the system says of a failure, without numbers and paths."""
    return (error.strerror or str(error)).lower()


def check_data_dir() -> None:
    """Raise UserError if the data folder takes no results."""
    folder = DATA.path
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(
            f"the data folder {folder} cannot be written ({reason_of(error)}); {DATA.remedy(error)}"
        ) from None


def write_to_cache(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of the cache folder; warn if it cannot be written, since its content can be made again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        log(f"warning: {path} cannot be written ({reason_of(error)}), so it is made again; {CACHE.remedy(error)}")
