"""Writes a trained model for use elsewhere: `python launch/export.py RUN --format FORMAT --out DIR`.

FORMAT is open_clip, safetensors, onnx or torch (docs/export.md).
"""

import sys

from reid_dist.export.command import main

if __name__ == "__main__":
    sys.exit(main())
