"""Golden files, a byte tokenizer and small videos whose frames show their number."""

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_frame import SIDE, numbered_frame

from vlmjax.data.processor import Processor, ProcessorConfig
from vlmjax.data.tokenizer import byte_tokenizer

GOLDENS = Path(os.environ.get("VLMJAX_GOLDENS", Path(__file__).parents[1] / "goldens"))


@pytest.fixture(scope="session")
def golden():
    """Returns (arrays, meta) of a golden file by name."""

    def load(name):
        path = GOLDENS / f"{name}.npz"
        if not path.is_file():
            pytest.fail(f"{path} is missing; set VLMJAX_GOLDENS")
        arrays = np.load(path)
        return arrays, json.loads(str(arrays["meta"]))

    return load


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def make_processor(tokenizer):
    return lambda **config: Processor(ProcessorConfig(**config), tokenizer)


@pytest.fixture(scope="session")
def make_video(tmp_path_factory):
    """Writes frames numbered 0, 1, ... at the given times (in 1/1000 s) and returns the path."""
    folder = tmp_path_factory.mktemp("videos")

    def make(name, times, codec="libx264", gop=12, step=40, container=None, **options):
        path = folder / name
        if path.exists():
            return path
        with av.open(str(path), "w", options=container) as container:
            stream = container.add_stream(codec, rate=1000 // step)
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuv420p"
            stream.codec_context.gop_size = gop
            stream.options = options
            stream.codec_context.time_base = Fraction(1, 1000)
            for number, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
                frame.pts, frame.time_base, frame.duration = time, Fraction(1, 1000), step
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return make
