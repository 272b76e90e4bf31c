"""The same five records in every layout that a source reads."""

import io
import json
import tarfile

from PIL import Image

QUESTION, ANSWER = "what is it?", 'it is {a} "thing" [with\\ brackets'


def picture(color, kind, size=(40, 30)):
    """Returns the bytes of a picture."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def turns(tags, answer=ANSWER):
    return [{"from": "human", "value": tags + QUESTION}, {"from": "gpt", "value": answer}]


def make_media(folder, video):
    """Writes pictures and a video into a folder."""
    (folder / "in").mkdir(parents=True)
    (folder / "in/a.png").write_bytes(picture("red", "PNG"))
    (folder / "in/b.jpg").write_bytes(picture("blue", "JPEG"))
    (folder / "in/c.mp4").write_bytes(video.read_bytes())


def annotations():
    """Returns annotations of an image, two images, a video, a stream, and text only."""
    said = [{"role": "user", "content": "Tell me.", "time": 0.0}]
    said += [{"role": "assistant", "content": "now", "time": 1.5}]
    return [
        {"id": "one", "image": "in/a.png", "conversations": turns("<image>\n")},
        {"id": "two", "image": ["in/a.png", "in/b.jpg"], "conversations": turns("<image><image>")},
        {"id": "clip", "video": ["in/c.mp4"], "conversations": turns("<video>")},
        {"id": "live", "stream": True, "video": ["in/c.mp4"], "conversation": said},
        {"id": "words", "conversations": turns("", "ü" * 300)},
    ]


def with_bytes(folder):
    """Returns the annotations as rows of a table: every column in each, media as bytes."""
    rows = []
    for row in annotations():
        images = row.get("image") or []
        images = [images] if isinstance(images, str) else images
        rows.append(
            {
                "id": row["id"],
                "images": [{"bytes": (folder / f).read_bytes(), "path": f} for f in images],
                "video": [(folder / f).read_bytes() for f in row.get("video", [])],
                "stream": row.get("stream", False),
                "conversations": row.get("conversations"),
                "conversation": row.get("conversation"),
            }
        )
    return rows


def write_json(file, rows):
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    return f"json:{file}"


def write_jsonl(file, rows):
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n \n")
    return f"json:{file}"


def write_parquet(file, folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(with_bytes(folder)), file)
    return f"parquet:{file}"


def add(tar, name, data=b"", **fields):
    """Adds a member; `fields` are those of a TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tars(folder, media):
    """Writes two shards; pictures of one record are numbered."""
    rows = with_bytes(media)
    for shard, part in enumerate((rows[:3], rows[3:])):
        with tarfile.open(folder / f"x-{shard:03d}.tar", "w") as tar:
            for row in part:
                for k, image in enumerate(row["images"]):
                    name = f"{row['id']}.{k + 9}.{image['path'][-3:]}"
                    add(tar, name, image["bytes"])
                for clip in row["video"]:
                    add(tar, f"{row['id']}.mp4", clip)
                kept = {k: v for k, v in row.items() if k not in ("images", "video")}
                add(tar, f"{row['id']}.json", json.dumps(kept).encode())
    return f"tar:{folder}/x-{{000..001}}.tar"
