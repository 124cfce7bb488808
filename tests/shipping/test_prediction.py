"""Prediction from an exported file: what it takes, that one bad image stops nothing, and what it imports."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx.external_data_helper import set_external_data
from onnx_files import SMALL, WIDTH, average_backbone, exported_file, some_head, write_sealed
from PIL import Image, features

from featx.cli import cli
from featx.errors import ExportError, SourceError
from featx.head import MULTILABEL
from featx.shipping import graph
from featx.shipping.deployed import Model
from featx.shipping.prediction import csv_lines, expand, json_lines, predict, table_lines, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_file(tmp_path_factory.mktemp("model") / "model.onnx")


def picture(seed: int, width: int = 60, height: int = 45) -> np.ndarray:
    """Smooth, as photographs are: `uint8 [height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven PNG files of seven sizes in two folders with awkward names, and a file that is not an image."""
    root = tmp_path / "photos"
    for i in range(7):
        path = root / ("a b" if i % 2 else "ünï [1]") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 40 + 9 * i, 90 - 7 * i)).save(path)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def expected(arrays: list[np.ndarray]) -> np.ndarray:
    """The answers without onnxruntime's resize: Pillow's pixels, the backbone and the head written in numpy."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in average_backbone(SMALL.crop).graph.initializer}
    pixels = np.stack([SMALL(array) for array in arrays]).astype(np.float32)
    normal = (pixels - tensors["mean"]) / tensors["std"]
    cells = normal.reshape(len(arrays), 3, 4, 8, 4, 8).mean(axis=(3, 5)).reshape(len(arrays), -1)
    head = some_head()
    return head.probabilities(head(cells @ tensors["mix"]))


def test_answers_are_those_of_the_backbone_and_head_written_in_numpy(model: Path) -> None:
    arrays = [picture(i, 30 + 11 * i, 80 - 5 * i) for i in range(9)]
    found = list(predict(model, arrays, batch_size=4, top_k=2))
    np.testing.assert_allclose([p.probabilities for p in found], expected(arrays), atol=5e-3)
    for prediction, row in zip(found, expected(arrays), strict=True):
        assert prediction.label == f"class {row.argmax()}"
        assert prediction.probability == pytest.approx(row.max(), abs=5e-3)
        assert len(prediction.top) == 2 and prediction.top[0][1] >= prediction.top[1][1]
    assert len({p.label for p in found}) > 1


def test_files_folders_globs_bytes_and_arrays_give_the_same_answers(model: Path, folder: Path) -> None:
    by_folder = list(predict(model, folder))
    assert [Path(p.id).name for p in by_folder] == ["1.png", "3.png", "5.png", "0.png", "2.png", "4.png", "6.png"]
    files = [Path(p.id) for p in by_folder]
    ways = [
        files,
        [str(file) for file in files],
        [file.read_bytes() for file in files],
        [np.asarray(Image.open(file)) for file in files],
        str(folder / "**" / "*.png"),
    ]
    for way in ways:
        found = list(predict(model, way, batch_size=3))
        if isinstance(way, str):
            found.sort(key=lambda p: [str(f) for f in files].index(p.id))
        np.testing.assert_allclose([p.probabilities for p in found], [p.probabilities for p in by_folder], atol=1e-6)
    (alone,) = predict(model, files[0])
    assert alone.id == str(files[0]) and alone.label == by_folder[0].label


def test_sharing_a_batch_changes_nothing_but_what_the_resize_rounds(model: Path) -> None:
    arrays = [picture(i, 50 + 20 * i, 70) for i in range(5)]
    together = [p.probabilities for p in predict(model, arrays)]
    session = Model(model)
    alone = [session(array[None])["probabilities"][0] for array in arrays]
    np.testing.assert_allclose(together, alone, atol=5e-3)


def test_a_file_that_takes_tensors_answers_alike(tmp_path: Path, model: Path) -> None:
    tensor = exported_file(tmp_path / "tensor.onnx", input="tensor")
    arrays = [picture(i) for i in range(4)]
    np.testing.assert_allclose([p.probabilities for p in predict(tensor, arrays)], expected(arrays), atol=1e-5)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 500


@pytest.mark.filterwarnings("default::featx.errors.FeatxWarning")
def test_in_a_folder_every_picture_is_answered_or_named(model: Path, tmp_path: Path) -> None:
    image = Image.fromarray(picture(0))
    for name, format in (("a.jpg", "JPEG"), ("b.JFIF", "JPEG"), ("c.avif", "AVIF"), ("d.gif", "GIF"), ("e.gif", "GIF")):
        if format != "AVIF" or features.check("avif"):
            image.save(tmp_path / name, format)
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    for name in ("layers.psd", "notes.txt", "Thumbs.db", ".hidden.gif"):
        (tmp_path / name).write_bytes(b"x")
    result = CliRunner().invoke(cli, ["predict", str(model), str(tmp_path), "--csv"])
    assert result.exit_code == 3
    rows = {Path(row["image"]).name: row for row in csv.DictReader(io.StringIO(result.stdout))}
    assert list(rows) == ["IMG_1.HEIC", "a.jpg", "b.JFIF", *(["c.avif"] if features.check("avif") else [])]
    assert [row["error"] == "" for row in rows.values()] == [False] + [True] * (len(rows) - 1)
    if importlib.util.find_spec("pillow_heif") is None:
        assert "HEIC" in result.stderr and "`pip install pillow-heif`" in result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: left out {tmp_path}/d.gif, {tmp_path}/e.gif: a GIF is read only where a manifest or a command names it",
        f"note: left out {tmp_path}/layers.psd: featx does not read .psd; convert it to JPEG or PNG",
    ]
    (named,) = predict(model, tmp_path / "d.gif")
    assert named.error is None


@pytest.mark.filterwarnings("default::featx.errors.FeatxWarning")
def test_a_folder_of_nothing_but_gifs_is_an_error_that_names_them(model: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.gif")
    result = CliRunner().invoke(cli, ["predict", str(model), str(tmp_path)])
    assert result.exit_code == 1
    assert "has no image in it" in result.stderr and f"left out {tmp_path}/a.gif" in result.stderr


def test_one_bad_image_is_named_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(picture(0)).save(good)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    thin = np.zeros((1, 100, 3), np.uint8)
    bad = {
        str(tmp_path / "empty.jpg"): "empty file",
        str(tmp_path / "text.jpg"): "not an image in a format",
        str(tmp_path / "cut.png"): "cannot be decoded",
        str(tmp_path / "absent.jpg"): "the file is not there",
        str(tmp_path / "pipe.png"): "a pipe, socket or device, not a file",
        "a\0b.jpg": "null",
    }
    images = [good, *bad, thin, np.zeros((0, 5, 3), np.uint8), good]
    found = list(predict(model, images, batch_size=2))
    assert len(found) == len(images)
    assert [p.error is None for p in found] == [True] + [False] * 8 + [True]
    for prediction, (name, reason) in zip(found[1:7], bad.items(), strict=True):
        assert prediction.id == name and reason in str(prediction.error)
        assert prediction.label is None and prediction.probabilities is None
    assert "1:64" in str(found[7].error)
    np.testing.assert_array_equal(found[0].probabilities, found[-1].probabilities)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 1), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
        np.zeros((3, 20, 20), np.uint8),
        np.zeros((20, 20, 3), np.uint16),
        np.zeros((20, 20, 3), np.float32),
        np.zeros((2, 20, 20, 3), np.uint8),
    ],
    ids=["grey", "grey with an axis", "rgba", "channels first", "16 bits", "float", "a batch"],
)
def test_arrays_of_another_form_are_refused_with_what_was_expected(model: Path, array: np.ndarray) -> None:
    (found,) = predict(model, [array])
    assert found.error == f"expected uint8 [H, W, 3] RGB, got {array.dtype} {list(array.shape)}"


def test_nothing_but_bad_images_gives_nothing_but_errors(model: Path) -> None:
    assert [p.error is not None for p in predict(model, [b"", b"x", b"y"], batch_size=2)] == [True] * 3
    assert list(predict(model, [])) == []


def test_folders_and_globs_without_an_image_are_errors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(SourceError, match="no image in it"):
        list(predict(model, tmp_path))
    with pytest.raises(SourceError, match="no file matches"):
        list(predict(model, str(tmp_path / "*.jpg")))


def test_a_file_with_the_letters_of_a_glob_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "shot [1].png"
    path.write_bytes(b"")
    assert list(expand(path)) == [str(path)]


def test_a_million_images_need_the_memory_of_a_few_batches(model: Path) -> None:
    """The queue is never longer than two batches and the threads, whatever is behind it."""
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in itertools.count():
            taken = i + 1
            yield picture(i % 3)

    predictions = predict(model, endless(), batch_size=8, workers=2)
    ahead = []
    tracemalloc.start()
    for i in range(800):
        next(predictions)
        ahead.append(taken - i)
        if i == 100:
            before = tracemalloc.get_traced_memory()[0]
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    predictions.close()
    assert max(ahead) <= 2 * 8 + 2
    assert after - before < 200_000


def test_answers_come_while_later_images_are_still_unread(model: Path) -> None:
    def slow() -> Iterator[np.ndarray]:
        yield from [picture(0)] * 40
        raise AssertionError("read too far ahead")

    predictions = predict(model, slow(), batch_size=4, workers=1)
    assert [next(predictions).label for _ in range(8)]
    predictions.close()


def test_closing_early_ends_the_threads(model: Path) -> None:
    predictions = predict(model, (picture(i) for i in range(10_000)), workers=3)
    next(predictions)
    assert any(t.name.startswith("featx-decode") for t in threading.enumerate())
    predictions.close()
    assert not any(t.name.startswith("featx-decode") for t in threading.enumerate())


def test_an_interrupt_drops_what_is_waiting_and_ends_the_threads(model: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield from [picture(0)] * 100
        raise KeyboardInterrupt

    answered = 0
    with pytest.raises(KeyboardInterrupt):
        for _ in predict(model, interrupted(), batch_size=8, workers=2):
            answered += 1
    assert answered == 88  # the others were on their way: the next batch, and an image per thread
    assert not any(t.name.startswith("featx-decode") for t in threading.enumerate())


def test_a_threshold_accepts_and_rejects_as_the_graph_does(tmp_path: Path) -> None:
    head = some_head(threshold=0.9)
    path = exported_file(tmp_path / "m.onnx", head, outputs=("probabilities", "accepted"))
    arrays = [picture(i) for i in range(12)]
    found = list(predict(path, arrays))
    session = Model(path)._session
    pixels = np.stack([SMALL.square(Image.fromarray(a), SMALL.resize) for a in arrays])
    (accepted,) = session.run(["accepted"], {"images": pixels})
    assert [p.accepted for p in found] == accepted.tolist()
    assert 0 < sum(accepted) < 12


def test_a_sigmoid_head_answers_with_every_class_that_is_probable(tmp_path: Path) -> None:
    path = exported_file(tmp_path / "m.onnx", some_head(activation="sigmoid"))
    found = list(predict(path, [picture(i) for i in range(12)]))
    for p in found:
        assert p.probabilities is not None
        assert set(p.labels) == {f"class {i}" for i in np.flatnonzero(p.probabilities >= MULTILABEL)}
    assert len({len(p.labels) for p in found}) > 1


def test_a_head_alone_is_applied_to_the_features_of_another_file(tmp_path: Path, model: Path) -> None:
    features = exported_file(tmp_path / "features.onnx", outputs=("features",))
    head = exported_file(tmp_path / "head.onnx", input="features")
    assert head.stat().st_size < 5000
    arrays = [picture(i) for i in range(3)]
    whole = [p.probabilities for p in predict(model, arrays)]
    np.testing.assert_allclose([p.probabilities for p in predict(Model(features, head=head), arrays)], whole, atol=1e-6)
    with pytest.raises(ExportError, match="give a head for its features"):
        predict(features, arrays)
    with pytest.raises(ExportError, match="is a head alone"):
        predict(head, arrays)
    other = exported_file(tmp_path / "other.onnx", input="features", spec_digest="ff")
    with pytest.raises(ExportError, match="other features"):
        predict(Model(features, head=other), arrays)
    with pytest.raises(ExportError, match="takes pixels; a head takes features"):
        predict(Model(features, head=model), arrays)


def test_features_come_along_when_asked_for(model: Path) -> None:
    (found,) = predict(model, [picture(0)], features=True)
    assert found.features is not None and found.features.shape == (WIDTH,)
    np.testing.assert_allclose(
        some_head().probabilities(some_head()(found.features[None]))[0], found.probabilities, atol=1e-6
    )


def test_files_that_featx_did_not_export_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(average_backbone(32).SerializeToString())
    with pytest.raises(ExportError, match="not exported by featx"):
        predict(foreign, [])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match="not an ONNX file"):
        predict(tmp_path / "text.onnx", [])
    with pytest.raises(ExportError, match="there is no file"):
        predict(tmp_path / "absent.onnx", [])


def test_metadata_of_another_format_or_incomplete_is_refused(tmp_path: Path, model: Path) -> None:
    proto = onnx.load(model)
    for key, value, message in (
        ("featx_format", "2", "format 2"),
        ("class_names", "[", "damaged"),
        ("class_names", None, "required field `class_names`"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        entry = next(e for e in changed.metadata_props if e.key == key)
        if value is None:
            changed.metadata_props.remove(entry)
        else:
            entry.value = value
        with pytest.raises(ExportError, match=message):
            predict(write_sealed(tmp_path / "m.onnx", changed), [])


@pytest.mark.parametrize("where", ["../secret.bin", "absolute", "link.bin"])
def test_weights_in_files_elsewhere_are_not_read(tmp_path: Path, model: Path, where: str) -> None:
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name == "backbone/mix")
    (tmp_path / "secret.bin").write_bytes(tensor.raw_data)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    set_external_data(tensor, str(tmp_path / "secret.bin") if where == "absolute" else where)
    tensor.ClearField("raw_data")
    with pytest.raises(ExportError, match="keeps weights in other files"):
        predict(write_sealed(inside / "m.onnx", proto), [])


def test_an_unknown_provider_is_an_error_that_lists_the_others(model: Path) -> None:
    with pytest.raises(ExportError, match=r"'cdua'.*there are .*cpu"):
        Model(model, providers=["cdua"])
    assert list(predict(Model(model, providers=["CPUExecutionProvider"]), [])) == []


def test_lines_can_be_read_back(model: Path, folder: Path) -> None:
    (folder / "a b" / 'with "quotes", and comma.png').write_bytes(b"bad")
    found = list(predict(model, folder, top_k=3))
    rows = [json.loads(line) for line in json_lines(found)]
    table = list(csv.DictReader(io.StringIO("\n".join(csv_lines(found, 3)))))
    lines = list(table_lines(found))
    assert len(rows) == len(table) == len(lines) == 8
    for p, row, record, line in zip(found, rows, table, lines, strict=True):
        assert row["image"] == record["image"] == p.id and line.startswith(p.id)
        if p.error:
            assert row == {"image": p.id, "error": p.error} and record["error"] == p.error
            continue
        assert row["label"] == record["label"] == p.label
        assert float(record["probability"]) == row["probability"] == p.probability
        assert [t["label"] for t in row["top"]] == [p.label, record["label_2"], record["label_3"]]
        assert f"{p.label} {p.probability:.3f}" in line


def test_every_csv_record_is_as_long_as_the_header_whatever_names_hold(model: Path, tmp_path: Path) -> None:
    names = ["plain.png", "two\nlines.png", "return\r.png", 'quote".png', "comma,.png"]
    shown = ["plain.png", "two\\x0alines.png", "return\\x0d.png", 'quote".png', "comma,.png"]
    found = list(predict(model, [picture(0)] * 4 + [b"bad"], top_k=2))
    lines = csv_lines((replace(p, id=name) for p, name in zip(found, names, strict=True)), 4)
    header, *records = csv.reader(io.StringIO("".join(f"{line}\n" for line in lines), newline=""))
    assert header == ["image", "label", "probability", "accepted", "error", "label_2", "probability_2"] + [
        f"{name}_{k}" for k in (3, 4) for name in ("label", "probability")
    ]
    assert [record[0] for record in records] == shown
    assert [len(record) for record in records] == [len(header)] * 5
    assert [bool(record[4]) for record in records] == [False] * 4 + [True]
    assert records[4][1:4] == [""] * 3 and records[0][7:] == [""] * 4


def test_the_command_names_no_more_classes_in_its_csv_than_the_model_has(model: Path, folder: Path) -> None:
    done = CliRunner().invoke(cli, ["predict", str(model), str(folder), "--csv", "--top-k", "9"])
    classes = len(some_head().class_names)
    header, *records = csv.reader(io.StringIO(done.stdout, newline=""))
    assert done.exit_code == 0 and header[-1] == f"probability_{classes}" and len(records) == 7
    assert all(len(record) == len(header) and all(record[5:]) for record in records)


def test_a_name_with_control_characters_cannot_reach_the_terminal_but_programs_read_it_as_json(
    model: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "red\x1b[31m\nline.png", tmp_path / "title\x1b]0;x\x07.png"
    Image.fromarray(picture(0)).save(good)
    bad.write_bytes(b"bad")
    arguments = ["predict", str(model), str(good), str(bad)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 3
    assert done.stdout.startswith(f"{tmp_path}/red\\x1b[31m\\x0aline.png  class ") and done.stdout.count("\n") == 1
    assert f"skipped: {tmp_path}/title\\x1b]0;x\\x07.png: " in done.stderr and done.stderr.count("\n") == 1
    for line, path in zip(
        CliRunner().invoke(cli, [*arguments, "--json"]).stdout.splitlines(), (good, bad), strict=True
    ):
        assert json.loads(line)["image"] == str(path)
    records = list(csv.DictReader(io.StringIO(CliRunner().invoke(cli, [*arguments, "--csv"]).stdout, newline="")))
    escaped = [f"{tmp_path}/red\\x1b[31m\\x0aline.png", f"{tmp_path}/title\\x1b]0;x\\x07.png"]
    assert [record["image"] for record in records] == escaped


def test_text_that_a_spreadsheet_would_compute_stays_text_and_numbers_stay_numbers(model: Path) -> None:
    names = ["=1+1.png", "+a", "-a", "@a", "\t=a", " =a", "＝a", "\u202egnp.exe", "-0.5", "a=b", "\x1b[31mred"]
    shown = [
        "'=1+1.png",
        "'+a",
        "'-a",
        "'@a",
        "'\\x09=a",
        "' =a",
        "'＝a",
        "\\u202egnp.exe",
        "-0.5",
        "a=b",
        "\\x1b[31mred",
    ]
    found = next(iter(predict(model, [picture(0)], top_k=2)))
    top = (("=HYPERLINK(1)", -0.5), ("-2", 0.5))
    lines = list(csv_lines([replace(found, id=name, top=top) for name in names], 2))
    records = list(csv.DictReader(lines))
    assert [record["image"] for record in records] == shown
    assert {(r["label"], r["probability"], r["label_2"]) for r in records} == {("'=HYPERLINK(1)", "-0.5", "-2")}
    (line,) = table_lines([replace(found, id="\u202egnp")])
    assert line.startswith("\\u202egnp  class ")


def test_csv_and_table_show_every_label_of_an_image_and_none(model: Path) -> None:
    found = next(iter(predict(model, [picture(0)], top_k=2)))
    answers = [replace(found, id="x", top=(("a", 0.9), ("b", 0.1)), labels=said) for said in ((), ("a",), ("a", "b"))]
    answers.append(replace(found, id="x", top=(), labels=(), error="bad"))
    records = list(csv.DictReader(csv_lines(answers, 2, True)))
    assert [record["labels"] for record in records] == ["|", "a", "a|b", ""]
    assert [r["label"] for r in records] == ["a", "a", "a", ""] and [len(r) for r in records] == [8] * 4
    assert list(table_lines(answers, True)) == [
        *(f"x  {said}  a 0.900  b 0.100" for said in ("no label", "a", "a|b")),
        "x  bad",
    ]


def test_the_command_shows_the_labels_of_a_model_that_gives_several(tmp_path: Path, folder: Path) -> None:
    path = exported_file(tmp_path / "m.onnx", some_head(activation="sigmoid"))
    expected = ["|".join(p.labels) or "|" for p in predict(path, folder)]
    table = csv.DictReader(io.StringIO(CliRunner().invoke(cli, ["predict", str(path), str(folder), "--csv"]).stdout))
    assert [record["labels"] for record in table] == expected and len(set(expected)) > 1
    lines = CliRunner().invoke(cli, ["predict", str(path), str(folder)]).stdout.splitlines()
    assert [line.split("  ")[1].replace("no label", "|") for line in lines] == expected


@pytest.mark.parametrize(("name", "flags"), [("a.csv", []), ("A.CSV", []), ("a.jsonl", []), ("a", ["--csv"])])
def test_answers_go_into_a_file_by_its_suffix(
    model: Path, folder: Path, tmp_path: Path, name: str, flags: list[str]
) -> None:
    (folder / "bad é.png").write_bytes(b"bad")
    arguments, file = ["predict", str(model), str(folder), *flags], tmp_path / "new" / name
    for _ in range(2):  # answers may be replaced
        done = CliRunner().invoke(cli, [*arguments, "-o", str(file)])
        assert done.exit_code == 3 and done.stdout == f"{file}\n", done.stderr
    as_csv = not name.endswith("jsonl")
    stdout = CliRunner().invoke(cli, arguments if flags else [*arguments, "--csv" if as_csv else "--json"]).stdout
    assert file.read_bytes() == b"\xef\xbb\xbf" * as_csv + stdout.encode()
    assert [path.name for path in file.parent.iterdir()] == [name]


def test_a_file_of_answers_is_whole_or_as_it_was_and_replaces_nothing_else(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    write_lines(file, csv_lines(predict(model, [picture(0)]), 1), marked=True)
    before = file.read_bytes()

    def ends() -> Iterator[str]:
        yield "image,label,probability"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(file, ends())
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    for content in (b"path,label\na.jpg,x\n", b""):
        file.write_bytes(content)
        with pytest.raises(ExportError, match="was not written by featx predict, and is not replaced"):
            write_lines(file, [])
        assert file.read_bytes() == content
    refused = CliRunner().invoke(cli, ["predict", str(model), "x.png", "-o", "a.txt"])
    assert refused.exit_code == 2 and "a.txt is neither .csv nor .jsonl; add --csv or --json" in refused.stderr


def test_names_that_are_not_utf8_survive(model: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "PNG")
    try:
        with open(name, "wb") as file:
            file.write(buffer.getvalue())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (found,) = predict(model, tmp_path)
    assert os.fsencode(found.id) == name and found.error is None


def test_predicting_imports_neither_torch_nor_scikit_learn_nor_onnx(model: Path, folder: Path) -> None:
    code = f"""
import sys
from featx.shipping.prediction import json_lines, predict
assert len(list(json_lines(predict({str(model)!r}, {str(folder)!r})))) == 7
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split())
    assert {"numpy", "PIL", "onnxruntime", "featx"} <= loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "scipy", "h5py", "onnx", "timm", "matplotlib", "google"}
    assert out.stderr == ""


def test_the_guard_of_the_graph_is_named_in_the_error(model: Path) -> None:
    with pytest.raises(ExportError, match=graph.GUARD):
        Model(model)(np.zeros((1, 1, 200, 3), np.uint8))


def test_folders_are_walked_through_links_but_never_round(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", "elsewhere/3.png", ".hidden/4.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(0)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "elsewhere").rename(tmp_path / "elsewhere")
    for link, target in (("a/up", "in"), ("c", "elsewhere"), ("d", "elsewhere")):
        (tmp_path / "in" / link).symlink_to(tmp_path / target, target_is_directory=True)
    found = [os.path.relpath(p, tmp_path / "in") for p in expand(tmp_path / "in") if isinstance(p, str)]
    assert found == ["a/1.png", "b/2.png", "c/3.png"]
    globbed = [os.path.basename(p) for p in expand(str(tmp_path / "in" / "*" / "*.png")) if isinstance(p, str)]
    assert globbed == ["1.png", "2.png", "3.png", "3.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    Image.fromarray(picture(0)).save(tmp_path / "in" / "1.png")
    plain = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match="closed cannot be listed"):
        list(expand(tmp_path / "in"))


def test_a_runs_folder_in_the_models_place_is_told_from_a_missing_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(model, tmp_path / "run" / "model.onnx")
    with pytest.raises(ExportError, match=r"run is a folder; its model is .*run/model.onnx"):
        Model(tmp_path / "run")
    with pytest.raises(ExportError, match="there is no file"):
        Model(tmp_path / "none.onnx")
