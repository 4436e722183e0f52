"""Writes the seed corpus: small tars of every dialect, indexes and manifests, good and bad."""

import io
import json
import pathlib
import tarfile

ROOT = pathlib.Path(__file__).parent / "corpus"


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def tar(form, names, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * number
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    # Without the padding to 10 KiB: shorter seeds mutate better.
    data = buffer.getvalue().rstrip(b"\0")
    return data + bytes(-len(data) % 512 + 1024)


names = ["a/0.jpg", "a/0.cls", "b/1.jpg"]
long = names + ["n" * 150 + ".jpg", "grün.jpg"]
put("tar_walker", "ustar", tar(tarfile.USTAR_FORMAT, names))
put("tar_walker", "gnu", tar(tarfile.GNU_FORMAT, long))
put("tar_walker", "pax", tar(tarfile.PAX_FORMAT, long))
put("tar_walker", "global", tar(tarfile.PAX_FORMAT, names, pax_headers={"comment": "c"}))
put("tar_walker", "empty", bytes(1024))
whole = tar(tarfile.PAX_FORMAT, long)
put("tar_walker", "cut", whole[: len(whole) // 2])

# The shard that the target `index` writes.
good = (
    "v1.2 3\n"
    "jpg 512 700 a/0.jpg cls 2048 1 a/0.cls\n"
    "jpg 3072 512 a/1.jpg cls 4096 1 a/1.cls\n"
    "jpg 5120 3 b/2.jpg cls 6144 1 b/2.cls\n"
)
put("index", "good", good.encode())
put("index", "count", good.replace("v1.2 3", "v1.2 4").encode())
put("index", "version", good.replace("v1.2", "v1.1").encode())
put("index", "huge", b"v1.2 1\njpg 512 18446744073709551615 a.jpg\n")
put("index", "noimage", b"v1.2 1\ncls 512 1 a.cls\n")

shard = {
    "name": "000000.tar", "samples": 1, "members": 2, "bytes": 3072, "sha256": "0" * 64,
    "index_crc32c": "0" * 8, "crc32c": "0" * 16,
}
manifest = {
    "format": 1, "samples": 1, "bytes": 3072, "members_per_sample": 2,
    "part": {"number": 1, "of": 1}, "source_sha256": "", "options": {"a": None},
    "classes": ["x"], "class_samples": [1], "oddities": {"gray": 1}, "skipped": 0, "shards": [shard],
}
put("manifest", "good", json.dumps(manifest).encode())
put("manifest", "sum", json.dumps(manifest | {"samples": 2}).encode())
put("manifest", "version", json.dumps(manifest | {"format": 2}).encode())
put("manifest", "empty", b"{}")
