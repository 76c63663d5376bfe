"""Sharding from outside: bytes, readers, restarts, refusals, bad images."""

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import xxhash
from corpora import jpeg, make_corpus
from PIL import Image

from data_tools import draft, engines
from data_tools.engines import ShardOptions, plan_corpus, plan_into, shard_corpus
from data_tools.errors import UserError
from data_tools.finalize import TooManyBad
from data_tools.manifest import DatasetManifest, load_index
from data_tools.verify import verify_dataset

# What the root command does around `shard`.
SHARD = """
import sys, typer
from data_tools.cli import shard
from data_tools.errors import UserError
try:
    typer.run(shard)
except UserError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a data set except the lock (who) and the plan header (where the corpus lay)."""
    names = [p for p in out.rglob("*") if p.is_file() and p.name not in ("lock", "plan.json")]
    return {str(p.relative_to(out)): p.read_bytes() for p in names}


def start(*args: str | Path | int, **kw) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", SHARD, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def wait_for_markers(out: Path, n: int, process: subprocess.Popen[str]) -> None:
    while len(list((out / "plan").glob("*.done.json"))) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 90)


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "out"
    shard_corpus(ShardOptions(corpus, out, val_fraction=0.2, max_samples=10, workers=1))
    return out


def all_shards(out: Path):
    return [s for shards in DatasetManifest.load(out).splits.values() for s in shards]


# --- what comes out -----------------------------------------------------------------------------------------


def test_manifest_accounts_for_every_image(corpus, dataset):
    manifest = DatasetManifest.load(dataset)
    assert manifest.classes == ["class0", "class1", "class2"]
    assert manifest.samples("train") + manifest.samples("val") == 90 and manifest.samples("val") > 5
    counts = np.add(*(manifest.stats[s]["class_counts"] for s in ("train", "val")))
    assert counts.tolist() == [30, 30, 30]
    assert manifest.stats["train"]["width"] == [32, 32, 32] and manifest.stats["train"]["height"] == [24] * 3
    for s in all_shards(dataset):
        data = (dataset / s.name).read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (s.bytes, s.hash)
        assert xxhash.xxh3_128_hexdigest((dataset / s.index_name).read_bytes()) == s.index_hash
    assert not (dataset / "quarantine.jsonl").exists()


def test_webdataset_reads_every_sample_as_it_was(corpus, dataset):
    import webdataset

    urls = [str(dataset / s.name) for s in all_shards(dataset)]
    seen = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        seen[sample["__key__"]] = (sample["jpg"], int(sample["cls"]))
    expected = {}
    for path in corpus.rglob("*.jpg"):
        key = str(path.relative_to(corpus).with_suffix(""))
        expected[key] = (path.read_bytes(), int(path.parent.name[-1]))
    assert seen == expected


def test_gnu_tar_reads_the_shards(corpus, dataset, tmp_path):
    for s in all_shards(dataset):
        run = subprocess.run(
            ["tar", "-xvf", dataset / s.name, "-C", tmp_path], capture_output=True, text=True, check=True
        )
        assert run.stderr == "" and len(run.stdout.splitlines()) == 2 * s.samples
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.jpg")} == {
        p.relative_to(corpus): p.read_bytes() for p in corpus.rglob("*.jpg")
    }


def test_index_points_at_the_images(dataset):
    for s in all_shards(dataset):
        rows = load_index(dataset / s.index_name)
        data = (dataset / s.name).read_bytes()
        with tarfile.open(dataset / s.name) as tar:
            members = [m for m in tar if m.name.endswith(".jpg")]
        assert len(rows) == len(members) == s.samples
        for row, member in zip(rows, members):
            image = data[row["offset"] : row["offset"] + row["size"]]
            assert simplejpeg.decode_jpeg(image).shape == (row["height"], row["width"], 3) == (24, 32, 3)
            assert (row["offset"], row["size"]) == (member.offset_data, member.size)
            assert row["key"] == xxhash.xxh3_64_intdigest(member.name.removesuffix(".jpg").encode())
            assert f"class{row['label']}" == member.name.split("/")[0]


