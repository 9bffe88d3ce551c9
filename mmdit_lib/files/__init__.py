"""Files on disk: written whole or not at all, known by their checksums."""

from .atomic import alive, complete_file, complete_folder, require_place, require_space
from .records import FileRecord, read_json, write_synced

__all__ = [
    "FileRecord",
    "alive",
    "complete_file",
    "complete_folder",
    "read_json",
    "require_place",
    "require_space",
    "write_synced",
]
