"""The sections of processor files that say how pixels are prepared: read, checked and made.

transformers 5 keeps them in processor_config.json, transformers 4 in files of their own.
"""

import json
from pathlib import Path

PROCESSOR, IMAGE, VIDEO = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
BICUBIC = 3


def read_json(file: Path) -> dict:
    """The content of a file, an object; {} if there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds a {type(found).__name__}, it must hold an object; copy the file again"
        )
    return found


def read_sections(directory: Path) -> tuple[dict, dict]:
    """The image and the video section of a directory; {} if it has none."""
    processor = read_json(directory / PROCESSOR)
    return (
        processor.get("image_processor") or read_json(directory / IMAGE),
        processor.get("video_processor") or read_json(directory / VIDEO),
    )


def statistics(section: dict) -> dict | None:
    """`mean` and `std` of a section, None where it is silent."""
    if "image_mean" not in section or "image_std" not in section:
        return None
    return {name: tuple(section[f"image_{name}"]) for name in ("mean", "std")}


def mean_colour(mean) -> tuple[int, ...]:
    """What a padded picture is surrounded with."""
    return tuple(int(255 * x) for x in mean)


def need_view(section: dict, file: Path, side: int) -> str:
    """How a section makes a view of side x side: "pad", "crop" or "resize".

    Raises:
      ValueError: it makes another one, or in another way.
    """
    name = section.get("image_processor_type") or section.get("video_processor_type") or ""
    crops = section.get("do_center_crop")
    crops = not ("Siglip" in name or "Onevision" in name) if crops is None else crops
    size = section.get("size")
    found = [_side(size)] + [_side(section.get("crop_size") or size)] * bool(crops)
    bicubic = section.get("resample", BICUBIC) == BICUBIC
    if size is not None and (any(x != side for x in found) or not bicubic):
        raise ValueError(
            f"{file.parent} prepares views of size {size}, crop_size {section.get('crop_size')} "
            f"and resample {section.get('resample')}; the tower sees {side}x{side}, resized by "
            f"{BICUBIC} (bicubic); use the processor files of the released model"
        )
    if not crops and "shortest_edge" in (size if isinstance(size, dict) else {}):
        raise ValueError(
            f"{file.parent} resizes the shortest edge and does not crop; views are square; set "
            "do_center_crop, or size to a height and a width"
        )
    if section.get("do_pad") and "Llava" in name and "image_grid_pinpoints" not in section:
        return "pad"
    return "crop" if crops else "resize"


def _side(size) -> int | None:
    """The side of a square size, None if it is no square."""
    values = set(size.values()) - {None} if isinstance(size, dict) else {size}
    return values.pop() if len(values) == 1 else None


def make_section(kind: str, cfg, side: int, mode: str = "resize", **more) -> dict:
    """A section of a processor file.

    Args:
      kind: class of the image or video processor.
      cfg: of the tower, for its mean and std.
      side: of a view.
      mode: "crop" (also of a padded picture) or "resize".
      more: what only this class has.
    """
    square = {"height": side, "width": side}
    crop = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    whole = {"size": square, "do_center_crop": False}
    return {
        f"{'video' if 'Video' in kind else 'image'}_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
        "resample": BICUBIC,
        **(crop if mode == "crop" else whole),
        **more,
    }