@pytest.mark.parametrize("options", [{}, {"order": "source"}, {"verify": False}, {"shard_size": 30_000}])
def test_same_bytes_for_any_number_of_workers(corpus, tmp_path, options):
    for name, workers in (("one", 1), ("two", 2)):
        shard_corpus(ShardOptions(corpus, tmp_path / name, val_fraction=0.1, workers=workers,
                                  **{"max_samples": 20, **options}))  # fmt: skip
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_copy_of_the_corpus_elsewhere_gives_the_same_tars(corpus, dataset, tmp_path):
    make_corpus(tmp_path / "copy", 90)
    again = shard_corpus(ShardOptions(tmp_path / "copy", tmp_path / "out", 0.2, max_samples=10, workers=1))
    assert again == DatasetManifest.load(dataset)


def test_dry_run_promises_what_is_written(corpus, dataset):
    plan = plan_corpus(ShardOptions(corpus, dataset.parent / "never", val_fraction=0.2, max_samples=10))
    assert [(s.name, s.samples, s.bytes) for s in plan.shards] == [
        (s.name, s.samples, s.bytes) for s in all_shards(dataset)
    ]
    assert not (dataset.parent / "never").exists()


def test_odd_names(tmp_path):
    names = ["a b.jpg", "new\nline.jpg", "Ünï☃.jpg", ".hidden.jpg", "many.dots.in.it.jpg", "-rf.jpg",
             "x" * 200 + ".jpg",             os.fsdecode(b"caf\xe9.jpg"), "a.PNG", "a.jpg"]  # fmt: skip
    folder = tmp_path / "in" / "ein.e Klasse"
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(i))
    out = tmp_path / "out"
    manifest = shard_corpus(ShardOptions(tmp_path / "in", out, workers=1))
    assert manifest.samples("train") == len(names) and manifest.classes == ["ein.e Klasse"]
    assert verify_dataset(out) == []
    import webdataset

    samples = list(webdataset.WebDataset(str(out / "train-000000.tar"), shardshuffle=False))
    assert {s["jpg"] for s in samples} == {jpeg(i) for i in range(len(names))}  # by content: a.PNG is a JPEG
    assert len({s["__key__"] for s in samples}) == len(names)


