"""Finding a model's files, one at a time. Imports no torch."""

from __future__ import annotations

from pathlib import Path


class FileResolver:
    """Finds a model's files in a folder, or (downloading just that file) on the hub.

    `gguf` is the file that holds the weights where they are not in that folder, in one of the folder's own formats.
    """

    def __init__(self, name_or_path: str, *, gguf: Path | None = None) -> None:
        self.name_or_path = name_or_path
        self.gguf = gguf
        self._folder = Path(name_or_path) if Path(name_or_path).is_dir() else None

    def __str__(self) -> str:
        return f"the model {self.gguf or self.name_or_path}"

    @property
    def weights_folder(self) -> Path | None:
        """The folder of the weights; none for a model on the hub, whose client verifies what it downloads."""
        return self.gguf.parent if self.gguf is not None else self._folder

    def __call__(self, filename: str) -> Path | None:
        if self.gguf is not None and filename == self.gguf.name:
            return self.gguf
        if self._folder is not None:
            path = self._folder / filename
            return path if path.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(self.name_or_path, filename, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None
