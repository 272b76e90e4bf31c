"""Writes one held-out picture and one held-out video of the demo as files to ask about.

python -m vlmjax.data.demo.show --output runs/demo/ask
"""

from pathlib import Path

import av
import numpy as np
from absl import app, flags
from PIL import Image

from vlmjax.data.demo.source import DemoSource

OUTPUT = flags.DEFINE_string("output", None, "folder of the files", required=True)


def write_video(file, frames, timestamps):
    """Writes frames u8[t, h, w, 3] as a lossless video that shows each until the next's time."""
    rate = 10  # frames a second in the file; the processor looks at one a second
    length = timestamps[-1] + 1
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for k in range(round(length * rate)):
            shown = int(np.searchsorted(timestamps, k / rate, side="right")) - 1
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[shown])))
        container.mux(stream.encode())


def part_of(task, kind, wanted):
    """Returns (part, answer) of the first held-out record of a task whose video or image fits."""
    source = DemoSource(task, "test", 2)
    for i in range(1000):
        record = source[i]
        part = next(p for p in record["messages"][0]["content"] if p["type"] == kind)
        if wanted(part, record["messages"][0]["content"][-1]["text"]):
            return part, record["answer"]
    raise ValueError(f"no {task} record of 1000 fits; change the rule that chooses one")


def main(_):
    folder = Path(OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    picture, name = part_of("name", "image", lambda part, question: True)
    Image.fromarray(np.asarray(picture["image"])).save(folder / "picture.png")
    video, frames = part_of(
        "video",
        "video",
        lambda part, question: part["timestamps"][1] == 1.0 and question.startswith("list"),
    )
    write_video(folder / "clip.mp4", video["video"], video["timestamps"])
    print(f"{folder}/picture.png shows: {name}\n{folder}/clip.mp4 shows: {frames}")


if __name__ == "__main__":
    app.run(main)
