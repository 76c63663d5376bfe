"""Listing folders and manifests."""

import gzip
import json
import os

import pytest
from source_helpers import list_rows

from data_tools.draft import Draft, Request
from data_tools.errors import UserError
from data_tools.plan import PlanOptions
from data_tools.plan_store import iter_samples
from data_tools.sources import Columns, open_source
from pipeline.data.folder import FolderSource
from pipeline.data.source import open_source as open_trainer_source


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def listed(path, columns=None):
    return [(os.fsdecode(r["path"]), r["label"], r["split"]) for r in list_rows(path, columns)[0]]


def planned(folder, *sources, classes=None, options=None, **columns):
    """(plan, samples by path) of a request."""
    request = Request(tuple(map(str, sources)), Columns(**columns), classes)
    plan = Draft(request, options or PlanOptions(order="source"), folder).build()
    return plan, {s.path: s for s in iter_samples(folder)}


def test_class_folders_sorted_and_nested(tmp_path):
    touch(tmp_path, "dog/2.jpg", "dog/1.PNG", "cat/deep/er/1.jpeg", "cat/notes.txt", "dog/._1.jpg")
    touch(tmp_path, ".git/x.jpg", "cat/.ipynb_checkpoints/1.jpg", "dog/.hidden.jpg", "README.md", "empty/x.txt")
    assert listed(tmp_path) == [
        ("cat/deep/er/1.jpeg", "cat", None),
        ("dog/.hidden.jpg", "dog", None),
        ("dog/1.PNG", "dog", None),
        ("dog/2.jpg", "dog", None),
    ]
    assert list_rows(tmp_path)[1] == {"hidden folders": 1, "files without an image suffix": 2, "macOS ._ files": 1}


def test_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg", "sub/readme.txt")
    assert listed(tmp_path) == [("a.jpg", None, None), ("b.jpg", None, None)]


def test_split_folders(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "validation/dog/9.jpg", "docs/readme.txt")
    assert listed(tmp_path)[-1] == ("validation/dog/9.jpg", "dog", "val")
    assert {row[1] for row in listed(tmp_path)} == {"cat", "dog"}


def test_a_class_called_train_alone_is_a_class(tmp_path):
    touch(tmp_path, "train/1.jpg", "bus/1.jpg")
    assert [row[1] for row in listed(tmp_path)] == ["bus", "train"]


@pytest.mark.parametrize("split, name", [("train", "train"), ("validation", "val")])
def test_a_lone_split_of_class_folders_is_a_split(tmp_path, split, name):
    touch(tmp_path, f"{split}/cat/1.jpg", f"{split}/dog/deep/1.jpg", "docs/readme.txt")
    assert listed(tmp_path) == [
        (f"{split}/cat/1.jpg", "cat", name),
        (f"{split}/dog/deep/1.jpg", "dog", name),
    ]


