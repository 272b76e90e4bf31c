"""A mixture on disk for tests of the data engine: pictures, clips and text, some records broken."""

import json
import os
import zlib

import av
import numpy as np
from PIL import Image
from tiny import tiny_config

ROWS = 2


def picture(folder, name, rng, size=None):
    """Writes a JPEG of random size; returns its name."""
    shape = (*(size or rng.integers(16, 60, 2)), 3)
    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name)
    return name


def clip(folder, name, rng, size=(32, 48), seconds=3):
    """Writes a clip of one frame a second, the left half of which never changes."""
    pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    with av.open(str(folder / name), "w") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.width, stream.height = size[1], size[0]
        for _ in range(seconds):
            pixels[:, size[1] // 2 :] = rng.integers(0, 255, 3)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(stream.encode())
    return name


def talk(id, asked, answer="Something.", **media):
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": id, "conversations": turns} | media


def pictures(folder, number, rng):
    """Returns annotations with one or two pictures, every eighth with a clip."""
    rows = []
    for i in range(number):
        words = "word " * int(rng.integers(1, 9))
        if i % 8 == 7:
            media = {"video": clip(folder, f"v{i}.mp4", rng)}
        else:
            media = {"image": [picture(folder, f"p{i}_{k}.jpg", rng) for k in range(1 + i % 2)]}
        rows.append(talk(f"p{i}", f"What, {words}?", **media))
    return rows


def texts(number, rng):
    """Returns annotations without media."""
    return [talk(f"t{i}", "Say " + "word " * int(rng.integers(1, 12))) for i in range(number)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"json:{file}"


def broken(folder, outside, rng):
    """Returns {id: (annotation, reason)} of twelve kinds of records that cannot be used."""
    whole = (folder / picture(folder, "whole.jpg", rng, (40, 50))).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    # A GIF that says it is 60,000 pixels wide and high, and a PNG header of 40,000.
    side = (60_000).to_bytes(2, "little")
    frame = b"," + bytes(4) + side * 2 + b"\x80" + bytes(6) + b"\x02\x02\x4c\x01\x00;"
    (folder / "bomb.gif").write_bytes(b"GIF89a" + side * 2 + b"\0" * 3 + frame)
    Image.new("1", (8, 8)).save(folder / "small.png")
    png = bytearray((folder / "small.png").read_bytes())
    png[16:24] = (40_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(png)
    with av.open(str(folder / "bomb.mp4"), "w") as out:  # frames of 151 MB in a few kilobytes
        stream = out.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 7104
        frame = av.VideoFrame(7104, 7104, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    secret = picture(outside, "secret.jpg", rng)
    os.symlink(outside / secret, folder / "link.jpg")
    image = "<image>What?"
    rows = {
        "damaged_media": talk("truncated", image, image="cut.jpg"),
        "missing_file": talk("empty", image, image="empty.jpg"),
        "hostile_media": [
            talk("gif", image, image="bomb.gif"),
            talk("png", image, image="huge.png"),
            talk("mp4", "<video>What?", video="bomb.mp4"),
        ],
        "outside_root": [
            talk("escape", image, image=f"../{outside.name}/secret.jpg"),
            talk("symlink", image, image="link.jpg"),
        ],
        "remote_media": talk("url", image, image="http://example.com/a.jpg"),
        "malformed": {"id": "key", "image": "whole.jpg"},
        "unknown_role": {
            "id": "role",
            "conversations": [{"from": "human", "value": "a"}, {"from": "robot", "value": "b"}],
        },
        "no_answer": talk("answer", image, "", image="whole.jpg"),
        "placeholders": talk("tags", "<image><image>What?", image="whole.jpg"),
    }
    flat = [
        (row, reason)
        for reason, found in rows.items()
        for row in (found if isinstance(found, list) else [found])
    ]
    return {row["id"]: (row, reason) for row, reason in flat}


def mixture_config(folder, number=48, **changes):
    """Returns the config of a tiny run on a quarter of text and three quarters of pictures."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    shown = write(folder / "pictures.jsonl", pictures(folder, number, rng))
    text = write(folder / "text.jsonl", texts(number, rng))
    sources = ((shown, 3.0), (text, 1.0))
    settings = dict(
        data__sources=sources,
        data__budget=(160, 160, 80, 4),
        data__index=str(folder / "index"),
        train__rows=ROWS,
    )
    return tiny_config(folder, **settings | changes)
