"""Files on disk: written atomically, and recorded with checksums."""

from .atomic import complete_file, complete_folder, picture_file, require_place, require_space
from .interrupts import INTERRUPTED, delayed_interrupts
from .records import FileRecord, Files, parse_json, read_json, write_synced

__all__ = [
    "INTERRUPTED",
    "FileRecord",
    "Files",
    "complete_file",
    "complete_folder",
    "delayed_interrupts",
    "parse_json",
    "picture_file",
    "read_json",
    "require_place",
    "require_space",
    "write_synced",
]