def test_the_trainer_sees_the_classes_of_a_lone_split_too(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    source = open_trainer_source(str(tmp_path), "train", image_size=8, num_classes=None)
    assert isinstance(source, FolderSource) and source.splits == ["train"]
    assert source.classes == sorted({row[1] for row in listed(tmp_path)}) == ["cat", "dog"]


@pytest.mark.parametrize("flat", ["val/9.jpg", "train/9.jpg"])
def test_splits_of_which_some_have_no_class_folders_are_refused(tmp_path, flat):
    touch(tmp_path, "train/cat/1.jpg", "test/dog/1.jpg", "docs/readme.txt", flat)
    with pytest.raises(UserError, match=rf"of which {flat[:-6]} holds images in no class folder.*path,label,split"):
        listed(tmp_path)
    touch(tmp_path, "bus/1.jpg")  # now train is one class of several
    assert {row[1] for row in listed(tmp_path)} == {"bus", "test", "train"} | {flat[:-6]}


def test_a_flat_split_in_a_list_beside_the_other(tmp_path):
    """What the refusal advises."""
    touch(tmp_path, "set/train/cat/1.jpg", "set/train/dog/1.jpg", "set/val/9.jpg")
    (tmp_path / "set" / "val.csv").write_text("path,label,split\nval/9.jpg,dog,val\n")
    with pytest.raises(UserError, match=r"give .*set/train alone"):
        listed(tmp_path / "set")
    plan, samples = planned(tmp_path / "plan", tmp_path / "set" / "train", tmp_path / "set" / "val.csv")
    assert plan.classes == ["cat", "dog"] and [s.label for s in samples.values()] == [0, 1, 1]
    assert [(s.split, s.samples) for s in plan.shards] == [("train", 2), ("val", 1)]


def test_flat_folders_called_train_and_val_are_classes(tmp_path):
    touch(tmp_path, "train/1.jpg", "val/1.jpg")
    assert [row[1:] for row in listed(tmp_path)] == [("train", None), ("val", None)]


def test_images_beside_class_folders_are_refused(tmp_path):
    touch(tmp_path, "1.jpg", "cat/1.jpg")
    with pytest.raises(UserError, match="labels or not"):
        listed(tmp_path)


def test_nothing_to_shard(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_source(tmp_path / "missing")
    touch(tmp_path, "a.txt")
    with pytest.raises(UserError, match="not a corpus"):
        open_source(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"no images found .passed over: 1 files"):
        planned(tmp_path / "plan", tmp_path)


def test_links_are_followed_and_loops_are_not(tmp_path):
    touch(tmp_path / "store", "1.jpg")
    touch(tmp_path / "in", "cat/0.jpg")
    (tmp_path / "in/dog").symlink_to(tmp_path / "store")
    (tmp_path / "in/cat/again").symlink_to(tmp_path / "in/cat")
    (tmp_path / "in/cat/up").symlink_to("..")
    (tmp_path / "in/cat/self.jpg").symlink_to("self.jpg")
    (tmp_path / "in/cat/gone.jpg").symlink_to("nowhere.jpg")
    rows, ignored = list_rows(tmp_path / "in")
    paths = [r["path"].decode() for r in rows]
    assert {"cat/0.jpg", "dog/1.jpg", "cat/self.jpg", "cat/gone.jpg"} <= set(paths)
    assert len(paths) < 12 and ignored["links to a folder above"] >= 2
    assert next(r for r in rows if r["path"] == b"cat/gone.jpg")["size"] == 0


def test_class_name_that_is_not_utf8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/1.jpg", "wb"):
        pass
    with pytest.raises(UserError, match="not valid UTF-8"):
        listed(tmp_path)


def test_large_folders_are_listed_in_parallel_and_in_order(tmp_path):
    touch(tmp_path, *(f"c{i % 40:02d}/{i:05d}.jpg" for i in range(400)), *(f"big/{i:05d}.jpg" for i in range(2500)))
    _, samples = planned(tmp_path / "plan", tmp_path)
    paths = [path for path in samples if not path.startswith("plan")]
    assert len(paths) == 2900 and paths == sorted(paths)
    assert all(s.size == 1 and s.mtime_ns for s in samples.values())


# --- text manifests -----------------------------------------------------------------------------------------


def write(tmp_path, text, name="m.csv"):
    touch(tmp_path, "a.jpg", "b c.jpg", "sub/d.jpg")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / name


def test_csv_with_names_split_and_bom(tmp_path):
    file = write(tmp_path, "\ufeffpath,label,split,note\na.jpg,dog,train,x\n./sub/d.jpg,cat,valid,\n")
    assert listed(file) == [("a.jpg", "dog", "train"), ("sub/d.jpg", "cat", "val")]
    plan, samples = planned(tmp_path / "plan", file)
    assert plan.classes == ["cat", "dog"] and samples["sub/d.jpg"].label == 0
    assert json.loads(samples["a.jpg"].extra) == {"note": "x"} and samples["sub/d.jpg"].extra == ""


def test_csv_labels_that_are_indices(tmp_path):
    file = write(tmp_path, f"path\tlabel\na.jpg\t7\n{tmp_path}/b c.jpg\t0\n", "m.tsv")
    plan, samples = planned(tmp_path / "p1", file)
    assert plan.classes is None and [s.label for s in samples.values()] == [7, 0]
    plan, _ = planned(tmp_path / "p2", write(tmp_path, "path,label\na.jpg,001\nb c.jpg,010\n"))
    assert plan.classes == ["001", "010"]


def test_csv_without_labels_keeps_missing_files_for_the_quarantine(tmp_path):
    _, samples = planned(tmp_path / "plan", write(tmp_path, 'path\na.jpg\n"odd\nname.jpg"\n'))
    assert [(s.path, s.size, s.label) for s in samples.values()] == [("a.jpg", 1, -1), ("odd\nname.jpg", 0, -1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_,label\na.jpg,1\n", "columns path,label"),
        ("", "columns path"),
        ("path,label\n", "no images found"),
        ("path,label\na.jpg,\n", "line 2: empty label"),
        ("path,label\na.jpg\n", "line 2: empty label"),
        ("path,label\n,x\n", "line 2: empty path"),
        ("path\na.jpg,x\n", "line 2: 2 cells"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", "'a.jpg' is listed twice"),
        ("path,label\na.jpg,-1\nb c.jpg,1\n", "label -1 is outside"),
        ("path,label\na.jpg,10000000\n", "label 10000000 is outside .*--classes"),
        ("path,split\na.jpg,../x\n", "line 2: split"),
        ("path\nno.jpg\nnope.jpg\n", "none of the 2 images"),
        (b"path\n\xff\xfe.jpg\n", "UTF-8"),
        ('path\n"a.jpg\n', "CSV form"),
    ],
)
def test_csv_refusals_say_where(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path / "plan", write(tmp_path, text))


def test_json_lines_with_extra_columns_and_several_labels(tmp_path):
    lines = [
        {"file_name": "a.jpg", "labels": ["red", "blue"], "source": "x", "n": {"deep": 1}},
        {"file_name": "b c.jpg", "labels": []},
        {"file_name": "sub/d.jpg", "labels": ["blue"]},
    ]
    plan, samples = planned(tmp_path / "plan", write(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", "m.jsonl"))
    assert plan.classes == ["blue", "red"] and {s.label for s in samples.values()} == {-1}
    assert [json.loads(s.extra) for s in samples.values()] == [
        {"labels": [1, 0], "source": "x", "n": {"deep": 1}}, {"labels": []}, {"labels": [0]}]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"path": "a.jpg"}\n{', "line 2"), ("[1]\n", "not a JSON object"), ('{"x": 1}\n', "line 1: no path")],
)
def test_json_lines_refusals(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        planned(tmp_path / "plan", write(tmp_path, text, "m.jsonl"))


def test_several_labels_in_a_csv_cell(tmp_path):
    text = 'path,labels\na.jpg,red;blue\nb c.jpg,"[""red""]"\nsub/d.jpg,\n'
    _, samples = planned(tmp_path / "plan", write(tmp_path, text))
    assert [json.loads(s.extra)["labels"] for s in samples.values()] == [[1, 0], [1], []]


def test_s3_inventory_without_header(tmp_path):
    rows = 'b,cats/1+a%2Bb.jpg,1234\nb,cats/,0\nb,"dogs/x,y.png",99\nb,log.txt,5\n'
    (tmp_path / "inv.csv.gz").write_bytes(gzip.compress(rows.encode()))
    columns = Columns(header=("Bucket", "Key", "Size"), label_from_folder=True)
    rows, ignored = list_rows(tmp_path / "inv.csv.gz", columns)
    assert [(r["path"].decode(), r["size"], r["label"]) for r in rows] == [
        ("s3://b/cats/1 a+b.jpg", 1234, "cats"), ("s3://b/dogs/x,y.png", 99, "dogs")]  # fmt: skip
    assert ignored == {"objects without an image suffix": 2}


def test_columns_that_are_asked_for(tmp_path):
    file = write(tmp_path, "where,kind,label\na.jpg,k,7\n")
    assert listed(file, Columns(path="where", label="kind")) == [("a.jpg", "k", None)]
    with pytest.raises(UserError, match=r"no column 'nope' .--label-column.*where, kind"):
        listed(file, Columns(path="where", label="nope"))


# --- classes ------------------------------------------------------------------------------------------------


def test_explicit_classes(tmp_path):
    file = write(tmp_path, "path,label\na.jpg,dog\nsub/d.jpg,cat\n")
    (tmp_path / "classes.txt").write_text("dog\nzebra\ncat\n")
    plan, samples = planned(tmp_path / "p1", file, classes=tmp_path / "classes.txt")
    assert plan.classes == ["dog", "zebra", "cat"] and [s.label for s in samples.values()] == [0, 2]
    (tmp_path / "classes.txt").write_text("dog\nzebra\n")
    with pytest.raises(UserError, match="label 'cat' is not in --classes"):
        planned(tmp_path / "p2", file, classes=tmp_path / "classes.txt")
    numbers = write(tmp_path, "path,label\na.jpg,1\nsub/d.jpg,0\n")
    plan, samples = planned(tmp_path / "p3", numbers, classes=tmp_path / "classes.txt")
    assert plan.classes == ["dog", "zebra"] and [s.label for s in samples.values()] == [1, 0]
    with pytest.raises(UserError, match="label '2' is not in"):
        planned(tmp_path / "p4", write(tmp_path, "path,label\na.jpg,2\n"), classes=tmp_path / "classes.txt")


@pytest.mark.parametrize("text", ["", "a\n\nb\n", "a\na\n"])
def test_class_lists_that_cannot_be_meant(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match="--classes"):
        planned(tmp_path / "plan", write(tmp_path, "path\na.jpg\n"), classes=tmp_path / "classes.txt")


def test_several_sources_share_classes_and_keep_their_samples_apart(tmp_path):
    touch(tmp_path / "x/set", "cat/1.jpg", "dog/1.jpg")
    touch(tmp_path / "y/set", "cat/1.jpg", "eel/1.jpg")
    plan, samples = planned(tmp_path / "plan", tmp_path / "x/set", tmp_path / "y/set")
    assert plan.classes == ["cat", "dog", "eel"]
    assert {p: s.label for p, s in samples.items()} == {
        "set/cat/1.jpg": 0, "set/dog/1.jpg": 1, "set-2/cat/1.jpg": 0, "set-2/eel/1.jpg": 2}  # fmt: skip
