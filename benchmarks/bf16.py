"""What bf16 costs on real photographs: how far features are from fp32's, and what heads refitted on them answer.

    python benchmarks/bf16.py PHOTOS --networks squeezenet1_1=W.pth timm/tf_efficientnet_lite0=W.pth

PHOTOS as for featx.fit. torch computes bf16, which it does on any processor, slowly where that has no bf16.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
from int8 import losses

from featx.backbones.loading import resolve
from featx.backbones.request import BackboneRequest
from featx.engines.opening import open_engine
from featx.extraction.pipeline import extract
from featx.features import cosines, distances
from featx.fitting import fit_features
from featx.measuring.views import paired


def row(photos: Path, name: str, weights: str, cache: Path) -> str:
    request = BackboneRequest(name, weights)
    engine = open_engine(request, resolve(request, cache), cache=cache, precision="bf16", engine="torch-cpu")
    large = extract(photos, request, cache=cache)
    small = extract(photos, request, cache=cache, precision="bf16", engine=engine)

    apart, cosine = distances(small.X, large.X), cosines(small.X, large.X).min()
    right = []
    for features in (small, large):
        held, head = features.split("val"), fit_features(features, "logreg").head
        right.append(f"{(head(held.X).argmax(axis=1) == held.y).sum()} of {len(held)}")
    more = paired("log_loss", losses(small, small.X), losses(large, large.X))
    return (
        f"| {name} | {np.median(apart):.2%} | {apart.max():.2%} | {cosine:.5f} | {' | '.join(right)} "
        f"| {more.value:+.4f} ({more.low:+.4f} to {more.high:+.4f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--networks", nargs="+", required=True, metavar="NAME=WEIGHTS")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| | median | worst image | smallest cosine | right, bf16 | right, fp32 | cross-validated log-loss (95 %) |")
    print("|---|---|---|---|---|---|---|")
    for given in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            name, _, weights = given.partition("=")
            print(row(options.photos, name, weights, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
