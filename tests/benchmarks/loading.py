"""Samples a second and memory: our processor and loader against transformers' own processors.

python tests/benchmarks/loading.py [--seconds 20] [--samples 20000]

Every method gets the same JPEG files (640x480 to 1920x1080) and 8 s H.264 clips (640x360 to
1280x720, one frame a second), made of the demo's real pictures, the same text, sizes and frames,
and the same budget of visual tokens. `samples_per_second` is of processor time, that is per core,
in a process of its own with one thread; `peak_mb` is the highest resident memory of that process.
transformers decodes clips with PyAV, since torchcodec is not installed. All keep freed memory as
our workers do, which makes every one of them faster.
Then the loader on six pictures a clip, with 0, 1 and 2 workers, by the clock and by processor time;
with --samples so many through 2 workers, with the resident memory of the parent and of the workers
at 10 %, 55 % and 100 %. JSON lines.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
QUESTION, ANSWER = "What is to be seen here? Say it in one sentence.", "Several small pictures."
MEDIA = {"pictures": ".jpg", "clips": ".mp4"}
MIX = 6  # pictures for each clip, where both come


def messages(file):
    kind = "image" if file.suffix == ".jpg" else "video"
    parts = [{"type": kind, kind: str(file)}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": ANSWER}]


def make_ours(folder):
    """Returns file -> number of patches, by our processor with transformers' choices."""
    from vlmjax.data.processor import Processor, ProcessorConfig
    from vlmjax.data.tokenizer import byte_tokenizer

    config = ProcessorConfig(resize="transformers", frame_sampling="transformers")
    process = Processor(config, byte_tokenizer())

    def one(file):
        sample = process({"id": file.name, "messages": messages(file)})
        return sum(len(item.patches) for item in sample.items)

    return one


def make_theirs(folder, name, backend):
    """Returns file -> number of patches, by a processor of transformers."""
    import torchvision_shim

    torchvision_shim.install()
    import torch
    from transformers import AutoImageProcessor, AutoProcessor, Qwen2VLProcessor
    from transformers.image_utils import load_image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.utils import logging
    from transformers.video_utils import load_video

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(folder)
    if name == "qwen2_vl":
        sizes = dict(size=dict(processor.image_processor.size), patch_size=14)
        images = Qwen2VLImageProcessor(**sizes)
        sizes = dict(size=dict(processor.video_processor.size), patch_size=14)
        videos = Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=True)
        template = processor.chat_template
        processor = Qwen2VLProcessor(images, processor.tokenizer, videos, chat_template=template)
    elif backend == "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    choose = functools.partial(processor.video_processor.sample_frames, fps=1)

    def one(file):
        text = processor.apply_chat_template(messages(file))
        if file.suffix == ".jpg":
            media = {"images": [load_image(str(file))]}
        else:
            frames, metadata = load_video(str(file), backend="pyav", sample_indices_fn=choose)
            media = {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
        made = processor(text=text, return_tensors="pt", **media)
        return sum(len(made[key]) for key in made if key.startswith("pixel_values"))

    return one


METHODS = {
    "transformers video_llama_3 (torchvision)": lambda f: make_theirs(f, "video_llama_3", ""),
    "transformers video_llama_3 (pil)": lambda f: make_theirs(f, "video_llama_3", "pil"),
    "transformers qwen2_vl": lambda f: make_theirs(f, "qwen2_vl", ""),
    "vlmjax": make_ours,
}


def measure(folder, method, media, seconds):
    """Prints the line of one method, run in this process."""
    from vlmjax.data.loading import keep_memory

    keep_memory()
    one = METHODS[method](folder)
    files = sorted(folder.glob(f"*{MEDIA[media]}"))
    patches = sum(map(one, files))
    rounds, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        for file in files:
            one(file)
        rounds += 1
    rate = rounds * len(files) / (time.process_time() - began)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    row = dict(method=method, media=media, samples_per_second=round(rate, 2))
    print(json.dumps(row | dict(peak_mb=peak // 1024, patches=patches)), flush=True)


class Samples:
    """Six pictures, a clip, six pictures, a clip ... as our samples."""

    def __init__(self, folder):
        self.photos, self.clips = (sorted(folder.glob(f"*{end}")) for end in MEDIA.values())

    def __getitem__(self, number):
        from vlmjax.data.processor import Processor, ProcessorConfig
        from vlmjax.data.tokenizer import byte_tokenizer

        if not hasattr(self, "process"):
            self.process = Processor(ProcessorConfig(), byte_tokenizer())
        at, rest = divmod(number, MIX + 1)
        files = [self.clips[at % len(self.clips)]] if rest == MIX else self.photos
        file = files[(MIX * at + rest) % len(files)]
        return self.process({"id": str(number), "messages": messages(file)})


def used():
    """Returns (processor seconds, resident MB of this process, of its workers) so far.

    Memory that two processes share is counted in both.
    """
    import psutil

    me = psutil.Process()
    crew = me.children(recursive=True)
    seconds = sum(sum(process.cpu_times()[:2]) for process in (me, *crew))
    resident = sum(process.memory_info().rss for process in crew)
    return seconds, me.memory_info().rss >> 20, resident >> 20


def load_samples(folder, workers, seconds, samples):
    """Prints the line of the loader: for so many seconds, or so many samples."""
    from loading import Samples as Picklable  # by its module's name, as a worker finds it

    from vlmjax.data.loading import load

    items = load(Picklable(folder), workers=workers, ahead=16)
    for _ in range(MIX + 1):
        next(items)
    done, memory, began, seconds_before = 0, [], time.monotonic(), used()[0]
    marks = [int(samples * share) for share in (0.1, 0.55, 1)]
    while done < samples or (not samples and time.monotonic() - began < seconds):
        next(items)
        done += 1
        if done in marks:
            memory.append(used()[1:])
    rate = done / (time.monotonic() - began)
    row = dict(method=f"vlmjax load, {workers} workers", media="mixed", samples=done)
    per_core = done / (used()[0] - seconds_before)
    row |= dict(samples_per_second=round(rate, 2), samples_per_core_second=round(per_core, 2))
    row |= dict(resident_mb=memory or [used()[1:]])
    print(json.dumps(row), flush=True)
    items.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--samples", type=int, default=0, help="of the measurement of memory")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--media", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        return measure(args.folder, args.method, args.media, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        environment = os.environ | ONE_THREAD | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        for media in MEDIA:
            for method in METHODS:
                flags = ["--folder", folder, "--method", method, "--media", media]
                flags += ["--seconds", str(args.seconds)]
                subprocess.run([sys.executable, __file__, *flags], env=environment, check=True)
        for workers in (0, 1, 2):
            load_samples(Path(folder), workers, args.seconds, 0)
        if args.samples:
            load_samples(Path(folder), 2, 0, args.samples)
    return None


def prepare(folder):
    """Writes the media and what transformers reads its VideoLLaMA3 processor from."""
    from loading_media import make_clips, make_photos

    from vlmjax.data.processor import ProcessorConfig
    from vlmjax.data.tokenizer import byte_tokenizer
    from vlmjax.hf.processor import write_processor

    make_photos(folder)
    make_clips(folder)
    write_processor(folder, byte_tokenizer(), ProcessorConfig())
    (folder / "config.json").write_text('{"model_type": "video_llama_3"}')


if __name__ == "__main__":
    main()
