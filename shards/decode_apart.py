"""Decode one image in a process of its own, because it may be the one that killed the last decoder.

    python -m fourmill.shards.decode_apart 256 bicubic < image > frame

Far slower than `decode_frame` (a process per image), and with the same result for any image that leaves its decoder alive.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from fourmill.modality import Resample
from fourmill.shards.decode import Frame, RejectedImage, decode_frame

DEADLINE_S = 60.0
ATTEMPTS = 2  # a process can end for reasons that are not its image's
REJECTED = 9  # exit status


def decode_apart(
    image: bytes | np.ndarray, shorter_side: int, resample: Resample, deadline_s: float = DEADLINE_S
) -> Frame:
    """As `decode_frame`; one that kills or hangs its decoder twice is a RejectedImage too.

    What a source rendered itself (an array) has been decoded already, and is not suspected.
    """
    if isinstance(image, np.ndarray):
        return decode_frame(image, shorter_side, resample)
    command = [sys.executable, "-m", "fourmill.shards.decode_apart", str(shorter_side), resample]
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            done = subprocess.run(command, input=image, capture_output=True, timeout=deadline_s, check=False)
        except subprocess.TimeoutExpired:
            reason = "hangs its decoder"
            continue
        if done.returncode == 0:
            head, _, pixels = done.stdout.partition(b"\n")
            height, width, rows, columns = json.loads(head)
            frame = np.frombuffer(pixels, np.uint8).reshape(rows, columns, 3)
            return Frame(pixels=frame, width=width, height=height)
        if done.returncode == REJECTED:
            raise RejectedImage(done.stdout.decode())
        if done.returncode > 0:  # Python itself ended it, with a message: that is no crash
            raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr.decode(errors='replace')[-300:]}")
        reason = "kills its decoder"
    raise RejectedImage(reason)


def main() -> None:
    shorter_side, resample = sys.argv[1:]
    try:
        frame = decode_frame(sys.stdin.buffer.read(), int(shorter_side), resample)  # type: ignore[arg-type]
    except RejectedImage as error:
        sys.stdout.write(error.reason)
        sys.exit(REJECTED)
    head = json.dumps([frame.height, frame.width, *frame.pixels.shape[:2]])
    sys.stdout.buffer.write(head.encode() + b"\n" + frame.pixels.tobytes())


if __name__ == "__main__":
    main()
