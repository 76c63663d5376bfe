"""Listing folders and CSV manifests."""

import os

import pytest

from data_tools.errors import UserError
from data_tools.sources import scan


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def listed(corpus):
    return [(s.path, s.label, s.split) for s in corpus.samples]


def test_class_folders_sorted_and_nested(tmp_path):
    touch(tmp_path, "dog/2.jpg", "dog/1.PNG", "cat/deep/er/1.jpeg", "cat/notes.txt", "dog/._1.jpg")
    touch(
        tmp_path, ".git/x.jpg", "cat/.ipynb_checkpoints/1.jpg", "dog/.hidden.jpg", "README.md", "empty/x.txt"
    )
    corpus = scan(tmp_path)
    assert corpus.classes == ["cat", "dog"]
    assert listed(corpus) == [
        ("cat/deep/er/1.jpeg", 0, None),
        ("dog/.hidden.jpg", 1, None),
        ("dog/1.PNG", 1, None),
        ("dog/2.jpg", 1, None),
    ]
    assert corpus.ignored == {
        "hidden folders": 2,
        "files without an image suffix": 3,
        "macOS ._ files": 1,
    }


def test_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg", "sub/readme.txt")
    corpus = scan(tmp_path)
    assert corpus.classes is None and listed(corpus) == [("a.jpg", -1, None), ("b.jpg", -1, None)]


def test_split_folders(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "validation/dog/9.jpg")
    corpus = scan(tmp_path)
    assert corpus.classes == ["cat", "dog"]
    assert listed(corpus)[-1] == ("validation/dog/9.jpg", 1, "val")


def test_a_class_called_train_alone_is_a_class(tmp_path):
    touch(tmp_path, "train/1.jpg", "bus/1.jpg")
    assert scan(tmp_path).classes == ["bus", "train"]


def test_images_beside_class_folders_are_refused(tmp_path):
    touch(tmp_path, "1.jpg", "cat/1.jpg")
    with pytest.raises(UserError, match="labels or not"):
        scan(tmp_path)


def test_nothing_to_shard(tmp_path):
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError):
            scan(source)
    touch(tmp_path, "a.txt")
    with pytest.raises(UserError, match="not a corpus"):
        scan(tmp_path / "a.txt")


def test_links_are_followed_and_loops_are_not(tmp_path):
    touch(tmp_path / "store", "1.jpg")
    touch(tmp_path / "in", "cat/0.jpg")
    (tmp_path / "in/dog").symlink_to(tmp_path / "store")
    (tmp_path / "in/cat/again").symlink_to(tmp_path / "in/cat")
    (tmp_path / "in/cat/up").symlink_to("..")
    (tmp_path / "in/cat/self.jpg").symlink_to("self.jpg")
    (tmp_path / "in/cat/gone.jpg").symlink_to("nowhere.jpg")
    corpus = scan(tmp_path / "in")
    paths = [s.path for s in corpus.samples]
    assert {"cat/0.jpg", "dog/1.jpg", "cat/self.jpg", "cat/gone.jpg"} <= set(paths)
    assert len(paths) < 12 and corpus.ignored["links to a folder above"] >= 2
    assert next(s for s in corpus.samples if s.path == "cat/gone.jpg").size == 0


def test_class_name_that_is_not_utf8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/1.jpg", "wb"):
        pass
    with pytest.raises(UserError, match="not valid UTF-8"):
        scan(tmp_path)


# --- CSV ----------------------------------------------------------------------------------------------------


def csv_corpus(tmp_path, text, name="m.csv"):
    touch(tmp_path, "a.jpg", "b c.jpg", "sub/d.jpg")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return scan(tmp_path / name)


def test_csv_with_names_split_and_bom(tmp_path):
    corpus = csv_corpus(tmp_path, "\ufeffpath,label,split,note\na.jpg,dog,train,x\n./sub/d.jpg,cat,valid,\n")
    assert corpus.classes == ["cat", "dog"]
    assert listed(corpus) == [("a.jpg", 1, "train"), ("sub/d.jpg", 0, "val")]


def test_csv_labels_that_are_indices(tmp_path):
    corpus = csv_corpus(tmp_path, f"path\tlabel\na.jpg\t7\n{tmp_path}/b c.jpg\t0\n", "m.tsv")
    assert corpus.classes is None and [s.label for s in corpus.samples] == [7, 0]
    padded = csv_corpus(tmp_path, "path,label\na.jpg,001\nb c.jpg,010\n")
    assert padded.classes == ["001", "010"]


def test_csv_without_labels_keeps_missing_files_for_the_quarantine(tmp_path):
    corpus = csv_corpus(tmp_path, 'path\na.jpg\n"odd\nname.jpg"\n')
    assert [(s.path, s.size, s.label) for s in corpus.samples] == [("a.jpg", 1, -1), ("odd\nname.jpg", 0, -1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,1\n", "columns path,label"),
        ("", "columns path"),
        ("path,label\n", "lists no images"),
        ("path,label\na.jpg,\n", "line 2: empty label"),
        ("path,label\na.jpg\n", "line 2: empty label"),
        ("path,label\n,x\n", "line 2: empty path"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", "line 3: 'a.jpg' is already on line 2"),
        ("path,label\na.jpg,-1\nb c.jpg,1\n", "line 2: label -1 is outside"),
        ("path,label\na.jpg,99999999999\n", "line 2: label 99999999999 is outside"),
        ("path,split\na.jpg,../x\n", "line 2: split"),
        ("path\nno.jpg\nnope.jpg\n", "none of its 2 images exists"),
        (b"path\n\xff\xfe.jpg\n", "UTF-8"),
        ('path\n"a.jpg\n', "CSV form"),
    ],
)
def test_csv_refusals_say_where(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        csv_corpus(tmp_path, text)
