"""One file for a tree of dataclasses, tensors and plain values: written whole, checked when read, never executed.

The tensors are those of a safetensors file, and the tree, in JSON, is its metadata, with a checksum of
everything. Only dataclasses of this package are made again; a file can cause nothing else to run.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cryoai.formats.files import atomic_path

__all__ = ["DamagedSnapshotError", "read_snapshot", "write_snapshot", "write_tensors"]

_PACKAGE = "cryoai."
_PLAIN = (type(None), bool, int, float, str)


class DamagedSnapshotError(ValueError):
    """The file is not what was once written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file with the metadata ``about``; it is whole on the disk when this returns.

    Raises
    ------
    OSError
        If it cannot be written, such as on a full disk.
    """
    # Copied, because two tensors may share memory, which the file cannot hold.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(about) or None)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def write_snapshot(path: Path, value: object) -> None:
    """Write a value, which is whole on the disk when this returns.

    It may be made of None, numbers, strings, paths, tensors, lists, tuples, dictionaries and dataclasses of this
    package.

    Raises
    ------
    TypeError
        If there is anything else in it.

    Examples
    --------
    >>> import tempfile
    >>> from cryoai.poses import Poses
    >>> path = Path(tempfile.mkdtemp()) / "poses.safetensors"
    >>> write_snapshot(path, (Poses(torch.eye(3)[None], torch.zeros(1, 2)), {"step": 3}))
    >>> poses, numbers = read_snapshot(path)
    >>> type(poses).__name__, numbers
    ('Poses', {'step': 3})
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encoded(value, tensors))
    write_tensors(path, tensors, {"tree": tree, "sha256": _checksum(tree, tensors)})


def read_snapshot(path: Path, device: torch.device | str = "cpu") -> Any:
    """The value that was written; tensors that were on an accelerator come to ``device``.

    Raises
    ------
    DamagedSnapshotError
        If the file is not whole, or not one of these.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if metadata.get("sha256") != _checksum(metadata.get("tree", ""), tensors):
            raise DamagedSnapshotError(f"{path}: its checksum is wrong")
        return _decoded(json.loads(metadata["tree"]), tensors, torch.device(device))
    except (SafetensorError, OSError) as error:
        raise DamagedSnapshotError(f"{path}: cannot be read ({error})") from None


def _checksum(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encoded(value: object, tensors: dict[str, Tensor]) -> Any:
    """The value for JSON, its tensors put into ``tensors``."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        name, on_device = str(len(tensors)), value.device.type != "cpu"
        plain = torch.view_as_real(value) if value.is_complex() else value
        tensors[name] = plain.detach().cpu().contiguous()
        return {"tensor": name, "complex": value.is_complex(), "on_device": on_device}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encoded(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]}
    kind = type(value)
    if dataclasses.is_dataclass(kind) and kind.__module__.startswith(_PACKAGE):
        fields = {f.name: _encoded(getattr(value, f.name), tensors) for f in dataclasses.fields(kind)}
        return {"module": kind.__module__, "class": kind.__qualname__, "fields": fields}
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}: cannot be part of a snapshot")


def _decoded(code: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(code, _PLAIN):
        return code
    if "tensor" in code:
        found = tensors[code["tensor"]]
        found = torch.view_as_complex(found) if code["complex"] else found
        return found.to(device) if code["on_device"] else found
    if "path" in code:
        return Path(code["path"])
    if "list" in code:
        return [_decoded(item, tensors, device) for item in code["list"]]
    if "tuple" in code:
        return tuple(_decoded(item, tensors, device) for item in code["tuple"])
    if "dict" in code:
        return {_decoded(key, tensors, device): _decoded(item, tensors, device) for key, item in code["dict"]}
    kind, fields = _dataclass(code), code["fields"]
    if set(fields) != {field.name for field in dataclasses.fields(kind)}:
        raise DamagedSnapshotError(f"{kind.__qualname__}: written by a version of cryoai where it had other parts")
    return kind(**{name: _decoded(item, tensors, device) for name, item in fields.items()})


def _dataclass(code: dict[str, Any]) -> type[Any]:
    module, name = code["module"], code["class"]
    found = getattr(importlib.import_module(module), name, None) if module.startswith(_PACKAGE) else None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise DamagedSnapshotError(f"{module}.{name}: no part of this version of cryoai")
    return found