def test_csv_to_shards(tmp_path):
    (tmp_path / "img").mkdir()
    rows = ["path,label,split"]
    for i in range(12):
        (tmp_path / "img" / f"{i}.jpg").write_bytes(jpeg(i))
        rows.append(f"img/{i}.jpg,{'odd' if i % 2 else 'even'},{'val' if i > 8 else 'train'}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    manifest = shard_corpus(ShardOptions(tmp_path / "m.csv", tmp_path / "out", workers=1))
    assert (manifest.samples("train"), manifest.samples("val"), manifest.classes) == (9, 3, ["even", "odd"])
    assert verify_dataset(tmp_path / "out") == []


def test_unlabelled_images_have_no_cls_member(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(i))
    manifest = shard_corpus(ShardOptions(tmp_path / "in", tmp_path / "out", workers=1))
    assert manifest.classes is None and manifest.stats["train"]["class_counts"] == []
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["0.jpg", "1.jpg", "2.jpg"]
    assert load_index(tmp_path / "out" / "train-000000.idx.npy")["label"].tolist() == [-1] * 3
    assert verify_dataset(tmp_path / "out") == []


# --- restarts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("larger"), 1200, side=120)


@pytest.fixture(scope="module")
def undisturbed(larger, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shard_corpus(ShardOptions(larger, out, max_samples=20, workers=2))
    return out


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_killed_in_the_middle_and_run_again(larger, undisturbed, tmp_path, sent, code, workers):
    out = tmp_path / "out"
    args = (larger, out, "--max-samples", 20, "--workers", workers)
    run = start(*args, start_new_session=True)
    wait_for_markers(out, 5, run)
    if sent == signal.SIGINT:
        os.killpg(run.pid, sent)  # as a terminal does
    else:
        run.send_signal(sent)
    _, error = run.communicate(timeout=60)
    done = {p.name: p.stat().st_mtime_ns for p in (out / "plan").glob("*.done.json")}
    assert run.returncode == code, error
    assert 5 <= len(done) < 60 and not (out / "dataset.json").exists()
    if sent != signal.SIGKILL:
        assert "finished shards stay" in error and not list(out.glob(".*.tmp-*"))
    deadline = time.monotonic() + 10  # workers notice by themselves that their parent is gone
    while group_alive(run.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)

    (out / ".train-000059.tar.tmp-0123abcd").write_bytes(b"what a killed run leaves")
    again = start(*args)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert "images were done before" in error
    assert contents(out) == contents(undisturbed)
    for name, mtime in done.items():  # finished shards were not packed again
        assert (out / "plan" / name).stat().st_mtime_ns == mtime


def group_alive(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_worker_is_replaced(larger, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = start(larger, out, "--max-samples", 20, "--workers", 2, start_new_session=True)
    wait_for_markers(out, 3, run)
    workers = [p for p in children(run.pid) if "forkserver" in cmdline(p)]
    packing = [p for w in workers for p in children(w)]
    assert packing
    os.kill(packing[0], signal.SIGKILL)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    assert contents(out) == contents(undisturbed)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def test_a_script_without_guard_is_told_about_it(larger, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom data_tools.engines import ShardOptions, shard_corpus\n"
        "shard_corpus(ShardOptions(sys.argv[1], sys.argv[2], max_samples=10, workers=2))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, script, larger, tmp_path / "out"], env=env, capture_output=True, text=True)
    assert run.returncode and "at their start" in run.stderr and '`if __name__ == "__main__":`' in run.stderr


def test_disk_full_ends_with_a_message_and_goes_on_later(larger, undisturbed, tmp_path):
    out = tmp_path / "out"

    def limit() -> None:  # no file may grow beyond this: writing fails within a tar
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    args = (larger, out, "--max-samples", 20, "--workers", 2)
    run = start(*args, preexec_fn=limit)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 1 and "run the same command to go on" in error and "Traceback" not in error
    assert not list(out.glob("*.tar")) and not list(out.glob(".*"))
    assert start(*args).wait(120) == 0
    assert contents(out) == contents(undisturbed)


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_the_corpus(tmp_path):
    code = (
        "import sys; from data_tools.engines import *; run_part(Output.at(sys.argv[1]), 0, 1, 1); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks, images = [], [jpeg(i) for i in range(20)]
    for count in (2_000, 20_000):
        source, out = tmp_path / f"in{count}" / "a", tmp_path / f"out{count}"
        source.mkdir(parents=True)
        for i in range(count):
            (source / f"{i}.jpg").write_bytes(images[i % 20])
        plan_into(ShardOptions(source.parent, out, max_samples=500))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        said = subprocess.run([sys.executable, "-c", code, out], env=env, capture_output=True, text=True, check=True)
        peaks.append(int(said.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks  # MB; before it was cared for: 40


def test_too_little_space_is_said_before_packing(corpus, tmp_path, monkeypatch):
    usage = engines.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(engines.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="MB are to be written"):
        shard_corpus(ShardOptions(corpus, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_damaged_output_is_packed_again(corpus, dataset, tmp_path):
    options = ShardOptions(corpus, tmp_path / "out", val_fraction=0.2, max_samples=10, workers=1)
    shard_corpus(options)
    (options.out / "train-000000.tar").unlink()
    with open(options.out / "train-000001.tar", "ab") as file:
        file.write(b"x")
    (options.out / "train-000002.idx.npy").unlink()
    (options.out / "plan" / "train-000003.done.json").write_text("{")
    shard_corpus(options)
    assert contents(options.out) == contents(dataset)


def test_finished_set_is_left_alone(corpus, dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.glob("*.tar")}
    shard_corpus(ShardOptions(corpus, dataset, val_fraction=0.2, max_samples=10))
    assert {p: p.stat().st_mtime_ns for p in dataset.glob("*.tar")} == before


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    (out / "plan").mkdir(parents=True)
    with open(out / "plan" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            shard_corpus(ShardOptions(corpus, out, workers=1))
    shard_corpus(ShardOptions(corpus, out, workers=1))


def test_a_changed_corpus_or_option_is_refused_with_what_changed(tmp_path):
    source = make_corpus(tmp_path / "in", 12)
    options = ShardOptions(source, tmp_path / "out", max_samples=5, workers=1)
    shard_corpus(options)
    before = contents(options.out)

    with pytest.raises(UserError, match="max_samples was 5, is 4"):
        shard_corpus(replace(options, max_samples=4))
    with pytest.raises(UserError, match=r"val_fraction was 0.0, is 0.5; seed was 0, is 1|seed"):
        shard_corpus(replace(options, val_fraction=0.5, seed=1))

    extra = source / "class0" / "new.jpg"
    extra.write_bytes(jpeg(99))
    with pytest.raises(UserError, match=r"1 new \(first: 'class0/new.jpg'\)"):
        shard_corpus(options)
    extra.unlink()

    first = source / "class0" / "00000.jpg"
    kept, times = first.read_bytes(), first.stat()
    first.write_bytes(kept + b"\0")
    with pytest.raises(UserError, match=r"1 of another size or label \(first: 'class0/00000.jpg'\)"):
        shard_corpus(options)
    first.write_bytes(kept)
    os.utime(first, ns=(0, times.st_mtime_ns + 10**9))
    with pytest.raises(UserError, match=r"written again since \(1, the first is 'class0/00000.jpg'\)"):
        shard_corpus(options)
    first.unlink()
    with pytest.raises(UserError, match=r"1 gone \(first: 'class0/00000.jpg'\)"):
        shard_corpus(options)
    assert contents(options.out) == before

    manifest = shard_corpus(replace(options, overwrite=True))
    assert manifest.samples("train") == 11
    fresh = shard_corpus(replace(options, out=tmp_path / "fresh"))
    assert manifest == fresh and contents(options.out) == contents(tmp_path / "fresh")


def test_a_foreign_folder_is_refused_even_with_overwrite(corpus, tmp_path):
    (tmp_path / "mine.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"already holds mine.tar"):
            shard_corpus(ShardOptions(corpus, tmp_path, overwrite=overwrite))
    with pytest.raises(UserError, match="the corpus itself"):
        shard_corpus(ShardOptions(corpus, corpus))


@pytest.mark.parametrize(
    "bad", [{"val_fraction": 1.0}, {"shard_size": 10}, {"seed": -1}, {"max_bad": -1}, {"order": "random"}]
)
def test_options_that_cannot_be_meant(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        ShardOptions(Path("a"), Path("b"), **bad)


def test_a_source_that_changes_while_it_is_read(corpus, tmp_path, monkeypatch):
    source = make_corpus(tmp_path / "in", 6)
    build = draft.Draft.build

    def build_then_change(self):
        plan = build(self)
        (source / "class0" / "00003.jpg").write_bytes(jpeg(77))
        return plan

    monkeypatch.setattr(draft.Draft, "build", build_then_change)
    with pytest.raises(UserError, match=r"00003.jpg was written again while"):
        shard_corpus(ShardOptions(source, tmp_path / "out", workers=1))
    assert not list((tmp_path / "out").glob("*.tar"))


# --- bad images ---------------------------------------------------------------------------------------------


def spoil(root: Path) -> dict[str, str]:
    """Adds bad files to a corpus; returns what the quarantine must say of each."""
    good = jpeg(0)
    buffer = io.BytesIO()
    Image.new("RGB", (1200, 1000)).save(buffer, "PNG")
    (root / "class0" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "class1" / "empty.jpg").write_bytes(b"")
    (root / "class1" / "text.png").write_bytes(b"<html>404 Not Found</html>")
    (root / "class2" / "huge.png").write_bytes(buffer.getvalue())
    (root / "class2" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(root / "class2" / "pipe.jpg")
    return {
        "class0/cut.jpg": "damaged JPEG",
        "class1/empty.jpg": "empty file",
        "class1/text.png": "not an image",
        "class2/huge.png": "1200 x 1000 pixels, more than the limit of 1000000",
        "class2/gone.jpg": "unreadable: No such file",
        "class2/pipe.jpg": "not an ordinary file",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_go_to_quarantine_and_fail_the_run(tmp_path, workers):
    source = make_corpus(tmp_path / "in", 30)
    expected = spoil(source)
    out = tmp_path / "out"
    options = ShardOptions(source, out, max_samples=6, workers=workers, max_pixels=10**6)
    with pytest.raises(TooManyBad, match=r"(?s)6 of 36 images are bad, allowed are 0 .*--max-bad 6"):
        shard_corpus(options)
    assert not (out / "dataset.json").exists()
    with pytest.raises(TooManyBad, match="allowed are 10%"):
        shard_corpus(replace(options, max_bad=0.1))
    packed = {p: p.stat().st_mtime_ns for p in out.glob("train-*.tar")}

    manifest = shard_corpus(replace(options, max_bad=6))
    assert (manifest.samples("train"), manifest.source["quarantined"]) == (30, 6)
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {b["path"] for b in listed} == expected.keys()
    assert all(b["reason"].startswith(expected[b["path"]]) for b in listed)
    touched = {p.name for p, t in packed.items() if p.stat().st_mtime_ns != t}
    assert touched <= {b["shard"] for b in listed if b["path"] in ("class2/gone.jpg", "class2/pipe.jpg")}
    assert verify_dataset(out) == []


def test_difficult_images_are_packed_as_they_are(tmp_path):
    source = make_corpus(tmp_path / "in", 2, classes=1)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    others = [pixels.rotate(90), pixels.rotate(180)]
    for name, image, form, options in [
        ("animated.gif", pixels, "GIF", {"save_all": True, "append_images": others}),
        ("animated.webp", pixels, "WEBP", {"save_all": True, "append_images": others}),
        ("cmyk.jpg", pixels.convert("CMYK"), "JPEG", {}),
        ("one.png", pixels.resize((1, 1)), "PNG", {}),
        ("one.jpg", pixels.resize((1, 1)), "JPEG", {}),
        ("wide.jpg", pixels.resize((20_000, 3)), "JPEG", {}),
        ("wrong.png", pixels, "JPEG", {}),
        ("wrong.jpg", pixels, "TIFF", {}),
    ]:
        image.save(source / "class0" / name, form, **options)
    out = tmp_path / "out"
    for verify in (True, False):
        shard_corpus(ShardOptions(source, out, workers=1, verify=verify, overwrite=True))
        with tarfile.open(out / "train-000000.tar") as tar:
            packed = {tar.extractfile(m).read(): m.name for m in tar if not m.name.endswith(".cls")}  # type: ignore[union-attr]
        assert packed.keys() == {p.read_bytes() for p in source.rglob("*.*")}
        suffixes = {Path(name).suffix for name in packed.values()}
        assert suffixes == {".jpg", ".gif", ".webp", ".png", ".tif"}  # by content
        rows = load_index(out / "train-000000.idx.npy")
        assert {(1, 1), (20_000, 3), (40, 30)} <= set(zip(rows["width"].tolist(), rows["height"].tolist()))
        assert verify_dataset(out) == []


def test_links_to_themselves_and_paths_that_lead_out(tmp_path):
    source = make_corpus(tmp_path / "in", 3, classes=1)
    (source / "class0" / "loop.jpg").symlink_to("loop.jpg")
    manifest = shard_corpus(ShardOptions(source, tmp_path / "out", workers=1, max_bad=1))
    assert manifest.samples("train") == 3
    assert "unreadable: Too many levels" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "l.csv").write_text(
        "path,label\n../in/class0/00000.jpg,a\n../in/class0/../class0/00001.jpg,b\n"
    )
    shard_corpus(ShardOptions(tmp_path / "lists" / "l.csv", tmp_path / "listed", workers=1))
    with tarfile.open(tmp_path / "listed" / "train-000000.tar") as tar:
        assert not any(".." in name or name.startswith("/") for name in tar.getnames()) and len(tar.getnames()) == 4


def test_an_unreadable_file_that_is_mended_is_picked_up(tmp_path):
    source = make_corpus(tmp_path / "in", 6)
    locked = source / "class0" / "00003.jpg"
    real, target = locked.read_bytes(), tmp_path / "target"
    target.mkdir()
    locked.unlink()
    locked.symlink_to(target / "x.jpg")
    options = ShardOptions(source, tmp_path / "out", workers=1)
    with pytest.raises(TooManyBad, match="unreadable"):
        shard_corpus(options)
    (target / "x.jpg").write_bytes(real)
    with pytest.raises(UserError, match="1 of another size"):  # it has a size now: another corpus
        shard_corpus(options)
    assert shard_corpus(replace(options, overwrite=True)).samples("train") == 6
    assert not (options.out / "quarantine.jsonl").exists()


def test_a_shard_of_bad_images_only_is_left_out(tmp_path):
    source = make_corpus(tmp_path / "in", 3, classes=1)
    for i in range(3):
        (source / "class0" / f"bad{i}.jpg").write_bytes(b"no")
    out = tmp_path / "out"
    manifest = shard_corpus(ShardOptions(source, out, max_samples=3, order="source", workers=1, max_bad=0.5))
    assert [s.name for s in manifest.splits["train"]] == ["train-000000.tar"]
    written = ["contact-sheet.png", "dataset.json", "quarantine.jsonl", "train-000000.idx.npy", "train-000000.tar"]
    assert [p.name for p in sorted(out.glob("*.*"))] == written


def test_without_verification_only_headers_are_read(tmp_path):
    source = make_corpus(tmp_path / "in", 3)
    spoil(source)
    options = ShardOptions(source, tmp_path / "out", workers=1, verify=False, max_pixels=10**6, max_bad=5)
    manifest = shard_corpus(options)
    assert manifest.samples("train") == 4  # the truncated JPEG passes
    assert [d.key for d in verify_dataset(tmp_path / "out")] == ["class0/cut"]


# --- verify -------------------------------------------------------------------------------------------------


def test_verify_finds_every_kind_of_damage(corpus, tmp_path):
    out = tmp_path / "out"
    shard_corpus(ShardOptions(corpus, out, max_samples=10, workers=1))
    assert verify_dataset(out) == []
    names = [s.name for s in all_shards(out)]
    row = load_index(out / "train-000000.idx.npy")[3]
    with open(out / names[0], "r+b") as file:  # one byte of one image
        file.seek(int(row["offset"]) + 300)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    with open(out / names[1], "r+b") as file:
        file.truncate(5000)
    (out / names[2]).unlink()
    rows = np.array(load_index(out / "train-000003.idx.npy", mmap=False))
    rows["label"][2] += 1
    np.save(out / "train-000003.idx.npy", rows)
    (out / "train-000004.idx.npy").write_bytes(b"junk")
    found = verify_dataset(out, workers=2)
    assert {d.shard for d in found} == set(names[:5])
    assert any("crc32" in d.what and d.key for d in found if d.shard == names[0])
    assert any("label" in d.what and d.key for d in found if d.shard == names[3])
