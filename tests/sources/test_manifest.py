"""Manifests: what their cells may hold, and that every mistake in one is named with its row."""

from __future__ import annotations

import builtins
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from featx.errors import ImageError, SourceError
from featx.sources.opening import open_source
from featx.sources.source import Source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with three files to name."""
    for name in ("a.jpg", "b.jpg", "sub/c.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(root: Path, text: str | bytes, name: str = "list.csv") -> Path:
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root / name


def opened(root: Path, text: str | bytes, name: str = "list.csv") -> Source:
    return open_source(write(root, text, name))


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="pip install featx[parquet]")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_rows_keep_their_order_and_name_any_file(root: Path) -> None:
    source = opened(root, "path,label,split\nsub/c.gif,bee,test\na.jpg,ant,train\nb.jpg,,\n")
    assert source.ids == ["sub/c.gif", "a.jpg", "b.jpg"]
    assert source.labels == ["bee", "ant", ""] and source.splits == ["test", "train", ""]
    assert source.read(0) == b"sub/c.gif"
    assert source.root == root and source.notes == []


@pytest.mark.parametrize("column", ["path", "file_name", "image", " Path ", "FILE_NAME"])
def test_the_path_column_has_three_names(root: Path, column: str) -> None:
    source = opened(root, f"Label,extra,{column}\nant,1,a.jpg\n")
    assert (source.ids, source.labels, source.splits) == (["a.jpg"], ["ant"], None)


def test_spreadsheets_write_a_byte_order_mark_carriage_returns_and_quotes(root: Path) -> None:
    (root / "a, b.jpg").write_bytes(b"x")
    source = opened(root, b'\xef\xbb\xbfpath,label\r\n"a, b.jpg","ant, red"\r\n\r\na.jpg, b\xc3\xa9e \r\n')
    assert source.ids == ["a, b.jpg", "a.jpg"] and source.labels == ["ant, red", "bée"]


@pytest.mark.parametrize(
    ("written", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("VALID", "val"), ("validation", "val"), ("dev", "val")),
        *(("val", "val"), ("test", "test"), ("testing", "test"), (" test ", "test"), ("", None)),
    ],
)
def test_splits_go_by_the_usual_names(root: Path, written: str, split: str | None) -> None:
    source = opened(root, f"path,label,split\na.jpg,ant,{written}\n")
    assert source.splits == ([split] if split else None)


def test_an_unknown_split_is_an_error_that_names_row_and_choices(root: Path) -> None:
    with pytest.raises(SourceError, match=r"row 3: the split 'trian' is not one of train, .*Did you mean train"):
        opened(root, "path,label,split\na.jpg,x,train\nb.jpg,x,trian\n")


def test_a_missing_column_is_an_error_that_lists_the_columns_found(root: Path) -> None:
    with pytest.raises(SourceError, match=r"no column `path`, .*mean pth\? Its columns: 'pth', 'label'"):
        opened(root, "pth,label\na.jpg,x\n")
    with pytest.raises(SourceError, match=r"no column `label`; add one.*mean labels\? Its columns: 'path', 'labels'"):
        opened(root, "path,labels\na.jpg,x\n")
    with pytest.raises(SourceError, match=r"Its columns: 'path;label'. Separate its cells with commas"):
        opened(root, "path;label\na.jpg;x\n")
    with pytest.raises(SourceError, match=r"several columns for the path, path and image; keep one"):
        opened(root, "path,image,label\na.jpg,b.jpg,x\n")
    with pytest.raises(SourceError, match=r"row 2 has no column `label`.* Its columns: 'path'"):
        opened(root, jsonl({"path": "a.jpg", "label": 1}, {"path": "b.jpg"}), "list.jsonl")
    with pytest.raises(SourceError, match=r"no column `path`.* Its columns: 'img', 'label'"):
        open_source(parquet(root / "list.parquet", {"img": ["a.jpg"], "label": ["x"]}))


@pytest.mark.parametrize("text", ["", "\n", "path,label\n", "path,label\n\n"])
def test_an_empty_manifest_is_an_error(root: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"has no rows; give one row per image|no column `path`"):
        opened(root, text)
    with pytest.raises(SourceError, match=r"list.jsonl has no rows"):
        opened(root, "", "list.jsonl")
    with pytest.raises(SourceError, match=r"list.parquet has no rows"):
        open_source(parquet(root / "list.parquet", {"path": [], "label": []}))


@pytest.mark.parametrize("cell", ["", "   "])
def test_an_empty_path_is_an_error_that_names_the_row(root: Path, cell: str) -> None:
    with pytest.raises(SourceError, match=r"list.csv, row 3: the path is"):
        opened(root, f"path,label\na.jpg,x\n{cell},y\n")
    with pytest.raises(SourceError, match=r"list.jsonl, row 1: the path is None"):
        opened(root, jsonl({"path": None, "label": "x"}), "list.jsonl")


def test_a_file_that_is_not_there_is_noted_and_skipped_when_it_is_read(root: Path) -> None:
    source = opened(root, "path,label\na.jpg,x\nz.jpg,x\nsub,y\n")
    assert source.ids == ["a.jpg", "z.jpg", "sub"]
    assert source.notes == ["2 of 3 files are not there and will be skipped: z.jpg (row 3), sub (row 4)"]
    assert source.stats is not None and source.stats[:, 0].tolist() == [5, -1, -1]
    with pytest.raises(ImageError, match=r"^the file is not there$"):
        source.read(1)
    with pytest.raises(ImageError, match=r"^a folder, not a file"):
        source.read(2)


def test_a_manifest_none_of_whose_files_is_there_says_where_it_looked(root: Path) -> None:
    with pytest.raises(SourceError, match=r"none of the 2 files .*: x.jpg \(row 2\).* relative to the manifest's"):
        opened(root, "path,label\nx.jpg,x\ny.jpg,x\n")
    with pytest.raises(SourceError, match=r"its paths hold backslashes, write them with /"):
        opened(root, "path,label\nsub\\c.gif,x\n")


def test_one_file_has_one_id_however_it_is_written(root: Path) -> None:
    text = f"path,label\n./sub//c.gif,x\n{root}/a.jpg,y\n{root.parent}/{root.name}/b.jpg,z\n"
    source = opened(root, text)
    assert source.ids == ["sub/c.gif", "a.jpg", "b.jpg"]


def test_files_elsewhere_keep_an_id_that_leads_to_them(root: Path) -> None:
    (root / "lists").mkdir()
    far = root / "far" / "d.jpg"
    far.parent.mkdir()
    far.write_bytes(b"far")
    (root / "lists" / "list.csv").write_text(f"path,label\n../a.jpg,x\n{far},y\n")
    source = open_source(root / "lists" / "list.csv")
    assert source.ids == ["../a.jpg", far.as_posix()]
    assert [source.read(i) for i in (0, 1)] == [b"a.jpg", b"far"]


def test_a_repeated_row_counts_once_and_is_noted(root: Path) -> None:
    source = opened(root, "path,label\na.jpg,x\nb.jpg,y\n./a.jpg,x\n")
    assert source.ids == ["a.jpg", "b.jpg"]
    assert source.notes == ["rows that repeat another count once: a.jpg"]


def test_one_file_under_two_labels_or_splits_is_refused(root: Path) -> None:
    with pytest.raises(SourceError, match=r"row 4 names a.jpg as row 2 does, .*\(y, no split against x, no split"):
        opened(root, "path,label\na.jpg,x\nb.jpg,y\na.jpg,y\n")
    with pytest.raises(SourceError, match=r"\(x, test against x, train\)"):
        opened(root, "path,label,split\na.jpg,x,train\na.jpg,x,test\n")


def test_numbers_as_labels_become_text(root: Path) -> None:
    rows = [{"path": "a.jpg", "label": 3}, {"path": "b.jpg", "label": 3.0}, {"path": "sub/c.gif", "label": True}]
    assert opened(root, jsonl(*rows), "list.jsonl").labels == ["3", "3", "true"]
    # a column of whole numbers with a gap is a column of floats to many tools
    columns = {"path": ["a.jpg", "b.jpg", "sub/c.gif"], "label": [0.0, float("nan"), 1.5]}
    assert open_source(parquet(root / "list.parquet", columns)).labels == ["0", "", "1.5"]


def test_a_manifest_without_any_label_is_a_source_without_labels(root: Path) -> None:
    assert opened(root, "path,label\na.jpg,\nb.jpg, \n").labels is None
    assert opened(root, jsonl({"path": "a.jpg", "label": None}), "list.jsonl").labels is None


def test_several_labels_are_joined_and_flagged(root: Path) -> None:
    source = opened(root, "path,label\na.jpg,cat|indoor\nb.jpg,cat\nsub/c.gif, dog | dog |\n")
    assert source.multilabel and source.labels == ["cat|indoor", "cat", "dog"]
    assert source.notes == ["images may have several labels each, separated by '|', as in 'cat|indoor'"]
    rows = [
        {"path": "a.jpg", "label": ["cat", "indoor", "cat"]},
        {"path": "b.jpg", "label": []},
        {"path": "sub/c.gif", "label": None},
    ]
    source = opened(root, jsonl(*rows), "list.jsonl")
    assert source.multilabel and source.labels == ["cat|indoor", "|", ""]
    columns = {"path": ["a.jpg", "b.jpg"], "label": [["cat", "indoor"], []]}
    source = open_source(parquet(root / "list.parquet", columns))
    assert source.multilabel and source.labels == ["cat|indoor", "|"]


@pytest.mark.parametrize("label", [{"a": 1}, ["a|b"], [""], [["a"]], [None]])
def test_a_label_of_another_kind_is_refused_with_its_row(root: Path, label: Any) -> None:
    with pytest.raises(SourceError, match=r"list.jsonl, row 2: .*labels? "):
        opened(root, jsonl({"path": "b.jpg", "label": "x"}, {"path": "a.jpg", "label": label}), "list.jsonl")


def test_a_row_with_too_many_or_too_few_cells_is_refused_with_its_number(root: Path) -> None:
    with pytest.raises(SourceError, match=r"row 3 has 3 cells, the header 2; put cells that hold a comma in"):
        opened(root, "path,label\na.jpg,x\na, b.jpg,y\n")
    with pytest.raises(SourceError, match=r"row 2 has 1 cells, the header 2"):
        opened(root, "path,label\na.jpg\n")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_a_manifest_that_is_not_utf8_says_so(root: Path, encoding: str, name: str) -> None:
    text = "path,label\na.jpg,bée\n" if name.endswith("csv") else '{"path": "a.jpg", "label": "bée"}\n'
    with pytest.raises(SourceError, match=r"is not UTF-8 \(byte 0x..\); save it as UTF-8"):
        opened(root, text.encode(encoding), name)


@pytest.mark.parametrize("line", ["{", "[1]", "3", '"a.jpg"', "path,label"])
def test_a_line_that_is_not_a_json_object_is_refused_with_its_number(root: Path, line: str) -> None:
    with pytest.raises(SourceError, match=r"row 2: .*(not JSON|not a JSON object)"):
        opened(root, jsonl({"path": "a.jpg", "label": "x"}) + line, "list.jsonl")


def test_broken_tables_are_source_errors(root: Path) -> None:
    with pytest.raises(SourceError, match=r"row 2: not a CSV table"):
        opened(root, 'path,label\n"a.jpg"x,y\n')
    with pytest.raises(SourceError, match=r"not a CSV table"):
        opened(root, 'path,label\n"a.jpg,x\n')
    pytest.importorskip("pyarrow", reason="pip install featx[parquet]")
    for data in (b"", b"PAR1 and no more", b"path,label\n"):
        with pytest.raises(SourceError, match=r"is not a Parquet file that can be read"):
            opened(root, data, "list.parquet")


def test_a_path_that_no_system_takes_is_refused_with_its_row(root: Path) -> None:
    with pytest.raises(SourceError, match=r"row 1: 'a\\x00b' cannot be a path"):
        opened(root, jsonl({"path": "a\0b", "label": "x"}), "list.jsonl")
    with pytest.raises(SourceError, match=r"row 1: .* cannot be a path"):
        opened(root, jsonl({"path": "\ud800.jpg", "label": "x"}), "list.jsonl")


def test_names_that_are_not_utf8_can_be_written_as_json_escapes(root: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    try:
        (root / name).write_bytes(b"odd")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert opened(root, '{"path": "caf\\udce9.jpg", "label": "x"}', "list.jsonl").read(0) == b"odd"


def test_images_inside_a_parquet_file_are_refused(root: Path) -> None:
    path = parquet(root / "list.parquet", {"image": [{"bytes": b"x", "path": "a.jpg"}], "label": [1]})
    with pytest.raises(SourceError, match=r"row 1: images inside a manifest are not read"):
        open_source(path)


def test_parquet_without_pyarrow_names_the_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(root, b"PAR1", "list.parquet")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SourceError, match=r"needs pyarrow: pip install featx\[parquet\]"):
        open_source(path)


@pytest.mark.parametrize(
    ("column", "cells", "splits"),
    [
        ("set", "train test", ["train", "test"]),
        ("Usage", "Training PublicTest", ["train", "test"]),
        ("data_split", "TRAIN VALIDATION", ["train", "val"]),
        ("any name at all", "training_set dev", ["train", "val"]),
        ("is_valid", "False True", ["train", "val"]),  # fastai
        ("isTest", "0.0 1.0", ["train", "test"]),
        ("is_training_image", "0 1", ["val", "train"]),  # CUB-200
        ("is_train", "no yes", ["val", "train"]),
        ("held_out", "0 1", ["train", "test"]),
    ],
)
def test_a_split_column_of_another_name_is_understood_and_said(
    root: Path, column: str, cells: str, splits: list[str]
) -> None:
    a, b = cells.split()
    source = opened(root, f"path,label,{column}\na.jpg,x,{a}\nb.jpg,x,{b}\n")
    assert source.splits == splits
    (note,) = source.notes
    assert note.startswith(f"the split is read from the column {column!r}")
    rows = [{"path": "a.jpg", "label": "x"}, {"path": "b.jpg", "label": "x", column: b}]
    assert opened(root, jsonl(*rows), "list.jsonl").splits == ["", splits[1]]
    columns = {"path": ["a.jpg", "b.jpg"], "label": ["x", "x"], column: [a, b], "image_embedding": [[1.0], [2.0]]}
    assert open_source(parquet(root / "list.parquet", columns)).splits == splits


def test_what_tables_write_for_nothing_is_no_split(root: Path) -> None:
    for column, first in (("Split", "train"), ("set", "train"), ("is_test", "0")):
        for gap in ("nan", "NA", "None", "<NA>", " "):
            source = opened(root, f"path,label,{column}\na.jpg,x,{first}\nb.jpg,x,{gap}\nsub/c.gif,x,{first}\n")
            assert source.splits == ["train", "", "train"]


def test_columns_for_each_split_are_read_together(root: Path) -> None:
    text = "path,label,train,val,test\na.jpg,x,1,0,0\nb.jpg,x,0,1,0\nsub/c.gif,x,0,0,1\n"
    assert opened(root, text).splits == ["train", "val", "test"]
    assert open_source(
        parquet(root / "l.parquet", {"path": ["a.jpg", "b.jpg"], "label": ["x", "y"], "is_valid": [True, False]})
    ).splits == ["val", "train"]
    with pytest.raises(SourceError, match=r"row 3 is in train and test; each image is in one split"):
        opened(root, "path,label,train,test\na.jpg,x,1,0\nb.jpg,x,1,1\n")
    with pytest.raises(SourceError, match=r"row 2 is in no split"):
        opened(root, text.replace("1,0,0", "0,0,0"))


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("set", "train extra"),
        ("set", "1 2"),
        ("partition", "0 2"),
        ("train_test", "0 1"),
        ("kind", "train test unused"),
        ("usage", "fit test"),
        ("set", "tr te"),
        ("tvt", "0 1"),
        ("is_test", "x nan"),  # a mark, and empty cells
        ("is_train", "1 NA"),
    ],
)
def test_a_column_that_may_say_the_split_is_refused_where_its_values_are_unclear(
    root: Path, column: str, cells: str
) -> None:
    names = ("a.jpg", "b.jpg", "sub/c.gif")
    text = "".join(f"{name},x,{cell}\n" for name, cell in zip(names, cells.split(), strict=False))
    with pytest.raises(SourceError, match=rf"the column '{column}' may say the split.*Add a column `split`, which"):
        opened(root, f"path,label,{column}\n{text}")
    rows = zip(f"path,label,{column}\n{text}".splitlines(), ["split", "train", "", "test"], strict=False)
    assert (opened(root, "".join(f"{line},{split}\n" for line, split in rows)).splits or [])[:2] == ["train", ""]


@pytest.mark.parametrize(
    ("column", "cells"), [("set", "A B"), ("fold", "0 1"), ("vehicle", "train bus"), ("test", "8 9.5")]
)
def test_a_column_that_says_something_else_is_no_split(root: Path, column: str, cells: str) -> None:
    if column == "test":  # a measurement; 0 and 1 would be read as a split
        cells, column = "8 9.5", "test_score"
    a, b = cells.split()
    source = opened(root, f"path,label,{column}\na.jpg,x,{a}\nb.jpg,y,{b}\n")
    assert source.splits is None
    noted = [f"the column {column!r} says no split ({a}, {b}), and is ignored"] if column in ("set", "fold") else []
    assert source.notes == noted


def test_two_columns_for_the_split_are_refused(root: Path) -> None:
    with pytest.raises(SourceError, match=r"several columns for the split, set, usage; call the right one `split`"):
        opened(root, "path,label,set,usage\na.jpg,x,train,test\n")


def test_blanks_around_cells_are_dropped_and_a_name_may_still_end_in_one(root: Path) -> None:
    (root / "a, b.jpg").write_bytes(b"x")
    (root / "end.jpg ").write_bytes(b"y")
    source = opened(root, 'label, path\nant,  a.jpg \nant , "a, b.jpg"\nbee,sub/c.gif\nbee,end.jpg \n')
    assert source.ids == ["a.jpg", "a, b.jpg", "sub/c.gif", "end.jpg "] and source.notes == []
    assert source.labels == ["ant", "ant", "bee", "bee"]
    assert opened(root, jsonl({"path": " a.jpg ", "label": " ant"}), "list.jsonl").ids == ["a.jpg"]


def test_one_number_is_one_class_in_every_kind_of_table(root: Path) -> None:
    cells = ["0.0", "0", "-3.0", "1.50", "1.5", "007", "1e3", "1.2.0", "v1.0", "1.0|2"]
    expected = ["0", "0", "-3", "1.5", "1.5", "007", "1e3", "1.2.0", "v1.0", "1|2"]
    for i in range(len(cells)):
        (root / f"{i}.jpg").write_bytes(b"")
    text = "path,label\n" + "".join(f"{i}.jpg,{cell}\n" for i, cell in enumerate(cells))
    assert opened(root, text).labels == expected
    lines = [{"path": f"{i}.jpg", "label": cell} for i, cell in enumerate(cells)]
    assert opened(root, jsonl(*lines), "list.jsonl").labels == expected


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize(("folder", "file"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_name_with_accents_is_found_in_either_normal_form(root: Path, written: str, folder: str, file: str) -> None:
    there = f"{unicodedata.normalize(folder, 'Größe')}/{unicodedata.normalize(file, 'é.jpg')}"
    (root / there).parent.mkdir()
    (root / there).write_bytes(b"x")
    source = opened(root, unicodedata.normalize(written, "path,label\nGröße/é.jpg,fourmi élevée\n"))
    assert source.ids == [there] and source.notes == [] and source.read(0) == b"x"
    assert source.labels == [unicodedata.normalize("NFC", "fourmi élevée")]


def test_labels_that_look_alike_are_one_class_and_case_is_pointed_out(root: Path) -> None:
    labels = ["fire ant", " fire ant", "fire\u00a0ant", "fire  ant ", "fi\u200bre ant"]
    lines = [{"path": name, "label": label} for name in ("a.jpg", "b.jpg") for label in labels]
    for line in lines:
        assert opened(root, jsonl(line), "list.jsonl").labels == ["fire ant"]
    source = opened(root, "path,label\na.jpg,Ants\nb.jpg,ants\n")
    assert source.notes == ["'Ants' and 'ants' are two classes, which differ in upper and lower case alone"]


@pytest.mark.parametrize("name", ["answers.csv", "answers.jsonl"])
def test_answers_are_not_taken_for_labels(root: Path, name: str) -> None:
    row = {"image": "a.jpg", "label": "x", "probability": 0.9}
    text = (
        jsonl({**row, "top": []}) if name.endswith("l") else "image,label,probability,accepted,error\na.jpg,x,0.9,,\n"
    )
    with pytest.raises(SourceError, match=r"is what `featx predict` wrote: answers, not labels"):
        opened(root, text, name)
    assert opened(root, "image,label\na.jpg,x\n").labels == ["x"]


def test_a_table_without_a_header_is_told_that_the_first_row_names_the_columns(root: Path) -> None:
    with pytest.raises(SourceError, match=r"its first row names the columns.* Its columns: 'TRAIN', 'a.jpg', 'x'"):
        opened(root, "TRAIN,a.jpg,x\nTEST,b.jpg,y\n")  # Vertex AI's


@pytest.mark.parametrize("above", ["", "data/set/", "x/"])
def test_folders_called_like_splits_say_the_split_where_no_column_does(root: Path, above: str) -> None:
    names = [f"{above}{name}" for name in ("train/test/1.jpg", "train/y/2.jpg", "test_images/3.jpg")]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    text = "file_name,label\n" + "".join(f"{name},x\n" for name in names)  # as Hugging Face's metadata.csv
    source = opened(root, text)
    assert source.splits == ["train", "train", "test"]
    (note,) = source.notes
    assert note.startswith(f"no column says the split; the folders do: {above}test_images is test, {above}train/")
    alone = "".join(line for line in text.splitlines(True) if "test" not in line)
    blank = "".join(f"{line},{'split' * (i == 0)}\n" for i, line in enumerate(text.split()))
    for other in (alone, blank, text + "a.jpg,x\n"):
        assert opened(root, other).splits is None


@pytest.mark.parametrize("header", ["filename,class", "filepath,label", "class_name,image_path", "File,Category"])
def test_columns_as_other_tools_name_them(root: Path, header: str) -> None:
    rows = ["a.jpg,ant", "b.jpg,bee"] if header.lower().startswith("file") else ["ant,a.jpg", "bee,b.jpg"]
    source = opened(root, "\n".join([header, *rows]))
    assert (source.ids, source.labels) == (["a.jpg", "b.jpg"], ["ant", "bee"])


def test_of_several_columns_for_one_thing_the_usual_name_counts_or_one_is_asked_for(root: Path) -> None:
    source = opened(root, "filename,path,class,label\nx,a.jpg,insect,ant\n")
    assert (source.ids, source.labels) == (["a.jpg"], ["ant"])
    with pytest.raises(SourceError, match="several columns for the label, class and category; keep one"):
        opened(root, "path,class,category\na.jpg,insect,ant\n")
