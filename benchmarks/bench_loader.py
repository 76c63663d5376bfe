"""How fast training samples arrive, beside other loaders and beside decoding without any loader, all in one run.

    python benchmarks/bench_loader.py [--photos PHOTOS] [--workers 2] [--scratch FOLDER]

PHOTOS is a folder or tar of JPEG photographs; without it, textures are made up. They are cropped, resized and encoded
again (quality 92, 4:2:0) into distinct images of 500 x 400 and of 2000 x 1500 pixels. Every loader delivers uint8
batches [B, 3, 224, 224] (B = 64, large ones 16) of randomly resized crops (5 to 100% of the area, bilinear,
antialiased) that are flipped half of the time, from a warm page cache, with as many worker processes. Prints a markdown
table; rates are the best of several interleaved repetitions, counted from the arrival of an early batch on, so that
starting workers is left out.

MosaicML's `streaming` is installed into a folder of the scratch space that nothing else sees (--no-streaming skips
it). Wanted, of the fastest other loader: 1.4 times at 500 x 400, 1.6 times at 2000 x 1500 and twice that rate with
data.scaled_decode; and 90% of the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

SIZE, SCALE = 224, (0.05, 1.0)
SETS = {"small": (500, 400, 2000), "large": (2000, 1500, 300)}  # width, height, how many
STREAMING = ["mosaicml-streaming==0.13.0", "transformers<5", "huggingface-hub<1", "tokenizers<0.23", "regex", "tqdm",
             "catalogue", "Brotli", "zstd", "python-snappy", "cramjam", "requests"]  # fmt: skip


# --- photographs --------------------------------------------------------------------------------------------------


def read_photos(place: Path | None) -> list[np.ndarray]:
    if place is None:
        return [_texture(i) for i in range(40)]
    if place.is_dir():
        found = [p.read_bytes() for p in sorted(place.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    else:
        with tarfile.open(place) as tar:
            files = [tar.extractfile(m) for m in tar if m.name.lower().endswith((".jpg", ".jpeg"))]
            found = [f.read() for f in files if f is not None]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in found]


def _texture(seed: int) -> np.ndarray:
    """Noise of every scale, the coarser the stronger, as photographs have it. uint8 [400, 500, 3]."""
    rng = np.random.default_rng(seed)
    total = np.zeros((400, 500, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((500, 400), Image.Resampling.BICUBIC), dtype=float) - 128) / cells**0.7
    return (128 + total / total.std() * 50).clip(0, 255).astype(np.uint8)


def write_jpegs(photos: list[np.ndarray], count: int, width: int, height: int, folder: Path) -> int:
    """`count` distinct JPEGs in ten classes; returns the mean size in bytes. Large ones get a sensor's grain."""
    rng, total = np.random.default_rng(1), 0
    grain = rng.normal(0, 3, (height + 64, width + 64, 1))
    for i, photo in zip(range(count), cycle(photos)):
        h, w = photo.shape[:2]
        share = rng.uniform(0.8, 1.0)
        box_h, box_w = int(h * share), int(w * share)
        top, left = rng.integers(0, h - box_h + 1), rng.integers(0, w - box_w + 1)
        image = Image.fromarray(photo[top : top + box_h, left : left + box_w]).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(image)
        if width > w:
            y, x = rng.integers(0, 64, 2)
            pixels = (pixels + grain[y : y + height, x : x + width]).clip(0, 255).astype(np.uint8)
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=92, colorsubsampling="420")
        path = folder / f"class{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        total += len(data)
    return total // count


def batch_of(data: Path) -> int:
    """Large images come in small batches, so that a measurement takes in many."""
    return 64 if data.name == "small" else 16


# --- loaders ------------------------------------------------------------------------------------------------------
Rate = tuple[float, float]  # images a second, and milliseconds of processor time an image


# Each gives batches of uint8 tensors [B, 3, 224, 224], and labels, for ever or for several epochs.


def transform_of(how: str) -> Any:
    """how: "", "scaled", "region" or "both"."""
    from pipeline.data.augment import TrainTransform

    return TrainTransform(SIZE, 0, scale=SCALE, scaled=how in ("scaled", "both"), region=how in ("region", "both"))


def ours(data: Path, workers: int, how: str = "") -> Iterator[Any]:
    from pipeline.data.loader import Share, TrainSamples, train_batches
    from pipeline.data.order import SampleOrder
    from pipeline.data.source import TarSource

    source = TarSource(data / "tars", "train")
    samples = TrainSamples(source, transform_of(how), channels=3, num_classes=10)
    order = SampleOrder(source.shard_sizes, manifest_sha="", seed=0, global_batch_size=4 * batch_of(data))
    share = Share.of(0, 1, 4 * batch_of(data), batch_of(data))
    for batches in train_batches(samples, order, share, num_workers=workers):
        for batch in batches:
            yield batch.images, batch.labels


def _transform(tensor: bool) -> Callable[[Image.Image], torch.Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=InterpolationMode.BILINEAR, antialias=True)
    flip = v2.RandomHorizontalFlip()
    return v2.Compose([v2.PILToTensor(), crop, flip] if tensor else [crop, flip, v2.PILToTensor()])


