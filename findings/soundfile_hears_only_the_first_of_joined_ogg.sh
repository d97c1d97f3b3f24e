#!/usr/bin/env bash
# libsndfile (1.2.2, in soundfile 0.14.0) hears only the first stream of an Ogg file that holds several, one behind the
# other, and says nothing: the number of frames, the samples and the end of file are those of the first.
#
# A good guess: a file joined of two, as `cat one.ogg two.ogg` makes it and RFC 3533 (section 4) allows, is as long as
# both, as other players have it, or is refused.
# Seen: 1.0 of 2.5 seconds, for Vorbis and for Opus, from `frames` in the header and from reading to the end alike.
# So an importer of recordings has to look for a further first page (flag 0x02) behind the first stream.
#
# Source: soundfile 0.14.0 (wheel, libsndfile 1.2.2 inside), numpy 2.4.6. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install soundfile==0.14.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import numpy as np
import soundfile

RATE = 48_000
print("libsndfile", soundfile.__libsndfile_version__)
for kind in ("VORBIS", "OPUS"):
    parts = []
    for i, seconds in enumerate((1.0, 1.5)):
        tone = 0.3 * np.sin(2 * np.pi * (440 + 220 * i) * np.arange(int(RATE * seconds)) / RATE)
        soundfile.write(f"{i}.ogg", tone, RATE, format="OGG", subtype=kind)
        parts.append(Path(f"{i}.ogg").read_bytes())
    Path("joined.ogg").write_bytes(b"".join(parts))
    firsts = sum(page[1] & 2 == 2 for page in b"".join(parts).split(b"OggS")[1:])
    header = soundfile.info("joined.ogg").frames / RATE
    samples, rate = soundfile.read("joined.ogg")
    print(f"{kind}: {firsts} streams of 1.0 and 1.5 s joined; header {header:.2f} s, read {len(samples) / rate:.2f} s")
    assert firsts == 2 and abs(header - 1.0) < 0.05 and abs(len(samples) / rate - 1.0) < 0.05
PYTHON
echo "as described"
