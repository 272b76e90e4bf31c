"""Writes the records of `source_files` as a TFDS dataset: python tfds_writer.py FOLDER MEDIA."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import source_files as files

warnings.filterwarnings("ignore")
import tensorflow_datasets as tfds  # noqa: E402

TEXT, IMAGE = tfds.features.Text(), tfds.features.Image(shape=(None, None, 3))


class Tiny(tfds.core.GeneratorBasedBuilder):
    """The five records: pictures encoded, videos as bytes and by path, turns in both forms."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "id": TEXT,
            "images": tfds.features.Sequence(IMAGE),
            "video": tfds.features.Sequence(TEXT),
            "stream": tfds.features.Scalar(dtype=np.bool_),
            "conversations": tfds.features.Sequence({"from": TEXT, "value": TEXT}),
            "conversation": TEXT,
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for k, row in enumerate(files.annotations()):
            images = row.get("image", [])
            images = [images] if isinstance(images, str) else images
            video = row.get("video", [])
            if row["id"] == "clip":
                video = [(MEDIA / file).read_bytes() for file in video]
            yield (
                k,
                {
                    "id": row["id"],
                    "images": [str(MEDIA / file) for file in images],
                    "video": video,
                    "stream": row.get("stream", False),
                    "conversations": row.get("conversations", []),
                    "conversation": json.dumps(row.get("conversation", [])),
                },
            )


if __name__ == "__main__":
    MEDIA = Path(sys.argv[2])
    Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
    print("tensorflow loaded:", "tensorflow" in sys.modules)
