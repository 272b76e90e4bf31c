"""Frame choice against libavfilter's own fps filter, decoding, and refusals."""

import dataclasses
import itertools
import os
import resource
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from numbered_frame import frame_number, numbered_frame

from vlmjax.data import video, video_file
from vlmjax.data.health import BadRecord
from vlmjax.data.sampling import last_of_second, transformers
from vlmjax.data.video import load_video, open_video, read_frames
from vlmjax.data.video_file import Limits

REGULAR = [40 * k for k in range(90)]  # 25 frames/s, 3.6 s
IRREGULAR = list(np.cumsum([40, 40, 320, 80, 1600, 40, 120, 440] * 8).tolist())
LATE = [7000 + t for t in REGULAR]
TIMES = {"regular": REGULAR, "irregular": IRREGULAR, "late": LATE}


def fps_filter(path, fps):
    """Returns the frame numbers of ffmpeg's fps=FPS:round=down, times from the first frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source = graph.add_buffer(template=stream, time_base=stream.time_base)
        rate, sink = graph.add("fps", f"fps={fps}:round=down"), graph.add("buffersink")
        source.link_to(rate)
        rate.link_to(sink)
        graph.configure()
        numbers, first = [], None
        for frame in [*container.decode(stream), None]:
            if frame is not None:
                first = frame.pts if first is None else first
                frame.pts -= first
            graph.push(frame)
            while True:
                try:
                    numbers.append(frame_number(graph.pull().to_ndarray(format="rgb24")))
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return numbers


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("fps", [1, 2.5])
def test_last_of_second_is_the_ffmpeg_filter(make_video, name, times, fps):
    path = make_video(f"{times}_{name}", TIMES[times])
    frames, stamps = load_video(path, fps=fps)
    expected = fps_filter(path, fps)
    assert [frame_number(f) for f in frames] == expected
    start = 7.0 if times == "late" else TIMES[times][0] / 1000
    np.testing.assert_allclose(stamps, start + np.arange(len(expected)) / fps, atol=1e-3)


def test_last_of_second_documented_example(make_video):
    frames, stamps = load_video(make_video("regular_clip.mp4", REGULAR))
    assert [frame_number(f) for f in frames] == [24, 49, 74]
    assert stamps.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "codec,name", [("mpeg4", "c.avi"), ("mpeg4", "c.mp4"), ("libx264", "c.ts")]
)
def test_other_containers(make_video, codec, name):
    path = make_video(name, REGULAR, codec=codec)
    assert [frame_number(f) for f in load_video(path)[0]] == [24, 49, 74]


def test_only_runs_with_chosen_frames_are_decoded(make_video):
    path = make_video("long.mp4", [40 * k for k in range(25 * 40)], gop=25)
    video = open_video(path, max_frames=4)
    assert len(video.runs) <= 8
    expected = [24 + 25 * k for k in (0, 13, 26, 39)]
    assert [frame_number(f) for f in read_frames(video)] == expected
    assert video.timestamps == (0, 13, 26, 39)


def test_pictures_that_refer_to_the_skipped_run(make_video):
    options = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"}
    path = make_video("open.mkv", REGULAR, **options)
    choice = dict(fps=25, max_frames=90)
    whole = open_video(path, **choice)
    expected = dict(zip(whole.pts, read_frames(whole), strict=True))
    for most in (2, 3, 5, 7, 11):
        video = open_video(path, fps=25, max_frames=most)
        for pts, frame in zip(video.pts, read_frames(video), strict=True):
            np.testing.assert_array_equal(frame, expected[pts])


def test_part_of_a_video(make_video):
    path = make_video("regular_clip.mp4", REGULAR)
    frames, stamps = load_video(path, fps=2, start=1.0, end=2.5)
    assert stamps.tolist() == [1.0, 1.5, 2.0]
    assert [frame_number(f) for f in frames] == [37, 49, 62]
    with pytest.raises(ValueError, match="no frame between 50.0 s and None s.*correct the start"):
        open_video(path, start=50.0)


def test_more_frames_than_allowed_are_thinned_by_linspace():
    times = [Fraction(k, 10) for k in range(2000)]
    for most in (1, 7, 180, 199):
        chosen, stamps = last_of_second(times, Fraction(200), fps=1, max_frames=most)
        kept = np.linspace(0, 199, most, dtype=int)
        assert chosen == (kept * 10 + 9).tolist() and stamps == kept.tolist()


@pytest.mark.parametrize("total,rate", [(50, 25), (3, 25), (700, 30), (9000, 25)])
def test_transformers_rule(total, rate):
    times = [Fraction(k, rate) for k in range(total)]
    chosen, stamps = transformers(
        times, Fraction(total, rate), fps=1, max_frames=180, rate=Fraction(rate)
    )
    count = int(min(max(total / rate, 4), 180, total))
    assert chosen == np.arange(0, total, total / count).astype(int)[:count].tolist()
    np.testing.assert_allclose(stamps, np.array(chosen) / rate)


def test_frames_are_read_upright(make_video, tmp_path):
    path = make_video("regular_clip.mp4", REGULAR)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix
    one = (1 << 16).to_bytes(4, "big")
    minus, zero = (-(1 << 16)).to_bytes(4, "big", signed=True), bytes(4)
    w = (1 << 30).to_bytes(4, "big")
    data[matrix : matrix + 36] = b"".join([zero, one, zero, minus, zero, zero, zero, zero, w])
    turned = tmp_path / "phone.mp4"
    turned.write_bytes(data)
    frames, _ = load_video(turned)  # a phone that was turned: players show it 90 degrees clockwise
    back = np.rot90(frames[0], 1)
    assert frame_number(back) == 24


@pytest.mark.parametrize("rotation", range(-180, 181, 30))
def test_sizes_are_those_of_upright_frames(rotation):
    pixels = np.zeros((2, 4, 3), np.uint8)
    frame = SimpleNamespace(rotation=rotation, width=4, height=2, to_ndarray=lambda format: pixels)
    assert video._size(frame) == video._upright(frame).shape[:2]


def test_content_decides_not_the_extension(make_video, tmp_path):
    wrong = tmp_path / "movie.jpg"
    wrong.write_bytes(make_video("regular_clip.mp4", REGULAR).read_bytes())
    assert len(load_video(wrong)[0]) == 3


@pytest.mark.parametrize("name", ["tag.avi", "tag.mkv", "tag.mp4"])
def test_tags_may_be_in_any_encoding(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as container:
        container.metadata["title"] = "XXcafeXX"
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 64
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = (tmp_path / name).read_bytes()
    latin = data.replace(b"cafe", b"caf\xe9")
    assert latin != data
    assert [frame_number(frame) for frame in load_video(latin)[0]] == [0, 1]


@pytest.mark.parametrize(
    "content,what",
    [
        (b"<html>not found</html>", "text, e.g. a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "playlist"),
        (b"ffconcat version 1.0\nfile secret.mp4\n", "playlist"),
        (bytes(range(256)) * 20, "unknown binary data"),
    ],
)
def test_other_content_is_named(tmp_path, content, what):
    path = tmp_path / "movie.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"movie.mp4.*cannot be read.*{what}.*convert it"):
        open_video(path)


@pytest.mark.parametrize(
    "name,codec,options",
    [
        ("cut.mkv", "libx264", {}),
        ("cut.webm", "libvpx", {}),
        ("cut.mp4", "libx264", {"movflags": "faststart"}),
        ("cut.flv", "flv1", {}),
    ],
)
def test_files_that_are_cut_off(make_video, name, codec, options):
    data = make_video(name, REGULAR, codec=codec, container=options).read_bytes()
    assert len(load_video(data)[0]) == 3
    with pytest.raises(BadRecord) as caught:
        load_video(data[: len(data) * 6 // 10], fps=25, max_frames=90)
    assert caught.value.reason == "damaged_media"


def with_sound(path, video, seconds):
    """Copies a video beside `seconds` of silence."""
    with av.open(str(video)) as found, av.open(str(path), "w") as made:
        pictures = made.add_stream_from_template(found.streams.video[0])
        sound = made.add_stream("aac", rate=16000)
        for k in range(int(seconds * 16000 / 1024)):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, 1024 * k, Fraction(1, 16000)
            made.mux(sound.encode(frame))
        made.mux(sound.encode(None))
        for packet in found.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                made.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi"])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("seconds", [1, 60])
def test_whole_files_are_taken_for_whole(make_video, tmp_path, suffix, times, seconds):
    """Frames far apart, and sound that ends before or goes on after the pictures."""
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = make_video(f"whole_{times}.{suffix}", TIMES[times], codec=codec)
    for file in (path, with_sound(tmp_path / path.name, path, seconds)):
        video = open_video(file, fps=25, max_frames=1000)
        assert len(list(read_frames(video))) == len(video.pts)


def test_damaged_files(make_video, tmp_path):
    mp4 = make_video("regular_clip.mp4", REGULAR).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(mp4[: len(mp4) // 2])
    with pytest.raises(ValueError, match="cut.mp4.*an MP4 file, damaged or truncated"):
        open_video(path)


@pytest.mark.parametrize("name", ["regular_clip.mp4", "regular_clip.mkv"])
def test_bytes_of_a_file_are_the_file(make_video, name):
    path = make_video(name, REGULAR)
    frames, stamps = load_video(path)
    again, same = load_video(path.read_bytes())
    np.testing.assert_array_equal(again, frames)
    assert same.tolist() == stamps.tolist()
    assert "x00" not in repr(open_video(path.read_bytes()))


def test_bytes_have_the_limits_of_files(make_video, tmp_path):
    data = make_video("regular_clip.mkv", REGULAR).read_bytes()
    with pytest.raises(BadRecord, match=r"video of \d+ bytes is 64x64") as caught:
        open_video(data, limits=Limits(pixels=64 * 63))
    assert caught.value.reason == "hostile_media"
    with pytest.raises(BadRecord, match="took longer") as caught:
        open_video(data, limits=Limits(deadline=0.0))
    assert caught.value.reason == "hostile_media"
    with pytest.raises(BadRecord, match="is empty") as caught:
        open_video(b"")
    assert caught.value.reason == "missing_file"


def test_bytes_open_no_other_file(make_video):
    """Playlists and references to files beside them are what bytes could reach out with."""
    path = make_video("regular_clip.mp4", REGULAR)
    playlists = [f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile:{path}\n#EXT-X-ENDLIST\n"]
    playlists += [f"ffconcat version 1.0\nfile {path}\n", f"file:{path}"]
    for text in playlists:
        with pytest.raises(BadRecord, match="cannot be read") as caught:
            open_video(text.encode())
        assert caught.value.reason == "damaged_media"


def test_videos_without_pictures(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="sound.mp4.*no video stream"):
        open_video(path)


def test_too_many_open_files_are_none_of_the_record(make_video):
    path, files = make_video("regular_clip.mp4", REGULAR), []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                files.append(os.dup(0))
        with pytest.raises(OSError, match="Too many open files"):
            open_video(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in files:
            os.close(file)


def test_too_short_for_one_period(make_video):
    path = make_video("short.mp4", REGULAR[:13])
    with pytest.raises(ValueError, match="short.mp4.*lasts 0.52 s.*raise fps"):
        open_video(path)
    assert len(load_video(path, sampling="transformers")[0]) == 4
    assert len(load_video(path, fps=4)[0]) == 2


@pytest.mark.parametrize(
    "limits,message",
    [
        (Limits(pixels=64 * 63), "64x64 = 4096 pixels, at most 4032"),
        (Limits(duration=2.0), "50 frames in 2.1 s, at most 2 s"),
        (Limits(frames=50), "51 frames in 2.1 s, at most .* 50 frames"),
        (Limits(rate=20.0), "90 frames in 3.6 s.*20 frames/s"),
        (Limits(deadline=0.0), "took longer than 0 s"),
        (Limits(deadline=1e-5), "took longer than 1e-05 s"),
    ],
)
def test_limits(make_video, limits, message):
    with pytest.raises(ValueError, match=message):
        open_video(make_video("regular_clip.mkv", REGULAR), limits=limits)


def test_all_that_reads_a_video_shares_one_deadline(make_video, monkeypatch):
    """Opening takes 10 s here, decoding as long, and other work does not count."""
    now = itertools.count()
    monkeypatch.setattr(video_file.time, "thread_time", lambda: next(now) / 10)
    path = make_video("regular_clip.mkv", REGULAR)
    found = open_video(path, limits=Limits(deadline=1000.0))
    opened = 1000 - found.clock.left
    assert 9 < opened < 12
    for frame in read_frames(found):
        for _ in range(1000):
            next(now)
        assert frame_number(frame) in (24, 49, 74)
    read = 1000 - found.clock.left - opened
    assert 9 < read < 18
    slow = open_video(path, limits=Limits(deadline=opened + read / 2))
    with pytest.raises(BadRecord, match="took longer than .* video_deadline") as caught:
        list(read_frames(slow))
    assert caught.value.reason == "hostile_media"


@pytest.mark.parametrize("name", ["regular_clip.mkv", "regular_clip.mp4", "c.avi"])
def test_a_file_is_opened_once_and_one_frame_decoded_to_choose(make_video, monkeypatch, name):
    path = make_video(name, REGULAR, **(dict(codec="mpeg4") if name == "c.avi" else {}))
    opened, decoded = [], []
    size, open_ = video._size, av.open
    monkeypatch.setattr(video, "_size", lambda frame: decoded.append(frame) or size(frame))
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or open_(*a, **k))
    assert (open_video(path).height, open_video(path).width) == (64, 64)
    assert len(opened) == len(decoded) == 2


def test_paths_that_are_no_files(tmp_path):
    for path in ("http://example.com/a.mp4", "concat://a"):
        with pytest.raises(ValueError, match="is a URL, only local files"):
            open_video(path)
    for path in (tmp_path / "none.mp4", tmp_path, "concat:a.mp4|b.mp4"):
        with pytest.raises(ValueError, match="is not a file"):
            open_video(path)
    with pytest.raises(ValueError, match="frame sampling 'first' is unknown.*last_of_second"):
        open_video(tmp_path / "none.mp4", sampling="first")


def test_numbered_frames_survive():
    assert [frame_number(numbered_frame(k)) for k in (0, 1, 999, 65535)] == [0, 1, 999, 65535]


def test_pictures_that_nothing_refers_to_are_skipped(make_video, monkeypatch):
    options = {"x264-params": "bframes=6:b-adapt=0:b-pyramid=normal:ref=3"}
    path = make_video("pyramid.mp4", REGULAR, gop=40, **options)
    whole = open_video(path, fps=25, max_frames=90)
    expected = dict(zip(whole.pts, read_frames(whole), strict=True))
    decode, decoded = video._decode, []

    def counted(*args):
        for frame in decode(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    for seed in range(8):
        pts = np.sort(np.random.default_rng(seed).choice(whole.pts, 9, replace=False))
        chosen = dataclasses.replace(whole, pts=tuple(pts.tolist()))
        decoded.clear()
        for time, frame in zip(pts, read_frames(chosen), strict=True):
            np.testing.assert_array_equal(frame, expected[time])
        assert len(decoded) < 60
