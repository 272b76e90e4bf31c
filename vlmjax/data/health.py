"""Records that cannot be used: why, which ones, and how many may be."""

# Why a record is unusable -> what is meant.
REASONS = {
    "missing_file": "a media file is not there or is empty",
    "damaged_media": "a media file is truncated, or no picture or video",
    "hostile_media": "a media file costs more than it may: pixels, duration, time to decode",
    "outside_root": "a media path leads outside its folder, or is a link that does",
    "remote_media": "a media path is a URL; nothing is ever fetched",
    "malformed": "the annotation lacks a key, or has a value of another type",
    "unknown_role": "a turn is from nobody that is known",
    "no_answer": "no assistant turn has any text, so nothing would be trained",
    "placeholders": "the text has other tags than the record has media",
    "too_long": "the sample fits no row, or is longer than max_length",
}


class BadRecord(ValueError):
    """A record cannot be used; `reason` is a key of `REASONS`."""

    def __init__(self, reason, message):
        super().__init__(message)
        assert reason in REASONS, reason
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker
        return BadRecord, (self.reason, str(self))