def folder(data: Path, workers: int, tensor: bool) -> Iterator[Any]:
    """torchvision's ImageFolder; `tensor`: its documentation's advice to transform uint8 tensors, not Pillow images."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(data / "jpegs"), _transform(tensor))
    loader = DataLoader(
        images, batch_of(data), shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def webdataset(data: Path, workers: int, tensor: bool) -> Iterator[Any]:
    """As its documentation does it: shards shuffled, encoded samples shuffled, batches made in the workers."""
    import webdataset as wds

    urls = sorted(map(str, (data / "tars").glob("train-*.tar")))
    stream = wds.WebDataset(urls, resampled=True, nodesplitter=None).shuffle(200).decode("pil").to_tuple("jpg", "cls")
    stream = stream.map_tuple(_transform(tensor), int).batched(batch_of(data))
    yield from wds.WebLoader(stream, batch_size=None, num_workers=workers)


def streaming(data: Path, workers: int, tensor: bool) -> Iterator[Any]:
    from streaming import StreamingDataLoader, StreamingDataset

    transform = _transform(tensor)

    class Photos(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["image"]), sample["class"]

    images = Photos(local=str(data / "mds"), shuffle=True, batch_size=batch_of(data), num_canonical_nodes=1)
    loader = StreamingDataLoader(
        images, batch_size=batch_of(data), num_workers=workers, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def write_mds(data: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(data / "mds"), columns={"image": "jpeg", "class": "int"}) as out:
        for i, path in enumerate(sorted((data / "jpegs").rglob("*.jpg"))):
            # Opened from a file it is stored as it is, not encoded again
            out.write({"image": Image.open(path), "class": i % 10})


def rate(batches: Iterator[Any], workers: int, seconds: float) -> Rate:
    """Over at least `seconds`, after the batches that were under way before."""
    for images, _ in islice(batches, 2 * workers + 1):
        assert images.shape[1:] == (3, SIZE, SIZE) and images.dtype == torch.uint8
    begin, used, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begin < seconds:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - begin), (cpu_seconds() - used) / count * 1000


def cpu_seconds() -> float:
    """Of all processes of this session: the loader's and its workers'."""
    ticks, session = 0, os.getsid(0)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _decode(jpegs: list[bytes], number: int, seconds: float, results: Any, start: Any, how: str) -> None:
    from pipeline.data.decode import decode_image

    torch.set_num_threads(1)
    transform = transform_of(how)
    image = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
    start.wait()
    begin, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        u = transform.draw(number, count)
        pixels = decode_image(jpegs[count % len(jpegs)], 3, partial(transform.choose, u))
        transform.finish(pixels, u, number, count, image)
        count += 1
    results.put((count / (time.perf_counter() - begin), count, time.process_time() - used))


def limit(data: Path, workers: int, seconds: float, how: str = "") -> Rate:
    """Decode, crop and resize alone: as many processes, the bytes in memory, the pixels thrown away."""
    context = multiprocessing.get_context("fork")
    jpegs = [p.read_bytes() for p in sorted((data / "jpegs").rglob("*.jpg"))[:500]]
    results, start = context.Queue(), context.Barrier(workers)
    processes = [context.Process(target=_decode, args=(jpegs, i, seconds, results, start, how)) for i in range(workers)]
    for p in processes:
        p.start()
    rates, counts, used = zip(*(results.get() for _ in processes))
    for p in processes:
        p.join()
    return sum(rates), sum(used) / sum(counts) * 1000


LOADERS: dict[str, tuple[str, Callable[[Path, int], Iterator[Any]]]] = {
    "limit": ("decode, crop, resize, no loader", lambda d, w: iter(())),
    "mixer": ("this project", ours),
    "limit-region": ("decode the crop alone, resize, no loader", lambda d, w: iter(())),
    "mixer-region": ("this project, data.region_decode", lambda d, w: ours(d, w, "region")),
    "limit-scaled": ("decode at a fraction where allowed, crop, resize, no loader", lambda d, w: iter(())),
    "mixer-scaled": ("this project, data.scaled_decode", lambda d, w: ours(d, w, "scaled")),
    "limit-both": ("whichever is quicker, no loader", lambda d, w: iter(())),
    "mixer-both": ("this project, data.region_decode and data.scaled_decode", lambda d, w: ours(d, w, "both")),
    "folder-pil": ("ImageFolder + DataLoader, Pillow transforms", lambda d, w: folder(d, w, False)),
    "folder-v2": ("ImageFolder + DataLoader, v2 transforms of uint8 tensors", lambda d, w: folder(d, w, True)),
    "wds-pil": ("webdataset, Pillow transforms", lambda d, w: webdataset(d, w, False)),
    "wds-v2": ("webdataset, v2 transforms of uint8 tensors", lambda d, w: webdataset(d, w, True)),
    "mds-pil": ("MosaicML streaming, Pillow transforms", lambda d, w: streaming(d, w, False)),
    "mds-v2": ("MosaicML streaming, v2 transforms of uint8 tensors", lambda d, w: streaming(d, w, True)),
}
OTHERS = ("folder", "wds", "mds")


def run_one(name: str, sets: list[Path], workers: int, seconds: float) -> list[Rate]:
    """One loader in a process of its own, so that none inherits another's threads, imports or memory."""
    command = [sys.executable, __file__, "--run", name, "--workers", str(workers), "--seconds", str(seconds)]
    paths = [str(sets[0].parent / "streaming"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, *map(str, sets)], capture_output=True, text=True, env=environment, start_new_session=True
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def install_streaming(scratch: Path) -> str | None:
    """Into a folder that only the processes of this benchmark see, beside the torch and numpy that are here (it
    declares numpy<2.2). What went wrong, or None."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(scratch / "streaming")]
    done = subprocess.run([*pip, *STREAMING], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def prepare(photos: list[np.ndarray], name: str, scratch: Path) -> tuple[Path, str]:
    from data_tools.engines import ShardOptions, shard_corpus

    width, height, count = SETS[name]
    data = scratch / name
    size = write_jpegs(photos, count, width, height, data / "jpegs")
    options = ShardOptions(data / "jpegs", data / "tars", shard_size=30_000_000, verify=False)
    shard_corpus(options, report=lambda progress: None)
    return data, f"{count} photographs of {width} x {height}, {size / 1000:.0f} KB on average"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement")
    parser.add_argument("--only", nargs="*", default=list(LOADERS), choices=LOADERS)
    parser.add_argument("--no-streaming", action="store_true")
    parser.add_argument("--scratch", type=Path, help="kept, and found again; default: a temporary folder")
    parser.add_argument("--prepare", action="store_true", help="make the photographs in --scratch and stop")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("sets", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measure_one(args.run, args.sets, args.workers, args.seconds)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        scratch = args.scratch or Path(temporary)
        names = list(args.only)
        if args.no_streaming:
            names = [n for n in names if not n.startswith("mds")]
        if any(n.startswith("mds") for n in names) and not (scratch / "streaming").exists():
            scratch.mkdir(parents=True, exist_ok=True)
            problem = install_streaming(scratch)
            if problem:
                print(f"MosaicML streaming could not be installed: {problem}\n")
                names = [n for n in names if not n.startswith("mds")]
        sets, titles = prepare_all(args.photos, scratch, names)
        if args.prepare:
            return
        best: dict[str, list[Rate]] = {}
        for _ in range(args.repeats):
            for name in list(names):
                try:
                    rates = run_one(name, sets, args.workers, args.seconds)
                except RuntimeError as e:
                    print(f"{e}\n")
                    names.remove(name)
                    continue
                before = best.get(name, rates)
                best[name] = [(max(r, old), min(c, used)) for (r, c), (old, used) in zip(rates, before)]
        print_table(best, titles, args.workers)


def prepare_all(place: Path | None, scratch: Path, names: list[str]) -> tuple[list[Path], list[str]]:
    about = scratch / "sets.json"
    if not about.exists():
        photos = read_photos(place)
        titles = [prepare(photos, name, scratch)[1] for name in SETS]
        about.write_text(json.dumps(titles))
    sets = [scratch / name for name in SETS]
    if any(n.startswith("mds") for n in names):
        for data in sets:
            if not (data / "mds").exists():
                run_one("write-mds", [data], 0, 0)
    return sets, json.loads(about.read_text())


def measure_one(name: str, sets: list[Path], workers: int, seconds: float) -> list[Rate]:
    if not name.startswith(("limit", "mixer")):
        from pipeline.model.timm_compat import import_timm

        import_timm()  # makes torchvision importable beside a CPU build of torch
    if name == "write-mds":
        write_mds(sets[0])
        return []
    if name.startswith("limit"):
        return [limit(data, workers, seconds, name.partition("-")[2]) for data in sets]
    return [rate(LOADERS[name][1](data, workers), workers, seconds) for data in sets]


def print_table(best: dict[str, list[Rate]], titles: list[str], workers: int) -> None:
    """Ratios of rates, and of processor times: other work on the machine hardly touches these."""
    for i, title in enumerate(titles):
        rates = {name: r[i] for name, r in best.items()}
        fastest, cheapest = (
            f(r[k] for name, r in rates.items() if name.startswith(OTHERS)) for k, f in enumerate((max, min))
        )
        print(f"{title}; {workers} workers\n")
        print(
            "| loader | img/s | to the fastest other | to its limit | CPU ms | to the cheapest other | to its limit |"
        )
        print("|-|-|-|-|-|-|-|")
        for name, (r, cpu) in rates.items():
            bound = rates.get(name.replace("mixer", "limit") if name.startswith("mixer") else "")
            wall_share, cpu_share = (f"{r / bound[0]:.0%}", f"{bound[1] / cpu:.0%}") if bound else ("", "")
            print(
                f"| {LOADERS[name][0]} | {r:,.0f} | {r / fastest:.2f} | {wall_share} "
                f"| {cpu:.2f} | {cheapest / cpu:.2f} | {cpu_share} |"
            )
        print()


if __name__ == "__main__":
    main()
