"""Images made on the spot: one layer of a directory's files, as `ctr images import` takes them.

The layout is OCI's: github.com/opencontainers/image-spec, image-layout.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

_OCI = "application/vnd.oci.image"


def write_image(path: Path, name: str, rootfs: Path, **config: Any) -> None:
    """Write an image called `name`, with a directory's files and OCI's `config`, as a tar."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(rootfs, ".")
    layer_of = _descriptor(layer.getvalue(), "layer.v1.tar")
    described = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer_of["digest"]]},
    }
    config_json = json.dumps(described).encode()
    manifest = {
        "schemaVersion": 2,
        "config": _descriptor(config_json, "config.v1+json"),
        "layers": [layer_of],
    }
    manifest_json = json.dumps(manifest).encode()
    named = {
        **_descriptor(manifest_json, "manifest.v1+json"),
        "annotations": {"io.containerd.image.name": name},
    }
    files = {
        "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [named]}).encode(),
    }
    for blob in (layer.getvalue(), config_json, manifest_json):
        files[f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"] = blob
    with tarfile.open(path, "w") as tar:
        for file, data in files.items():
            info = tarfile.TarInfo(file)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _descriptor(data: bytes, kind: str) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"mediaType": f"{_OCI}.{kind}", "digest": digest, "size": len(data)}
