"""Where the trained pipeline lies in the installed package."""

from importlib.resources import files
from pathlib import Path


def resolve_model(model: str | Path) -> str:
    """'tiny' stands for the trained pipeline of this package; any other name is left as it is."""
    return str(model_path()) if str(model) == "tiny" and not Path("tiny").exists() else str(model)


def model_path() -> Path:
    """Folder of the trained pipeline, for `StableDiffusion3Pipeline.from_pretrained`.

    Raises:
        FileNotFoundError: if the package was installed without its weights.
    """
    folder = Path(str(files("mmdit_lib.tiny") / "weights"))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no trained model in {folder}; make it with: python -m mmdit_lib.tiny.train --output_dir OUT"
        )
    return folder
