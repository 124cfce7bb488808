"""Classify photographs with a file that `featx export` wrote: onnxruntime, numpy and Pillow, nothing else.

python classify.py model.onnx photo.jpg ...
"""

import json
import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, or onnxruntime reports to its maker

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])

for path in sys.argv[2:]:
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
    pixels = np.asarray(upright.convert("RGB"))  # uint8 [H, W, 3], of any size
    (probabilities,) = session.run(["probabilities"], {"images": pixels[None]})
    best = probabilities[0].argmax()
    print(f"{path}\t{class_names[best]}\t{probabilities[0, best]:.4f}")
