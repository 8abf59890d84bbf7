"""Reading the files of published models without ever running what they hold.

Weights come from safetensors or through `torch.load(weights_only=True)`. Dictionaries that come as pickles go
through an unpickler that knows plain containers, strings, numbers and numpy scalars, and nothing else.
"""

from __future__ import annotations

import codecs
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scmodelforge.config import Config
from scmodelforge.config_reading import Reading
from scmodelforge.errors import ConfigError, ModelError

PICKLE_HELP = (
    "Only dictionaries, lists, strings, numbers and numpy scalars are read from pickles, because anything else "
    "could run code. Save the table as JSON, or take the file from the model's own repository."
)
PLAIN_KINDS = "biufUS"


def config_from(settings: dict[str, Any], path: Path) -> Config:
    """The config of these settings, which were read from `path`.

    Raises
    ------
    ModelError
        If they contradict each other, or are of a wrong kind.
    """
    reading = Reading(str(path))
    try:
        config, _ = reading.validate(settings)
        reading.raise_if_wrong()
    except ConfigError as error:
        raise ModelError(f"These settings, under our names for them, make no model. {error}") from error
    assert config is not None  # no config without a problem
    return config


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU, of a .safetensors file or one that `torch.save` wrote.

    A checkpoint with a `state_dict` gives that, and the prefix "module." of data-parallel models is taken off.

    Raises
    ------
    ModelError
        If the file is missing, damaged, holds anything but tensors and plain values, or numbers that are not finite.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            state: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"'{path}' cannot be read as safetensors: {error}. Copy or download it again."
            ) from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelError(
                f"'{path}' holds objects other than tensors and plain values, which are never loaded because they "
                "could run code, or was not written by torch.save. Export its weights as .safetensors."
            ) from error
        except Exception as error:  # torch raises whatever a damaged file makes it stumble over
            size = f"{path.stat().st_size:,} bytes"
            raise ModelError(
                f"'{path}' ({size}) cannot be read as weights: it is damaged or was cut off. Copy or download it again."
            ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ModelError(f"'{path}' holds no weights by name.")
    odd = [repr(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if odd:
        raise ModelError(f"'{path}' is no table of tensors by name; it holds {', '.join(odd[:5])}.")
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"'{path}' holds weights that are not finite: {_some(broken)}.")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises
    ------
    ModelError
        If it is missing or not JSON.
    """
    _require_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"'{path}' is not valid JSON: {error}") from error
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror}.") from error


def read_pickle(path: Path) -> Any:
    """The plain content of a pickle; numpy scalars become Python's numbers and strings.

    Raises
    ------
    ModelError
        If it is missing, damaged, or names any class or function beyond those of plain data. Nothing of it runs.
    """
    _require_file(path)
    try:
        with open(path, "rb") as handle:
            content = _PlainUnpickler(handle).load()
        _require_plain(content)
        return content
    except _Refused as error:
        raise ModelError(f"'{path}' asks for {error}, and is not loaded. {PICKLE_HELP}") from error
    except Exception as error:  # a crafted or damaged pickle can fail in any way
        raise ModelError(
            f"'{path}' cannot be read as a pickle of plain data: {error}. {PICKLE_HELP}"
        ) from error


def require_same_keys(ours: set[str], theirs: set[str], ignored: set[str], what: str) -> None:
    """Refuse weights of other names than expected.

    Parameters
    ----------
    ours, theirs
        Names that are needed, and names in the file.
    ignored
        Names that the file may hold and that are not needed.
    what
        The model that was expected, for the message.

    Raises
    ------
    ModelError
        With the missing and left-over names.
    """
    missing, left_over = sorted(ours - theirs), sorted(theirs - ours - ignored)
    if missing or left_over:
        raise ModelError(
            f"These weights are not those of {what}.\n  missing: {_some(missing)}\n  left over: {_some(left_over)}"
        )


def n_rows(table: torch.Tensor) -> int:
    """Rows of a matrix; 0 for what is none."""
    return len(table) if table.ndim == 2 else 0


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{names[:limit]}{more}"


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"The file '{path}' does not exist.")


class _Refused(pickle.UnpicklingError):
    """A pickle asked for something that is not plain data."""


def _require_plain(content: Any) -> None:
    """Refuse what is left of a stand-in: a dtype or a function that the pickle never used."""
    queue, seen = [content], set()
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            queue += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            queue += value
        elif not (value is None or isinstance(value, str | bytes | bytearray | int | float | complex)):
            raise _Refused("something other than plain data")


class _Dtype:
    """Stands for a numpy dtype in a pickle; numpy's own state setter is never reached."""

    __slots__ = ("name", "order")

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order if order in ("<", ">") else "="

    def plain(self) -> np.dtype:
        """The dtype, if it is one of numbers or strings."""
        dtype = np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]
        if dtype.kind not in PLAIN_KINDS:
            raise _Refused(f"a numpy scalar of type '{dtype}'")
        return dtype


def _dtype(name: str, *_: Any) -> _Dtype:
    if not isinstance(name, str):
        raise _Refused("a numpy dtype without a name")
    return _Dtype(name)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise _Refused("a numpy scalar that is no number and no string")
    return np.frombuffer(data, dtype=dtype.plain(), count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as pickles of old protocols write them."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"the codec {encoding!r}")
    return codecs.encode(text, "latin1")


_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,  # protocols before 3 use the names of Python 2
    ("__builtin__", "frozenset"): frozenset,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            function = _MAKERS[module, name]
        except KeyError:
            raise _Refused(f"'{module}.{name}'") from None
        # A new function each time: what a pickle does to it (its attributes) touches nobody else.
        return lambda *arguments: function(*arguments)
